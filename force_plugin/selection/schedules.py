"""Compute the density of a network after each step: d_1 ≥ d_2 ≥ … ≥ d_T = density.

A schedule is a callable ``(step, steps, density) -> density``. Steps are counted from
1. Densities are fractions of the prunable weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from numbers import Integral, Real

Schedule = Callable[[int, int, float], float]


def exponential(step: int, steps: int, density: float) -> float:
    """d_t = d^(t/T): every step removes an equal share of the remaining weights.

    Source: de Jorge et al. 2021 (arXiv 2006.09081), section 4.
    """
    return float(density ** (step / steps))


def linear(step: int, steps: int, density: float) -> float:
    """d_t = 1 − (t/T)(1 − d): every step removes an equal number of weights.

    Source: de Jorge et al. 2021 (arXiv 2006.09081), section 4.
    """
    return 1 - step / steps * (1 - density)


def snip_it(step: int, steps: int, density: float) -> float:
    """Sparsity s − (s − ½)·½^(t−1), and s at the last step.

    The first step removes half of the weights. Each further step covers half of the
    remaining distance to s. The first step reaches a sparsity of at most ½ at once.
    Source: Verdenius et al. 2020 (arXiv 2006.00896), with T = 7.
    """
    sparsity = 1 - density
    if step == steps or sparsity <= 0.5:
        return density
    return 1 - (sparsity - (sparsity - 0.5) * 0.5 ** (step - 1))


SCHEDULES: dict[str, Schedule] = {
    "exponential": exponential,
    "linear": linear,
    "snip_it": snip_it,
}


def count_kept(total: int, density: float) -> int:
    """Return the number of weights that stay: ⌊density · total⌋.

    The rounding of ``1 - sparsity`` makes no difference: 0.05 of 1000 weights is 50,
    although ``1000 * (1 - 0.95)`` is a little less or more.

    Args:
        total: Number of weights, ≥ 1.
        density: Fraction of the weights that stays, in [0, 1].
    """
    return min(total, math.floor(density * total + 1e-15 * total + 1e-12))


def check_left(kept: int, left: int, total: int, sparsity: float) -> None:
    """Raise ValueError if a sparsity keeps more weights than an earlier pruning left.

    Args:
        kept: Number of weights that the sparsity keeps.
        left: Number of weights that are left.
        total: Number of prunable weights.
        sparsity: The sparsity, for the message.
    """
    if kept > left:
        raise ValueError(
            f"sparsity: the model is pruned to {1 - left / total:.6g} already, and "
            f"pruning it again only removes more; got {sparsity}"
        )


def kept_per_step(
    schedule: str | Schedule,
    steps: int,
    sparsity: float,
    total: int,
    refining: int = 0,
) -> list[int]:
    """Return the number of weights to keep after each step.

    Args:
        schedule: ``"exponential"``, ``"linear"``, ``"snip_it"`` or a callable
            ``(step, steps, density) -> density``.
        steps: Number of steps T ≥ 1.
        sparsity: Fraction of the weights removed at the end, in [0, 1).
        total: Number of prunable weights.
        refining: Number of the last steps that stay at the final density, at most T / 2
            (default: 0). The schedule is that of the other steps. A callable is asked
            for all T densities, and none is added.

    Returns:
        T counts that never increase. The last count is ⌊(1 − sparsity) · total⌋.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or no weight would be left. Or the
            schedule's densities increase, leave [density, 1], or do not end at the
            density.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"sparsity: expected a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity < 1:
        raise ValueError(
            "sparsity: expected the fraction to remove, 0 <= sparsity < 1, "
            f"got {sparsity}"
            + (f"; {sparsity} % is {sparsity / 100:.12g}" if 1 < sparsity < 100 else "")
        )
    check_count("steps", steps)
    if isinstance(schedule, str) and (refining := min(refining, steps // 2)):
        way = kept_per_step(schedule, steps - refining, sparsity, total)
        return way + way[-1:] * refining
    density_at = find_schedule(schedule)

    # In floating point, 1 - 0.9999 is 3e-13 off 0.0001, and a root would carry this
    # error into the earlier steps. So the decimals as written are subtracted.
    density = float(1 - Decimal(repr(float(sparsity))))
    last = count_kept(total, density)
    if last < 1:
        raise ValueError(
            f"sparsity: {sparsity} leaves none of the {total} prunable weights; at "
            f"most {1 - 1 / total} leaves one"
        )
    given = [density_at(step, steps, density) for step in range(1, steps + 1)]
    try:
        densities = [float(d) for d in given]
    except (TypeError, ValueError, RuntimeError):
        came = ", ".join(sorted({type(d).__name__ for d in given}))
        raise TypeError(f"schedule: expected a density, a number, got {came}") from None
    if not abs(densities[-1] - density) <= 1e-6 * density:
        is_sparsity = abs(densities[-1] - sparsity) <= 1e-6
        raise ValueError(
            f"schedule: the density after the last step must be {density:.6g}, "
            f"got {densities[-1]:.6g}"
            + (", which is the sparsity; return 1 minus it" if is_sparsity else "")
        )
    kept = [count_kept(total, d) for d in densities[:-1] if 0 <= d <= 1] + [last]
    if len(kept) < steps or kept != sorted(kept, reverse=True):
        raise ValueError(
            "schedule: densities must lie between 0 and 1 and never increase, got "
            + ", ".join(f"{d:.4g}" for d in densities[:8])
            + (", ..." if steps > 8 else "")
        )
    return kept


def find_schedule(schedule: str | Schedule, name: str = "schedule") -> Schedule:
    """Return the function of a schedule that is given by name or as a callable.

    Args:
        schedule: As in :func:`kept_per_step`.
        name: Name of the caller's argument, for error messages. Default: ``schedule``.

    Raises:
        TypeError: ``schedule`` is no name and no callable, or a callable with other
            arguments.
        ValueError: No schedule has this name.
    """
    if isinstance(schedule, str):
        if schedule in SCHEDULES:
            return SCHEDULES[schedule]
        raise ValueError(
            f"{name}: expected one of {', '.join(SCHEDULES)} or a callable (step, "
            f"steps, density) -> density, got {schedule!r}"
        )
    if not callable(schedule):
        raise TypeError(
            f"{name}: expected a name or a callable (step, steps, density) -> "
            f"density, got {type(schedule).__name__}"
        )
    check_arguments(name, schedule, "a callable (step, steps, density) -> density", 3)
    return schedule


def check_arguments(
    name: str, function: Callable[..., object], expected: str, count: int
) -> None:
    """Raise TypeError unless a callable takes ``count`` positional arguments.

    Args:
        name: Name of the caller's argument, for the error message.
        function: The callable.
        expected: Description of the expected callable, for the error message.
        count: Number of positional arguments in a call.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some functions written in C have no signature
    try:
        signature.bind(*[None] * count)
    except TypeError:
        called = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{name}: expected {expected}, got {called}{arguments_of(signature)}"
        ) from None


def arguments_of(signature: inspect.Signature) -> str:
    """Return the arguments of a callable as text, without types and defaults."""
    plain = [
        one.replace(annotation=one.empty, default=one.empty)
        for one in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
