"""How many weights stay after each step: the papers' formulas, to the last weight."""

from __future__ import annotations

import math
import random
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from force_plugin.selection.schedules import SCHEDULES, count_kept, kept_per_step

NAMES = ["exponential", "linear", "snip_it"]
NAN, INF = math.nan, math.inf


def test_the_schedules_are_the_three_of_the_papers() -> None:
    assert sorted(SCHEDULES) == NAMES


# The formulas, by hand


def test_exponential_removes_the_same_share_at_every_step() -> None:
    assert kept_per_step("exponential", 3, 0.999, 10_000) == [1000, 100, 10]
    assert kept_per_step("exponential", 4, 0.9375, 1600) == [800, 400, 200, 100]
    # 1000 / sqrt(2) = 707.1
    assert kept_per_step("exponential", 2, 0.5, 1000) == [707, 500]


def test_linear_removes_the_same_number_at_every_step() -> None:
    assert kept_per_step("linear", 4, 0.8, 1000) == [800, 600, 400, 200]
    assert kept_per_step("linear", 3, 0.99, 1000) == [670, 340, 10]


def test_snip_it_removes_half_then_half_of_what_is_missing() -> None:
    # s = 0.98: sparsities 0.5, 0.74, 0.86, 0.92, 0.95, 0.965, then 0.98
    assert kept_per_step("snip_it", 7, 0.98, 1000) == [500, 260, 140, 80, 50, 35, 20]
    # s = 0.9: sparsities 0.5, 0.7, then 0.9
    assert kept_per_step("snip_it", 3, 0.9, 1000) == [500, 300, 100]


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 0.3, 0.5])
def test_snip_it_reaches_a_sparsity_up_to_a_half_at_once_in_as_many_steps(
    sparsity: float,
) -> None:
    expected = round(1000 * (1 - sparsity))
    assert kept_per_step("snip_it", 7, sparsity, 1000) == [expected] * 7


@pytest.mark.parametrize("name", NAMES)
def test_one_step_goes_to_the_end(name: str) -> None:
    assert kept_per_step(name, 1, 0.95, 1000) == [50]


@pytest.mark.parametrize("name", NAMES)
def test_a_sparsity_of_zero_keeps_everything(name: str) -> None:
    assert kept_per_step(name, 5, 0, 123) == [123] * 5


def exact_density(name: str, step: int, steps: int, sparsity: Fraction) -> Fraction:
    """The formulas of METHODS.md without any rounding, where they are rational."""
    if name == "linear":
        return 1 - Fraction(step, steps) * sparsity
    if step == steps or sparsity <= Fraction(1, 2):
        return 1 - sparsity
    return 1 - (sparsity - (sparsity - Fraction(1, 2)) * Fraction(1, 2 ** (step - 1)))


@pytest.mark.parametrize("name", ["linear", "snip_it"])
@pytest.mark.parametrize("sparsity", ["0.36", "0.5", "0.9", "0.95", "0.99", "0.9984"])
@pytest.mark.parametrize("total", [1000, 63_336, 1_000_000, 25_502_912])
def test_rational_schedules_are_exact_at_every_step(
    name: str, sparsity: str, total: int
) -> None:
    for steps in (1, 2, 3, 7, 10, 60):
        expected = [
            math.floor(exact_density(name, t, steps, Fraction(sparsity)) * total)
            for t in range(1, steps + 1)
        ]
        assert kept_per_step(name, steps, float(sparsity), total) == expected


