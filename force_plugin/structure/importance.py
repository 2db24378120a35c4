"""Saliencies of force_plugin as an importance for the pruners of torch-pruning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from typing_extensions import Unpack

from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.registry import find_method
from force_plugin.model.module_names import name_some
from force_plugin.pruning.loop import saliency
from force_plugin.scoring.passes import Loader, Passes, PassOptions
from force_plugin.structure.channel_layers import LAYERS, channel_sums


class SaliencyImportance(tp.importance.Importance):  # type: ignore[misc]
    """The saliency of channels, for any pruner of torch-pruning.

    An instance is the ``importance`` argument of the pruner::

        importance = SaliencyImportance(model, loader, "force")
        torch_pruning.pruner.BasePruner(model, example_inputs, importance).step()

    The importance of a channel is the sum of the saliencies of all weights that go with
    the channel: rows of the layers that write it, and columns of the layers that read
    it. Saliencies are measured at the first call, and again once layers have been cut.
    The model keeps its mode for the measurement; torch-pruning leaves the model in
    evaluation mode.

    A warning names layers that torch-pruning has not seen. torch-pruning traces in
    evaluation mode, unless the pruner's ``forward_fn`` calls the model in training mode
    too.

    Source: the criterion of the method, summed over a group of
    :class:`torch_pruning.dependency.Group` (Fang et al. 2023, arXiv 2301.12900).

    Args:
        model: The model that the pruner prunes.
        loader: Batches, as in :func:`force_plugin.force_prune`.
        method: A name of ``force_plugin.METHODS``, or a class.
        options: Options of :func:`force_plugin.saliency` for the passes: ``batches``
            (default: 1; ``None``: the whole loader), ``loss_fn``, ``forward``,
            ``open_gates``, ``microbatch``, ``autocast``, ``channels_last`` and
            ``compile``.

    Raises:
        TypeError, ValueError: ``method`` is no method, or an option is invalid.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        model: nn.Module,
        loader: Loader,
        method: str | type[SaliencyMethod] = "force",
        **options: Unpack[PassOptions],
    ) -> None:
        find_method(method)
        Passes.of(options, "SaliencyImportance")
        self._model = model
        self._loader = loader
        self._method = method
        self._options = options
        self._scores: dict[str, Tensor] = {}

    def __call__(self, group: Any) -> Tensor:
        """Return the saliency of each channel of a group.

        Args:
            group: A :class:`torch_pruning.dependency.Group`.

        Returns:
            Sums in float64 of shape ``[len(group[0].idxs)]``, in the order of
            ``group[0].idxs``.

        Raises:
            TypeError, ValueError, RuntimeError: See :func:`force_plugin.saliency`.
        """
        names = {module: name for name, module in self._model.named_modules()}
        if not self._scores:
            _warn_of_missing(names, group)
        self._measure(names)
        first = group[0]
        places: dict[int, int] = {}
        for place, index in enumerate(first.idxs):
            places.setdefault(index, place)
        total = torch.zeros(len(first.idxs), dtype=torch.float64)
        for item in group:
            layer, handler = item.dep.target.module, item.dep.handler
            scores = self._scores.get(f"{names.get(layer)}.weight")
            if not isinstance(layer, LAYERS) or scores is None:
                continue
            inputs = handler == group._DG.get_pruner_of_module(layer).prune_in_channels
            sums = channel_sums(layer, scores, inputs=inputs)
            own = item.idxs if item is first else item.root_idxs
            roots = torch.tensor([places[root] for root in own])
            total.index_add_(0, roots, sums[torch.tensor(item.idxs)])
        return total.to(first.dep.target.module.weight.device)

    def _measure(self, names: Mapping[nn.Module, str]) -> None:
        weights = {
            f"{name}.weight": module.weight
            for module, name in names.items()
            if isinstance(module, LAYERS)
        }
        known = {name: scores.shape for name, scores in self._scores.items()}
        if known and all(known.get(n, w.shape) == w.shape for n, w in weights.items()):
            return
        scores = saliency(self._model, self._loader, self._method, **self._options)
        self._scores = {n: score.double().cpu() for n, score in scores.items()}


def _warn_of_missing(names: Mapping[nn.Module, str], group: Any) -> None:
    """Warn of layers that are missing in the graph of a group."""
    known = {
        part for one in group._DG.module2node if one in names for part in one.modules()
    }
    missing = [
        name
        for layer, name in names.items()
        if isinstance(layer, LAYERS) and layer not in known
    ]
    if missing:
        warnings.warn(
            f"torch-pruning's graph does not show {name_some(missing)}: nothing is "
            "taken out there, and it may no longer fit the rest. Where layers run in "
            "training mode only, pass the pruner a forward_fn= that calls the model in "
            "both modes and returns all outputs",
            stacklevel=3,
        )
