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
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin.batches import describe
from force_plugin.connection import tensors
from force_plugin.errors import MethodError, NotFiniteError
from force_plugin.parameters import (
    find_parameter,
    name_some,
    no_parameter,
    pruned_so_far,
)
from force_plugin.reparametrisation import Reparametrisation, reparametrise
from force_plugin.schedules import (
    arguments_of,
    check_arguments,
    check_count,
    count_kept,
    find_schedule,
)
from force_plugin.scoring import Probe, same_bits
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
            weight: The dense weight θ, to be read: to write into it is an error.
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
            MethodError: A score is complex or has another shape than its weight, or
                :meth:`score` or :meth:`measure` writes into the model's weights, which
                are what they were.
            NoGradientError: A weight got no gradient.
            NotFiniteError: A score is not finite.
        """
        if cls.score is SaliencyMethod.score:
            raise TypeError(
                f"{cls.__name__} has no score: expected a subclass of SaliencyMethod "
                "with a static score(weight, signal) of its own"
            )
        signal, parts = cls._measured(probe), probe.parts
        trusted, alone = _is_ours(cls.score), getattr(cls.score, "elementwise", False)
        if alone:
            parts = WHOLE
        guard = nullcontext() if trusted else probe.protected(f"{cls.__name__}.score")
        scores, sums, sound = {}, [], {}
        with guard:
            for name, part in probe.weights.items():
                weight, measured = parts.whole(name, part), signal.pop(name, None)
                if measured is not None:
                    measured = parts.whole(name, measured)
                if trusted:
                    score = cls.score(weight, measured)
                else:
                    sound[name] = [
                        t.isfinite().all()
                        for t in tensors(measured)
                        if t.layout == torch.strided
                    ]
                    score = cls._scored(weight, measured, name)
                score = cls._checked(score, weight, name)
                if (
                    score.untyped_storage().data_ptr()
                    == weight.untyped_storage().data_ptr()
                ):
                    score = score.clone()
                if not (cls.looks or alone):  # a random one has its own on each rank
                    probe.parts.ranks.share([score])
                score = parts.part(name, score)
                scores[name] = score if score.is_floating_point() else score.double()
                # While it is in the cache; a sum may overflow where all are finite.
                sums.append(scores[name].sum())
        dtype = reduce(torch.promote_types, (s.dtype for s in scores.values()))
        scores = {name: score.to(dtype) for name, score in scores.items()}
        if not torch.stack([s.double().cpu() for s in sums]).isfinite().all():
            broken = [name for name, s in scores.items() if not s.isfinite().all()]
            if broken:
                blameless = [n for n in broken if n in sound and all(sound[n])]
                raise cls._not_finite(probe, broken, blameless)
        return scores

    @classmethod
    def _measured(cls, probe: Probe) -> dict[str, Any]:
        """What :meth:`measure` returns; if it writes elsewhere, that is taken back."""
        if _is_ours(cls.measure):
            return dict(cls.measure(probe))
        by = f"{cls.__name__}.measure"
        with probe.protected(by):
            signal = cls.measure(probe)
        if not isinstance(signal, Mapping):
            raise TypeError(
                f"{by}: expected a mapping of parameter names to signals, such as "
                f"probe.gradients(), got {describe(signal)}"
            )
        if missing := [name for name in probe.weights if name not in signal]:
            raise MethodError(
                f"{by}: expected a signal for each weight by its name, got none for "
                f"{name_some(missing)}",
                "take the names of probe.weights, and None for what needs no signal",
            )
        return dict(signal)

    @classmethod
    def _scored(cls, weight: Tensor, measured: Any, name: str) -> Tensor:
        """Score by a method of somebody's own, which may not write to the weight."""
        own = weight.clone()
        score = cls.score(own, measured)
        if not same_bits(own, weight):
            raise MethodError(
                f"{cls.__name__}.score has written into the weight {name}, which it is "
                "given to read",
                "work out of place, weight * signal instead of weight.mul_(signal), or "
                "on weight.clone(); the signal may be overwritten",
            )
        return score

    @classmethod
    def _checked(cls, score: object, weight: Tensor, name: str) -> Tensor:
        """A score as it can be ranked."""
        by = f"{cls.__name__}.score"
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

    @classmethod
    def _not_finite(
        cls, probe: Probe, names: Sequence[str], blameless: Sequence[str]
    ) -> NotFiniteError:
        """Say what has made scores NaN or infinite.

        Args:
            probe: The network.
            names: Of the weights that have such scores.
            blameless: Those of them whose signal is finite.
        """
        found = probe.broken()
        guilty = [name for name in names if name not in blameless]
        if found:
            cause = f"there is a NaN or inf in {name_some(found)}"
            advice = "look at the initialisation, or where these values come from"
        elif not guilty:
            cause = (
                f"the weight and its signal are finite, and {cls.__name__}.score makes "
                "NaN or inf of them"
            )
            advice = (
                "mend this score, where it divides by 0 or takes a root or a logarithm "
                "of what is not positive"
            )
        elif not _is_ours(cls.measure):
            names = guilty
            cause = f"what {cls.__name__}.measure returned for it is NaN or inf"
            advice = "look at this method, at the data and the initialisation"
            advice += probe.wider()
        elif cls.measure == SynFlow.measure:
            cause = (
                "its gradient is NaN or inf, as a product over many layers without "
                "signs overflows float64, or a narrower type that the forward casts to"
            )
            advice = "take another method"
        else:
            names = guilty
            cause = f"its gradient is NaN or inf, or too large for {probe.precision}"
            advice = f"look at the data and the initialisation{probe.wider()}"
        return NotFiniteError(
            f"the saliency of {name_some(names)} is not finite at step {probe.step}: "
            f"{cause}",
            advice,
        )

    def ranking(self, t: Tensor) -> Tensor:
        """Scores to rank by, from what PyTorch hands over; default: ``t`` itself.

        Args:
            t: ``importance_scores``, or the weight itself where none were given; that
                it requires a gradient tells the weight from scores. A copy.

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
        # Copies: a method of one's own may work in place.
        scores = given.detach().clone()
        if importance_scores is None or given.requires_grad:
            scores.requires_grad_()
        earlier = pruned_so_far(module, name)
        if earlier is None:
            earlier = torch.ones_like(parameter, dtype=torch.bool)
        mask = method.compute_mask(scores, earlier.clone())
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
        temperature: Divides the outputs before the loss. Default: 200. Where the loss
            comes from ``forward=``, they are divided where they leave the model, each
            time that it is called, or the one module of it that is. A loss that is
            computed within the model, from several modules, or from outputs that enter
            it again, is taken as it is, with a warning.
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


_OF_PYTORCH: dict[type, str] = {
    prune.L1Unstructured: 'method="magnitude" does the same',
    prune.RandomUnstructured: 'method="random" does the same',
}


def find_method(method: str | type[SaliencyMethod]) -> type[SaliencyMethod]:
    """The class of a method that is given by name or as a class.

    Raises:
        TypeError: It is neither, or a function of the class takes other arguments than
            it will be given.
        ValueError: No method has this name, or its steps or schedule are none.
    """
    if isinstance(method, type) and issubclass(method, SaliencyMethod):
        _check(method)
        return method
    if not isinstance(method, str):
        raise TypeError(
            "method: expected a name or a subclass of SaliencyMethod, got "
            + _what_came(method)
        )
    if method not in METHODS:
        close = difflib.get_close_matches(method.lower(), METHODS, n=1)
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, or a class, got {method!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return METHODS[method]


def scores_of(method: type[SaliencyMethod], probe: Probe) -> dict[str, Tensor]:
    """:meth:`SaliencyMethod.scores`, or what a class has in its place."""
    if _is_ours(method.scores):
        return method.scores(probe)
    with probe.protected(f"{method.__name__}.scores"):
        return method.scores(probe)


def _what_came(method: object) -> str:
    """What is no method, and what to pass instead."""
    kind = method if isinstance(method, type) else type(method)
    name = kind.__name__
    if issubclass(kind, SaliencyMethod):
        return f"an instance of {name}; pass the class itself, method={name}"
    if issubclass(kind, prune.BasePruningMethod):
        instead = "derive it from SaliencyMethod and give it a score"
        if kind.__module__.startswith("torch."):
            instead = "it is for the calls of torch.nn.utils.prune"
        return f"{name}; {_OF_PYTORCH.get(kind, instead)}"
    if inspect.isroutine(method):
        return (
            f"a function; derive a class from SaliencyMethod, and make it its score, "
            f"score = staticmethod({getattr(method, '__name__', 'function')})"
        )
    return f"{name}; leave it out for FORCE" if method is None else name


def _check(method: type[SaliencyMethod]) -> None:
    """Make sure that a class has what a method needs, before anything is measured."""
    _check_function(method, "score", "@staticmethod score(weight, signal)", 2)
    _check_function(method, "measure", "@classmethod measure(cls, probe)", 1)
    if method.steps is not None:
        check_count(f"{method.__name__}.steps", method.steps)
    if method.schedule is not None:
        find_schedule(method.schedule, f"{method.__name__}.schedule")


def _check_function(
    method: type[SaliencyMethod], name: str, expected: str, count: int
) -> None:
    """Make sure that a function can be called on the class, with so many arguments."""
    written, function = inspect.getattr_static(method, name), getattr(method, name)
    label = f"{method.__name__}.{name}"
    if not callable(function):
        raise TypeError(f"{label}: expected {expected}, got {type(written).__name__}")
    if inspect.isfunction(written):
        # Without a decorator nothing is given in the place of self.
        signature = inspect.signature(written)
        if next(iter(signature.parameters), "") in ("self", "cls"):
            raise TypeError(
                f"{label}: expected {expected}, got {name}{arguments_of(signature)} "
                f"without {expected.split()[0]}"
            )
    check_arguments(label, function, expected, count)


def _is_ours(function: object) -> bool:
    """Whether a function stands in this module: what it is given it does not change."""
    return getattr(function, "__globals__", None) is globals()
