"""A callback for Lightning: prune when training starts.

    from force_plugin.lightning import ForcePruning

    trainer = lightning.Trainer(callbacks=[ForcePruning(0.99)])

It needs ``pip install lightning``; nothing else in this package does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from force_plugin.masks import apply_masks, get_masks
from force_plugin.permanent import make_permanent
from force_plugin.pruning import force_prune
from force_plugin.report import SparsityReport, sparsity_report


class ForcePruning(Callback):
    """Prune a ``LightningModule`` before its first training step.

    Mirrors :func:`force_plugin.force_prune` on the train dataloader, with the module's
    own ``training_step`` as the loss (nothing is logged meanwhile), and then
    :func:`force_plugin.make_permanent`: the module has plain parameters and state-dict
    keys, and its pruned weights stay 0. Averages (``WeightAveraging``,
    ``StochasticWeightAveraging``) keep the zeros too. Checkpoints hold the masks in the
    callback's state, one byte a weight, so that ``fit(ckpt_path=...)`` goes on with
    them and does not prune again.

    One callback is for one module. Strategies that split or load a module after
    ``on_fit_start`` (FSDP, DeepSpeed) are not supported.

    Args:
        sparsity: Fraction of the prunable weights to remove, 0 ≤ sparsity < 1.
        options: Keyword arguments of :func:`force_plugin.force_prune`: ``method``,
            ``steps``, ``batches``, ... With ``loss_fn`` or ``forward`` the
            ``training_step`` is not used.

    Attributes:
        report: The :class:`force_plugin.SparsityReport`, ``None`` before training.

    Raises:
        TypeError, ValueError, RuntimeError: When training starts, what ``force_prune``
            raises.
    """

    def __init__(self, sparsity: float, **options: Any) -> None:  # noqa: D107
        self.sparsity = sparsity
        self.options = options
        self.report: SparsityReport | None = None
        self._masks: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune. The optimizers exist already, and keep their parameters."""
        if not self._masks:
            self.report = self._prune(trainer, pl_module)
            self._masks = get_masks(pl_module)
        else:
            apply_masks(pl_module, self._masks)
            self.report = sparsity_report(pl_module)
        make_permanent(pl_module)

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> SparsityReport:
        def training_loss(module: LightningModule, batch: Any) -> Tensor:
            batch = trainer.precision_plugin.convert_input(batch)
            result = module.training_step(batch, 0)
            loss = result["loss"] if isinstance(result, Mapping) else result
            assert isinstance(loss, Tensor)
            return loss

        # Lightning asks for the dataloader after this hook, unless it has it already.
        trainer.fit_loop.setup_data()
        loader: Any = trainer.train_dataloader
        options = dict(self.options)
        if "loss_fn" not in options:
            options.setdefault("forward", training_loss)
        # Lightning refuses to log in this hook, and these steps train nothing.
        vars(pl_module)["log"] = lambda *args, **kwargs: None
        try:
            return force_prune(pl_module, loader, self.sparsity, **options)
        finally:
            del vars(pl_module)["log"]

    def state_dict(self) -> dict[str, Any]:
        """The masks, bool tensors by parameter name, for a checkpoint."""
        return {"masks": {name: mask.cpu() for name, mask in self._masks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint."""
        self._masks = state_dict["masks"]
