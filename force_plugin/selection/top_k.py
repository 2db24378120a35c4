"""Find exactly the k largest scores of many tensors, without joining the tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from force_plugin.parallel.totals import ALL_HERE, Totals

Comparison = Callable[[Any, float], Any]  # a function of the module ``operator``

# Up to this number of candidates, selection is as cheap as another round of splitting.
_SMALL = 1 << 18
# Up to this number of scores, selection is usually as cheap as a pass over all scores.
_FEW = 1 << 21
_LARGEST_SAMPLE = 1 << 20
# Up to this number of bytes, threads wait for Python's lock longer than they work.
_ALONE = 1 << 27
# Number of values that fit into a core's cache.
_BLOCK = 1 << 19


def top_k_masks(
    scores: Mapping[str, Tensor],
    k: int,
    totals: Totals = ALL_HERE,
    among: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], float]:
    """Return masks that mark the k largest scores, and the k-th largest score.

    A sample brackets the k-th largest score. One pass marks the scores above the
    bracket, and copies the scores inside. The next round looks at the copied scores
    only. The idea is Floyd and Rivest's (1975). A misleading sample costs another
    round, never exactness.

    Tensors stay separate, with two exceptions. Small tensors are joined to blocks. Up
    to two million scores are joined, and NumPy partitions them.

    Of equal scores, the first counts as larger: the score in the earlier tensor, then
    the score at the lower index in row-major order. ``-inf`` is the lowest score.

    Args:
        scores: Tensors by name, of any shapes and devices and one floating-point
            dtype, without NaN.
        k: Number of scores to mark, from 0 to the number of scores that may be marked.
        totals: Sums over the processes that each hold a shard of the tensors. The
            processes exchange a small sample of the scores, and the number of scores
            above a threshold. Default: this process holds all scores.
        among: Bool tensors by name, of the scores' shapes and devices, True where a
            score may be marked. Default: empty, every score may be marked.

    Returns:
        A bool mask for each name, of the tensor's shape and on its device. Exactly k
        values are True in all masks together. The second value is the k-th largest
        score (``inf`` for k = 0).

    Raises:
        ValueError: k is negative, or larger than the number of scores that may be
            marked.
    """
    tensors = [*scores.values()]
    eligible = [among[name] for name in scores] if among else []
    total = _count_kept(eligible, totals) if among else totals.size(tensors)
    if not 0 <= k <= total:
        raise ValueError(f"k: expected 0 <= k <= {total} scores, got {k}")
    if k == 0:
        nothing = {n: torch.zeros_like(s, dtype=torch.bool) for n, s in scores.items()}
        return nothing, math.inf
    flat = _Choice(
        [_flat(score.detach(), score) for score in tensors],
        list(map(_flat, eligible, tensors if among else ())),
    )
    tied: Sequence[int] = range(len(tensors))
    few = None if among or totals.divided else _partitioned(flat.scores, k)
    if few is not None:
        threshold = few
        masks = [*flat.where(operator.ge, threshold)]
        surplus = sum(map(_number, masks)) - k
    else:
        found = _split(flat, *_bracket(flat, k / total, totals), totals)
        threshold, surplus = _search(flat, k, found, totals)
        if found.low < threshold < found.high:  # nearly always
            for _, mask, at, values in found.blocks:
                mask.scatter_(0, at, values >= threshold)
            masks = [*found.masks()]
            if not totals.divided:
                tied = found.having(threshold)
        elif threshold == found.high:
            masks = [*found.masks()]
        else:
            masks = [*flat.where(operator.ge, threshold)]
    masks = list(map(_unflat, masks, tensors))
    for number in reversed(tied):
        if not surplus:
            break
        score, mask = tensors[number], masks[number]
        ties = _marks(score.detach(), operator.eq, threshold)
        if among:
            ties &= eligible[number]
        ties = ties.flatten()  # row-major order, maybe not the memory order
        numbers, mine = totals.each(_number(ties))
        # The later shards clear their ties first; this shard clears the rest.
        own = max(0, surplus - int(sum(numbers[mine + 1 :])))
        if own < numbers[mine]:
            _keep_last(ties, own)
        mask ^= ties.view(mask.shape)
        surplus -= min(surplus, int(sum(numbers)))
    return dict(zip(scores, masks, strict=True)), threshold


def _keep_last(marks: Tensor, count: int) -> None:
    """Clear all True marks except the last ``count``."""
    for block in reversed(torch.split(marks, _BLOCK)):
        if not count:
            block.zero_()
            continue
        here = _number(block)
        if here > count:
            block[block.nonzero()[: here - count, 0]] = False
        count -= min(here, count)


class _Choice(NamedTuple):
    """Flat scores, and bool tensors that are True where a score may be marked."""

    scores: Sequence[Tensor]
    among: Sequence[Tensor] = ()

    def where(self, compare: Comparison, value: float) -> Iterator[Tensor]:
        """Yield a mask of each tensor's scores for which ``compare`` is True."""
        for number, score in enumerate(self.scores):
            marks = _marks(score, compare, value)
            if self.among:
                marks &= self.among[number]
            yield marks

    def only(self, compare: Comparison, value: float) -> _Choice:
        """Return the scores for which ``compare`` is True."""
        pairs = zip(self.scores, self.where(compare, value), strict=True)
        return _Choice([score[marks] for score, marks in pairs])


