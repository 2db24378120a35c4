"""Remove the channels that masks cut off, without a change of the outputs.

The cut-off channels are measured, not derived from the names of operations. Copies of
the model get random values wherever no mask is. A channel is cut off from the inputs if
its values are equal for all inputs. It is cut off from the outputs if no gradient comes
back to it. Every removal is checked: if the outputs change in float64, in either mode,
the set of channels stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from force_plugin.data.containers import count_samples, mapped, tensors
from force_plugin.errors import CompactionError, NotPrunedError
from force_plugin.model.restoring import restored, undisturbed
from force_plugin.model.torch_internals import BatchNorm
from force_plugin.model.weights import named_parameters
from force_plugin.parallel.ranks import unwrap
from force_plugin.scoring.connectivity import find_flow
from force_plugin.selection.schedules import check_count
from force_plugin.structure.both_modes import Behaviour, Mode, in_mode, is_bias
from force_plugin.structure.channel_layers import channel_axis, layers_of
from force_plugin.structure.channels import Channels
from force_plugin.structure.cut_copies import (
    deep_copy,
    plain_copy,
    rebuilt,
    tell_features,
)
from force_plugin.structure.example_inputs import (
    call,
    checked_inputs,
    in_float64,
    many_samples,
    shuffled,
)
from force_plugin.structure.surgery import Surgery

_DRAWS = (True, True, False, False)  # whether the random values are all positive

_SAME = 1e-12  # share of a tensor's largest value: smaller differences are rounding


@torch.inference_mode(False)
def compact(
    model: nn.Module,
    example_inputs: Any,
    *,
    round_to: int = 1,
    progress: bool = True,
) -> nn.Module:
    """Return a smaller model without the channels that the masks cut off.

    A channel is removed in two cases. Either no input reaches it, and its value is 0 in
    evaluation mode, or it does not reach the outputs. Its rows and columns are removed
    from all layers that write and read it, also through residual sums, concatenations,
    groups and batch normalisations.

    The result is an ordinary model that keeps its values, masks and modes. Its outputs
    in evaluation mode are unchanged. Its outputs in training mode are unchanged too,
    except for random values and batch statistics.

    The dependency graph of torch-pruning finds the channels that depend on each other
    (Fang et al. 2023, arXiv 2301.12900). It traces training mode too, where training
    uses other layers, for example auxiliary heads.

    These channels stay:

    - at least one channel of each set,
    - channels that carry a constant (the bias of a trained normalisation),
    - the inputs and outputs of the model,
    - channels that a layer normalisation or group normalisation runs over,
    - in each group of a convolution, as many channels as the fullest group needs.

    Args:
        model: A model pruned with :mod:`torch.nn.utils.prune` or
            :func:`force_plugin.force_prune`, made permanent or not. A model without
            masks works too, if its convolutions and linear layers hold zeros. The model
            is not changed.
        example_inputs: Inputs of the model: a tensor, a tuple of arguments or a mapping
            of keyword arguments. Any batch size; the values do not matter.
        round_to: Keep a multiple of this number of channels in each set, if the set has
            enough channels. On most hardware, 8 or 16 is faster than the odd numbers
            that masks leave. Default: 1, every channel that can be removed is removed.
        progress: Show a progress bar on standard error.

    Returns:
        A new model, with its own parameters on the same device.

    Raises:
        TypeError: ``model`` is no module, or there is no tensor in ``example_inputs``.
        NotPrunedError: Nothing is pruned in the model.
        MaskMismatchError: A mask holds other values than 0 and 1.
        ValueError: The model is sharded.
        CompactionError: The model cannot be run or traced, its outputs are NaN, or
            every removal changes its outputs. The message gives the reason.

    Warns:
        UserWarning: Some channels stay although masks cut them off, because their
            removal would change the outputs in a mode. Or training mode cannot be run
            with ``example_inputs``. Or neither mode uses some layers, which then stay
            unchanged. Or the masks have disconnected the network, so that next to
            nothing remains.
    """
    check_count("round_to", round_to)
    model = unwrap(model)
    weights = named_parameters(model)
    masks = {n: w.mask for n, w in weights.items() if w.mask is not None}
    if not masks:
        prunable = {n: w.local != 0 for n, w in weights.items() if w.prunable}
        masks = {n: m for n, m in prunable.items() if m.any() and not m.all()}
    if not masks:
        raise NotPrunedError(
            "compact: expected a model pruned with torch.nn.utils.prune, or one whose "
            "convolutions and linear layers hold zeros among their weights, got one "
            "without any mask or zero"
        )
    inputs = checked_inputs(model, example_inputs, "example_inputs")
    bar = tqdm(
        total=len(_DRAWS) + 3,
        desc="compact",
        disable=not progress,
        bar_format="{l_bar}{bar}| {elapsed}",
    )
    with undisturbed(model), torch.enable_grad(), bar:
        torch.manual_seed(0)
        small = _Compaction(model, masks, inputs, bar.update).result(round_to)
    tell_features(model, small)
    return small


class _Compaction:
    """The measurements on a pruned model, and the smaller model that follows."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        inputs: Any,
        advance: Callable[[], object],
    ) -> None:
        self._advance = advance
        self._model = model
        self._inputs = many_samples(mapped(in_float64, inputs))
        self._masks = masks
        self._plain = plain_copy(model)
        _mask(self._plain, masks)
        self._behaviour = Behaviour(self._plain, masks, self._inputs)
        self._connected = False  # whether random values lead to the outputs

    def result(self, round_to: int) -> nn.Module:
        self._advance()
        behaviour = self._behaviour
        surgery = Surgery(self._plain, behaviour)
        layers = self._cut_off()
        wanted = {
            name: removable
            for name, one in surgery.sets.items()
            if (removable := _removable(one, layers, round_to)).any()
        }
        unfollowed = {
            name: behaviour.unfollowed
            for name, one in surgery.sets.items()
            if behaviour.unfollowed and one.fixed
            if _removable(replace(one, fixed=""), layers, round_to).any()
        }
        removed, problems = surgery.possible(
            wanted, lambda cut, _: behaviour.problem(cut)
        )
        if problems and not removed:
            raise CompactionError(
                f"{type(self._model).__name__}: none of the channels that masks have "
                f"cut off can be taken out: {next(iter(problems.values()))}. The model "
                "is as it was"
            )
        if problems := problems | unfollowed:
            name, reason = next(iter(problems.items()))
            total = len(wanted) + len(unfollowed)
            warnings.warn(
                f"{len(problems)} of {total} sets of channels stay although masks have "
                f"cut some off (that of {name}, for one): {reason}",
                stacklevel=4,
            )
        for complaint in behaviour.complaints(bool(removed)):
            warnings.warn(complaint, stacklevel=4)
        self._advance()
        opened = behaviour.variants[1]
        if not self._connected and (
            find_flow(opened, lambda: call(opened, behaviour.trial)).connected is False
        ):
            warnings.warn(
                "the masks have disconnected the network: its outputs no longer depend "
                "on its inputs, and next to nothing is left of it; prune it less, or "
                "in more steps",
                stacklevel=4,
            )
        small = rebuilt(self._model, surgery.cut(removed))
        self._advance()
        return small

    def _cut_off(self) -> dict[str, Tensor]:
        """Return bool tensors of the layers' input channels by name, True = cut off."""
        modes = self._behaviour.traced
        carried: dict[str, Tensor] = {}
        for mode, one in product(modes, self._behaviour.variants):
            watched = _inputs_seen(one, self._behaviour.trial, mode, graded=False)
            for name, seen in watched.items():
                before = carried.get(name, torch.zeros(()))
                carried[name] = torch.maximum(seen.largest, before)
        layers: dict[str, _Seen] = {}
        for positive in _DRAWS:
            self._advance()
            model = deep_copy(self._plain).requires_grad_(False)
            _randomise(model, self._masks, positive)
            for mode in modes:
                inputs = mapped(partial(_random_like, positive=positive), self._inputs)
                found = _inputs_seen(model, inputs, mode, graded=True)
                for name, seen in found.items():
                    known = layers.setdefault(name, _Seen())
                    known.join(seen.differs, seen.read, seen.largest)
                self._connected |= mode == "evaluation" and any(
                    bool(tensor.grad.any())
                    for tensor in tensors(inputs)
                    if tensor.grad is not None
                )
        varied = any(_varies(tensor) for tensor in tensors(self._inputs))
        for seen in layers.values():
            seen.differs |= not varied
        return {
            name: ~seen.read | (~seen.differs & (carried[name] == 0))
            for name, seen in layers.items()
            if name in carried
        }


