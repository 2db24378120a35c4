"""Read and write results in files, so that a finished run is not run again."""

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
    """Return the rows of a file with a row on each line; none if it is missing."""
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
    """Append a row to a file, which several processes may share."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_runs(path: Path, kind: Callable[..., Run]) -> dict[Run, Row]:
    """Return the results by run, from a file with a result on each line."""
    return {kind(**row.pop("run")): row for row in read_lines(path)}


def append_run(path: Path, run: Any, result: Row) -> None:
    """Append the result of a run to a file; the run is a dataclass."""
    append_line(path, {"run": asdict(run)} | result)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that is a list; none if the file is missing."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{json.dumps(value, indent=1)}\n".encode())
