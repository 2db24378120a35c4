"""A command that fails: one line, a status, and no masks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from force_plugin.cli import main

QUICK = ["--steps", "2", "--batch-size", "8", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["test_resnet", "--sparsity", "0.9", "more"], 2, "unrecognized arguments: mo"),
        (
            ["test_resnet", "--sparsity", "0.9", "--on-collapse", "ignore"],
            2,
            r"argument --on-collapse: invalid choice: 'ignore' \(choose from .*raise",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--image-size", "0"],
            2,
            "argument --image-size: expected a whole number >= 1, got 0",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--num-classes", "0"],
            2,
            "argument --num-classes: expected a whole number >= 1, got 0",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--model-kwargs", "in_chans=three"],
            2,
            "model: test_resnet does not take .*'in_chans': 'three'",
        ),
        (
            ["test_resnet", "--sparsity", "0.9", "--batch-size", "1"],
            2,
            "Expected more than 1 value per channel",
        ),
        (
            ["test_resnet", "--sparsity", "0.99999", "--method", "iter_snip"],
            1,
            "disconnected.* lost every weight, .*--on-collapse warn",
        ),
        *(
            (
                ["test_resnet", "--sparsity", "0.9", option, "-1"],
                2,
                f"argument {option}: expected a whole number >= 0, got -1",
            )
            for option in ("--workers", "--seed")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_fails_is_one_line_and_writes_no_masks(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments[:1], *QUICK, *arguments[1:], "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert caught.value.code == status
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(f"^force-prune: error: .*{message}", printed.err)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
