"""Remove whole channels by the sensitivity of the loss, through torch-pruning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Unpack

from force_plugin.data.containers import mapped
from force_plugin.errors import (
    CollapseError,
    CompactionError,
    NotFiniteError,
    NothingToPruneError,
)
from force_plugin.model.module_names import name_some
from force_plugin.model.restoring import without_trace
from force_plugin.model.weights_to_prune import find_weights
from force_plugin.parallel.ranks import Ranks, unwrap
from force_plugin.parallel.shards import Shards
from force_plugin.pruning.loop import require_one_start
from force_plugin.scoring.passes import Loader, Passes, PassOptions
from force_plugin.scoring.probe import Probe
from force_plugin.selection.schedules import count_kept, kept_per_step
from force_plugin.selection.top_k import top_k_masks
from force_plugin.structure.both_modes import Behaviour
from force_plugin.structure.channel_layers import channel_sums, channels_of, layers_of
from force_plugin.structure.channels import Channels
from force_plugin.structure.cut_copies import (
    plain_copy,
    rebuilt,
    tell_features,
)
from force_plugin.structure.example_inputs import (
    checked_inputs,
    in_float64,
    many_samples,
)
from force_plugin.structure.surgery import Surgery, without_reading


@torch.inference_mode(False)
def snap_prune(
    model: nn.Module,
    loader: Loader,
    example_inputs: Any,
    sparsity: float,
    *,
    steps: int = 5,
    method: Literal["snap", "random"] = "snap",
    ignored_layers: Iterable[nn.Module] = (),
    progress: bool = True,
    **options: Unpack[PassOptions],
) -> nn.Module:
    """Return a smaller model without the least sensitive channels: SNAP-it.

    It is meant for a model before training. Each channel has an imagined gate of 1
    behind the layers that write the channel. The sensitivity of a channel is the
    magnitude of the gradient of the loss with respect to the gate, in evaluation mode.
    The least sensitive channels of the whole network are removed.

    A removal changes the sensitivities of the other channels, so channels are removed
    in steps. The first step removes half of the channels. Each following step covers
    half of the remaining distance to ``sparsity`` (Verdenius et al. 2020, arXiv
    2006.00896).

    Channels that go together through residual sums, concatenations, groups and
    attention heads count as one channel with one gate. The outputs of the last layers
    stay, and at least one channel of each set. Auxiliary heads that run in training
    mode only lose the inputs that they read. Their own channels stay, as they have no
    sensitivity in evaluation mode.

    Args:
        model: Any module; it is not changed. The new model keeps its masks.
        loader: Batches, as in :func:`force_plugin.force_prune`. Each step takes the
            next batches. After the last batch, the loader starts again.
        example_inputs: Inputs of the model: a tensor, a tuple of arguments or a mapping
            of keyword arguments. Any batch size; the values do not matter.
        sparsity: Fraction of the channels to remove, 0 ≤ sparsity < 1. Exactly
            ⌊(1 − sparsity) · m⌋ of m channels stay.
        steps: S: sparsities s − (s − ½)·½^i for i = 0 … S, then s. ``0``: a single
            step to s.
        method: ``"random"`` removes random channels, as a baseline. PyTorch's global
            generator decides which.
        ignored_layers: Modules of the model whose output channels stay.
        progress: Show a progress bar on standard error.
        options: Options of :func:`force_plugin.force_prune` for the passes: ``batches``
            for each step (default: 1; ``None``: the whole loader), ``loss_fn``,
            ``forward``, ``open_gates``, ``microbatch``, ``autocast``, ``channels_last``
            and ``compile``.

    Returns:
        A new model without the removed channels, with its own parameters on the same
        device. Make optimizers from the new model.

    Raises:
        TypeError, ValueError: An argument is invalid.
        NothingToPruneError, BatchError, NoGradientError, NotFiniteError: See
            :func:`force_plugin.force_prune`.
        CollapseError: No gradient passes, so channels cannot be ranked.
        CompactionError: torch-pruning cannot trace the model, no channel can be
            removed, or the smaller model fails or has wrong outputs.

    Warns:
        UserWarning: Some channels stay, because their removal would remove others too
            or make the model fail in a mode. Or training mode cannot be run with
            ``example_inputs``. Or neither mode uses some layers.
    """
    model = unwrap(model)
    inputs = checked_inputs(model, example_inputs, "example_inputs")
    if not any(True for _ in layers_of(model)):
        raise NothingToPruneError(
            "snap_prune: expected a model with convolutions or linear layers, got a "
            f"{type(model).__name__} without any"
        )
    if method not in ("snap", "random"):
        raise ValueError(f'method: expected "snap" or "random", got {method!r}')
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer of at least 0, got {steps!r}")
    if not (hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")):
        raise TypeError(
            "loader: expected an iterable of batches (a DataLoader, a list), got "
            f"{type(loader).__name__}"
        )
    own = {module: name for name, module in model.named_modules()}
    ignored_layers = list(ignored_layers)
    others = [module for module in ignored_layers if module not in own]
    if others:
        raise ValueError(
            "ignored_layers: expected modules of the model, got another "
            f"{type(others[0]).__name__}"
        )
    ignored = {own[part] for module in ignored_layers for part in module.modules()}
    seed = int(torch.randint(2**62, ())) if method == "random" else 0
    generator = torch.Generator().manual_seed(seed)
    inputs = many_samples(mapped(in_float64, inputs))
    onward = _Onward(loader)
    with without_trace(model, loader), torch.enable_grad(), Ranks(model) as ranks:
        passes = Passes.of(options, "snap_prune")
        shards = Shards(model, ranks)
        require_one_start(
            shards,
            find_weights(model, known=shards.parameters),
            *(method, sparsity, steps, sorted(ignored), passes.open_gates),
        )
        plain = plain_copy(model)
        behaviour = Behaviour(plain, {}, inputs)
        surgery = Surgery(plain, behaviour)
        # Always cut the whole model. torch-pruning traces a smaller model differently
        # if convolutions with groups have become depthwise.
        whole = _prunable(surgery, behaviour, ignored)
        gone = {name: torch.zeros(one.size) > 0 for name, one in whole.items()}
        total = sum(len(one.choices) for one in whole.values())
        small = model
        bar = tqdm(
            _kept_after(steps, sparsity, total, len(whole)),
            desc="snap",
            unit="step",
            disable=not progress or ranks.rank > 0,
        )
        for kept in bar:
            sets = _left(model, whole, gone)
            if method == "random":
                scores = {
                    name: torch.rand(len(one.choices), generator=generator).double()
                    for name, one in sets.items()
                }
                ranks.share(scores.values())
            else:
                scores = _sensitivities(
                    small,
                    sets,
                    behaviour.measured,
                    Shards(small, ranks),
                    onward,
                    passes,
                )
            for name, removed in _channels_to_cut(sets, scores, kept).items():
                left = (~gone[name]).nonzero().flatten()
                gone[name][left[removed]] = True
            small = rebuilt(model, surgery.cut(gone))
        _check(surgery, behaviour, gone)
        # With fewer channels, a layer normalisation changes the values of all others.
        rest = {name: own for name, own in gone.items() if not whole[name].normalised}
        if len(rest) < len(gone):
            _check(surgery, behaviour, rest)
    tell_features(model, small)
    return small


class _Onward:
    """A loader whose next iteration continues where the last iteration stopped.

    Once all batches are used, the next iteration starts again.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._rest: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._rest is None:
            self._rest = iter(self._loader)
        # "yield from" would close self._rest together with this generator.
        for batch in self._rest:  # noqa: UP028
            yield batch
        self._rest = None


