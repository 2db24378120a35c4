"""Intervals of a mean of differences, by Student's t."""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev

from scipy.stats import t


def half_width(differences: list[float]) -> float:
    """Return half the width of the 95 % interval of a mean, by Student's t."""
    if not differences[1:]:
        return 0.0
    count = len(differences)
    return float(t.ppf(0.975, count - 1)) * stdev(differences) / sqrt(count)


def interval(differences: list[float]) -> str:
    """Return the mean and its 95 % interval as text, with a star if 0 is outside."""
    if not differences[1:]:
        return "–"
    middle, half = mean(differences), half_width(differences)
    sign = " *" if abs(middle) > half else ""
    return f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f}){sign}"
