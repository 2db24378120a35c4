"""Callbacks for Lightning: prune when training starts, or during training.

    from force_plugin.lightning import ForcePruning

    trainer = lightning.Trainer(callbacks=[ForcePruning(0.99)])

The callbacks need ``pip install lightning``; the rest of this package does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin.data.containers import tensors
from force_plugin.masks.apply import apply_masks, get_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.registry import find_method
from force_plugin.model.weights import (
    named_parameters,
)
from force_plugin.model.weights_to_prune import find_parameter, find_weights
from force_plugin.pruning.loop import force_prune, saliency
from force_plugin.report.sparsity import SparsityReport, sparsity_report
from force_plugin.trainers.fit_loop import score_by_steps


class ForcePruning(Callback):
    """Prune a ``LightningModule`` before its first training step.

    The callback calls :func:`force_plugin.force_prune` with the module's own
    ``training_step`` as the loss. ``training_step`` gets the batches of the train
    dataloader after the transfer hooks of the module and the data module. It runs in
    the trainer's precision.

    The callback then calls :func:`force_plugin.make_permanent`. The module gets plain
    parameters and state-dict keys, and its pruned weights stay 0. Averages
    (``WeightAveraging``, ``StochasticWeightAveraging``, and copies of the weights in
    other callbacks) keep the zeros too. Checkpoints hold the masks in the callback's
    state, one byte for each weight. ``fit(ckpt_path=...)`` continues with these masks
    and does not prune again.

    Pruning happens in ``on_train_batch_start`` of the first batch. Optimizers exist
    then, and ``on_train_start`` and ``on_train_epoch_start`` have run. During scoring,
    the module's ``on_train_batch_start`` runs before each ``training_step``. Nothing is
    logged, counted or profiled. Module, data module, trainer, learning rates, random
    states and train dataloader are restored afterwards.

    Use a new callback for each module. Strategies that split or load a module after
    ``on_fit_start`` (FSDP, DeepSpeed) are not supported. With ``precision="16-mixed"``,
    scoring runs in float32, because small gradients underflow in float16.

    Args:
        sparsity: Fraction of the prunable weights to remove, 0 ≤ sparsity < 1.
        options: Keyword arguments of :func:`force_plugin.force_prune`: ``method``,
            ``steps``, ``batches``, ... With ``loss_fn`` or ``forward``, the
            ``training_step`` is not used; the batches do not change.

    Attributes:
        report: The :class:`force_plugin.SparsityReport`, ``None`` before training.

    Raises:
        TypeError, ValueError, RuntimeError: An error of ``force_prune``, when training
            starts.
        BatchError: There is no loss to score, because optimisation is manual or
            ``training_step`` returns None for every batch.

    Warns:
        UserWarning: Training ended before its first batch, so nothing is pruned.
    """

    def __init__(self, sparsity: float, **options: Any) -> None:  # noqa: D107
        self.sparsity = sparsity
        self.options = options
        self.report: SparsityReport | None = None
        self._masks: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the masks of a checkpoint or of an earlier ``fit``."""
        if self._masks:
            apply_masks(pl_module, self._masks)
            self.report = sparsity_report(pl_module)
            make_permanent(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune before the first training batch."""
        if self._masks:
            return
        copies = _copies(trainer, pl_module)
        self.report = score_by_steps(
            trainer,
            pl_module,
            self.options,
            lambda loader, options: force_prune(
                pl_module, loader, self.sparsity, **options
            ),
        )
        self._masks = get_masks(pl_module)
        make_permanent(pl_module)
        for name, tensor in copies:
            if name in self._masks:
                tensor.masked_fill_(~self._masks[name].to(tensor.device), 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there was no batch to train on."""
        if not self._masks:
            warnings.warn(
                "ForcePruning prunes before the first training batch, and training has "
                "ended without one: nothing is pruned",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the masks for a checkpoint, bool tensors by parameter name."""
        return {"masks": {name: mask.cpu() for name, mask in self._masks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the masks of a checkpoint."""
        self._masks = state_dict["masks"]


class SaliencyPruning(ModelPruning):
    """Lightning's ``ModelPruning`` with the saliency methods of force_plugin.

    Like :class:`lightning.pytorch.callbacks.ModelPruning`, the callback prunes after
    every epoch. The difference is the criterion: weights are pruned by the scores of
    :func:`force_plugin.saliency` at that moment. The loss is the module's own
    ``training_step`` on its training batches, as in :class:`ForcePruning`. As in
    ``ModelPruning``, weights are set back to their values before training, after the
    last epoch too, unless ``use_lottery_ticket_hypothesis=False``.

    ``ModelPruning`` of Lightning 2.6.6 differs in these points:

    - ``use_global_unstructured=False`` prunes each tensor separately here;
      ``ModelPruning`` refuses classes then.
    - Checkpoints hold the masks and the values before training, so that
      ``fit(ckpt_path=...)`` continues with them. In ``ModelPruning``, pruned weights
      return. With ``make_pruning_permanent=False``, Lightning cannot load its
      checkpoint into a new module; :func:`force_plugin.load_pruned_state_dict` can.
    - The weights are set back after every pruning. ``ModelPruning`` sets them back only
      once on a CPU, where training overwrites the stored values.
    - The pruned module can be copied while it is trained.
    - Modules and buffers with ``_mask`` in their names can be saved.
    - ``Trainer.validate`` prunes nothing, even with
      ``prune_on_train_epoch_end=False``.

    Args:
        pruning_fn: A name of ``force_plugin.METHODS`` or a class. Default:
            ``"force"``.
        scoring: Keyword arguments of :func:`force_plugin.saliency`: ``batches``,
            ``forward``, ``loss_fn``, ...
        use_global_unstructured: Whether to prune a share of all weights together,
            instead of a share of each tensor. Default: True.
        options: Keyword arguments of ``ModelPruning``: ``amount`` (the share of the
            remaining weights that each pruning removes), ``parameter_names``,
            ``verbose``, ...

    Raises:
        TypeError, ValueError: ``pruning_fn`` is no method.
        MisconfigurationException: An error of ``ModelPruning``. Or ``pruning_dim`` or
            ``pruning_norm`` is given, which are for structured pruning.
        RuntimeError: An error of ``saliency``, at a pruning.
        BatchError: See :class:`ForcePruning`; raised at a pruning.
    """

    pruning_fn: type[SaliencyMethod]

    def __init__(  # noqa: D107 (the class has it)
        self,
        pruning_fn: str | type[SaliencyMethod] = "force",
        *,
        scoring: Mapping[str, Any] | None = None,
        use_global_unstructured: bool = True,
        **options: Any,
    ) -> None:
        method = find_method(pruning_fn)
        structured = {"pruning_dim", "pruning_norm"} & {
            name for name, value in options.items() if value is not None
        }
        if structured:
            raise MisconfigurationException(
                f"{method.__name__} prunes single weights, without "
                f"{' and '.join(sorted(structured))}; leave that out"
            )
        super().__init__(method, **options)
        self._pruning_method_name = method.__name__  # for verbose=
        self._scoring = scoring or {}
        self._together = use_global_unstructured
        self._masks: dict[str, Tensor] = {}
        self._resumed: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the parameters, as ``ModelPruning`` does."""
        super().setup(trainer, pl_module, stage)
        self._scored = trainer, pl_module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the masks of a checkpoint, and load the values before training."""
        if self._resumed:
            self._masks = self._resumed["masks"]
            if self._masks:
                apply_masks(pl_module, self._masks)
            initial = zip(self._initial(), self._resumed["initial"], strict=False)
            for tensor, value in initial:
                tensor.copy_(value)
            self._resumed = {}

    def on_validation_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Prune if the options ask for it, and only during training."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)

    def _apply_global_pruning(self, amount: int | float) -> None:
        """Score the parameters that ``ModelPruning`` chose, and prune them."""
        trainer, module = self._scored
        pairs = list(self._parameters_to_prune)
        scores = score_by_steps(
            trainer,
            module,
            self._scoring,
            lambda loader, options: saliency(
                module, loader, self.pruning_fn, parameters=pairs, **options
            ),
        )
        method = self.pruning_fn(amount)
        weights = find_weights(module, pairs)
        for group in [weights] if self._together else [[w] for w in weights]:
            left = [
                torch.ones_like(w.local, dtype=torch.bool) if w.mask is None else w.mask
                for w in group
            ]
            mask = method.compute_mask(
                torch.cat([scores[weight.name].flatten() for weight in group]),
                torch.cat([one.flatten() for one in left]),
            )
            parts = torch.split(mask, [one.numel() for one in left])
            self._masks |= {
                weight.name: part.reshape(one.shape)
                for weight, part, one in zip(group, parts, left, strict=True)
            }
        apply_masks(module, self._masks)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Make parameters plain again, with zeros for pruned weights."""
        if prune.is_pruned(module):
            make_permanent(module, hold_zeros=False)

    def _make_pruning_permanent_on_state_dict(
        self, pl_module: LightningModule
    ) -> dict[str, Any]:
        """Return a state dict on the CPU with plain keys and pruned weights as 0."""
        state = pl_module.state_dict()
        for key in list(state):
            name = key.removesuffix("_mask")
            if name != key and f"{name}_orig" in state:
                pruned = ~state.pop(key).bool()
                state[name] = state.pop(f"{name}_orig").masked_fill(pruned, 0)
        return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the data of ``ModelPruning``, the masks, and the values before training.

        They are not the callback's state: Lightning would confuse two callbacks of a
        class that has a state.
        """
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = {
            "masks": {name: mask.cpu() for name, mask in self._masks.items()},
            "initial": [tensor.cpu() for tensor in self._initial()],
        }
        checkpoint.setdefault(_CHECKPOINT_KEY, []).append(state)

    def on_load_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the masks and the values before training from a checkpoint."""
        ours = [cb for cb in trainer.callbacks if isinstance(cb, SaliencyPruning)]
        states = dict(enumerate(checkpoint.get(_CHECKPOINT_KEY, [])))
        self._resumed = states.get(ours.index(self), {})

    def _initial(self) -> list[Tensor]:
        """Return the parameters' values before training, if they are stored."""
        return [
            getattr(layer["data"], name).detach()
            for layer in (self._original_layers or {}).values()
            for _, name in layer["names"]
        ]

    @staticmethod
    def _copy_param(new: nn.Module, old: nn.Module, name: str) -> None:
        """Set a parameter back to an old value, in its own memory and type."""
        parameter = find_parameter(new, name)
        if parameter is not None:
            parameter.detach().copy_(getattr(old, name).detach())


_CHECKPOINT_KEY = "force_plugin.SaliencyPruning"


def _copies(trainer: Any, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the copies of a module's parameters in callbacks, such as averages."""
    values = [value for one in trainer.callbacks for value in vars(one).values()]
    held = [
        tensor.detach()
        for value in values
        for tensor in (
            value.parameters() if isinstance(value, nn.Module) else tensors(value)
        )
        if not tensor.is_meta
    ]
    return [
        (name, tensor)
        for name, weight in named_parameters(module).items()
        for tensor in held
        if tensor.shape == weight.dense.shape
        and torch.equal(tensor.to(weight.dense), weight.dense)
    ]