def _prunable(
    surgery: Surgery, behaviour: Behaviour, ignored: set[str]
) -> dict[str, Channels]:
    """Return the sets that can lose channels, by a trial that removes half of each."""
    problems: dict[str, str] = {}
    wanted: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for name, one in surgery.sets.items():
        writers = {use.layer for use in one.writers}
        if not one.readers or writers & ignored or len(one.choices) < 2:
            continue
        if one.fixed:
            if behaviour.unfollowed:
                problems[name] = behaviour.unfollowed
            continue
        if not writers & behaviour.measured:
            problems[name] = (
                "they have no rank, as no output in evaluation mode depends on them"
            )
            continue
        half = torch.zeros(one.size, dtype=torch.bool)
        half[one.choices[torch.randperm(len(one.choices))[1::2]].flatten()] = True
        for use in (*one.writers, *one.readers):  # each layer keeps a channel
            if half[use.channels].all():
                half[one.choices[(one.choices == use.channels[0]).any(1)]] = False
        wanted[one.normalised][name] = half
    found: dict[str, Tensor] = {}
    for some in wanted.values():
        good, bad = surgery.possible(some, partial(_problem, surgery, behaviour))
        found, problems = found | good, problems | bad
    kind = type(behaviour.variants[0]).__name__
    if not found:
        why = next(reversed(problems.values()), "there are none")
        raise CompactionError(
            f"snap_prune: no channels of {kind} can be taken out: {why}. The model is "
            "as it was"
        )
    if problems:
        name, reason = next(iter(problems.items()))
        warnings.warn(
            f"{len(problems)} of {len(found) + len(problems)} sets of channels stay as "
            f"they are (that of {name}, for one): {reason}",
            stacklevel=4,
        )
    for complaint in behaviour.complaints(True):
        warnings.warn(complaint, stacklevel=4)
    return {name: surgery.sets[name] for name in found}


def _problem(
    surgery: Surgery,
    behaviour: Behaviour,
    cut: nn.Module,
    removed: Mapping[str, Tensor],
) -> str | None:
    """Return what is wrong with a copy that lost channels, or ``None``.

    The outputs must equal the outputs of a whole model whose layers read 0 instead of
    the removed channels. With a layer normalisation, which runs over the remaining
    channels, only the shapes are compared.
    """
    sets = {name: surgery.sets[name] for name in removed}
    unread = [
        (use, removed[name][use.channels])
        for name, one in sets.items()
        for use in one.readers
    ]
    return behaviour.problem(
        cut,
        partial(without_reading, unread=unread),
        values=not any(one.normalised for one in sets.values()),
        because=", as more than these channels would go",
    )


