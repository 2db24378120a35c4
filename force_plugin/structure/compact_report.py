"""Report what a smaller model saves: channels, parameters, multiplications."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from force_plugin.data.containers import count_samples, tensors
from force_plugin.model.restoring import undisturbed
from force_plugin.report.text import COLUMNS, table_rows
from force_plugin.structure.channel_layers import channels_of, layers_of
from force_plugin.structure.example_inputs import call, checked_inputs


@dataclass(frozen=True)
class LayerSize:
    """The channels of one convolution or linear layer, before and after compaction.

    Attributes:
        name: Name of the layer, e.g. ``"layer1.0.conv1"``.
        inputs: Input channels (features) before and after.
        outputs: Output channels (features) before and after.
    """

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]


@dataclass(frozen=True)
class CompactReport:
    """The sizes of a model before and after compaction; ``str()`` is a table.

    Attributes:
        layers: Every convolution and linear layer, in the order of the modules.
        channels: Number of output channels of all layers, before and after.
        parameters: Number of values in all parameters, masked values included, before
            and after.
        multiplications: Multiplications (with an addition each) in the forward pass of
            one sample, before and after.
            :class:`torch.utils.flop_counter.FlopCounterMode` counts them in
            convolutions, linear layers, other matrix products and attention.
    """

    layers: tuple[LayerSize, ...]
    channels: tuple[int, int]
    parameters: tuple[int, int]
    multiplications: tuple[int, int]

    def __str__(self) -> str:
        """Return a table of at most 80 columns: each layer, then the sums."""
        rows = [("inputs", "outputs")]
        rows += [(_change(*one.inputs), _change(*one.outputs)) for one in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        header, *layers = (
            f"{inputs:>{widths[0]}}  {outputs:>{widths[1]}}" for inputs, outputs in rows
        )
        names = [layer.name for layer in self.layers]
        longest = max(map(len, ["layer", *names]))
        width = min(longest, COLUMNS - 2 * 2 - sum(widths))
        lines, note = table_rows(names, layers, width)
        sums = [
            (what, f"{before:,}", f"{after:,}", _share(before, after))
            for what, (before, after) in (
                ("channels", self.channels),
                ("parameters", self.parameters),
                ("multiplications", self.multiplications),
            )
        ]
        sizes = [max(map(len, column)) for column in zip(*sums, strict=True)]
        totals = [
            f"{what:<{sizes[0]}}  {before:>{sizes[1]}} -> {after:>{sizes[2]}}"
            f"  {share:>{sizes[3]}}"
            for what, before, after, share in sums
        ]
        rule = "-" * max(width + 2 * 2 + sum(widths), *map(len, totals))
        header = f"{'layer':<{width}}  {header}"
        return "\n".join([header, rule, *lines, rule, *totals, *note])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists and numbers, for JSON.

        Returns:
            ``channels``, ``parameters`` and ``multiplications`` are pairs of before
            and after. ``layers`` is a list of dictionaries with ``name``, ``inputs``
            and ``outputs``.
        """
        return asdict(self)


def compact_report(
    before: nn.Module, after: nn.Module, example_inputs: Any
) -> CompactReport:
    """Compare a model with the smaller model that was made from it.

    Args:
        before: The model that :func:`force_plugin.compact` or
            :func:`force_plugin.snap_prune` was called with.
        after: The model that the function returned.
        example_inputs: Inputs for both models: a tensor, a tuple of arguments or a
            mapping of keyword arguments. Each model runs once, in evaluation mode.
            Multiplications are counted for one sample.

    Returns:
        The report.

    Raises:
        TypeError: A model is no module, or there is no tensor among the inputs.
        ValueError: The names of the layers differ between the models.
    """
    for argument, model in (("before", before), ("after", after)):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{argument}: expected a torch.nn.Module, got {type(model).__name__}"
            )
    sizes = [
        {name: channels_of(layer) for name, layer in layers_of(model)}
        for model in (before, after)
    ]
    if sizes[0].keys() != sizes[1].keys():
        other = sorted(sizes[0].keys() ^ sizes[1].keys())
        raise ValueError(
            "after: expected a model with the same layers as the one before, but only "
            f"one of them has {other[0]}"
        )
    layers = tuple(
        LayerSize(name, (had[0], has[0]), (had[1], has[1]))
        for (name, had), has in zip(sizes[0].items(), sizes[1].values(), strict=True)
    )
    return CompactReport(
        layers,
        (sum(s.outputs[0] for s in layers), sum(s.outputs[1] for s in layers)),
        (_parameters(before), _parameters(after)),
        (
            multiplications(before, example_inputs),
            multiplications(after, example_inputs),
        ),
    )


def multiplications(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiplications of one sample's forward pass in evaluation mode."""
    inputs = checked_inputs(model, example_inputs, "example_inputs")
    counter = FlopCounterMode(display=False)
    # FlopCounterMode does not count the fused attention of CPUs.
    with (
        undisturbed(model),
        _frozen(model),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        counter,
    ):
        call(model.eval(), inputs)
    samples = count_samples(list(tensors(inputs))) or 1
    return int(counter.get_total_flops()) // 2 // samples


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turn ``requires_grad`` off for all parameters inside a ``with`` block.

    ``expand`` of a parameter that requires gradients requires gradients too, even under
    no_grad, but has no gradient function. The hooks of the counter fail if a module
    gets such an expanded parameter.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    try:
        for one in trained:
            one.requires_grad_(False)
        yield
    finally:
        for one in trained:
            one.requires_grad_()


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _share(before: int, after: int) -> str:
    return f"{100 * after / before:.2f} %" if before else "-"
