"""The k largest of all scores: exactly k, exactly those, and always in the end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from selecting import top_k_of
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin.selection import top_k as selection

INF = math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def in_small() -> Iterator[None]:
    """What takes a million scores otherwise takes a few thousand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SMALL", 1 << 16)
        patch.setattr(selection, "_FEW", 1 << 12)
        patch.setattr(selection, "_BLOCK", 10_000)
        yield


def naive_top_k(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor]
) -> tuple[list[bool], float]:
    """The first k after a stable sort in descending order, and the last of them."""
    values = [value for score in scores for value in score.flatten().tolist()]
    allowed = as_list(among) or [True] * len(values)
    order = sorted(range(len(values)), key=lambda at: -values[at])
    order = [at for at in order if allowed[at]]
    chosen = set(order[:k])
    mask = [at in chosen for at in range(len(values))]
    return mask, values[order[k - 1]] if k else INF


def as_list(masks: Sequence[Tensor]) -> list[bool]:
    return [kept for mask in masks for kept in mask.flatten().tolist()]


def assert_as_naive(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor] = ()
) -> None:
    masks, threshold = top_k_of(scores, k, among=among)
    expected, value = naive_top_k(scores, k, among)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    assert {mask.dtype for mask in masks} == {torch.bool}
    assert as_list(masks) == expected
    assert threshold == value


# Small tensors, any values: duplicates, zeros of both signs, infinities, denormals

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, 5e-324, -5e-324, 1e-40, 1e-42]),
    st.integers(-3, 3).map(float),
    st.floats(allow_nan=False),
    st.floats(allow_nan=False, width=32),
)


