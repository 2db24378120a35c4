"""The k largest of all scores, exactly k, over tensors that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from force_plugin.sharding import WHOLE, Parts

# Up to this many candidates, to select among all is as cheap as to narrow further.
_SMALL = 1 << 18
_LARGEST_SAMPLE = 1 << 20
# Up to this many bytes, threads wait for Python's lock longer than they work.
_ALONE = 1 << 27
# Values that stay in a core's cache while they are looked at.
_BLOCK = 1 << 19


def top_k_masks(
    scores: Sequence[Tensor], k: int, parts: Parts = WHOLE
) -> tuple[list[Tensor], float]:
    """Mark the k largest scores.

    A sample brackets the k-th largest, one pass marks what lies above the bracket and
    copies what lies inside, and only this is looked at in the next round: the idea of
    Floyd and Rivest (1975), on tensors that are never all concatenated (small ones are,
    up to a block). A misleading sample costs another round, never exactness.

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
    flat = [_flat(score.detach()) for score in scores]
    found = _split(flat, *_bracket(flat, k, parts), parts)
    threshold, surplus = _search(flat, k, found, parts)
    tied: Sequence[int] = range(len(scores))
    if found.low < threshold <= found.high:  # nearly always
        for _, mask, at, values in found.blocks:
            mask.scatter_(0, at, values >= threshold)
        masks = list(map(_unflat, found.masks(), scores))
        if threshold < found.high and not parts.sharded:
            tied = found.having(threshold)
    else:
        masks = [score >= threshold for score in scores]
    for number in reversed(tied):
        if not surplus:
            break
        score, mask = scores[number], masks[number]
        # In row-major order, which need not be that of the memory.
        ties = (score == threshold).flatten()
        numbers, mine = parts.each(int(ties.count_nonzero()))
        # What of the surplus is not in the parts that come after this one.
        own = max(0, surplus - int(sum(numbers[mine + 1 :])))
        if own < numbers[mine]:
            _keep_last(ties, own)
        mask ^= ties.view(mask.shape)
        surplus -= min(surplus, int(sum(numbers)))
    return masks, threshold


def _keep_last(marks: Tensor, count: int) -> None:
    """Clear all but the last of the marks that are set."""
    for block in reversed(torch.split(marks, _BLOCK)):
        if not count:
            block.zero_()
            continue
        here = int(block.count_nonzero())
        if here > count:
            block[block.nonzero()[: here - count, 0]] = False
        count -= min(here, count)


