"""The tables of the docs are the stored results of benchmarks/open_gates.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import python

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("table", "options"),
    [
        ("open-gates-table.md", []),
        ("open-gates-vit-table.md", ["--models", "test_vit2", "--epochs", "8"]),
    ],
)
def test_the_table_of_the_docs_is_that_of_the_stored_results(
    table: str, options: list[str], tmp_path: Path
) -> None:
    script = ROOT / "benchmarks" / "open_gates.py"
    # The name of a folder tells the data set; nothing is read from it.
    options = [*options, "--data", "fashion-mnist", "--table", str(tmp_path / table)]
    done = python(script, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / table).read_text() == (ROOT / "docs" / table).read_text()
