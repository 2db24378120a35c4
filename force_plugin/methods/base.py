"""The base class of the methods, each of which measures a network and scores weights.

A method is a :class:`torch.nn.utils.prune.BasePruningMethod` with a criterion. A new
method is a class with a ``score``, and the attributes that differ from the base class:

    class GradientMagnitude(SaliencyMethod):
        @staticmethod
        def score(weight, gradient):
            return gradient.abs()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from force_plugin.methods.measurements import Measurements
from force_plugin.methods.scores import Scorer
from force_plugin.model.reparametrisation import Reparametrisation, reparametrise
from force_plugin.model.weights import pruned_so_far
from force_plugin.model.weights_to_prune import find_parameter, no_parameter
from force_plugin.selection.schedules import (
    count_kept,
)
from force_plugin.selection.top_k import top_k_masks

Score = TypeVar("Score", bound=Callable[..., Tensor])


def elementwise(score: Score) -> Score:
    """Mark a ``score`` that computes each entry from its own weight and signal alone.

    Each process then scores its own shard of a weight. Without this mark, the shards of
    a weight are put together before the weight is scored. The mark belongs to this
    function. A function that overrides it has to be marked too.

    Args:
        score: ``score(weight, signal)``, which returns a tensor of the weight's shape,
            for a whole weight and for any part of a weight. ``@staticmethod`` goes
            above this decorator.

    Returns:
        The function itself.
    """
    score.elementwise = True  # type: ignore[attr-defined]
    return score


class SaliencyMethod(Reparametrisation):
    """Keeps the weights with the largest scores, exactly as many as the caller asks.

    As a pruning method of PyTorch it takes its scores from ``importance_scores``, as
    in ``FORCE.apply(module, "weight", amount=0.9, importance_scores=scores)``.
    :func:`force_plugin.force_prune` computes the scores with :meth:`measure` and
    :meth:`score`.

    Args:
        amount: Fraction or number of weights to remove, among the weights not pruned
            yet. A float is a fraction in [0, 1]: ⌊(1 − amount) · n⌋ of n weights stay.
            An int is a number of weights, as in
            :class:`torch.nn.utils.prune.L1Unstructured`.

    Attributes:
        regrows: Whether a weight that was pruned at one step may come back at a later
            step. Default: False.
        steps: Number of steps, if the method fixes the number (1 for one-shot
            methods). Default: ``None``, the caller chooses.
        schedule: Name of the schedule, if the method fixes the schedule. Default:
            ``None``, the caller chooses.
        refining: Number of the last steps that stay at the final density, at most half
            of all steps. A schedule of the caller's own stays as it is. Default: 0.
        looks: Whether the scores come from passes of the network, so that closed gates
            matter. Default: True.

    Raises:
        TypeError: ``amount`` is no number.
        ValueError: ``amount`` is a float outside [0, 1] or a negative int.
    """

    PRUNING_TYPE = "unstructured"
    # Two texts for the error if a signal is not finite: the cause, and the advice.
    # ``None``: a gradient has overflowed, or the data is not finite.
    overflow: ClassVar[tuple[str, str] | None] = None
    regrows: ClassVar[bool] = False
    steps: ClassVar[int | None] = None
    schedule: ClassVar[str | None] = None
    refining: ClassVar[int] = 0
    looks: ClassVar[bool] = True

    def __init__(self, amount: float | int) -> None:  # noqa: D107 (the class has it)
        if isinstance(amount, bool) or not isinstance(amount, Real):
            raise TypeError(
                f"amount: expected a float or an int, got {type(amount).__name__}"
            )
        integral = isinstance(amount, Integral)
        if not amount >= 0 or (amount > 1 and not integral):
            raise ValueError(
                "amount: expected a fraction in [0, 1] as a float, or a number of "
                f"weights as an int, got {amount!r}"
            )
        self.amount: int | float = int(amount) if integral else float(amount)

    @classmethod
    def measure(cls, probe: Measurements) -> Mapping[str, Tensor | None]:
        """Return the signal that :meth:`score` gets; default: the mean gradient.

        Args:
            probe: Measures the network with the masks of the last step:
                ``probe.gradients()``, ``probe.hessian_gradients()``,
                ``probe.synflow_gradients()``.

        Returns:
            By parameter name, a tensor of the weight's shape that ``score`` may
            overwrite, or ``None``.
        """
        return probe.gradients()

    @staticmethod
    def score(weight: Tensor, signal: Any, /) -> Tensor:
        """Return the score of each weight of a tensor, higher = keep.

        Args:
            weight: The dense weight θ. Writing into it is an error.
            signal: The signal that :meth:`measure` returned for this weight.

        Returns:
            A floating-point tensor of the weight's shape.
        """
        raise NotImplementedError

    @classmethod
    def scores(cls, probe: Measurements) -> dict[str, Tensor]:
        """Measure and score every weight, pruned weights included.

        Args:
            probe: Measures the network with the masks of the last step.

        Returns:
            Scores by parameter name, each of its weight's shape, all of one dtype. The
            caller may overwrite them, unless the method says otherwise.

        Raises:
            TypeError: The method has no :meth:`score`.
            MethodError: A score is complex or has another shape than its weight, or
                :meth:`score` or :meth:`measure` has written into the model's weights.
                The weights get their values back.
            NoGradientError: A weight got no gradient.
            NotFiniteError: A score is not finite.
        """
        if cls.score is SaliencyMethod.score:
            raise TypeError(
                f"{cls.__name__} has no score: expected a subclass of SaliencyMethod "
                "with a static score(weight, signal) of its own"
            )
        return Scorer(cls, probe).scores()

    def ranking(self, t: Tensor) -> Tensor:
        """Return the scores to rank by; default: ``t`` itself.

        Args:
            t: A copy of ``importance_scores``, or of the weight if the caller gave no
                scores. A tensor that requires a gradient counts as the weight.

        Raises:
            ValueError: ``t`` is the weight, and this method needs scores.
        """
        if t.requires_grad:
            name = type(self).__name__
            raise ValueError(
                f"{name} ranks weights by their saliency: pass importance_scores=, for "
                "example from force_plugin.saliency(model, loader, ...), detached"
            )
        return t

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return a mask of the largest scores among the weights not pruned yet.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.compute_mask`.

        Args:
            t: Scores of any shape, higher = keep.
            default_mask: Mask of earlier prunings, with the shape of the scores.

        Returns:
            Bool mask with the shape of the scores (one byte a weight), True = kept.
            Among equal scores, the first in row-major order are kept.

        Raises:
            ValueError: More weights are to be removed than are left, or a score is
                complex or NaN.
        """
        eligible = default_mask.bool()
        left = int(eligible.count_nonzero())
        if isinstance(self.amount, int):
            kept = left - self.amount
        else:
            kept = count_kept(left, 1 - self.amount)
        if kept < 0:
            raise ValueError(
                f"amount: {self.amount} weights to remove, but only {left} are left"
            )
        if t.dtype == torch.bool:
            # Bool scores are a mask that was chosen elsewhere.
            chosen = t & eligible
            if int(chosen.count_nonzero()) == kept:
                return chosen
        scores = self.ranking(t).detach()
        if scores.is_complex():
            raise ValueError(
                f"importance_scores: expected real numbers, got {scores.dtype}; take "
                "their .abs() or .real"
            )
        scores = scores if scores.is_floating_point() else scores.double()
        if scores.isnan().any():
            raise ValueError("importance_scores: expected numbers, got NaN")
        masks, _ = top_k_masks({"": scores}, kept, among={"": eligible})
        return masks[""]

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: float | int,
        importance_scores: Tensor | None = None,
    ) -> Reparametrisation:
        """Prune one tensor of a module and reparametrise it, as PyTorch does.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.apply`. Afterwards the
        module has ``{name}_orig`` (the parameter), ``{name}_mask`` (a bool buffer) and
        a forward pre-hook that multiplies the two. If the module is pruned already,
        the new mask only removes more.

        Args:
            module: Module that holds the tensor.
            name: Name of the parameter within the module, e.g. ``"weight"``.
            amount: Fraction (float) or number (int) of weights to remove, among the
                weights not pruned yet.
            importance_scores: Scores of the parameter's shape, higher = keep. Default:
                the method ranks the parameter itself, or raises ValueError.

        Returns:
            The pruning method, or a :class:`torch.nn.utils.prune.PruningContainer`
            if the tensor was pruned before.

        Raises:
            TypeError: ``amount`` is no number, or ``importance_scores`` no tensor.
            ValueError: An argument does not fit. The module is unchanged.
        """
        method = cls(amount)
        parameter = find_parameter(module, name)
        if parameter is None:
            raise ValueError(no_parameter(module, name))
        given = parameter if importance_scores is None else importance_scores
        if not isinstance(given, Tensor):
            raise TypeError(
                f"importance_scores: expected a tensor, got {type(given).__name__}"
            )
        if given.shape != parameter.shape:
            raise ValueError(
                f"importance_scores: expected the shape of {name}, "
                f"{tuple(parameter.shape)}, got {tuple(given.shape)}"
            )
        # A user's method may work in place, so it gets copies.
        scores = given.detach().clone()
        if importance_scores is None or given.requires_grad:
            scores.requires_grad_()
        earlier = pruned_so_far(module, name)
        if earlier is None:
            earlier = torch.ones_like(parameter, dtype=torch.bool)
        mask = method.compute_mask(scores, earlier.clone())
        return reparametrise(module, name, mask, method)
