"""Advice on the method and the number of steps, by what a sparsity leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class _Row(NamedTuple):
    """Advice for networks that keep at least so many weights for each channel."""

    least: float
    method: str
    steps: int
    reason: str


# The figures are in docs/howto/which-method.md, and a test compares both.
_ROWS = (
    _Row(
        15,
        "snip",
        1,
        "so many weights stay that a single step was within half a point of the best "
        "method, on the networks that were measured",
    ),
    _Row(
        2,
        "steady_force",
        60,
        "a single step lost up to two points here, or the whole network, on the "
        "networks that were measured",
    ),
    _Row(
        0,
        "steady_force",
        60,
        'so few weights stay that "force" and "iter_snip" depended on the seed; '
        'compare with "synflow" and 100 steps, which reads no data',
    ),
)
_SEVERAL = _ROWS[1]


@dataclass(frozen=True)
class Advice:
    """The method and the number of steps to begin with.

    Attributes:
        sparsity: Fraction of the prunable weights to remove, in [0, 1).
        kept: Number of weights that stay.
        channels: Number of output channels of all prunable layers.
        method: A name of ``force_plugin.METHODS``.
        steps: Number of steps T.
        reasons: Why, a sentence each.
    """

    sparsity: float
    kept: int
    channels: int
    method: str
    steps: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Return what stays, and on a second line the call."""
        steps = f", steps={self.steps}" if self.steps > 1 else ""
        return (
            f"at {100 * self.sparsity:.10g} % {self.kept:,} weights stay, "
            f"{self.kept / self.channels:.3g} for each output channel; begin with\n"
            f"force_prune(model, loader, {self.sparsity:.12g}, "
            f'method="{self.method}"{steps})'
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as plain types."""
        return asdict(self) | {"reasons": [*self.reasons]}


def advise(
    sparsity: float,
    kept: int,
    channels: int,
    emptied: int,
    layers: int,
    normalised: float,
) -> Advice:
    """Return the method and the number of steps to begin with.

    Args:
        sparsity: Fraction of the prunable weights to remove.
        kept: Number of weights that stay.
        channels: Number of output channels of all prunable layers.
        emptied: Number of layers that lose every weight if they are ranked once.
        layers: Number of prunable layers.
        normalised: Share of the prunable weights that a normalisation follows.
    """
    row = next(row for row in _ROWS if kept >= row.least * channels)
    reasons = [row.reason]
    if row.steps == 1 and emptied:
        row = _SEVERAL
        reasons = [f"a single step would empty {emptied} of {layers} layers"]
    if normalised > 0.5 and row.steps > 1:
        reasons.append(
            f"a normalisation follows {100 * normalised:.0f} % of the weights: with "
            'few steps "force", as published, empties layers of such networks'
        )
    return Advice(sparsity, kept, channels, row.method, row.steps, tuple(reasons))
