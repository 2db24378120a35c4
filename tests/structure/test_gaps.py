"""The positions of kept weights, a byte for each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from force_plugin.structure.gaps import decode, encode


def read(gaps: list[int]) -> list[int]:
    """Return the positions of kept weights, as the description of the format says."""
    positions, at = [], 0
    for gap in gaps:
        at += gap
        if gap < 255:
            positions.append(at)
            at += 1
    return positions


def masks(positions: list[int], size: int) -> Tensor:
    kept = torch.zeros(size, dtype=torch.bool)
    kept[positions] = True
    return kept


@given(
    st.lists(st.sampled_from([0, 1, 2, 253, 254, 255, 256, 509, 510, 511, 765, 9999])),
    st.integers(0, 600),
)
def test_any_mask_comes_back(zeros: list[int], after: int) -> None:
    positions = [sum(zeros[: i + 1]) + i for i in range(len(zeros))]
    kept = masks(positions, sum(zeros) + len(zeros) + after)
    gaps = encode(kept)
    assert gaps.dtype == torch.uint8
    assert len(gaps) == len(zeros) + sum(gap // 255 for gap in zeros)
    assert read(gaps.tolist()) == positions
    assert torch.equal(decode(gaps, kept.shape), kept)


def test_shapes_are_read_in_rows() -> None:
    kept = torch.rand(4, 3, 5, 2).contiguous(memory_format=torch.channels_last) < 0.1
    gaps = encode(kept)
    assert torch.equal(gaps, encode(kept.flatten()))
    assert torch.equal(decode(gaps, kept.shape), kept)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,)])
@pytest.mark.parametrize("value", [False, True])
def test_small_shapes(shape: tuple[int, ...], value: bool) -> None:
    kept = torch.full(shape, value)
    assert torch.equal(decode(encode(kept), kept.shape), kept)


@pytest.mark.parametrize("gaps", [[10], [255], [0] * 11, [3, 255], [255, 255, 4]])
def test_gaps_that_do_not_fit_are_an_error(gaps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"gaps for a weight of shape \(2, 5\)"):
        decode(torch.tensor(gaps, dtype=torch.uint8), torch.Size((2, 5)))