def _marks(score: Tensor, compare: Comparison, value: float) -> Tensor:
    if _suit_numpy([score]):
        return torch.as_tensor(compare(score.numpy(), value))
    marks: Tensor = compare(score, value)
    return marks


def _partitioned(scores: Sequence[Tensor], k: int) -> float | None:
    """Return the k-th largest score if NumPy finds it fastest, else ``None``."""
    if sum(map(len, scores)) > _FEW or not _suit_numpy(scores):
        return None
    merged = torch.cat([*scores]).numpy()
    if not _mostly_distinct(merged):
        return None
    at = len(merged) - k
    merged.partition(at)
    return float(merged[at])


def _search(
    candidates: _Choice, k: int, found: _Split, totals: Totals
) -> tuple[float, int]:
    """Return the k-th largest score, and how many more than k are at least as large.

    Args:
        candidates: All scores.
        k: Rank of the wanted score, at least 1.
        found: The first split of the scores.
        totals: As in :func:`top_k_masks`.
    """
    while True:
        # The next round excludes both ends of the bracket. Otherwise a value that most
        # scores share (usually 0) would remain in every round.
        low, high, from_high, inside = found[:4]
        if k <= from_high:
            if k > _count_kept(candidates.where(operator.gt, high), totals):
                return high, from_high - k
            candidates = candidates.only(operator.gt, high)
        elif k <= from_high + inside:
            k -= from_high
            candidates = _Choice([found.between])
        else:
            k -= from_high + inside
            at_low = 0
            if low < high:
                at_low = _count_kept(candidates.where(operator.eq, low), totals)
            if k <= at_low:
                return low, at_low - k
            k -= at_low
            candidates = candidates.only(operator.lt, low)
        left = totals.size(candidates.scores)
        if left <= _SMALL:
            break
        found = _split(candidates, *_bracket(candidates, k / left, totals), totals)
    device = candidates.scores[0].device
    merged = totals.concatenate(torch.cat([c.to(device) for c in candidates.scores]))
    value = _kth_of(merged, k)
    return value, int((merged >= value).count_nonzero()) - k


def _kth_of(values: Tensor, k: int) -> float:
    """Return the k-th largest value of a tensor. The tensor may be reordered."""
    at = len(values) - k
    if _suit_numpy([values]):
        array = values.numpy()
        if _mostly_distinct(array):
            array.partition(at)
            return float(array[at])
    return float(values.kthvalue(at + 1).values)


