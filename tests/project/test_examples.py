"""The examples that are not of other people's trainers: they run, and learn."""

from __future__ import annotations

import re
from pathlib import Path

from interpreter import python

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed_by(name: str, *words: object) -> str:
    done = python(EXAMPLES / name, *words, seconds=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_first_command_of_the_readme(tmp_path: Path) -> None:
    plot = tmp_path / "digits.png"
    printed = printed_by("digits.py", "--epochs", 3, "--plot", plot)
    assert "111,720 / 11,172,032   99.00 %" in printed
    assert plot.stat().st_size > 10_000
    rows = re.findall(r"^(\w+) +(\S+)% +(\S+)%$", printed, re.MULTILINE)
    methods = ("force", "snip", "random")
    assert [row[:2] for row in rows] == [
        ("dense", "0"),
        *((method, "99.00") for method in methods),
    ]
    assert max(float(accuracy) for *_, accuracy in rows) > 50


def test_from_masks_to_speed() -> None:
    printed = printed_by("from_masks_to_speed.py", "--epochs", 3)
    assert re.search(r"^parameters +11,181,642 -> +\d+,\d+ ", printed, re.MULTILINE)
    rows = re.findall(r"^(\w+) +(\d+) +(\S+)%$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense", "masked", "compacted"]
    assert float(rows[0][2]) > 50


def test_channels_during_training() -> None:
    rows = printed_by("channels_during_training.py").splitlines()[2:]
    left = [[float(word.rstrip("%")) for word in row.split()] for row in rows]
    during = [row[1] for row in left]
    assert len(left) == 8 and during == sorted(during, reverse=True)
    assert during[0] == 100 and during[-1] < 50 and left[0][3] < 50
    assert min(left[-1][2], left[-1][4]) > 80
