"""Diagnosis of a network before it is pruned."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from force_plugin.errors import NoGradientError
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.registry import find_method, scores_of
from force_plugin.model.coverage import Coverage, passed_over
from force_plugin.model.module_names import name_layers, name_some
from force_plugin.model.weights import Weight
from force_plugin.model.weights_to_prune import find_weights
from force_plugin.parallel.ranks import ALONE, Ranks, unwrap
from force_plugin.parallel.shards import Shards, sharded_modules
from force_plugin.pruning.advice import Advice, advise
from force_plugin.pruning.doubts import find_small, sizes
from force_plugin.report.text import COLUMNS, stage_of, table_rows
from force_plugin.scoring import dead_gradients, gates
from force_plugin.scoring.passes import Loader, Passes, PassOptions
from force_plugin.scoring.probe import Probe
from force_plugin.selection.schedules import check_left, count_kept, kept_per_step
from force_plugin.selection.top_k import top_k_masks


@dataclass(frozen=True)
class StageDiagnosis:
    """The size and the saliency of one part of a network.

    Attributes:
        name: Name of the part, e.g. ``"layer1"`` or ``"stages.0"``.
        layers: Number of prunable layers in the part.
        weights: Number of weights in these layers.
        saliency: Share of the network's saliency that the part has with gates open, in
            [0, 1]. Scores with a sign count by their magnitudes. Weights that were
            pruned before do not count.
        closed: Share of the network's saliency that the part has when the gates stay
            closed, in [0, 1].
    """

    name: str
    layers: int
    weights: int
    saliency: float
    closed: float


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of :func:`force_plugin.diagnose`; ``print`` shows it in 80 columns.

    Attributes:
        parameters: Number of values in the network's parameters.
        prunable: Number of prunable weights that get a gradient.
        method: Name of the method that scored the network.
        stages: The parts of the network, in the order of its layers.
        gates: The closed gates that pruning opens while it scores.
        silent: Layers whose saliency is exactly 0 everywhere with gates open, each
            with the reason.
        hidden: Layers whose saliency is exactly 0 everywhere when the gates stay
            closed.
        unused: Layers that the loss does not use.
        emptied: For each sparsity, the number of layers that lose every weight when
            the weights are ranked once. The first number is for gates that are opened,
            the second for gates that stay closed. Weights that were pruned before
            count as lost.
        small: Layers with small initial weights that lose every weight at one of these
            sparsities with gates open. The value is the size of these weights in units
            of PyTorch's own initialisation.
        passed_over: Number of weights in matrices and kernels that are not prunable, by
            the type of their module, as in :class:`force_plugin.SparsityReport`. Layers
            that the loss does not use are left out.
        chosen: Whether ``parameters=`` named the weights to prune.
        advice: The method and the number of steps to begin with, if the caller gave a
            sparsity.
    """

    parameters: int
    prunable: int
    method: str
    stages: tuple[StageDiagnosis, ...]
    gates: tuple[gates.Gate, ...]
    silent: Mapping[str, str]
    hidden: tuple[str, ...]
    unused: tuple[str, ...]
    emptied: Mapping[float, tuple[int, int]]
    small: Mapping[str, float]
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False)
    chosen: bool = field(default=False, compare=False)
    advice: Advice | None = field(default=None, compare=False)

    @property
    def coverage(self) -> float:
        """Share of the model's matrix and kernel weights that is prunable, in [0, 1].

        ``passed_over`` counts all other matrix and kernel weights.
        """
        return Coverage(self.prunable, self.passed_over).share

    @property
    def layers(self) -> int:
        """Number of prunable layers that get a gradient."""
        return sum(stage.layers for stage in self.stages)

    @property
    def findings(self) -> tuple[str, ...]:
        """The findings that the user should know, a sentence each, or none."""
        found: list[str] = []
        if not self.chosen:
            found += Coverage(self.prunable, self.passed_over).doubts()
        found += gates.remarks_on({gate.name: gate for gate in self.gates})
        # A layer that is silent with open gates too has a line of its own.
        if helped := [name for name in self.hidden if name not in self.silent]:
            found.append(
                f"{name_layers(helped, self.layers)} have no saliency as long as "
                "the gates are closed: keep open_gates=True"
            )
        found += dead_gradients.sentences(self.silent, self.layers)
        if self.small:
            found.append(
                f"{name_layers([*self.small], self.layers)} lose every weight and have "
                f"small initial weights: {sizes(self.small)}"
            )
        if self.unused:
            found.append(
                f"the loss does not use {name_some(self.unused)}: leave such layers "
                "out with parameters=, or pass a forward= whose loss uses them"
            )
        return tuple(found)

    def __str__(self) -> str:
        """Return a table of the stages, the emptied layers and the findings."""
        share = 100 * self.prunable / self.parameters
        lines = [
            *_wrap(
                f"{self.parameters:,} parameters, {self.prunable:,} of them "
                f"({share:.1f} %) prunable in {self.layers} layers"
            ),
            *self._left_out(),
            "",
            *self._table(),
            "",
            *_wrap(f"layers that lose every weight, ranked once by {self.method}"),
        ]
        labels = [f"at {100 * sparsity:.10g} %" for sparsity in self.emptied]
        width = max(map(len, labels), default=0) + 3
        for label, (opened, closed) in zip(labels, self.emptied.values(), strict=True):
            also = f" ({closed} with gates closed)" if self.gates else ""
            lines.append(f"  {label:<{width}}{opened} of {self.layers}{also}")
        lines.append("")
        for finding in self.findings:
            lines += _wrap(f"- {finding}")
        if not self.findings:
            lines.append("every layer has a saliency")
        if self.advice:
            reasons = (f"- {reason}" for reason in self.advice.reasons)
            lines.append("")
            for line in (*str(self.advice).splitlines(), *reasons):
                lines += _wrap(line)
        return "\n".join(lines)

    __repr__ = __str__

    def _left_out(self) -> list[str]:
        if not self.passed_over:
            return []
        return _wrap(f"prunable: {Coverage(self.prunable, self.passed_over)}")

    def _table(self) -> list[str]:
        rows = [
            (
                str(stage.layers),
                f"{stage.weights:,}",
                f"{100 * stage.weights / self.prunable:.2f} %",
                f"{100 * stage.saliency:.2f} %",
                f"{100 * stage.closed:.2f} %",
            )
            for stage in self.stages
        ]
        header = ("layers", "weights", "share", "saliency", "gates closed")
        table = [row[: None if self.gates else -1] for row in (header, *rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        first, *rests = ("  ".join(map(str.rjust, row, widths)) for row in table)
        names = [stage.name for stage in self.stages]
        longest = max(map(len, ["stage", *names]))
        width = min(longest, COLUMNS - 2 * len(widths) - sum(widths))
        lines, note = table_rows(names, rests, width)
        rule = "-" * (width + 2 + len(first))
        return [f"{'stage':<{width}}  {first}", rule, *lines, rule, *note]

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain types that :func:`json.dumps` takes."""
        plain = asdict(self)
        plain["silent"] = dict(self.silent)
        plain["passed_over"] = dict(self.passed_over)
        plain["small"] = dict(self.small)
        plain["advice"] = self.advice and self.advice.to_dict()
        plain["emptied"] = {str(key): value for key, value in self.emptied.items()}
        return plain | {
            "layers": self.layers,
            "coverage": self.coverage,
            "findings": [str(finding) for finding in self.findings],
        }


@torch.inference_mode(False)
def diagnose(
    model: nn.Module,
    loader: Loader,
    method: str | type[SaliencyMethod] = "force",
    *,
    parameters: Iterable[tuple[nn.Module, str]] | None = None,
    sparsities: Iterable[float] = (0.9, 0.95, 0.99),
    sparsity: float | None = None,
    **options: Unpack[PassOptions],
) -> Diagnosis:
    """Return a diagnosis of a network, without pruning the network.

    The network is scored once as :func:`force_plugin.saliency` scores it. If it has
    closed gates, it is scored once more with these gates closed. Afterwards the
    network is unchanged, bit for bit.

    Args:
        model: Any module, pruned before or not.
        loader: Batches, as in :func:`force_plugin.force_prune`.
        method: A name of ``force_plugin.METHODS``, or a subclass of
            :class:`~force_plugin.SaliencyMethod`.
        parameters: ``[(module, "weight"), ...]``; default as in
            :func:`force_plugin.force_prune`.
        sparsities: Fractions of all prunable weights to remove, 0 ≤ sparsity < 1. The
            diagnosis counts the emptied layers for each fraction.
        sparsity: The fraction that the caller wants to remove, 0 ≤ sparsity < 1. If it
            is given, the diagnosis advises a method and a number of steps, and counts
            the emptied layers for this fraction too. The advice rests on the gradients
            of the loss, which takes one more measurement, whatever the ``method`` is.
            Default: ``None``, no advice.
        options: How batches are passed through the network, as in
            :func:`force_plugin.force_prune`: ``batches`` (default: 1; ``None``: the
            whole loader), ``loss_fn``, ``forward``, ``open_gates``, ``microbatch``,
            ``autocast``, ``channels_last`` and ``compile``.

    In a distributed job each process measures its own batches, and may call this
    function alone. If the model is sharded, every rank must call this function, and
    the measurement covers the batches of all ranks.

    Returns:
        The diagnosis.

    Raises:
        TypeError, ValueError: An argument is not as expected.
        NothingToPruneError, BatchError, MethodError, NoGradientError, NotFiniteError:
            As in :func:`force_plugin.force_prune`. But a loss that uses only some of
            the weights is no error here.
    """
    model = unwrap(model)
    # The ranks of a sharded model can only measure it together.
    with Ranks(model) if sharded_modules(model) else ALONE as ranks:
        shards = Shards(model, ranks)
        criterion = find_method(method)
        weights = find_weights(model, parameters, shards.parameters)
        shards.check(weights)
        fractions = _fractions(sparsities)
        if sparsity is not None:
            total = sum(weight.dense.numel() for weight in weights)
            (kept,) = kept_per_step("exponential", 1, sparsity, total)
            masked = {
                w.name: ~shards.local(w.name, w.mask)
                for w in weights
                if w.mask is not None
            }
            removed = sum(shards.totals.count(masked).values())
            check_left(kept, total - removed, total, sparsity)
            fractions = (*dict.fromkeys([*fractions, float(sparsity)]),)
        passes = Passes.of(options, "diagnose")
        rest = passed_over(model, shards.parameters, {w.name for w in weights})

        def score(
            chosen: Sequence[Weight], open_gates: bool
        ) -> tuple[dict[str, Tensor], Probe, dict[str, str]]:
            wanted = passes.opening(open_gates and criterion.looks)
            with Probe(model, chosen, loader, wanted, shards=shards) as probe:
                scores = scores_of(criterion, probe)
                blind = shards.totals.empty(scores) if open_gates else ()
                return scores, probe, probe.explain_zero_saliency(blind)

        unused: tuple[str, ...] = ()
        try:
            scores, probe, silent = score(weights, True)
        except NoGradientError as error:
            unused = tuple(error.names)
            weights = [weight for weight in weights if weight.name not in unused]
            if not weights:
                raise
            scores, probe, silent = score(weights, True)
        for problem in probe.problems if ranks.rank == 0 else ():
            warnings.warn(problem, stacklevel=3)  # past inference_mode
        closed = score(weights, False)[0] if probe.gates else scores
        hidden = shards.totals.empty(closed)

        # A weight that an earlier pruning removed has no share, and stays removed.
        masks = {
            w.name: shards.local(w.name, w.mask) for w in weights if w.mask is not None
        }
        left = [
            {n: s[masks[n]] if n in masks else s for n, s in one.items()}
            for one in (scores, closed)
        ]
        totals = [
            dict(
                zip(one, shards.totals.sum(*map(_magnitude, one.values())), strict=True)
            )
            for one in left
        ]
        prunable = sum(weight.dense.numel() for weight in weights)
        emptied = {
            sparsity: [
                _emptied(one, count_kept(prunable, 1 - sparsity), shards)
                for one in left
            ]
            for sparsity in fractions
        }
        advice = None
        if sparsity is not None:
            snip, behind = _gradients_of_loss(model, weights, loader, passes, shards)
            snip = {n: s[masks[n]] if n in masks else s for n, s in snip.items()}
            kept = count_kept(prunable, 1 - float(sparsity))
            follows = sum(w.dense.numel() for w in weights if w.name in behind)
            advice = advise(
                float(sparsity),
                kept,
                sum(weight.channels for weight in weights),
                len(_emptied(snip, kept, shards)),
                len(weights),
                follows / prunable,
            )
        lost = {name for opened, _ in emptied.values() for name in opened}
        small = find_small(
            (name, probe.parameters[name].rows(shards.whole(name, weight)))
            for name, weight in probe.weights.items()
            if name in lost
        )
    members: dict[str, list[Weight]] = {}
    for weight in weights:
        members.setdefault(stage_of(weight.name), []).append(weight)
    stages = []
    for stage, layers in members.items():
        shares = [
            sum(total[layer.name] for layer in layers) / (sum(total.values()) or 1.0)
            for total in totals
        ]
        count = sum(layer.dense.numel() for layer in layers)
        stages.append(StageDiagnosis(stage, len(layers), count, *shares))
    return Diagnosis(
        parameters=sum(w.dense.numel() for w in probe.parameters.values()),
        prunable=prunable,
        method=method if isinstance(method, str) else method.__name__,
        stages=tuple(stages),
        gates=tuple(probe.gates.values()),
        silent=silent,
        hidden=tuple(hidden),
        unused=unused,
        emptied={
            sparsity: (len(opened), len(closed))
            for sparsity, (opened, closed) in emptied.items()
        },
        small=small,
        passed_over=rest,
        chosen=parameters is not None,
        advice=advice,
    )


def _gradients_of_loss(
    model: nn.Module,
    weights: Sequence[Weight],
    loader: Loader,
    passes: Passes,
    shards: Shards,
) -> tuple[dict[str, Tensor], set[str]]:
    """Return SNIP's scores, and the names of the weights behind a normalisation.

    Weights that the loss does not use have no score.
    """
    try:
        with Probe(model, weights, loader, passes, shards=shards) as probe:
            gradients = probe.gradients()
            behind = probe.scale_free(gradients)
            scores = {n: g.mul_(probe.weights[n]).abs_() for n, g in gradients.items()}
            return scores, behind
    except NoGradientError as error:
        used = [weight for weight in weights if weight.name not in error.names]
        if not used or len(used) == len(weights):
            raise
        return _gradients_of_loss(model, used, loader, passes, shards)


def _magnitude(scores: Tensor) -> float:
    return float(scores.double().abs().sum())


def _fractions(sparsities: Iterable[float]) -> tuple[float, ...]:
    if not isinstance(sparsities, Iterable):
        raise TypeError(
            "sparsities: expected fractions such as (0.9, 0.95), got "
            f"{type(sparsities).__name__}"
        )
    fractions = tuple(sparsities)
    for sparsity in fractions:
        if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
            raise TypeError(
                "sparsities: expected fractions such as (0.9, 0.95), got "
                f"{type(sparsity).__name__} among them"
            )
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsities: expected fractions, 0 <= sparsity < 1, got {sparsity}"
            )
    return tuple(map(float, fractions))


def _emptied(scores: Mapping[str, Tensor], kept: int, shards: Shards) -> list[str]:
    """Return the layers that keep no weight when the largest scores are kept."""
    left = shards.totals.size([*scores.values()])
    masks, _ = top_k_masks(scores, min(kept, left), shards.totals)
    return shards.totals.empty(masks)


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent="  ")