@dataclass
class _Seen:
    """Measurements of the input channels of a layer, a value for each channel.

    Attributes:
        differs: Whether the channel's values differ between inputs.
        read: Whether a gradient came back to the channel.
        largest: The largest magnitude of the channel's values.
    """

    differs: Tensor = field(default_factory=lambda: torch.tensor(False))
    read: Tensor = field(default_factory=lambda: torch.tensor(False))
    largest: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    def join(self, differs: Tensor, read: Tensor, largest: Tensor) -> None:
        self.differs = self.differs | differs.cpu()
        self.read = self.read | read.cpu()
        self.largest = torch.maximum(self.largest, largest.cpu())


def _inputs_seen(
    model: nn.Module, inputs: Any, mode: Mode, *, graded: bool
) -> dict[str, _Seen]:
    """Run a model and return measurements of the inputs of each layer, by name.

    Args:
        model: A model in float64. If ``graded``, no parameter requires gradients.
        inputs: The inputs that the model is called with.
        mode: The mode that the model runs in.
        graded: Measure gradients too. Outputs of layers are then scaled to at most 1,
            because no gradient passes a saturated gate. Outputs of embeddings are
            multiplied by random values, so that equal rows differ.
    """
    found: dict[str, _Seen] = {}
    samples = count_samples(inputs)

    def look(
        name: str, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        values = args[0]
        axis = channel_axis(module, values)
        rest = [dim for dim in range(values.dim()) if dim != axis]
        plain = values.detach()
        largest = plain.abs().amax(rest)
        # Samples are compared: padding changes a constant at the border of an image.
        among = [0] if len(plain) == samples else rest
        spread = plain.amax(among, True) - plain.amin(among, True)
        differs = spread.amax(rest) > _SAME * largest.max()
        seen = found.setdefault(name, _Seen())
        nothing = torch.zeros_like(differs)
        seen.join(differs, nothing, largest)
        if not graded:
            return None
        if not values.requires_grad:  # made from integers or parameters alone
            values = plain.clone().requires_grad_()

        def on_gradient(gradient: Tensor) -> None:
            seen.join(nothing, gradient.abs().amax(rest) != 0, nothing.to(largest))

        values.register_hook(on_gradient)
        return values, *args[1:]

    def scale(module: nn.Module, args: object, output: Tensor) -> Tensor:
        largest = output.detach().abs().max()
        return output / largest if largest else output

    def vary(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * _random_like(output, positive=True)

    with ExitStack() as hooks, torch.set_grad_enabled(graded):
        hooks.enter_context(in_mode(model, mode))
        hooks.enter_context(restored(model.modules()))
        for name, module in layers_of(model):
            handle = module.register_forward_pre_hook(partial(look, name))
            hooks.callback(handle.remove)
            if graded:
                hooks.callback(module.register_forward_hook(scale).remove)
        for module in model.modules():
            if graded and isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(vary).remove)
        outputs = [*tensors(call(model, mapped(torch.clone, inputs)))]
    if ends := [output for output in outputs if output.requires_grad]:
        # The plain sum of a softmax or a normalisation is constant: no gradient.
        weights = [torch.rand_like(output) for output in ends]
        torch.autograd.backward(ends, weights)
    return found


def _removable(one: Channels, cut_off: Mapping[str, Tensor], round_to: int) -> Tensor:
    """Return which channels of a set may be removed, bool of shape ``[size]``."""
    free = torch.ones(one.size, dtype=torch.bool)
    for use in one.readers:
        # Layers whose weights are used without a call were not measured.
        gone = cut_off.get(use.layer, torch.zeros(int(use.positions.max()) + 1) > 0)
        free[use.channels[~gone[use.positions]]] = False
    return one.removable(free, round_to)


def _random_like(tensor: Tensor, positive: bool) -> Tensor:
    """Return random values of the same shape, 3 times as large in every second sample.

    Layers with positive weights make any two inputs ever more alike, except in size.
    Integers are shuffled instead.
    """
    if not tensor.is_floating_point():
        return shuffled(tensor)
    values = torch.rand_like(tensor) + 0.5
    if not positive:
        values *= torch.randn_like(tensor).sign()
    values[1::2] *= 3
    return values.requires_grad_(tensor.is_leaf)


def _varies(tensor: Tensor) -> bool:
    """Return whether :func:`_random_like` can change a tensor."""
    return tensor.is_floating_point() or bool((tensor != tensor.flatten()[:1]).any())


@torch.no_grad()
def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, weight in named_parameters(model).items():
        if name in masks:
            weight.dense.mul_(masks[name].to(weight.dense.device))


@torch.no_grad()
def _randomise(model: nn.Module, masks: Mapping[str, Tensor], positive: bool) -> None:
    """Draw random values wherever no mask is, so that no gate is closed.

    If all values are positive, nothing cancels out and no unit is always 0.
    """
    for name, weight in named_parameters(model).items():
        values = weight.dense
        if not values.is_floating_point():
            continue
        values.uniform_(0.5, 1.5)
        if not positive and values.dim() > 1:
            values.mul_(torch.randn_like(values).sign())
        if is_bias(name):
            values.mul_(1e-4)
    _mask(model, masks)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.reset_running_stats()
