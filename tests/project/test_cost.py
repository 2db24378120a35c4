"""The benchmark of scoring's cost runs, and sees what got worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from interpreter import Done, python

ROOT = Path(__file__).parents[2]
SECTIONS = ["step", "large", "synflow", "grasp", "selection", "profile"]


def run(*options: str, script: str = "cost") -> Done:
    return python(f"benchmarks/{script}.py", *options, cwd=ROOT)


def test_a_ratio_that_got_worse_is_visible_from_one_command(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    quick = ("--quick", "--sizes", "1e5", "--only")
    first = run(*quick, *SECTIONS, "--store", str(file))
    assert first.returncode == 0, first.stderr
    assert max(map(len, first.stdout.splitlines()[3:])) <= 80
    record = json.loads(file.read_text("utf-8"))
    assert {row["section"] for row in record["rows"]} == set(SECTIONS)

    shown = run("--from", str(file), "--only", *SECTIONS, "--plot", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[3:] == first.stdout.splitlines()[3:]
    assert (tmp_path / "ratios.png").stat().st_size

    again = run(*quick, "profile", "--store", str(file))
    assert again.returncode == 0, again.stderr
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert len(rows) == len(record["rows"])

    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(record | {"torch": "1.0"}), "utf-8")
    refused = run(*quick, "profile", "--store", str(elsewhere))
    assert refused.returncode and "torch: '1.0', now" in refused.stderr

    def compared(factor: float) -> int:
        for row in record["rows"]:
            for end in row.get("ratio", ()):
                row["ratio"][end] *= factor
        file.write_text(json.dumps(record), "utf-8")
        return run(*quick, "grasp", "--compare", str(file)).returncode

    assert compared(100) == 0
    assert compared(1e-4) == 1


@pytest.mark.parametrize(
    ("script", "results", "options"),
    [
        ("cost", "cost", []),
        ("cost", "cost-noisy", []),
        ("scale", "scale", ["--predict"]),
    ],
)
def test_the_docs_show_what_is_stored(
    script: str, results: str, options: list[str]
) -> None:
    shown = run("--from", f"benchmarks/{results}.json", *options, script=script)
    assert shown.returncode == 0, shown.stderr
    _, tables = shown.stdout.split("\n\n", maxsplit=1)  # after the commands
    assert max(map(len, tables.splitlines())) <= 80
    stored = ROOT / "docs" / f"{results}-results.txt"
    assert shown.stdout == stored.read_text("utf-8")