Case = tuple[list[Tensor], int, list[Tensor]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores, a k, and which there are to choose from."""
    dtype = draw(st.sampled_from(DTYPES))
    scores, among = [], []
    some = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = math.prod(shape)
        values = draw(st.lists(VALUES, min_size=size, max_size=size))
        scores.append(torch.tensor(values, dtype=dtype).reshape(shape))
        if some:
            marks = draw(st.lists(st.booleans(), min_size=size, max_size=size))
            among.append(torch.tensor(marks, dtype=torch.bool).reshape(shape))
    most = sum(int(a.sum()) for a in among) if some else sum(map(Tensor.numel, scores))
    return scores, draw(st.integers(0, most)), among


@given(cases())
@settings(max_examples=300, deadline=None)
def test_any_scores_give_the_first_k_of_a_stable_sort(case: Case) -> None:
    assert_as_naive(*case)


@given(cases(), st.integers(0, 6), st.integers(1, 6), st.booleans())
@settings(max_examples=300, deadline=None)
def test_narrowing_down_to_a_handful_gives_the_same_in_threads_or_without(
    case: Case, small: int, sample: int, threads: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_FEW", 0)
        patch.setattr(selection, "_SMALL", small)
        patch.setattr(selection, "_LARGEST_SAMPLE", sample)
        patch.setattr(selection, "_BLOCK", 3)
        if threads:
            patch.setattr(selection, "_ALONE", 0)
        assert_as_naive(*case)


@given(cases(), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_what_a_gpu_is_asked_to_do_gives_the_same(case: Case, small: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SMALL", small)
        patch.setattr(selection, "_on_cpu", lambda tensors: False)
        assert_as_naive(*case)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_a_tie_goes_to_the_earlier_tensor_then_to_the_lower_index(
    dtype: torch.dtype,
) -> None:
    first = torch.tensor([[1, 2], [2, 3]], dtype=dtype)
    second = torch.tensor([2, 2, 9], dtype=dtype)
    kept = {
        2: ([[0, 0], [0, 1]], [0, 0, 1]),
        3: ([[0, 1], [0, 1]], [0, 0, 1]),
        4: ([[0, 1], [1, 1]], [0, 0, 1]),
        5: ([[0, 1], [1, 1]], [1, 0, 1]),
        6: ([[0, 1], [1, 1]], [1, 1, 1]),
        7: ([[1, 1], [1, 1]], [1, 1, 1]),
    }
    for k, expected in kept.items():
        masks, threshold = top_k_of([first, second], k)
        assert tuple(mask.int().tolist() for mask in masks) == expected
        assert threshold == {2: 3, 7: 1}.get(k, 2)


def test_zeros_of_both_signs_are_one_value() -> None:
    (mask,), threshold = top_k_of([torch.tensor([-0.0, 0.0, -0.0, -1.0])], 2)
    assert mask.tolist() == [True, True, False, False]
    assert threshold == 0


def test_minus_infinity_is_taken_last_but_is_taken() -> None:
    (mask,), threshold = top_k_of([torch.tensor([-INF, -3e38, -INF, INF])], 3)
    assert mask.tolist() == [True, True, False, True]
    assert threshold == -INF


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3),
    "permuted": lambda t: t.permute(2, 0, 3, 1),
    "every_second": lambda t: t[:, ::2, :, 1:],
    "flipped": lambda t: t.flip(1),
    "expanded": lambda t: t[:1].expand(4, -1, -1, -1),
    "needs_gradient": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 7, 40, 71])
def test_ties_are_resolved_in_row_major_order_however_a_tensor_lies_in_memory(
    layout: str, k: int
) -> None:
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(3, (4, 5, 3, 2), generator=generator).double()
    score = LAYOUTS[layout](values)
    assert_as_naive([score, values], min(k, score.numel()))
    assert_as_naive([score], min(k, score.numel()))
    # What there is to choose from need not lie as the scores do.
    among = torch.rand(score.shape, generator=generator) < 0.6
    assert_as_naive([score], min(k, int(among.sum())), [among])


def test_the_scores_are_left_as_they_were() -> None:
    score = torch.tensor([3.0, 1.0, 3.0, 2.0])
    before = score.clone()
    top_k_of([score], 1)
    assert torch.equal(score, before)


def test_masks_are_those_of_pytorchs_global_magnitude_pruning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(9, 50))
    weights = [module.weight.detach().abs() for module in model]
    masks, _ = top_k_of(weights, 123)
    total = sum(weight.numel() for weight in weights)
    prune.global_unstructured(
        [(module, "weight") for module in model],
        prune.L1Unstructured,
        amount=total - 123,
    )
    for mask, module in zip(masks, model, strict=True):
        assert torch.equal(mask, module.weight_mask.bool())


# k


def test_none_of_the_scores_is_above_an_infinite_threshold() -> None:
    masks, threshold = top_k_of([torch.full((2, 3), INF), torch.ones(())], 0)
    assert [mask.shape for mask in masks] == [(2, 3), ()]
    assert not any(as_list(masks))
    assert threshold == INF
    assert top_k_of([], 0) == ([], INF)


@pytest.mark.parametrize("k", [-1, 7, 10**9])
def test_a_k_that_does_not_fit_is_named_with_the_number_of_scores(k: int) -> None:
    scores = [torch.ones(2, 2), torch.ones(2)]
    with pytest.raises(ValueError, match=rf"k: expected 0 <= k <= 6 .*got {k}$"):
        top_k_of(scores, k)
    with pytest.raises(ValueError, match=r"0 <= k <= 0 scores, got 1"):
        top_k_of([], 1)
    among = [torch.eye(2).bool(), torch.zeros(2).bool()]
    with pytest.raises(ValueError, match=r"0 <= k <= 2 scores, got 3"):
        top_k_of(scores, 3, among=among)


def test_nothing_is_chosen_that_may_not_be_whatever_its_score() -> None:
    scores = [torch.tensor([9.0, -INF, 9.0]), torch.tensor([[1.0, INF]])]
    among = [torch.tensor([0, 1, 1]).bool(), torch.tensor([[1, 0]]).bool()]
    masks, threshold = top_k_of(scores, 3, among=among)
    assert as_list(masks) == as_list(among)
    assert threshold == -INF


# Larger than the limit below which everything is simply sorted

SIZES = (50_001, 3, 80_000, 0, 9_996)
TOTAL = sum(SIZES)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _sparse(values: np.ndarray) -> np.ndarray:
    return np.where(_rng().random(TOTAL) < 0.01, values, 0)


HARD: dict[str, Callable[[], np.ndarray]] = {
    "normal": lambda: _rng().standard_normal(TOTAL),
    "all_equal": lambda: np.full(TOTAL, 0.7),
    "two_values": lambda: (_rng().random(TOTAL) < 0.3).astype(float),
    "many_zeros": lambda: _sparse(_rng().random(TOTAL) + 0.5),
    "zeros_of_both_signs": lambda: (
        _sparse(np.ones(TOTAL)) * _rng().choice([-1, 1], TOTAL)
    ),
    "denormals": lambda: _rng().integers(0, 1000, TOTAL) * 5e-324,
    "heavy_tails": lambda: _rng().standard_cauchy(TOTAL) ** 5,
    "mostly_minus_infinity": lambda: np.where(
        _rng().random(TOTAL) < 0.98, -INF, _rng().standard_normal(TOTAL)
    ),
    "both_infinities": lambda: _rng().choice([-INF, 0, INF], TOTAL),
    "ascending": lambda: np.arange(TOTAL, dtype=float),
    "descending": lambda: -np.arange(TOTAL, dtype=float),
    "one_large": lambda: np.eye(1, TOTAL, TOTAL - 1)[0],
    "neighbours": lambda: 1 + _rng().integers(0, 5, TOTAL) * 2.0**-52,
}


def ranks(values: np.ndarray) -> list[int]:
    """The ends, the middle, and around the number of values above 0 and above -inf."""
    edges = {1, 2, TOTAL // 100, TOTAL // 2, TOTAL - 1, TOTAL}
    for number in ((values > 0).sum(), (values != 0).sum(), (values > -INF).sum()):
        edges |= {int(number) + step for step in (-1, 0, 1)}
    return sorted(k for k in edges if 1 <= k <= TOTAL)


def in_order(values: np.ndarray) -> np.ndarray:
    """Indices by descending value, the first of equal ones first."""
    return np.argsort(-values, kind="stable")


def split(values: np.ndarray, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(torch.from_numpy(values).to(dtype).split(SIZES))


def assert_as_sorted(
    values: np.ndarray,
    scores: Sequence[Tensor],
    k: int,
    allowed: np.ndarray | None = None,
) -> None:
    order = in_order(values)
    among: Sequence[Tensor] = ()
    if allowed is not None:
        order = order[allowed[order]]
        among = torch.from_numpy(allowed).split(SIZES)
    masks, threshold = top_k_of(scores, k, among=among)
    found = torch.cat([mask.flatten() for mask in masks]).numpy()
    expected = np.zeros(len(values), dtype=bool)
    expected[order[:k]] = True
    assert found.sum() == k
    np.testing.assert_array_equal(found, expected)
    assert threshold == values[order[k - 1]]


def test_the_hard_cases_are_large_enough_to_be_sampled() -> None:
    assert TOTAL > selection._SMALL > selection._FEW
    assert (HARD["denormals"]() > 0).any()


@pytest.mark.parametrize("name", HARD)
def test_hard_scores_are_selected_exactly(name: str) -> None:
    values = HARD[name]()
    scores = split(values)
    for k in ranks(values):
        assert_as_sorted(values, scores, k)


@pytest.mark.parametrize("share", [0.9, 0.1, 0.0001])
@pytest.mark.parametrize("name", HARD)
def test_hard_scores_are_selected_exactly_among_some(name: str, share: float) -> None:
    values = HARD[name]()
    scores = split(values)
    allowed = np.random.default_rng(1).random(TOTAL) < share
    left = int(allowed.sum())
    for k in {1, 2, left // 2, left - 1, left, int((values[allowed] > 0).sum())} - {0}:
        assert_as_sorted(values, scores, k, allowed)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The brackets of the rounds that were taken."""
    sampled = selection._bracket
    taken: list[tuple[float, float]] = []

    def bracket(*args: Any) -> tuple[float, float]:
        taken.append(sampled(*args))
        return taken[-1]

    monkeypatch.setattr(selection, "_bracket", bracket)
    return taken


@pytest.mark.parametrize("name", HARD)
def test_hard_scores_take_two_rounds_at_most(
    name: str, rounds: list[tuple[float, float]]
) -> None:
    values = HARD[name]()
    for k in ranks(values):
        rounds.clear()
        top_k_of(split(values), k)
        assert 1 <= len(rounds) <= 2, k


def test_the_sample_is_of_those_that_there_are_to_choose_from(
    rounds: list[tuple[float, float]],
) -> None:
    values = HARD["normal"]()
    assert_as_sorted(values, split(values), TOTAL // 4, values < 0)
    assert len(rounds) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["normal", "many_zeros", "mostly_minus_infinity"])
def test_narrow_types_with_all_their_ties_are_selected_exactly(
    name: str, dtype: torch.dtype
) -> None:
    scores = split(HARD[name](), dtype)
    values = torch.cat(scores).double().numpy()
    for k in (1, 1_000, TOTAL // 2, TOTAL - 1):
        assert_as_sorted(values, scores, k)


def test_float32_denormals_are_told_apart() -> None:
    values = _rng().integers(0, 200_000, TOTAL) * 2.0**-149
    scores = split(values, torch.float32)
    for k in (1, 999, TOTAL // 2, TOTAL):
        assert_as_sorted(values, scores, k)


def test_a_large_channels_last_tensor_of_ties_is_cut_in_row_major_order() -> None:
    values = _rng().integers(0, 2, 64 * 40 * 6 * 6).astype(float)
    score = torch.from_numpy(values).reshape(64, 40, 6, 6)
    score = score.to(memory_format=torch.channels_last)
    assert score.numel() > selection._SMALL
    for k in (5, int(values.sum()) + 5):
        assert_as_sorted(values, [score], k)


def test_many_small_tensors_are_ranked_together() -> None:
    values = _rng().integers(0, 100, 90_000).astype(float)
    scores = list(torch.from_numpy(values).reshape(300, 20, 15).unbind())
    for k in (1, 450, 45_678):
        assert_as_sorted(values, scores, k)


def test_few_scores_are_partitioned_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def bracket(*args: Any) -> tuple[float, float]:
        raise AssertionError("a sample was drawn")

    monkeypatch.setattr(selection, "_FEW", TOTAL)
    monkeypatch.setattr(selection, "_bracket", bracket)
    for name in ("normal", "heavy_tails", "descending"):
        values = HARD[name]()
        values[1::3] = values[::3][: len(values[1::3])]  # a third of them tie
        for k in (1, 2, 999, 70_000, TOTAL - 1, TOTAL):
            assert_as_sorted(values, split(values), k)


def test_every_rank_of_the_threshold_is_the_value_of_that_rank() -> None:
    values = _rng().standard_normal(TOTAL)
    descending = np.sort(values)[::-1]
    scores = split(values)
    for k in _rng().integers(1, TOTAL + 1, 25):
        masks, threshold = top_k_of(scores, int(k))
        assert threshold == descending[k - 1]
        assert sum(int(mask.sum()) for mask in masks) == k


def test_no_more_than_a_block_is_ever_put_together() -> None:
    lengths = [4_000, 4_000, 4_000, 0, 70_000, 1, 9_999, 10_000]
    runs = selection._runs([torch.empty(length) for length in lengths], 10_000)
    assert [[len(tensor) for tensor in run] for run in runs] == [
        [4_000, 4_000],
        [4_000, 0],
        [70_000],
        [1, 9_999],
        [10_000],
    ]


def test_each_mask_has_memory_of_its_own() -> None:
    # They become buffers of a network, which may be saved one by one.
    scores = [torch.rand(3, 4), torch.rand(7), torch.rand(70_000)]
    masks, _ = top_k_of(scores, 10)
    assert [m.untyped_storage().nbytes() for m in masks] == [12, 7, 70_000]


# Chance


def test_no_random_state_is_consumed_and_none_is_needed() -> None:
    scores = split(HARD["normal"]())
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
        results.append(as_list(top_k_of(scores, 12_345)[0]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1]
        assert random.getstate() == before[2]
    assert results[0] == results[1]


MAXIMUM_OF_ROUNDS = 100


@pytest.fixture
def brackets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, float]]]:
    """Brackets to be handed out before the sampled ones."""
    unlucky: list[tuple[float, float]] = []
    sampled = selection._bracket
    rounds = 0

    def bracket(*args: Any) -> tuple[float, float]:
        nonlocal rounds
        rounds += 1
        assert rounds <= MAXIMUM_OF_ROUNDS, "the selection does not come to an end"
        return unlucky.pop(0) if unlucky else sampled(*args)

    monkeypatch.setattr(selection, "_bracket", bracket)
    yield unlucky
    assert rounds


UNLUCKY = {
    "far_too_high": [(0.99, 0.999), (0.98, 0.99)],
    "far_too_low": [(-0.9, -0.8), (-0.7, -0.6)],
    "one_wrong_value_too_high": [(0.9, 0.9)],
    "one_wrong_value_too_low": [(-0.9, -0.9)],
    "one_value_again_and_again": [(0.25, 0.25)] * 5,
    "above_everything": [(7.0, 8.0), (7.0, 7.0), (INF, INF)],
    "below_everything": [(-8.0, -7.0), (-7.0, -7.0), (-INF, -INF)],
    "everything": [(-INF, INF)] * 3,
    "high_then_low": [(0.9, 0.95), (-0.95, -0.9), (0.5, 0.5), (-0.5, 0.5)],
}


@pytest.mark.parametrize("case", UNLUCKY)
@pytest.mark.parametrize("k", [1, 300, 70_000, 139_999, TOTAL])
def test_an_unlucky_sample_costs_rounds_and_never_exactness(
    brackets: list[tuple[float, float]], case: str, k: int
) -> None:
    # Eighths tie by the ten thousand, and the brackets hit and miss them.
    values = np.round(_rng().uniform(-1, 1, TOTAL) * 8) / 8
    brackets += UNLUCKY[case]
    assert_as_sorted(values, split(values), k)
    brackets[:] = UNLUCKY[case]
    allowed = np.random.default_rng(1).random(TOTAL) < 0.7
    assert_as_sorted(values, split(values), min(k, int(allowed.sum())), allowed)


@given(
    values=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=30),
    unlucky=st.lists(
        st.tuples(st.integers(-5, 5), st.integers(-5, 5)).map(sorted), max_size=8
    ),
    share=st.floats(0, 1),
)
@example(values=[0.0] * 9 + [1.0], unlucky=[[0, 0]], share=0.2)
@settings(max_examples=300, deadline=None)
def test_any_brackets_lead_to_the_same_masks(
    values: list[float], unlucky: list[list[int]], share: float
) -> None:
    k = max(1, math.ceil(share * len(values)))
    pending = [(float(low), float(high)) for low, high in unlucky]
    sampled = selection._bracket
    rounds = iter(range(MAXIMUM_OF_ROUNDS))

    def bracket(*args: Any) -> tuple[float, float]:
        assert next(rounds, None) is not None, "the selection does not come to an end"
        return pending.pop(0) if pending else sampled(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_FEW", 0)
        patch.setattr(selection, "_SMALL", 0)
        patch.setattr(selection, "_bracket", bracket)
        halves = torch.tensor(values).double().tensor_split(2)
        assert_as_naive(halves, k)