@pytest.mark.parametrize("nines", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("per_power", [1, 2, 10])
def test_exponential_meets_the_powers_of_ten_on_its_way(
    nines: int, per_power: int
) -> None:
    sparsity = float("0." + "9" * nines)
    kept = kept_per_step("exponential", nines * per_power, sparsity, 10**7)
    assert kept[per_power - 1 :: per_power] == [
        10**7 // 10**power for power in range(1, nines + 1)
    ]


@pytest.mark.parametrize("sparsity", ["0.3", "0.9", "0.98", "0.995"])
def test_exponential_is_the_power_in_sixty_digits(sparsity: str) -> None:
    density = 1 - Decimal(sparsity)
    total = 1_234_577
    for steps in (3, 7, 60):
        expected = [
            math.floor((density.ln() * t / steps).exp() * total)
            for t in range(1, steps)
        ]
        kept = kept_per_step("exponential", steps, float(sparsity), total)
        assert kept[:-1] == expected


# The last count


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_last_count_is_the_floor_in_exact_arithmetic(digits: int) -> None:
    totals = (1, 7, 10, 64, 100, 999, 1000, 4096, 10**5, 25_502_912, 10**8)
    for numerator in range(10**digits):
        text = f"0.{numerator:0{digits}}"
        for total in totals:
            expected = math.floor((1 - Fraction(text)) * total)
            if expected:
                assert kept_per_step("linear", 1, float(text), total) == [expected], (
                    text,
                    total,
                )


@given(
    numerator=st.integers(0, 10**6 - 1),
    total=st.integers(1, 10**8),
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 100),
)
@settings(max_examples=300, deadline=None)
def test_counts_never_increase_and_end_exactly(
    numerator: int, total: int, name: str, steps: int
) -> None:
    text = f"0.{numerator:06}"
    last = math.floor((1 - Fraction(text)) * total)
    if not last:
        with pytest.raises(ValueError, match="leaves none"):
            kept_per_step(name, steps, float(text), total)
        return
    kept = kept_per_step(name, steps, float(text), total)
    assert len(kept) == steps
    assert all(isinstance(count, int) for count in kept)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] <= total
    assert kept[-1] == last


def test_all_but_one_weight_leave_exactly_one() -> None:
    draw = random.Random(0)
    totals = [*range(1, 3000), *(draw.randint(1, 10**7) for _ in range(3000)), 10**7]
    wrong = [m for m in totals if kept_per_step("linear", 1, 1 - 1 / m, m) != [1]]
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_steps_may_go_down_to_the_last_weight(name: str) -> None:
    for total in (10, 12_345, 10**7):
        kept = kept_per_step(name, 60, 1 - 1 / total, total)
        assert kept[-1] == 1 and len(kept) == 60


def test_a_count_is_guarded_against_the_rounding_of_the_density() -> None:
    assert 1000 * (1 - 0.95) != 50
    assert count_kept(1000, 1 - 0.95) == 50
    # One minus 0.9 is a little less than a tenth.
    assert 10 * (1 - 0.9) < 1
    assert count_kept(10, 1 - 0.9) == 1
    assert count_kept(10, 0.9999) == 9
    assert count_kept(10, 0.0) == 0
    assert count_kept(10, 1.0) == 10


@pytest.mark.parametrize(
    "sparsity", [np.float64(0.95), Fraction(19, 20), np.float32(0.9375)], ids=repr
)
def test_any_real_number_is_a_sparsity(sparsity: Any) -> None:
    expected = 1600 - int(1600 * Fraction(float(sparsity)).limit_denominator(100))
    one: Any = np.int64(1)
    assert kept_per_step("linear", one, sparsity, 1600) == [expected]


# Schedules of the user


def test_a_callable_gets_the_step_from_one_the_steps_and_the_density() -> None:
    calls = []

    def schedule(step: int, steps: int, density: float) -> float:
        calls.append((step, steps, density))
        return 1 - (1 - density) * (step / steps) ** 2

    assert kept_per_step(schedule, 4, 0.8, 1000) == [950, 800, 550, 200]
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [call[2] for call in calls] == pytest.approx([0.2] * 4)


def test_a_callable_may_hold_still_and_be_off_by_rounding_at_the_end() -> None:
    densities = {1: 1.0, 2: 0.5, 3: 0.5, 4: 0.1 * (1 - 1e-9)}
    assert kept_per_step(lambda t, *_: densities[t], 4, 0.9, 1000) == [
        1000,
        500,
        500,
        100,
    ]


@pytest.mark.parametrize(
    ("densities", "shown"),
    [
        ((0.3, 0.4, 0.1), "0.3, 0.4, 0.1"),
        ((1.2, 0.5, 0.1), "1.2, 0.5, 0.1"),
        ((-0.1, 0.1, 0.1), "-0.1, 0.1, 0.1"),
        ((0.05, 0.1, 0.1), "0.05, 0.1, 0.1"),
        ((NAN, 0.5, 0.1), "nan, 0.5, 0.1"),
        ((0.5, NAN, 0.1), "0.5, nan, 0.1"),
        ((INF, 0.5, 0.1), "inf, 0.5, 0.1"),
    ],
    ids=str,
)
def test_densities_that_increase_or_leave_the_range_are_shown(
    densities: tuple[float, ...], shown: str
) -> None:
    expected = f"between 0 and 1 and never increase, got {shown}"
    with pytest.raises(ValueError, match=rf"^schedule: .*{re.escape(expected)}$"):
        kept_per_step(lambda t, *_: densities[t - 1], 3, 0.9, 1000)