def _mostly_distinct(values: np.ndarray[Any, Any]) -> bool:
    """Return whether most values differ; NumPy's partition is very slow otherwise."""
    some = values[:: len(values) // 256 + 1].tolist()
    return 2 * len(set(some)) > len(some)


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Return values in the memory order of ``like``, as a view if possible."""
    if like.is_contiguous():
        return tensor.flatten()
    return tensor.permute(_order(like)).flatten()


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    """Return flat values in the shape of ``like``: the inverse of :func:`_flat`."""
    if like.is_contiguous():
        return flat.view(like.shape)
    order = _order(like)
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(back)


_Block = tuple[int, Tensor, Tensor, Tensor]


class _Split(NamedTuple):
    """Scores divided into three groups: at least ``high``, between, at most ``low``."""

    low: float
    high: float
    from_high: int  # number of scores that are at least ``high``, in all shards
    inside: int  # number of scores between, in all shards
    between: Tensor  # the scores between, of this shard
    # For each run of tensors: a mask of scores that are at least ``high``, and the
    # lengths of the tensors.
    runs: list[tuple[Tensor, list[int]]]
    # For each block: the number of its run, its part of the run's mask, the indices of
    # the scores between, and the scores between.
    blocks: list[_Block]

    def masks(self) -> Iterator[Tensor]:
        """Yield the current mask of each tensor, from the mask of its run."""
        for marks, lengths in self.runs:
            pieces = torch.split(marks, lengths)
            # Each mask gets its own memory, because masks are saved one by one.
            yield from pieces if len(pieces) == 1 else map(torch.clone, pieces)

    def having(self, value: float) -> list[int]:
        """Return the numbers of tensors whose runs have ``value`` between."""
        found = {run for run, _, _, values in self.blocks if (values == value).any()}
        run_of = (n for n, (_, lengths) in enumerate(self.runs) for _ in lengths)
        return [number for number, run in enumerate(run_of) if run in found]


def _runs(tensors: Iterable[Tensor], size: int) -> list[list[Tensor]]:
    """Return runs of tensors: up to ``size`` values together, or one larger tensor."""
    runs: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not runs or len(tensor) > room:
            runs.append([])
            room = size
        runs[-1].append(tensor)
        room -= len(tensor)
    return runs


def _split(candidates: _Choice, low: float, high: float, totals: Totals) -> _Split:
    """Divide scores by ``low`` and ``high`` in one pass."""

    def split(
        number: int, run: list[Tensor], may: list[Tensor], upper: Tensor
    ) -> tuple[int, _Block]:
        if not on_cpu:
            (values,) = run
            torch.ge(values, high, out=upper)
            inner = values > low
            for allowed in may:
                upper &= allowed
                inner &= allowed
            at = (inner ^ upper).nonzero().squeeze(1) if low < high else none
            return int(upper.count_nonzero()), (number, upper, at, values[at])
        # NumPy finds the few scores between many times faster than PyTorch. PyTorch's
        # operations would also start threads of their own in each thread of the pool.
        array = _as_array(run)
        above = np.greater_equal(array, high, out=upper.numpy())
        between = array > low
        if may:
            permitted = _as_array(may)
            above &= permitted
            between &= permitted
        between ^= above
        where = np.flatnonzero(between) if low < high else none.numpy()
        block = number, upper, torch.from_numpy(where), torch.from_numpy(array[where])
        return int(np.count_nonzero(above)), block

    none = torch.empty(0, dtype=torch.long)
    on_cpu = _on_cpu(candidates.scores)
    size = _BLOCK if on_cpu else -1
    among = iter(_runs(candidates.among, size))
    runs: list[tuple[Tensor, list[int]]] = []
    work: list[tuple[int, list[Tensor], list[Tensor], Tensor]] = []
    for number, run in enumerate(_runs(candidates.scores, size)):
        lengths = list(map(len, run))
        marks = torch.empty(sum(lengths), dtype=torch.bool, device=run[0].device)
        runs.append((marks, lengths))
        may = next(among, [])
        if on_cpu and len(run) == 1:
            pieces = (torch.split(whole, _BLOCK) for whole in (*run, *may, marks))
            for values, *rest, marked in zip(*pieces, strict=True):
                work.append((number, [values], rest, marked))
        else:
            work.append((number, run, may, marks))
    if on_cpu and sum(c.nbytes for c in candidates.scores) > _ALONE:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            done = list(pool.map(split, *zip(*work, strict=True)))
    else:
        done = [split(*piece) for piece in work]
    numbers, blocks = zip(*done, strict=True)
    device = blocks[0][-1].device
    between = torch.cat([values.to(device) for *_, values in blocks])
    from_high, inside = map(int, totals.sum(sum(numbers), len(between)))
    return _Split(low, high, from_high, inside, between, runs, list(blocks))


def _on_cpu(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _suit_numpy(scores: Sequence[Tensor]) -> bool:
    """Whether NumPy has these, and is the faster with them."""
    return _on_cpu(scores) and scores[0].itemsize > 2


def _as_array(tensors: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """Return flat tensors as one array, of a type that is fast in NumPy."""
    narrow = tensors[0].dtype in (torch.bfloat16, torch.float16)
    arrays = [(t.float() if narrow else t).numpy() for t in tensors]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _number(marks: Tensor) -> int:
    """Return the number of True marks."""
    on_cpu = _on_cpu([marks])
    return int(np.count_nonzero(marks.numpy()) if on_cpu else marks.count_nonzero())


def _count_kept(masks: Iterable[Tensor], totals: Totals) -> int:
    return int(*totals.sum(sum(map(_number, masks))))


def _bracket(candidates: _Choice, rank: float, totals: Totals) -> tuple[float, float]:
    """Return two values that likely enclose the score of a rank (0: largest score)."""
    total = totals.size(candidates.scores)
    # A larger sample leaves fewer scores inside: both cost about the same work here.
    stride = total // min(_LARGEST_SAMPLE, math.ceil(2 * total ** (2 / 3)))
    # The stride must not be in step with the rows and kernels of a weight.
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    device = candidates.scores[0].device

    def draw(tensors: Sequence[Tensor]) -> Tensor:
        drawn, start = [], 0
        for tensor in tensors:
            drawn.append(tensor[start::stride].to(device))
            start = (start - len(tensor)) % stride
        return torch.cat(drawn)

    sample = draw(candidates.scores)
    if candidates.among:
        sample = sample[draw(candidates.among)]
    sample = totals.concatenate(sample)
    if not len(sample):
        return -math.inf, math.inf
    # Four standard deviations of the rank of the wanted value within the sample.
    margin = 4 * math.sqrt(len(sample) * rank * (1 - rank)) + 2
    last = len(sample) - 1
    first = math.floor(rank * last - margin)
    final = math.ceil(rank * last + margin)
    if first < 0 and final > last:  # too few to bracket: only above or below
        first = final = round(rank * last)
    high = _kth_of(sample, first + 1) if first >= 0 else math.inf
    low = _kth_of(sample, final + 1) if final <= last else -math.inf
    return low, high
