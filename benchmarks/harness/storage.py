"""Results in files: a run that is in one is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from force_plugin.files import write_whole

Row = dict[str, Any]
Run = TypeVar("Run")


def read_lines(path: Path) -> list[Row]:
    """The rows of a file that has one a line; of one that is not there yet, none."""
    rows = []
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(
                f"{path}: line {number} was cut off; delete it, and it is run again"
            ) from error
        rows.append(row)
    return rows


def append_line(path: Path, row: Row) -> None:
    """Add a row; several processes may share a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_runs(path: Path, kind: Callable[..., Run]) -> dict[Run, Row]:
    """The results of such a file by their runs."""
    return {kind(**row.pop("run")): row for row in read_lines(path)}


def append_run(path: Path, run: Any, result: Row) -> None:
    """Add the result of a run, which is a dataclass."""
    append_line(path, {"run": asdict(run)} | result)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that is a list of them, none if it is not there yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def write_json(path: Path, value: object) -> None:
    """Write a file that people can read, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{json.dumps(value, indent=1)}\n".encode())