def _search(
    candidates: Sequence[Tensor], k: int, found: _Split, parts: Parts
) -> tuple[float, int]:
    """The k-th largest score, and how many more than k are at least as large.

    Args:
        candidates: All scores; flat.
        k: Its rank, at least 1.
        found: How they were split.
        parts: As in :func:`top_k_masks`.
    """
    while True:
        # Both ends stay outside of the next round: a value that most scores share
        # (0, as a rule) would otherwise be carried from round to round.
        low, high, from_high, inside = found[:4]
        if k <= from_high:
            if k > _count((c > high for c in candidates), parts):
                return high, from_high - k
            candidates = [c[c > high] for c in candidates]
        elif k <= from_high + inside:
            k -= from_high
            candidates = [found.between]
        else:
            k -= from_high + inside
            at_low = _count((c == low for c in candidates), parts) if low < high else 0
            if k <= at_low:
                return low, at_low - k
            k -= at_low
            candidates = [c[c < low] for c in candidates]
        if parts.size(candidates) <= _SMALL:
            break
        found = _split(candidates, *_bracket(candidates, k, parts), parts)
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


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _flat(tensor: Tensor) -> Tensor:
    """Its values in the order of its memory, a view if they are all of it."""
    return tensor.permute(_order(tensor)).flatten()


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_flat` for values that are in the same order."""
    order = _order(like)
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(back)


_Block = tuple[int, Tensor, Tensor, Tensor]


class _Split(NamedTuple):
    """Values divided into those of at least ``high``, those between, and the rest."""

    low: float
    high: float
    from_high: int  # how many are at least ``high``, in all parts
    inside: int  # how many are between, in all parts
    between: Tensor  # those of this part
    # Of each run of tensors, which are at least ``high``, and the tensors' lengths.
    runs: list[tuple[Tensor, list[int]]]
    # Of each block: the number of its run, its part of that, where those between are,
    # and they themselves.
    blocks: list[_Block]

    def masks(self) -> Iterator[Tensor]:
        """Of each tensor, what is marked in its run by now."""
        for marks, lengths in self.runs:
            pieces = torch.split(marks, lengths)
            # Each in memory of its own, as they will be saved one by one.
            yield from pieces if len(pieces) == 1 else map(torch.clone, pieces)

    def having(self, value: float) -> list[int]:
        """The tensors whose runs have a value that is between."""
        found = {run for run, _, _, values in self.blocks if (values == value).any()}
        run_of = (n for n, (_, lengths) in enumerate(self.runs) for _ in lengths)
        return [number for number, run in enumerate(run_of) if run in found]


def _runs(tensors: Iterable[Tensor], size: int) -> list[list[Tensor]]:
    """Tensors one after the other, up to a size together, or a single larger one."""
    runs: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not runs or len(tensor) > room:
            runs.append([])
            room = size
        runs[-1].append(tensor)
        room -= len(tensor)
    return runs


def _split(
    candidates: Sequence[Tensor], low: float, high: float, parts: Parts
) -> _Split:
    """Divide values in one pass."""

    def split(number: int, run: list[Tensor], upper: Tensor) -> tuple[int, _Block]:
        values = run[0] if len(run) == 1 else torch.cat(run)
        if values.device.type != "cpu":
            torch.ge(values, high, out=upper)
            at = ((values > low) ^ upper).nonzero().squeeze(1) if low < high else none
            return int(upper.count_nonzero()), (number, upper, at, values[at])
        # NumPy finds the few that are between many times as fast as PyTorch does.
        array = (values if values.itemsize > 2 else values.float()).numpy()
        above = np.greater_equal(array, high, out=upper.numpy())
        where = np.flatnonzero((array > low) ^ above) if low < high else none.numpy()
        at, found = torch.from_numpy(where), torch.from_numpy(array[where])
        return int(np.count_nonzero(above)), (number, upper, at, found)

    none = torch.empty(0, dtype=torch.long)
    on_cpu = all(c.device.type == "cpu" for c in candidates)
    runs: list[tuple[Tensor, list[int]]] = []
    work: list[tuple[int, list[Tensor], Tensor]] = []
    for number, run in enumerate(_runs(candidates, _BLOCK if on_cpu else -1)):
        lengths = list(map(len, run))
        marks = torch.empty(sum(lengths), dtype=torch.bool, device=run[0].device)
        runs.append((marks, lengths))
        if on_cpu and len(run) == 1:
            halves = (torch.split(whole, _BLOCK) for whole in (run[0], marks))
            work += (
                (number, [values], part) for values, part in zip(*halves, strict=True)
            )
        else:
            work.append((number, run, marks))
    if on_cpu and sum(c.nbytes for c in candidates) > _ALONE:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            done = list(pool.map(split, *zip(*work, strict=True)))
    else:
        done = [split(*piece) for piece in work]
    numbers, blocks = zip(*done, strict=True)
    device = blocks[0][-1].device
    between = torch.cat([values.to(device) for *_, values in blocks])
    from_high, inside = map(int, parts.total(sum(numbers), len(between)))
    return _Split(low, high, from_high, inside, between, runs, list(blocks))


def _count(masks: Iterable[Tensor], parts: Parts) -> int:
    return int(*parts.total(sum(int(mask.count_nonzero()) for mask in masks)))


def _bracket(candidates: Sequence[Tensor], k: int, parts: Parts) -> tuple[float, float]:
    """Two values that most likely enclose the k-th largest."""
    total = parts.size(candidates)
    rank = k / total
    # The larger the sample, the less lies inside: about as much work each.
    stride = total // min(_LARGEST_SAMPLE, math.ceil(2 * total ** (2 / 3)))
    # Not in step with the rows and kernels of a weight.
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    device = candidates[0].device
    drawn, start = [], 0
    for c in candidates:
        drawn.append(c[start::stride].to(device))
        start = (start - len(c)) % stride
    sample = parts.concatenate(torch.cat(drawn))
    # Four standard deviations of the rank of the wanted value within the sample.
    margin = 4 * math.sqrt(len(sample) * rank * (1 - rank)) + 2
    last = len(sample) - 1
    first = math.floor(rank * last - margin)
    final = math.ceil(rank * last + margin)
    if first < 0 and final > last:  # too few to say anything but on which side it is
        first = final = round(rank * last)
    high = _kth_of(sample, first + 1) if first >= 0 else math.inf
    low = _kth_of(sample, final + 1) if final <= last else -math.inf
    return low, high
