"""Score a model by its ``training_step``, called as in Lightning's fit loop."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.loops.fetchers import (
    _DataFetcherWrapper,
    _DataLoaderIterDataFetcher,
    _PrefetchDataFetcher,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from force_plugin.data.containers import describe, mapped, to_device
from force_plugin.errors import BatchError
from force_plugin.model.restoring import restored, rewound

T = TypeVar("T")


def score_by_steps(
    trainer: Trainer,
    module: LightningModule,
    options: Mapping[str, Any],
    measure: Callable[[Iterable[Any], dict[str, Any]], T],
) -> T:
    """Return a measurement with ``training_step`` as the loss.

    If the options contain a loss, their loss is used instead.

    Args:
        trainer: The trainer, in its fit loop.
        module: The module that the trainer trains.
        options: Options of :func:`force_plugin.saliency` or
            :func:`force_plugin.force_prune`.
        measure: Called with a loader and the options, which then contain a loss.
    """
    own = options.get("forward") is None and "loss_fn" not in options
    step = _TrainingStep(trainer, module, own)
    if own:
        options = {**options, "forward": step.loss}
    with _without_logging(trainer, module):
        try:
            return measure(step, dict(options))
        except _Skipped:
            # Measure again without skipped batches. It costs a further pass per batch.
            step.skips = True
            return measure(step, dict(options))


class _Skipped(Exception):
    """A ``training_step`` returned None, which leaves the batch out."""


class _TrainingStep:
    """A loader of a trainer's batches, and the loss of ``training_step`` on a batch.

    The loader yields iterators over batches instead, if ``training_step`` takes a
    ``dataloader_iter``. :meth:`loss` returns the loss of a batch or an iterator.

    Args:
        trainer: The trainer, in its fit loop.
        module: The module that the trainer trains.
        own: Whether the loss of ``training_step`` is scored. If ``False``, the loader
            always yields batches.

    Attributes:
        skips: Whether to run ``training_step`` once more for each batch, and leave out
            batches for which it returns None. Default: False.
    """

    def __init__(self, trainer: Any, module: LightningModule, own: bool) -> None:
        self.skips = False
        self._trainer = trainer
        self._module = module
        self._iterates = own and isinstance(
            trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher
        )
        self._index = 0  # index of the batch that was read last

    def __iter__(self) -> Iterator[Any]:
        fetcher = _PrefetchDataFetcher()
        # A copy, because the loop's own loader is within an epoch.
        fetcher.setup(copy(self._trainer.fit_loop._combined_loader))
        seen = given = 0
        for fetched in fetcher:
            raw, self._index, _ = fetched
            seen += 1
            batch = (
                _Rereadable(fetcher, fetched)
                if self._iterates
                else self._transferred(raw)
            )
            if batch is not None and (not self.skips or self._takes(batch)):
                given += 1
                yield batch
        if not given:
            came = f"it returned None for all {seen}" if seen else "there is none"
            raise BatchError(
                "training_step: expected at least one batch of the train dataloader "
                f"with a loss, but {came}",
                "pass forward=, a callable (module, batch) -> loss, or other data, in "
                "a dataloader that can be read again",
            )

    def _takes(self, batch: Any) -> bool:
        """Return whether ``training_step`` returns a result for a copy of a batch."""
        return self._run(to_device(batch, self._module.device, {})) is not None

    def _transferred(self, batch: Any) -> Any:
        """Return a batch of the dataloader as ``training_step`` gets it."""
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
        return call._call_strategy_hook(
            self._trainer, "batch_to_device", batch, dataloader_idx=0
        )

    def _run(self, batch: Any) -> Any:
        """Return the result of ``training_step``, or None if the batch has no step."""
        run = partial(call._call_lightning_module_hook, self._trainer)
        start, arguments = batch, [batch]
        if self._iterates:
            start = None
            batch.rewind()
        else:
            loop = self._trainer.fit_loop.epoch_loop
            kwargs = loop._build_kwargs(OrderedDict(), batch, self._index)
            arguments = [*kwargs.values()]
        if run("on_train_batch_start", start, self._index) == -1:
            return None
        precision = self._trainer.precision_plugin
        # In float16, small gradients underflow without the trainer's GradScaler.
        half = precision.precision == "16-mixed"
        with nullcontext() if half else precision.train_step_context():
            # With the strategy's training_step, DistributedDataParallel would wait for
            # a backward pass.
            try:
                return run("training_step", *arguments)
            except StopIteration:  # Lightning ends the epoch
                return None

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Return a batch's loss, as a ``forward`` of :func:`force_plugin.saliency`."""
        name = type(self._module).__name__
        if not self._module.automatic_optimization:
            raise BatchError(
                f"training_step: {name} has automatic_optimization=False, so it takes "
                "optimizer steps itself and there is no loss to score",
                "pass forward=, a callable (module, batch) -> loss, or loss_fn= (to "
                "SaliencyPruning in scoring=)",
            )
        result = self._run(batch)
        if result is None and not self.skips and self._trainer.world_size == 1:
            raise _Skipped
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            return loss
        came = "None" if result is None else describe(result)
        if isinstance(result, Mapping):
            came += f" with {', '.join(map(repr, result)) or 'nothing'}"
            came += "" if loss is None else f", the loss {describe(loss)}"
        if isinstance(loss, Tensor) and not loss.requires_grad:
            came += ", without a gradient"
        raise BatchError(
            "training_step: expected a loss of one number that depends on the weights "
            f'through autograd, or a mapping with it as "loss", got {came}',
            "pass forward=, a callable (module, batch) -> loss, to score by another",
        )


