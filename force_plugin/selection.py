"""The k largest of all scores, exactly k, over tensors that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from force_plugin.sharding import WHOLE, Parts

# Up to this many candidates, to select among all is as cheap as to narrow further.
_SMALL = 1 << 21
_SAMPLE = 1 << 14
# Values that stay in a core's cache while they are looked at.
_BLOCK = 1 << 19


def top_k_masks(
    scores: Sequence[Tensor], k: int, parts: Parts = WHOLE
) -> tuple[list[Tensor], float]:
    """Mark the k largest scores.

    The order is total: of equal scores the one that comes first (earlier tensor, then
    lower index in row-major order) counts as larger. ``-inf`` is the lowest score.

    Args:
        scores: Tensors of any shapes and devices and one floating-point dtype, without
            NaN; at least k values in all.
        k: Number of scores to mark, 0 ≤ k ≤ their number.
        parts: What other processes hold the other parts of these tensors. Each learns
            of theirs how many scores are above a threshold, and a small sample.

    Returns:
        Bool masks, one for each tensor, of its shape and on its device, with exactly
        k True in all; and the k-th largest score (``inf`` for k = 0).

    Raises:
        ValueError: k is negative or larger than the number of scores.
    """
    total = parts.size(scores)
    if not 0 <= k <= total:
        raise ValueError(f"k: expected 0 <= k <= {total} scores, got {k}")
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores], math.inf
    threshold, surplus = kth_largest(scores, k, parts)
    masks = [score >= threshold for score in scores]
    for score, mask in zip(reversed(scores), reversed(masks), strict=True):
        if not surplus:
            break
        ties = score == threshold
        numbers, mine = parts.each(int(ties.count_nonzero()))
        # What of the surplus is not in the parts that come after this one.
        own = surplus - int(sum(numbers[mine + 1 :]))
        if own >= numbers[mine]:
            mask ^= ties
        elif own > 0:
            # By coordinates, not on a flat view: a mask has the memory format of its
            # weight, and a channels-last tensor has no flat view in row-major order.
            last = ties.flatten().nonzero().squeeze(1)[-own:]
            mask[torch.unravel_index(last, mask.shape)] = False
        surplus -= min(surplus, int(sum(numbers)))
    return masks, threshold


def kth_largest(
    scores: Sequence[Tensor], k: int, parts: Parts = WHOLE
) -> tuple[float, int]:
    """The k-th largest value of all tensors together, exactly.

    A random sample brackets the value, one pass counts what lies above the bracket and
    copies what lies inside, and only this is looked at in the next round: the idea of
    Floyd and Rivest (1975), on tensors that are never concatenated. The sample comes
    from a generator of its own, so the global random state is left alone; an unlucky
    sample costs another round, never exactness.

    Args:
        scores: As in :func:`top_k_masks`.
        k: Rank, 1 ≤ k ≤ number of scores.
        parts: As in :func:`top_k_masks`.

    Returns:
        The value, and how many more than k values are at least as large.
    """
    candidates = [_flat(score.detach()) for score in scores]
    generator = torch.Generator().manual_seed(0)
    while (total := parts.size(candidates)) > _SMALL:
        low, high = _bracket(candidates, total, k / total, generator, parts)
        # Both ends stay outside of the next round: a value that most scores share
        # (0, as a rule) would otherwise be carried from round to round.
        number, between = _split(candidates, low, high)
        from_high, inside = map(int, parts.total(number, sum(map(len, between))))
        if k <= from_high:
            if k > _count((c > high for c in candidates), parts):
                return high, from_high - k
            candidates = [c[c > high] for c in candidates]
        elif k <= from_high + inside:
            k -= from_high
            candidates = between
        else:
            k -= from_high + inside
            at_low = _count((c == low for c in candidates), parts) if low < high else 0
            if k <= at_low:
                return low, at_low - k
            k -= at_low
            candidates = [c[c < low] for c in candidates]
    device = candidates[0].device
    merged = parts.concatenate(torch.cat([c.to(device) for c in candidates]))
    value = _kth_of(merged, k)
    return value, int((merged >= value).count_nonzero()) - k


def _kth_of(values: Tensor, k: int) -> float:
    """The k-th largest value of a tensor, whose order is lost."""
    at = len(values) - k
    if values.device.type == "cpu" and values.itemsize > 2:
        array = values.numpy()
        some = array[:: len(array) // 512 + 1]
        # NumPy is by far the faster, and by far the slower where values repeat.
        if 2 * len(np.unique(some)) > len(some):
            array.partition(at)
            return float(array[at])
    return float(values.kthvalue(at + 1).values)


def _flat(tensor: Tensor) -> Tensor:
    """Its values in the order of its memory, a view if they are all of it."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).flatten()


def _split(
    candidates: Sequence[Tensor], low: float, high: float
) -> tuple[int, list[Tensor]]:
    """How many values are at least ``high``, and those between the two."""

    def split_all(values: Tensor) -> tuple[int, Tensor]:
        upper = values >= high
        between = (values > low) ^ upper if low < high else slice(0)
        return int(upper.count_nonzero()), values[between]

    def split_block(block: Tensor) -> tuple[int, Tensor]:
        # NumPy takes values by a mask many times as fast as PyTorch does.
        values = (block if block.itemsize > 2 else block.float()).numpy()
        upper = values >= high
        between = (values > low) ^ upper if low < high else slice(0)
        return int(np.count_nonzero(upper)), torch.from_numpy(values[between])

    if any(c.device.type != "cpu" for c in candidates):
        pairs = list(map(split_all, candidates))
    else:
        blocks = [block for c in candidates for block in torch.split(c, _BLOCK)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            pairs = list(pool.map(split_block, blocks))
    numbers, between = zip(*pairs, strict=True)
    return sum(numbers), list(between)


def _count(masks: Iterable[Tensor], parts: Parts) -> int:
    return int(*parts.total(sum(int(mask.count_nonzero()) for mask in masks)))


def _bracket(
    candidates: Sequence[Tensor],
    total: int,
    rank: float,
    generator: torch.Generator,
    parts: Parts,
) -> tuple[float, float]:
    """Two values that most likely enclose the value at the rank (0 = largest)."""
    device = candidates[0].device
    drawn = []
    for c in candidates:
        share = math.ceil(_SAMPLE * c.numel() / total)
        at = torch.randint(max(1, c.numel()), (share,), generator=generator)
        drawn.append(c[at.to(c.device)].to(device))
    sample = parts.concatenate(torch.cat(drawn)).sort(descending=True).values
    # Six standard deviations of the rank of the wanted value within the sample.
    margin = 6 * math.sqrt(len(sample) * rank * (1 - rank)) + 2
    last = len(sample) - 1
    first = math.floor(rank * last - margin)
    final = math.ceil(rank * last + margin)
    if first < 0 and final > last:  # too few to say anything but on which side it is
        first = final = round(rank * last)
    high = float(sample[first]) if first >= 0 else math.inf
    low = float(sample[final]) if final <= last else -math.inf
    return low, high
