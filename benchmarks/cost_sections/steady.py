"""Measure a step of SteadyFORCE over a step of FORCE, in turns."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from harness.networks import prune
from harness.timing import seconds

from cost_sections.rows import Row, make_row, milliseconds, step_case


def measure(args: argparse.Namespace) -> Iterator[Row]:
    ...
