"""The k largest of all scores, exactly k, over tensors that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Up to this many candidates one torch.kthvalue is as cheap as narrowing further.
_SMALL = 1 << 16
_SAMPLE = 1 << 16


def top_k_masks(scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], float]:
    """Mark the k largest scores.

    The order is total: of equal scores the one that comes first (earlier tensor, then
    lower index in row-major order) counts as larger. ``-inf`` is the lowest score.

    Args:
        scores: Tensors of any shapes and devices and one floating-point dtype, without
            NaN; at least k values in all.
        k: Number of scores to mark, 0 ≤ k ≤ their number.

    Returns:
        Bool masks, one for each tensor, of its shape and on its device, with exactly
        k True in all; and the k-th largest score (``inf`` for k = 0).

    Raises:
        ValueError: k is negative or larger than the number of scores.
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k: expected 0 <= k <= {total} scores, got {k}")
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores], math.inf
    threshold = kth_largest(scores, k)
    masks = [score >= threshold for score in scores]
    surplus = _count(masks) - k
    for score, mask in zip(reversed(scores), reversed(masks), strict=True):
        if not surplus:
            break
        ties = score == threshold
        number = int(ties.count_nonzero())
        if number > surplus:
            # By coordinates, not on a flat view: a mask has the memory format of its
            # weight, and a channels-last tensor has no flat view in row-major order.
            last = ties.flatten().nonzero().squeeze(1)[-surplus:]
            mask[torch.unravel_index(last, mask.shape)] = False
            break
        mask ^= ties
        surplus -= number
    return masks, threshold


def kth_largest(scores: Sequence[Tensor], k: int) -> float:
    """The k-th largest value of all tensors together, exactly.

    A random sample brackets the value, one pass counts what lies above and inside the
    bracket, and only the few values inside are kept for the next round: the idea of
    Floyd and Rivest (1975), on tensors that are never concatenated. The sample comes
    from a generator of its own, so the global random state is left alone; an unlucky
    sample costs another round, never exactness.

    Args:
        scores: As in :func:`top_k_masks`.
        k: Rank, 1 ≤ k ≤ number of scores.
    """
    candidates = [score.detach().flatten() for score in scores if score.numel()]
    generator = torch.Generator().manual_seed(0)
    while (total := sum(c.numel() for c in candidates)) > _SMALL:
        low, high = _bracket(candidates, k / total, generator)
        above = _count(c > high for c in candidates)
        if k <= above:
            candidates = [c[c > high] for c in candidates]
            continue
        # Both ends stay outside of the next round: a value that most scores share
        # (0, as a rule) would otherwise be carried from round to round.
        k -= above
        at_high = _count(c == high for c in candidates)
        if k <= at_high:
            return high
        k -= at_high
        if low < high:
            inside = _count(c > low for c in candidates) - above - at_high
            if k <= inside:
                candidates = [c[(c > low) & (c < high)] for c in candidates]
                continue
            k -= inside
            at_low = _count(c == low for c in candidates)
            if k <= at_low:
                return low
            k -= at_low
        candidates = [c[c < low] for c in candidates]
    device = candidates[0].device
    merged = torch.cat([c.to(device) for c in candidates])
    return float(merged.kthvalue(merged.numel() - k + 1).values)


def _count(masks: Iterable[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks)


def _bracket(
    candidates: Sequence[Tensor], rank: float, generator: torch.Generator
) -> tuple[float, float]:
    """Two values that most likely enclose the value at the rank (0 = largest)."""
    total = sum(c.numel() for c in candidates)
    parts = []
    for c in candidates:
        if c.numel():
            share = math.ceil(_SAMPLE * c.numel() / total)
            at = torch.randint(c.numel(), (share,), generator=generator)
            parts.append(c[at.to(c.device)].cpu())
    sample = torch.cat(parts).sort(descending=True).values
    # Six standard deviations of the rank of the wanted value within the sample.
    margin = 6 * math.sqrt(len(sample) * rank * (1 - rank)) + 2
    last = len(sample) - 1
    high = max(0, math.floor(rank * last - margin))
    low = min(last, math.ceil(rank * last + margin))
    return float(sample[low]), float(sample[high])
