"""Scores of all weights by a method, checked and converted to one dtype."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from force_plugin.data.containers import describe, tensors
from force_plugin.errors import MethodError, NotFiniteError
from force_plugin.methods.measurements import Measurements
from force_plugin.model.module_names import name_some
from force_plugin.model.restoring import same_bits
from force_plugin.parallel.shards import WHOLE

if TYPE_CHECKING:
    from force_plugin.methods.base import SaliencyMethod


def is_ours(function: object) -> bool:
    """Whether a function is from this package, so that it writes to no weight."""
    place = getattr(function, "__globals__", {}).get("__name__", "")
    return bool(place.startswith("force_plugin.methods."))


class Scorer:
    """Asks a method for its scores, and makes sure that they can be ranked.

    Args:
        method: The method.
        probe: Measures the network with the masks of the last step.
    """

    def __init__(self, method: type[SaliencyMethod], probe: Measurements) -> None:  # noqa: D107
        self._method = method
        self._probe = probe
        self._trusted = is_ours(method.score)
        self._elementwise = getattr(method.score, "elementwise", False)
        # A shard is scored alone if the method is elementwise. Otherwise the shards of
        # a weight are put together first.
        self._shards = WHOLE if self._elementwise else probe.shards
        # Whether the signal of a weight is finite. Noted for users' scores only.
        self._sound: dict[str, bool] = {}

    def scores(self) -> dict[str, Tensor]:
        """Return scores by parameter name, all of one dtype.

        The caller may overwrite them.

        Raises:
            MethodError: The method writes into a weight, or a score is no real tensor
                of its weight's shape.
            NotFiniteError: A score is not finite.
        """
        signal, scores, sums = self._signal(), {}, []
        by = f"{self._method.__name__}.score"
        with nullcontext() if self._trusted else self._probe.protected(by):
            for name, shard in self._probe.weights.items():
                scores[name] = self._score(name, shard, signal.pop(name, None))
                # Add up each score while it is in the cache. A sum that is not finite
                # may be an overflow, so that each value is checked below.
                sums.append(scores[name].sum())
        dtype = reduce(torch.promote_types, (s.dtype for s in scores.values()))
        scores = {name: score.to(dtype) for name, score in scores.items()}
        if not torch.stack([s.double().cpu() for s in sums]).isfinite().all():
            self._require_finite(scores)
        return scores

    def _signal(self) -> dict[str, Any]:
        """Return the result of ``measure``; undo what it writes to the model."""
        method = self._method
        if is_ours(method.measure):
            return dict(method.measure(self._probe))
        by = f"{method.__name__}.measure"
        with self._probe.protected(by):
            signal = method.measure(self._probe)
        if not isinstance(signal, Mapping):
            raise TypeError(
                f"{by}: expected a mapping of parameter names to signals, such as "
                f"probe.gradients(), got {describe(signal)}"
            )
        if missing := [name for name in self._probe.weights if name not in signal]:
            raise MethodError(
                f"{by}: expected a signal for each weight by its name, got none for "
                f"{name_some(missing)}",
                "take the names of probe.weights, and None for what needs no signal",
            )
        return dict(signal)

    def _score(self, name: str, shard: Tensor, signal: Any) -> Tensor:
        """Return the score of a weight, or of this rank's shard of a weight."""
        weight = self._shards.whole(name, shard)
        if signal is not None:
            signal = self._shards.whole(name, signal)
        score = (self._given if self._trusted else self._watched)(name, weight, signal)
        score = self._usable(name, score, weight)
        if _share_memory(score, weight):
            score = score.clone()
        if not (self._method.looks or self._elementwise):
            # Each rank draws other random scores, so all take the scores of rank 0.
            self._probe.shards.ranks.share([score])
        score = self._shards.local(name, score)
        return score if score.is_floating_point() else score.double()

    def _given(self, name: str, weight: Tensor, signal: Any) -> object:
        return self._method.score(weight, signal)

    def _watched(self, name: str, weight: Tensor, signal: Any) -> object:
        """Return the result of a user's ``score``; it must not write to the weight."""
        self._sound[name] = all(
            bool(tensor.isfinite().all())
            for tensor in tensors(signal)
            if tensor.layout == torch.strided
        )
        own = weight.clone()
        score = self._method.score(own, signal)
        if not same_bits(own, weight):
            raise MethodError(
                f"{self._method.__name__}.score has written into the weight {name}, "
                "which it is given to read",
                "work out of place, weight * signal instead of weight.mul_(signal), or "
                "on weight.clone(); the signal may be overwritten",
            )
        return score

    def _usable(self, name: str, score: object, weight: Tensor) -> Tensor:
        """Return a score as a dense tensor that can be ranked, or raise MethodError."""
        by = f"{self._method.__name__}.score"
        if not isinstance(score, Tensor) or score.shape != weight.shape:
            came = tuple(score.shape) if isinstance(score, Tensor) else describe(score)
            raise MethodError(
                f"{by}: expected a tensor of the weight's shape {tuple(weight.shape)} "
                f"for {name}, got {came}"
            )
        if score.is_complex():
            raise MethodError(
                f"{by}: expected real scores for {name}, got {score.dtype}",
                "take their .abs() or .real",
            )
        if score.is_meta:
            raise MethodError(
                f"{by}: expected scores on {weight.device} for {name}, got a tensor on "
                "the meta device, which has no values"
            )
        score = score.detach().to(weight.device).to_dense()
        # There is no arithmetic in 8 bits.
        narrow = score.is_floating_point() and score.itemsize < 2
        return score.float() if narrow else score

    def _require_finite(self, scores: Mapping[str, Tensor]) -> None:
        """Raise NotFiniteError, with the cause, if a score is NaN or infinite."""
        method, probe = self._method, self._probe
        names = [name for name, score in scores.items() if not score.isfinite().all()]
        if not names:
            return
        # The names of weights whose signal is not finite either.
        guilty = [name for name in names if not self._sound.get(name)]
        if found := probe.causes.broken():
            cause = f"there is a NaN or inf in {name_some(found)}"
            advice = "look at the initialisation, or where these values come from"
        elif not guilty:
            cause = (
                f"the weight and its signal are finite, and {method.__name__}.score "
                "makes NaN or inf of them"
            )
            advice = (
                "mend this score, where it divides by 0 or takes a root or a logarithm "
                "of what is not positive"
            )
        elif not is_ours(method.measure):
            names = guilty
            cause = f"what {method.__name__}.measure returned for it is NaN or inf"
            advice = "look at this method, at the data and the initialisation"
            advice += probe.causes.wider()
        elif method.overflow:
            cause, advice = method.overflow
        else:
            names = guilty
            precision, wider = probe.causes.precision, probe.causes.wider()
            cause = f"its gradient is NaN or inf, or too large for {precision}"
            advice = f"look at the data and the initialisation{wider}"
        raise NotFiniteError(
            f"the saliency of {name_some(names)} is not finite at step {probe.step}: "
            f"{cause}",
            advice,
        )


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
