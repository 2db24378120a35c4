"""Callbacks for Lightning: prune when training starts, or while it goes on.

    from force_plugin.lightning import ForcePruning

    trainer = lightning.Trainer(callbacks=[ForcePruning(0.99)])

They need ``pip install lightning``; nothing else in this package does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor
from torch.nn.utils import prune

from force_plugin.masks import apply_masks, get_masks
from force_plugin.methods import SaliencyMethod, find_method
from force_plugin.parameters import find_weights
from force_plugin.permanent import make_permanent
from force_plugin.pruning import force_prune, saliency
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
        # Lightning asks for the dataloader after this hook, unless it has it already.
        trainer.fit_loop.setup_data()
        with _training_loss(trainer, pl_module, self.options) as options:
            loader: Any = trainer.train_dataloader
            return force_prune(pl_module, loader, self.sparsity, **options)

    def state_dict(self) -> dict[str, Any]:
        """The masks, bool tensors by parameter name, for a checkpoint."""
        return {"masks": {name: mask.cpu() for name, mask in self._masks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint."""
        self._masks = state_dict["masks"]


class SaliencyPruning(ModelPruning):
    """Lightning's ``ModelPruning``, for the methods that need scores.

    Mirrors :class:`lightning.pytorch.callbacks.ModelPruning`, which prunes after every
    epoch, and in all but this: what it prunes by are the scores of
    :func:`force_plugin.saliency` at that moment, on the train dataloader and with the
    module's own ``training_step`` as the loss. Like it, it sets the weights back to
    their values before training, unless ``use_lottery_ticket_hypothesis=False``. Until
    training ends the masks are those of
    :func:`torch.nn.utils.prune.global_unstructured`, which cannot be copied.

    Args:
        pruning_fn: A name of ``force_plugin.METHODS`` or a class. Default:
            ``"force"``.
        scoring: Keyword arguments of :func:`force_plugin.saliency`: ``batches``, ...
        options: Those of ``ModelPruning``: ``amount``, the share of what is left that
            each pruning removes, ``parameter_names``, ...

    Raises:
        TypeError, ValueError: There is no such method.
        MisconfigurationException: What ``ModelPruning`` raises.
        RuntimeError: When it prunes, what ``saliency`` raises.
    """

    pruning_fn: type[SaliencyMethod]

    def __init__(  # noqa: D107 (the class has it)
        self,
        pruning_fn: str | type[SaliencyMethod] = "force",
        *,
        scoring: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(find_method(pruning_fn), **options)
        self._scoring = scoring or {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the parameters, as ``ModelPruning`` does."""
        super().setup(trainer, pl_module, stage)
        self._scored = trainer, pl_module

    def apply_pruning(self, amount: int | float) -> None:
        """Score, and prune what ``ModelPruning`` chose by that."""
        trainer, module = self._scored
        pairs = list(self._parameters_to_prune)
        with _training_loss(trainer, module, self._scoring) as options:
            loader: Any = trainer.train_dataloader
            scores = saliency(
                module, loader, self.pruning_fn, parameters=pairs, **options
            )
        prune.global_unstructured(
            pairs,
            pruning_method=self.pruning_fn,
            importance_scores={
                owner: scores[weight.name]
                for weight in find_weights(module, pairs)
                for owner in weight.owners
            },
            amount=amount,
        )


@contextmanager
def _training_loss(
    trainer: Trainer, pl_module: LightningModule, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Options with the module's ``training_step`` as the loss, unless there is one."""

    def training_loss(module: LightningModule, batch: Any) -> Tensor:
        batch = trainer.precision_plugin.convert_input(batch)
        result = module.training_step(batch, 0)
        loss = result["loss"] if isinstance(result, Mapping) else result
        assert isinstance(loss, Tensor)
        return loss

    forward = {} if "loss_fn" in options else {"forward": training_loss}
    # Lightning refuses to log in some hooks, and these steps train nothing.
    vars(pl_module)["log"] = lambda *args, **kwargs: None
    try:
        yield {**forward, **options}
    finally:
        del vars(pl_module)["log"]