class _Rereadable(_DataFetcherWrapper):
    """A ``dataloader_iter`` of one step that can be read again after a rewind."""

    def __init__(
        self, fetcher: _PrefetchDataFetcher, first: tuple[Any, int, int]
    ) -> None:
        super().__init__(fetcher)  # type: ignore[arg-type]
        self._fetcher = fetcher
        self._read = [first]
        self._place = 0

    def rewind(self) -> None:
        self._place = 0

    def __next__(self) -> tuple[Any, int, int]:
        if self._place == len(self._read):
            self._read.append(next(self._fetcher))
        self._place += 1
        batch, *indices = self._read[self._place - 1]
        return (mapped(torch.clone, batch), *indices)


@contextmanager
def _without_logging(trainer: Any, module: LightningModule) -> Iterator[None]:
    """Run steps inside a ``with`` block without logging, counting or traces."""
    loop, stage = trainer.fit_loop, trainer.state.stage
    loaders = loop._combined_loader.flattened
    if any(isinstance(loader, Iterator) for loader in loaders):
        warnings.warn(
            "the train dataloader can be read only once, so training lacks the batches "
            "that are scored; make it a DataLoader or a list",
            stacklevel=2,
        )
    logged = [part for part in module.modules() if isinstance(part, LightningModule)]
    modes = [(part, part.training) for part in module.modules()]
    groups = [group for one in trainer.optimizers for group in one.param_groups]
    settings = [dict(group) for group in groups]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    data = [trainer.datamodule] if trainer.datamodule is not None else []
    with ExitStack() as stack:
        stack.enter_context(restored([trainer, *data, *schedulers]))
        for loader in loaders:
            stack.enter_context(rewound(loader))
        trainer.loggers = [_Silent(logger) for logger in trainer.loggers]
        trainer.profiler = PassThroughProfiler()
        trainer.training = True
        if stage != RunningStage.TRAINING:  # e.g. at the end of the validation
            loop.epoch_loop.val_loop._module_mode.restore(module)
        for part in logged:
            # Lightning refuses to log in some hooks, and scoring needs no log.
            vars(part)["log"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            for part in logged:
                del vars(part)["log"]
            for owner, mode in modes:
                owner.training = mode
            for group, values in zip(groups, settings, strict=True):
                group.clear()
                group.update(values)
            trainer.state.stage = stage


class _Silent(DummyLogger):
    """A logger that only has the names and paths of a given logger.

    A ``training_step`` may ask for names and paths.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> Any:
        return self._logger.name

    @property
    def version(self) -> Any:
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._logger, name, None)
        return super().__getattr__(name) if callable(value) else value
