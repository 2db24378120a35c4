"""What holds for any scores, schedule, masks file and small network."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from selecting import top_k_of
from state import same
from torch import Tensor, nn

from force_plugin import (
    FORCE,
    METHODS,
    force_prune,
    get_masks,
    load_masks,
    save_masks,
)
from force_plugin.selection.schedules import SCHEDULES, kept_per_step

# The same examples in every run: a failure is one of the code, not of the day.
thorough = settings(max_examples=100, deadline=None, derandomize=True)
quick = settings(max_examples=60, deadline=None, derandomize=True)

SEEDS = st.integers(0, 2**32 - 1)


# Selection


@st.composite
def many_scores(draw: st.DrawFn) -> tuple[np.ndarray, torch.dtype, list[int], int]:
    """Scores by the ten thousand with ties, where they are cut into tensors, and k."""
    rng = np.random.default_rng(draw(SEEDS))
    size = draw(st.sampled_from([1, 1000, 70_000, 150_000]))
    values = rng.standard_normal(size)
    levels = draw(st.sampled_from([0, 1, 2, 50]))
    if levels:
        values = np.round(values * levels) / levels
    values[rng.random(size) < draw(st.sampled_from([0, 0.3, 0.95]))] = 0
    values[rng.random(size) < draw(st.sampled_from([0, 0.2, 0.9]))] = -np.inf
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16]))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    return values, dtype, cuts, draw(st.integers(0, size))


@given(many_scores())
@quick
def test_the_first_k_of_a_stable_sort_are_kept_however_the_scores_are_cut(
    case: tuple[np.ndarray, torch.dtype, list[int], int],
) -> None:
    values, dtype, cuts, k = case
    scores = torch.from_numpy(values).to(dtype)
    descending = np.argsort(-scores.double().numpy(), kind="stable")
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[descending[:k].copy()] = True
    masks, threshold = top_k_of(list(scores.tensor_split(cuts)), k)
    assert torch.equal(torch.cat(masks), expected)
    assert threshold == (scores[descending[k - 1]] if k else math.inf)


@given(SEEDS, st.integers(1, 40), st.sampled_from([2, 5, 1000]))
@quick
def test_what_is_among_the_first_k_is_among_the_first_k_plus_one(
    seed: int, size: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    score = torch.from_numpy(rng.integers(0, levels, size).astype(float))
    masks = [top_k_of([score], k)[0][0] for k in range(size + 1)]
    for smaller, larger in pairwise(masks):
        assert (smaller <= larger).all()


@given(SEEDS, st.integers(1, 60), st.floats(0, 1), st.data())
@thorough
def test_a_method_removes_the_lowest_scores_of_those_that_are_left(
    seed: int, size: int, density: float, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(-3, 3, size).astype(np.float32))
    earlier = torch.from_numpy(rng.random(size) < density)
    left = int(earlier.sum())
    amount = data.draw(
        st.one_of(st.integers(0, left), st.sampled_from([0.0, 0.5, 1.0]))
    )
    removed = (
        amount if isinstance(amount, int) else left - math.floor(left * (1 - amount))
    )
    order = sorted((i for i in range(size) if earlier[i]), key=lambda i: -scores[i])
    mask = FORCE(amount).compute_mask(scores, earlier.float())
    assert mask.nonzero().flatten().tolist() == sorted(order[: left - removed])


# Schedules


@given(
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 10**7),
    st.integers(1, 60),
    st.sampled_from([*SCHEDULES]),
)
@thorough
def test_any_sparsity_ends_at_its_floor_and_no_step_leaves_its_bounds(
    sparsity: float, total: int, steps: int, name: str
) -> None:
    # The decimals that are written: 0.9 is nine tenths.
    exact = (1 - Fraction(repr(sparsity))) * total
    # A float like 1 - 1/m misses its weight by some 1e-16 of m; that much is forgiven.
    floors = {
        math.floor(exact),
        min(total, math.floor(exact + Fraction(2e-15 * total + 2e-12))),
    }
    if floors == {0}:
        with pytest.raises(ValueError, match=r"^sparsity: .* leaves none of the"):
            kept_per_step(name, steps, sparsity, total)
        return
    assume(0 not in floors)
    kept = kept_per_step(name, steps, sparsity, total)
    assert len(kept) == steps
    assert kept[-1] in floors
    assert total >= kept[0]
    assert kept == sorted(kept, reverse=True)


@given(
    st.lists(
        st.one_of(
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(0.25, 1),
            st.sampled_from([0.25, 0.5, 1.0, 1, 0, None, "x", 1j]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@thorough
def test_a_callable_is_followed_or_refused_and_never_corrected(
    densities: list[Any], ends_well: bool
) -> None:
    if ends_well:
        densities = [*densities[:-1], 0.25]
    total, steps = 1000, len(densities)

    def prune() -> list[int]:
        return kept_per_step(lambda t, *_: densities[t - 1], steps, 0.75, total)

    if not all(isinstance(d, int | float) for d in densities):
        with pytest.raises(TypeError, match=r"^schedule: expected a density, a number"):
            prune()
        return
    inside = [float(d) for d in densities if 0 <= d <= 1]
    counts = [math.floor(d * total + 1e-9) for d in inside]
    if (
        len(inside) == steps
        and abs(inside[-1] - 0.25) <= 2.5e-7
        and counts == sorted(counts, reverse=True)
    ):
        assert prune() == [*counts[:-1], 250]
    else:
        with pytest.raises(ValueError, match=r"^schedule: .*, got .*\d|nan|inf"):
            prune()


# Files of masks

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        ["0.weight", "слой.вес", "层.權重", "a.b..c", "🙂", '"', "\\", "\0"]
    ),
)


def random_masks(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(np.asarray(rng.random(shape) < 0.5))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masks") / "masks.safetensors"


@given(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=4), SEEDS, st.data())
@thorough
def test_a_file_that_is_cut_or_grown_anywhere_is_refused(
    file: Path, shapes: dict[str, tuple[int, ...]], seed: int, data: st.DataObject
) -> None:
    masks = random_masks(shapes, seed)
    save_masks(masks, file)
    assert same(load_masks(file), masks)
    whole = file.read_bytes()
    extra = data.draw(st.binary(min_size=1, max_size=9))
    for broken in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + extra):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="not a masks file, or one that is cut"):
            load_masks(file)


def test_a_wrong_byte_anywhere_in_a_file_never_gives_other_masks(file: Path) -> None:
    # Shapes of which others have as many bytes: (3, 5) and (2, 5), (7,) and ().
    masks = random_masks({"0.weight": (3, 5), "1.weight": (4, 2), "2.bias": (7,)}, 0)
    save_masks(masks, file)
    whole = file.read_bytes()
    start = whole.index(b'shapes":')
    shapes = range(start, whole.index(b"}", start))
    silent = []
    for at in range(len(whole)):
        for byte in b"0123456789 " if at in shapes else [whole[at] ^ 1]:
            file.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                loaded = load_masks(file)
            except ValueError:
                continue
            if not same(loaded, masks):
                silent.append((whole[at - 12 : at + 2], chr(byte), [*loaded]))
    assert silent == []


# Networks


def tanh_network(widths: list[int], bias: bool, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def connected(masks: dict[str, Tensor]) -> bool:
    """Whether a path of kept weights leads from an input to an output."""
    paths = None
    for mask in masks.values():
        paths = mask.double() if paths is None else mask.double() @ paths
    return paths is not None and bool(paths.any())


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.booleans(),
    st.floats(0, 0.97),
    st.sampled_from([*METHODS]),
    st.integers(1, 4),
    st.sampled_from(["exponential", "linear", "snip_it"]),
    SEEDS,
)
# Chains that are disconnected: by an emptied layer, and with no layer empty.
@example([6, 6, 6, 6], True, 0.97, "snip", 1, "linear", 0)
@example([6, 6, 6, 6], True, 0.97, "snip", 1, "linear", 2)
@example([7, 7, 7, 7, 7], False, 0.95, "iter_snip", 2, "linear", 1)
@quick
@pytest.mark.filterwarnings("ignore:.*saliency of exactly 0:UserWarning")
def test_any_network_keeps_exactly_k_its_values_and_its_masks_the_next_time(
    widths: list[int],
    bias: bool,
    sparsity: float,
    method: str,
    steps: int,
    schedule: str,
    seed: int,
) -> None:
    model = tanh_network(widths, bias, seed)
    total = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    kept = math.floor((1 - Fraction(repr(sparsity))) * total + Fraction(1, 10**9))
    assume(kept >= 1)
    before = copy.deepcopy(model)
    batch = (torch.randn(7, widths[0]), torch.arange(7) % widths[-1])

    def prune(network: nn.Module) -> tuple[dict[str, Tensor], str]:
        torch.manual_seed(seed)
        report = force_prune(
            network,
            [batch],
            sparsity,
            method=method,
            steps=steps,
            schedule=schedule,
            on_collapse="warn",
            progress=False,
        )
        assert report.kept == kept
        return get_masks(network), " ".join(report.warnings)

    masks, said = prune(model)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    for name, parameter in model.named_parameters():
        own = before.get_parameter(name.removesuffix("_orig"))
        assert torch.equal(parameter, own)
    assert same(prune(before)[0], masks)
    # With one class every loss is 0, and so is every saliency.
    if method not in ("magnitude", "random") and widths[-1] > 1:
        assert connected(masks) or "disconnected" in said
        # At a step before the last a network may be, and then be connected by chance.
        assert not (connected(masks) and "pruned network is disconnected" in said)
