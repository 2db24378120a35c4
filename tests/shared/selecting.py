"""The selection over tensors in a row, which the package knows by name."""

from collections.abc import Sequence

from torch import Tensor

from force_plugin.parallel.totals import ALL_HERE, Totals
from force_plugin.selection.top_k import top_k_masks


def top_k_of(
    scores: Sequence[Tensor],
    k: int,
    totals: Totals = ALL_HERE,
    among: Sequence[Tensor] = (),
) -> tuple[list[Tensor], float]:
    """Masks in the order of the scores, and the k-th largest."""
    masks, threshold = top_k_masks(_named(scores), k, totals, _named(among))
    assert [*masks] == [*_named(scores)]
    return [*masks.values()], threshold


def _named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}
