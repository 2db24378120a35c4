"""The methods: what each one measures, and how it scores a weight from it.

A method is a :class:`torch.nn.utils.prune.BasePruningMethod` with a criterion. A new
one is a class with a ``score``, and the attributes that differ from the base class:

    class GradientMagnitude(SaliencyMethod):
        @staticmethod
        def score(weight, gradient):
            return gradient.abs()
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import reduce
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from force_plugin.parameters import name_some, parameter_key, pruned_so_far
from force_plugin.reparametrisation import Reparametrisation, reparametrise
from force_plugin.schedules import count_kept
from force_plugin.scoring import Probe
from force_plugin.selection import top_k_masks
from force_plugin.sharding import WHOLE

Score = TypeVar("Score", bound=Callable[..., Tensor])


def elementwise(score: Score) -> Score:
    """Say of a ``score`` that it looks at each weight and its signal alone.

    The parts of a sharded weight are then scored where they are; for any other one each
    weight is put together first. It is said of this function, and not of one that
    overrides it.

    Args:
        score: ``score(weight, signal)``, of the same shapes for a whole weight as for a
            part of it. ``@staticmethod`` goes above this decorator.

    Returns:
        The same function.
    """
    score.elementwise = True  # type: ignore[attr-defined]
    return score


class SaliencyMethod(Reparametrisation):
    """Keeps the weights with the largest scores, exactly as many as asked for.

    As a pruning method of PyTorch it takes its scores from ``importance_scores``, as
    in ``FORCE.apply(module, "weight", amount=0.9, importance_scores=scores)``;
    :func:`force_plugin.force_prune` computes them with :meth:`measure` and
    :meth:`score`.

    Args:
        amount: What to remove of the weights not pruned yet: a fraction in [0, 1] as a
            float (⌊(1 − amount) · n⌋ of n weights stay), or a number of weights as an
            int, as in :class:`torch.nn.utils.prune.L1Unstructured`.

    Attributes:
        regrows: Whether a weight that was pruned at one step may come back at a later
            one. Default: False.
        steps: Number of steps where the method fixes it (1 for one-shot methods);
            ``None`` leaves it to the caller, which is the default.
        schedule: Name of the schedule where the method fixes it. Default: ``None``.
        looks: Whether the scores come from passes of the network, so that closed gates
            matter. Default: True.

    Raises:
        TypeError: ``amount`` is no number.
        ValueError: ``amount`` is a float outside [0, 1] or a negative int.
    """

    PRUNING_TYPE = "unstructured"
    regrows: ClassVar[bool] = False
    steps: ClassVar[int | None] = None
    schedule: ClassVar[str | None] = None
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
    def measure(cls, probe: Probe) -> Mapping[str, Tensor | None]:
        """What :meth:`score` is given for each weight; default: the mean gradient.

        Args:
            probe: Measures the network as it is pruned so far:
                ``probe.gradients()``, ``probe.hessian_gradients()``,
                ``probe.synflow_gradients()``.

        Returns:
            By parameter name, a tensor of the weight's shape that ``score`` may
            overwrite, or ``None``.
        """
        return probe.gradients()

    @staticmethod
    def score(weight: Tensor, signal: Any) -> Tensor:
        """Score of each weight, higher = keep.

        Args:
            weight: The dense weight θ, not to be changed.
            signal: What :meth:`measure` returned for this weight.

        Returns:
            A floating-point tensor of the weight's shape.
        """
        raise NotImplementedError

    @classmethod
    def scores(cls, probe: Probe) -> dict[str, Tensor]:
        """Measure and score every weight, pruned ones included.

        Args:
            probe: The network as it is pruned so far.

        Returns:
            Scores by parameter name, each of its weight's shape, all of one dtype; the
            caller's to overwrite.

        Raises:
            TypeError: The method has no :meth:`score`.
            ValueError: A score is complex or has another shape than its weight.
            RuntimeError: A weight got no gradient, or a score is not finite.
        """
        if cls.score is SaliencyMethod.score:
            raise TypeError(
                f"{cls.__name__} has no score: expected a subclass of SaliencyMethod "
                "with a static score(weight, signal) of its own"
            )
        signal, parts = dict(cls.measure(probe)), probe.parts
        alone = getattr(cls.score, "elementwise", False)
        if alone:
            parts = WHOLE
        scores, sums = {}, []
        for name, part in probe.weights.items():
            weight, measured = parts.whole(name, part), signal.pop(name, None)
            if measured is not None:
                measured = parts.whole(name, measured)
            score = cls.score(weight, measured)
            if isinstance(score, Tensor) and score.is_complex():
                raise ValueError(
                    f"{cls.__name__}.score: expected real scores for {name}, got "
                    f"{score.dtype}"
                )
            if not isinstance(score, Tensor) or score.shape != weight.shape:
                came = tuple(score.shape) if isinstance(score, Tensor) else score
                raise ValueError(
                    f"{cls.__name__}.score: expected a tensor of the weight's shape "
                    f"{tuple(weight.shape)} for {name}, got {came}"
                )
            if (
                score.untyped_storage().data_ptr()
                == weight.untyped_storage().data_ptr()
            ):
                score = score.clone()
            if not (cls.looks or alone):  # a random one has its own on each rank
                probe.parts.ranks.share([score])
            score = parts.part(name, score)
            scores[name] = score if score.is_floating_point() else score.double()
            # While it is in the cache; a sum may overflow where every score is finite.
            sums.append(scores[name].sum())
        dtype = reduce(torch.promote_types, (s.dtype for s in scores.values()))
        scores = {name: score.to(dtype) for name, score in scores.items()}
        if not torch.stack([s.double().cpu() for s in sums]).isfinite().all():
            broken = [name for name, s in scores.items() if not s.isfinite().all()]
            if broken:
                raise RuntimeError(
                    f"the saliency of {name_some(broken)} is not finite at step "
                    f"{probe.step}: its gradient (or the weight itself) is NaN or inf. "
                    "Look at the data and the initialisation, or score in float32 "
                    "instead of 16 bits"
                )
        return scores

    def ranking(self, t: Tensor) -> Tensor:
        """Scores to rank by, from what PyTorch hands over; default: ``t`` itself.

        Args:
            t: ``importance_scores``, or the weight itself where none were given; that
                it requires a gradient tells the weight from scores.

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
        """Mask that keeps the largest scores among the weights not pruned yet.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.compute_mask`.

        Args:
            t: Scores of any shape, higher = keep.
            default_mask: Mask of earlier prunings, of the same shape.

        Returns:
            Bool mask of the same shape (one byte a weight), True = kept; of equal
            scores the first in row-major order are kept.

        Raises:
            ValueError: More weights are to be removed than there are, or a score is
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
            # Scores of True and False are a mask that was chosen elsewhere.
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
        return top_k_masks([scores], kept, among=[eligible])[0][0]

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: float | int,
        importance_scores: Tensor | None = None,
    ) -> Reparametrisation:
        """Prune one tensor of a module and reparametrise it, as PyTorch does.

        Mirrors :meth:`torch.nn.utils.prune.BasePruningMethod.apply`: afterwards the
        module has ``{name}_orig`` (the parameter), ``{name}_mask`` (a bool buffer) and
        a forward pre-hook that multiplies the two. On a module that is pruned already
        the new mask only removes more.

        Args:
            module: Module that holds the tensor.
            name: Name of the parameter within the module, e.g. ``"weight"``.
            amount: Fraction (float) or number (int) of the weights not pruned yet.
            importance_scores: Scores of the parameter's shape, higher = keep.

        Returns:
            The pruning method, or a :class:`torch.nn.utils.prune.PruningContainer`
            where the tensor was pruned before.

        Raises:
            TypeError: ``amount`` is no number, or ``importance_scores`` no tensor.
            ValueError: An argument does not fit; the module is unchanged.
        """
        method = cls(amount)
        parameter = module._parameters.get(parameter_key(module, name))
        if parameter is None:
            raise ValueError(f"{type(module).__name__} has no parameter {name!r}")
        scores = importance_scores
        if scores is None:
            scores = parameter.detach().requires_grad_()
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"importance_scores: expected a tensor, got {type(scores).__name__}"
            )
        if scores.shape != parameter.shape:
            raise ValueError(
                f"importance_scores: expected the shape of {name}, "
                f"{tuple(parameter.shape)}, got {tuple(scores.shape)}"
            )
        earlier = pruned_so_far(module, name)
        if earlier is None:
            earlier = torch.ones_like(parameter, dtype=torch.bool)
        mask = method.compute_mask(scores, earlier)
        return reparametrise(module, name, mask, method)


class SNIP(SaliencyMethod):
    """``|θ ⊙ g(θ)|``, once, on the dense network; SNIP-MB with several batches.

    Source: Lee et al. 2019 (arXiv 1810.02340), equation 6; the gradient is averaged
    over the batches before the absolute value, as in de Jorge et al. 2021.
    """

    steps: ClassVar[int | None] = 1

    @staticmethod
    @elementwise
    def score(weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.mul_(weight).abs_()


class IterSNIP(SNIP):
    """``|θ ⊙ g(θ ⊙ c)|`` over the weights still kept, in T steps.

    Source: de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.
    """

    steps = None


class FORCE(IterSNIP):
    """``|θ ⊙ g(θ ⊙ c)|`` over all weights, in T steps: pruned weights may come back.

    θ is the dense weight, and the gradient of the pruned network is not masked.
    Source: de Jorge et al. 2021 (arXiv 2006.09081), Algorithm 1.
    """

    regrows = True


class GraSP(SaliencyMethod):
    """``θ ⊙ Hg``, once, on the dense network; GraSP-MB with several batches.

    The paper scores S = −θ ⊙ Hg and removes the highest. Its re-initialisation of
    linear layers is left out: what is scored is what is trained. Source: Wang et al.
    2020 (arXiv 2002.07376), equation 8.

    Attributes:
        temperature: Divides the outputs before the loss. Default: 200. A loss that
            comes from ``forward=`` is taken as it is.
    """

    steps = 1
    temperature: ClassVar[float] = 200.0

    @classmethod
    def measure(cls, probe: Probe) -> Mapping[str, Tensor]:  # noqa: D102
        return probe.hessian_gradients(cls.temperature)

    @staticmethod
    @elementwise
    def score(weight: Tensor, hessian_gradient: Tensor) -> Tensor:  # noqa: D102
        return hessian_gradient.mul_(weight)


class GraSPIt(SaliencyMethod):
    """``g(θ ⊙ c)²`` over the weights still kept, in T steps.

    Source: the public code of de Jorge et al. 2021 ("GRASP-It").
    """

    @staticmethod
    @elementwise
    def score(weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.square_()


class SynFlow(SaliencyMethod):
    """``|θ ⊙ ∂R/∂θ|`` over the weights still kept, without data, in T steps.

    R is the sum of the outputs for an input of ones, with every parameter and buffer
    replaced by its absolute value, in evaluation mode and in float64 (products over
    many layers overflow float32). The paper takes 100 steps. Source: Tanaka et al. 2020
    (arXiv 2006.05467), Algorithm 1.
    """

    @classmethod
    def measure(cls, probe: Probe) -> Mapping[str, Tensor]:  # noqa: D102
        return probe.synflow_gradients()

    @staticmethod
    @elementwise
    def score(weight: Tensor, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.mul_(weight.to(gradient.dtype)).abs_()


class SNIPIt(SNIP):
    """``|θ ⊙ g| / L`` over the weights still kept, in evaluation mode, in 7 steps.

    L is one number, so the ranking within a step is SNIP's. Source: Verdenius et al.
    2020 (arXiv 2006.00896), with its own schedule of sparsities.
    """

    steps = 7
    schedule = "snip_it"

    @classmethod
    def measure(cls, probe: Probe) -> Mapping[str, Tensor]:  # noqa: D102
        with probe.evaluation_mode():
            gradients = probe.gradients()
        # A loss of 0 has no elasticity; the ranking does not depend on it.
        return {name: g.div_(probe.loss or 1.0) for name, g in gradients.items()}


class Magnitude(SaliencyMethod):
    """``|θ|``, without data: the baseline of every comparison."""

    steps = 1
    looks = False

    @classmethod
    def measure(cls, probe: Probe) -> Mapping[str, None]:  # noqa: D102
        return dict.fromkeys(probe.weights)

    @staticmethod
    @elementwise
    def score(weight: Tensor, signal: None) -> Tensor:  # noqa: D102
        return weight.abs()

    def ranking(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.abs()


class Random(SaliencyMethod):
    """Uniform noise, without data.

    The scores come from PyTorch's global generator on the CPU: ``torch.manual_seed``
    decides, the device does not, and this is the one method that advances it.
    """

    steps = 1
    looks = False

    @classmethod
    def measure(cls, probe: Probe) -> Mapping[str, None]:  # noqa: D102
        return dict.fromkeys(probe.weights)

    @staticmethod
    def score(weight: Tensor, signal: None) -> Tensor:  # noqa: D102
        return torch.rand(weight.shape).to(weight.device)

    def ranking(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.rand(t.shape).to(t.device) if t.requires_grad else t


METHODS: dict[str, type[SaliencyMethod]] = {
    "force": FORCE,
    "iter_snip": IterSNIP,
    "snip": SNIP,
    "grasp": GraSP,
    "grasp_it": GraSPIt,
    "synflow": SynFlow,
    "snip_it": SNIPIt,
    "magnitude": Magnitude,
    "random": Random,
}


def find_method(method: str | type[SaliencyMethod]) -> type[SaliencyMethod]:
    """The class of a method that is given by name or as a class.

    Raises:
        TypeError: It is neither.
        ValueError: No method has this name.
    """
    if isinstance(method, type) and issubclass(method, SaliencyMethod):
        return method
    if not isinstance(method, str):
        raise TypeError(
            "method: expected a name or a subclass of SaliencyMethod, got "
            + (method.__name__ if isinstance(method, type) else type(method).__name__)
        )
    if method not in METHODS:
        close = difflib.get_close_matches(method.lower(), METHODS, n=1)
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, or a class, got {method!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return METHODS[method]