def test_of_many_wrong_densities_the_first_are_shown() -> None:
    with pytest.raises(ValueError, match=r"got 0\.11, 0\.12, .*, 0\.18, \.\.\.$"):
        kept_per_step(lambda t, T, d: d if t == T else d + t / 100, 30, 0.9, 1000)


@pytest.mark.parametrize("last", [0.7, 0.2, 0.0, INF, NAN], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_schedule_that_ends_elsewhere_is_told_where_it_should(
    last: float, steps: int
) -> None:
    message = rf"^schedule: .* after the last step must be 0\.5, got {last:g}$"
    with pytest.raises(ValueError, match=message):
        kept_per_step(lambda t, T, _: last if t == T else 0.9, steps, 0.5, 100)


@pytest.mark.parametrize("returned", [None, 1j, [0.5]], ids=repr)
def test_a_schedule_that_returns_no_number_is_named(returned: Any) -> None:
    with pytest.raises(TypeError, match=rf"^schedule: .*{type(returned).__name__}"):
        kept_per_step(lambda *_: returned, 2, 0.5, 100)


def test_an_error_of_the_schedule_itself_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        kept_per_step(lambda *_: 1 / 0, 2, 0.5, 100)


# Arguments that are wrong


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 100, -INF, INF, NAN], ids=str)
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"0 <= sparsity < 1, got {sparsity}$"):
        kept_per_step("linear", 1, sparsity, 100)


@pytest.mark.parametrize(
    ("percent", "fraction"),
    [
        (95, "0.95"),
        (2, "0.02"),
        (99.5, "0.995"),
        (98.4, "0.984"),
        (99.9, "0.999"),
        (99.99, "0.9999"),
    ],
)
def test_a_percentage_gets_the_fraction_to_write_instead(
    percent: float, fraction: str
) -> None:
    message = rf"got {percent}; {percent} % is {re.escape(fraction)}$"
    with pytest.raises(ValueError, match=message):
        kept_per_step("linear", 1, percent, 100)


@pytest.mark.parametrize(
    "sparsity", [True, False, "0.9", None, [0.9], 0.9 + 0j], ids=repr
)
def test_a_sparsity_that_is_no_number_is_refused(sparsity: Any) -> None:
    message = rf"^sparsity: expected a number, got {type(sparsity).__name__}$"
    with pytest.raises(TypeError, match=message):
        kept_per_step("linear", 1, sparsity, 100)


@pytest.mark.parametrize("total", [1, 3, 100, 63_336, 12_345_678])
def test_a_sparsity_that_leaves_nothing_gets_the_largest_that_does_not(
    total: int,
) -> None:
    sparsity = 1 - 0.5 / total
    with pytest.raises(ValueError, match=f"leaves none of the {total} ") as error:
        kept_per_step("linear", 1, sparsity, total)
    assert f"sparsity: {sparsity} " in str(error.value)
    suggested = re.search(r"at most (\S+) leaves one", str(error.value))
    assert suggested
    assert kept_per_step("linear", 1, float(suggested[1]), total) == [1]


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^steps: expected at least 1, got {steps}$"):
        kept_per_step("linear", steps, 0.5, 100)


@pytest.mark.parametrize("steps", [2.5, 2.0, True, "3", None], ids=repr)
def test_steps_that_are_no_integer_are_refused(steps: Any) -> None:
    message = f"^steps: expected an integer, got {type(steps).__name__}$"
    with pytest.raises(TypeError, match=message):
        kept_per_step("linear", steps, 0.5, 100)


@pytest.mark.parametrize("schedule", ["cosine", "Linear", ""])
def test_an_unknown_schedule_is_told_the_known_ones(schedule: str) -> None:
    with pytest.raises(ValueError, match=rf"^schedule: .*got {schedule!r}$") as error:
        kept_per_step(schedule, 1, 0.5, 100)
    assert all(name in str(error.value) for name in NAMES)
    assert "callable (step, steps, density) -> density" in str(error.value)


@pytest.mark.parametrize("schedule", [None, 3, 0.5, ["linear"]], ids=repr)
def test_a_schedule_that_cannot_be_called_is_refused(schedule: Any) -> None:
    message = rf"^schedule: expected a name or a callable .*{type(schedule).__name__}$"
    with pytest.raises(TypeError, match=message):
        kept_per_step(schedule, 1, 0.5, 100)