def _check(
    surgery: Surgery, behaviour: Behaviour, removed: Mapping[str, Tensor]
) -> None:
    """Raise CompactionError if something is wrong with the model to be returned."""
    cut = surgery.cut(removed)
    problem = _problem(surgery, behaviour, cut, removed)
    if problem is not None:
        raise CompactionError(
            f"snap_prune: without these channels of {type(cut).__name__}, {problem}. "
            "The model is as it was"
        )


def _left(
    model: nn.Module, sets: Mapping[str, Channels], gone: Mapping[str, Tensor]
) -> dict[str, Channels]:
    """Return the sets without the removed channels."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for name, one in sets.items():
        for uses, stay, side in ((one.writers, outputs, 1), (one.readers, inputs, 0)):
            for use in uses:
                if use.layer not in stay:
                    size = channels_of(model.get_submodule(use.layer))[side]
                    stay[use.layer] = torch.ones(size, dtype=torch.bool)
                stay[use.layer][use.positions[gone[name][use.channels]]] = False
    return {
        name: one.without(gone[name], outputs, inputs) for name, one in sets.items()
    }


def _kept_after(steps: int, sparsity: float, total: int, sets: int) -> list[int]:
    """Return the number of channels to keep after each step."""
    if isinstance(sparsity, Real) and 0 <= sparsity < 1:
        last = count_kept(total, 1 - float(sparsity))
        if last < sets:
            possible = math.floor((1 - sets / total) * 1e6) / 1e6
            raise ValueError(
                f"sparsity: {sparsity} leaves {last} of {total} channels, and one in "
                f"each of {sets} sets must stay; at most {possible} is possible"
            )
    return kept_per_step("snip_it", steps + 2 if steps else 1, sparsity, total)


def _sensitivities(
    model: nn.Module,
    sets: Mapping[str, Channels],
    measured: Set[str],
    shards: Shards,
    loader: Loader,
    passes: Passes,
) -> dict[str, Tensor]:
    """Return the magnitude of the gate's gradient for each unit, by set, in float64.

    The gradient of a gate behind a layer is the sum of θ · g over the weights and the
    bias of the gate's channel. Layers that run in training mode only add nothing.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = {use.layer for one in sets.values() for use in one.writers} & measured
    parameters = [
        (model.get_submodule(layer), key)
        for layer in sorted(layers)
        for key in ("weight", "bias")
        if getattr(model.get_submodule(layer), key) is not None
    ]
    weights = find_weights(model, parameters, shards.parameters)
    with Probe(model, weights, loader, passes, shards=shards) as probe:
        with probe.evaluation_mode():
            gradients = probe.gradients()
        sums = {}
        for weight in weights:
            products = gradients.pop(weight.name).mul_(probe.weights[weight.name])
            for layer, key in weight.owners:
                found = products
                if key == "weight":
                    found = channel_sums(layer, products.double(), inputs=False)
                sums[f"{names[layer]}.{key}"] = found.double().cpu()
    broken = [name for name, one in sums.items() if not one.isfinite().all()]
    if broken:
        raise NotFiniteError(
            f"the sensitivity of {name_some(broken)} is not finite: its gradient (or "
            "the weight itself) is NaN or inf. Look at the data and the initialisation"
        )
    scores = {}
    for name, one in sets.items():
        gates = torch.zeros(one.size, dtype=torch.float64)
        for use in one.writers:
            for key in ("weight", "bias"):
                if f"{use.layer}.{key}" in sums:
                    gradient = sums[f"{use.layer}.{key}"][use.positions]
                    gates.index_add_(0, use.channels, gradient)
        scores[name] = gates[one.choices].sum(1).abs()
    if not any(score.any() for score in scores.values()):
        raise CollapseError(
            "the sensitivity of every channel is exactly 0: no gradient passes. Look "
            "at the data and the initialisation, or take out fewer channels"
        )
    return scores


def _channels_to_cut(
    sets: Mapping[str, Channels], scores: Mapping[str, Tensor], kept: int
) -> dict[str, Tensor]:
    """Return the channels to remove so that ``kept`` units stay.

    The best unit of each layer stays too.
    """
    ranked = {name: score.clone() for name, score in scores.items()}
    for name, one in sets.items():
        for use in (*one.writers, *one.readers):
            of_layer = torch.isin(one.choices, use.channels).any(1)
            best = torch.where(of_layer, scores[name], -1).argmax()
            ranked[name][best] = torch.inf
    needed = sum(int(score.isinf().sum()) for score in ranked.values())
    if needed > kept:
        raise ValueError(
            f"sparsity: expected a lower one, as {kept} channels would be left, and "
            f"{needed} must stay, so that each layer keeps one"
        )
    stay, _ = top_k_masks(ranked, kept)
    removed = {}
    for name, one in sets.items():
        removed[name] = torch.zeros(one.size, dtype=torch.bool)
        removed[name][one.choices[~stay[name]].flatten()] = True
    return removed
