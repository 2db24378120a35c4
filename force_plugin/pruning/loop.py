"""The loop: score, select, mask, and again; then prune the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Unpack

from force_plugin.masks.apply import prune_with
from force_plugin.masks.permanent import prune_in_place
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.registry import find_method, scores_of
from force_plugin.model.coverage import Coverage, passed_over
from force_plugin.model.weights import (
    Weight,
)
from force_plugin.model.weights_to_prune import find_weights
from force_plugin.parallel.ranks import Ranks, unwrap
from force_plugin.parallel.shards import Shards
from force_plugin.pruning.doubts import Doubts
from force_plugin.report.sparsity import SparsityReport, report_of
from force_plugin.scoring import gates
from force_plugin.scoring.passes import Loader, Passes, PassOptions
from force_plugin.scoring.probe import Probe
from force_plugin.selection.schedules import (
    Schedule,
    check_count,
    find_schedule,
    kept_per_step,
)
from force_plugin.selection.top_k import top_k_masks

_REPORT = "please report this: the ranks had the same scores"


@torch.inference_mode(False)
def force_prune(
    model: nn.Module,
    loader: Loader,
    sparsity: float,
    *,
    method: str | type[SaliencyMethod] = "force",
    steps: int = 60,
    schedule: str | Schedule = "exponential",
    parameters: Iterable[tuple[nn.Module, str]] | None = None,
    on_collapse: Literal["raise", "warn"] = "raise",
    progress: bool = True,
    **options: Unpack[PassOptions],
) -> SparsityReport:
    """Prune a model in place, before it is trained.

    Algorithm 1 of de Jorge et al. 2021 (arXiv 2006.09081) for ``"force"`` and
    ``"iter_snip"``, and its one-step and data-free relatives. Afterwards the model is
    pruned as :func:`torch.nn.utils.prune.global_unstructured` prunes (``weight_orig``,
    ``weight_mask`` and a forward pre-hook), and everything else is bit for bit what it
    was: values, running statistics, gradients, modes, hooks and, except for
    ``"random"``, the global random state. After an error or Ctrl-C the model is
    untouched.

    The network is scored as it stands: in training mode its batch statistics are those
    of the scoring batches, and dropout is on.

    Where :mod:`torch.distributed` is initialised, every rank must call it, with the
    same model and batches of its own. What is measured is averaged over the ranks, and
    all of them get the same mask; progress and warnings are rank 0's.

    Args:
        model: Any module. On one that is pruned already, only more is removed. Of
            :class:`torch.nn.parallel.DistributedDataParallel`, ``torch.compile`` and
            other wrappers it is the module inside, also in the names. One that
            ``fully_shard`` has sharded is pruned in its shards: no rank holds it or its
            scores, and afterwards its weights are 0 where they are pruned, and held
            there, as :func:`force_plugin.make_permanent` holds them.
        loader: Iterable of batches ``(inputs, targets)``: a ``DataLoader``, a list.
            Each step takes the next ones, from the beginning again when it ends. Their
            tensors are moved to the device of the model's first prunable weight.
        sparsity: Fraction of the prunable weights to remove, 0 ≤ sparsity < 1; exactly
            ⌊(1 − sparsity) · m⌋ of m weights stay.
        method: A name of ``force_plugin.METHODS`` or a subclass of
            :class:`~force_plugin.SaliencyMethod`.
        steps: T, the number of steps; 60 in the FORCE paper, 100 in SynFlow's. Methods
            that fix it keep theirs: ``"snip"``, ``"grasp"``, ``"magnitude"`` and
            ``"random"`` take 1 step, ``"snip_it"`` takes 7.
        schedule: Density after each step: ``"exponential"``, ``"linear"``,
            ``"snip_it"`` or a callable ``(step, steps, density) -> density``.
            ``"snip_it"`` keeps its own as a method, which the report says.
        batches: Batches a step, over which the gradient is averaged (default: 1);
            ``None``: one whole pass of the loader a step.
        loss_fn: ``loss_fn(model(inputs), targets)``, a scalar; default:
            :func:`torch.nn.functional.cross_entropy`.
        forward: ``forward(model, batch)``, a scalar loss, for batches that are no
            ``(inputs, targets)`` pair; replaces ``loss_fn``.
        parameters: ``[(module, "weight"), ...]`` as in
            :func:`torch.nn.utils.prune.global_unstructured`; default: the weight of
            every convolution and linear layer, and of what behaves as a linear layer
            (transformers' ``Conv1D``, a class of one's own that multiplies by its
            two-dimensional ``weight``), but for one that an embedding shares. A shared
            weight counts once.
        open_gates: Score with closed gates opened: what multiplies a branch by 0 or
            nearly 0 (``zero_init_last``, LayerScale, ReZero, skip-init gains) and hides
            its weights from the gradient, and weights that are all (nearly) 0. See
            :mod:`force_plugin.scoring.gates`. ``False`` gives the papers' scores there.
            The model keeps its own values.
        microbatch: Cut each batch into equal microbatches of at most this many samples.
            Only one microbatch has to fit into memory. ``None`` (the default): each
            batch passes as a whole. The tensors and arrays of a batch, in
            tuples, lists, mappings and dataclasses, are split if their first dimension
            is that of the first of them. So are lists with an item a sample (images of
            different sizes, a dictionary for each). The rest goes with each microbatch,
            which has the types of the batch. Its loss counts by its share of the
            samples. So of a loss that is a mean over samples the gradient is that of
            the whole batch, but for what looks at several samples: batch normalisation
            in training mode normalises over a microbatch, and a contrastive loss
            compares within it.
            ``"synflow"`` passes one sample anyway.
        autocast: ``torch.bfloat16``: run the network and the loss under
            :func:`torch.autocast`; ``None`` (the default): as the caller does.
            ``"synflow"``, which needs float64, is left out.
        channels_last: Hand the network inputs of 4 dimensions (floating point) in
            ``torch.channels_last``, and of 5 in ``torch.channels_last_3d``, which may
            be faster (default: False). Weights and masks keep their formats.
        compile: Run the scoring passes by :func:`torch.compile`, all but the first,
            which looks for gates; a string is its ``mode``, as ``"reduce-overhead"``.
            Compiling takes a while, and once more where batches differ in size, and
            changes roundings and random numbers (dropout). It is for methods that take
            nothing but gradients, so not for ``"grasp"`` and ``"synflow"``, and for
            models that are not sharded; what it cannot compile is its own error.
            Default: False.
        on_collapse: What to do where the mask disconnects the network, so that its
            outputs no longer depend on its inputs: ``"raise"`` an error, with the model
            untouched, or ``"warn"`` and prune it all the same. ``"magnitude"`` and
            ``"random"`` read no data and do not see it.
        progress: Show a progress bar with step and density on standard error.

    Returns:
        The sparsity of every prunable layer, and what was passed over of the model's
        matrices and kernels. Its ``warnings`` name gates that were opened, layers that
        were emptied (and since which step), and what makes the mask doubtful: layers
        without any saliency, the step at which the network collapsed (far fewer of the
        weights that stay have a saliency other than 0 than of the dense network's),
        more idle weights than others, whose channels nothing reaches or nothing leads
        on from, and less than one half of the matrices and kernels that is prunable.

    Raises:
        TypeError, ValueError: An argument is not as expected. All that follow are
            ValueErrors or RuntimeErrors too, see :class:`force_plugin.PruningError`.
        NothingToPruneError: The model has no weight that is to be pruned.
        BatchError: The loader, a batch or the loss is not as expected.
        MethodError: The ``method`` is one's own, and its scores are not as expected.
        NoGradientError: The loss does not use a weight.
        NotFiniteError: A loss or a score is NaN or infinite.
        CollapseError: The mask disconnects the network.
        RankError: Another rank has failed, which the message quotes, or the ranks'
            arguments or weights differ.

    Warns:
        UserWarning: The mask is doubtful, as above, layers lost every weight, or less
            than one half of the model's matrix and kernel weights is prunable.
    """
    model = unwrap(model)
    with Ranks(model) as ranks:
        shards = Shards(model, ranks)
        criterion = find_method(method)
        method_name = method if isinstance(method, str) else method.__name__
        weights = find_weights(model, parameters, shards.parameters)
        shards.check(weights)
        check_count("steps", steps)
        find_schedule(schedule)  # also where the method has its own
        if on_collapse not in ("raise", "warn"):
            raise ValueError(
                f'on_collapse: expected "raise" or "warn", got {on_collapse!r}'
            )
        total = sum(weight.dense.numel() for weight in weights)
        kept_after = kept_per_step(
            criterion.schedule or schedule, criterion.steps or steps, sparsity, total
        )
        # The masks of an earlier pruning, if any: what it removed never comes back.
        earlier = {
            w.name: torch.ones_like(w.local, dtype=torch.bool)
            if w.mask is None
            else shards.local(w.name, w.mask)
            for w in (weights if any(w.mask is not None for w in weights) else ())
        }
        removed = shards.totals.count({name: ~mask for name, mask in earlier.items()})
        available = total - sum(removed.values())
        if kept_after[-1] > available:
            raise ValueError(
                f"sparsity: the model is pruned to {1 - available / total:.6g} "
                f"already, and pruning it again only removes more; got {sparsity}"
            )
        passes = Passes.of(options, "force_prune")
        require_one_start(shards, weights, method_name, passes.open_gates, kept_after)

        doubts = Doubts(kept_after, on_collapse, criterion, shards)
        if parameters is None:
            rest = passed_over(model, shards.parameters, {w.name for w in weights})
            doubts.problems += Coverage(total, rest).doubts()
        masks: dict[str, Tensor] = {}
        probe = Probe(
            model,
            weights,
            loader,
            passes.opening(criterion.looks),
            on_batch=lambda number: (
                passes.batches != 1
                and bar.set_postfix_str(f"batch {number} of the step")
            ),
            shards=shards,
        )
        bar = tqdm(
            total=len(kept_after),
            desc=method_name,
            unit="step",
            disable=not progress or ranks.rank > 0,
        )
        with bar, probe:
            for step, kept in enumerate(kept_after, start=1):
                scores = scores_of(criterion, probe)
                if step == 1:
                    doubts.on_first_scores(scores, earlier, probe)
                among = earlier if criterion.regrows else masks or earlier
                selected, threshold = top_k_masks(
                    [*scores.values()],
                    min(kept, available),
                    shards.totals,
                    [*among.values()],
                )
                masks = dict(zip(scores, selected, strict=True))
                shards.require_same(
                    f"the masks of step {step}", _REPORT, *masks.values()
                )
                doubts.on_selection(step, scores, among, masks, threshold, probe.masks)
                del scores, selected  # not to be there beside the next step's gradients
                probe.prune(masks)
                bar.set_postfix_str(f"density {kept / total:.4g}", refresh=False)
                bar.update()
            if kept_after[-1] < total:
                doubts.on_flow(*probe.flow())

        kept_in, emptied = shards.totals.count(masks), doubts.emptied()
        # Before the model is touched: a filter may make errors of warnings.
        said = [*doubts.problems, *(["; ".join(emptied)] if emptied else [])]
        _warn(said, ranks)
        remarks = [*gates.remarks_on(probe.gates), *doubts.problems, *emptied]
    # 60 and "exponential" are what a caller passes who passes nothing.
    if steps not in (len(kept_after), 60):
        remarks.append(f"steps={steps} was not used: {method_name} has its own number")
    if schedule not in (criterion.schedule, "exponential") and (
        criterion.schedule or criterion.steps == 1
    ):
        own = "its own" if criterion.schedule else "a single step"
        remarks.append(
            f"schedule={_name(schedule)} was not used: {method_name} has {own}"
        )
    report = report_of(model, shards.parameters, weights, kept_in, remarks, method_name)
    # Nothing comes after it that could fail.
    pairs = [(weight, masks[weight.name]) for weight in weights]
    if shards.sharded:
        prune_in_place(pairs, shards)
    else:
        prune_with(pairs, criterion)
    return report


@torch.inference_mode(False)
def saliency(
    model: nn.Module,
    loader: Loader,
    method: str | type[SaliencyMethod] = "force",
    *,
    parameters: Iterable[tuple[nn.Module, str]] | None = None,
    **options: Unpack[PassOptions],
) -> dict[str, Tensor]:
    """Scores of the prunable weights of a model as it stands, without pruning it.

    These are the scores of the first step of :func:`force_plugin.force_prune` with the
    same arguments. The model, its gradients and modes and the global random state are
    afterwards what they were. In a distributed job every rank must call it, and gets
    the scores of all batches.

    Args:
        model: Any module, pruned before or not, wrapped in
            :class:`torch.nn.parallel.DistributedDataParallel`, ``torch.compile`` and
            others or not.
        loader: Batches, as in :func:`force_plugin.force_prune`.
        method: A name of ``force_plugin.METHODS``, or a class.
        batches: Number of batches (default: 1); ``None``: the whole loader.
        loss_fn: ``loss_fn(model(inputs), targets)``, a scalar; default: cross entropy.
        forward: ``forward(model, batch)``, a scalar loss, for batches that are no
            ``(inputs, targets)`` pair.
        parameters: ``[(module, "weight"), ...]``; default as in
            :func:`force_plugin.force_prune`.
        open_gates: Score with closed gates opened, as in
            :func:`force_plugin.force_prune`.
        microbatch: The most samples to pass through the network at once, as in
            :func:`force_plugin.force_prune`; ``None`` (the default): a batch.
        autocast: ``torch.bfloat16`` to pass them under :func:`torch.autocast`.
        channels_last: Hand images over in ``torch.channels_last`` (default: False).
        compile: Run all passes but the first by :func:`torch.compile`; a string is its
            ``mode``. Default: False.

    Returns:
        By parameter name (``"layer1.0.conv1.weight"``), a tensor of the weight's shape
        on its device, sharded if the weight is; higher = keep. ``float64`` for SynFlow,
        at least ``float32`` for the methods that need gradients.

    Warns:
        UserWarning: GraSP's temperature was not used.

    Raises:
        TypeError, ValueError: An argument is not as expected.
        NothingToPruneError, BatchError, MethodError, NoGradientError, NotFiniteError,
            RankError: As in :func:`force_plugin.force_prune`.
    """
    model = unwrap(model)
    with Ranks(model) as ranks:
        shards = Shards(model, ranks)
        criterion = find_method(method)
        weights = find_weights(model, parameters, shards.parameters)
        shards.check(weights)
        passes = Passes.of(options, "saliency")
        require_one_start(shards, weights, criterion.__name__, passes.open_gates)
        with Probe(
            model,
            weights,
            loader,
            passes.opening(criterion.looks),
            shards=shards,
        ) as probe:
            scores = scores_of(criterion, probe)
            _warn(probe.problems, ranks)
            return {name: shards.joined(name, own) for name, own in scores.items()}


def _warn(problems: Iterable[str], ranks: Ranks) -> None:
    """Say what makes a result doubtful, to whoever has called the function."""
    for problem in problems if ranks.rank == 0 else ():
        warnings.warn(problem, stacklevel=4)  # past inference_mode


def _name(schedule: str | Schedule) -> str:
    name = schedule if isinstance(schedule, str) else None
    return repr(name) if name else getattr(schedule, "__name__", "a callable")


def require_one_start(
    shards: Shards, weights: Sequence[Weight], *settings: object
) -> None:
    """Make sure that the ranks are about to do the same to the same network."""
    shards.ranks.require_same(
        "the arguments, or the model",
        "pass the same method, sparsity, steps, schedule, parameters and open_gates, "
        "and a model of the same architecture, on every rank",
        *settings,
        *((w.name, w.dense.shape, w.dense.dtype, w.mask is None) for w in weights),
    )
    shards.require_same(
        "the model's parameters",
        "seed every rank alike (torch.manual_seed) before the model is made, or wrap "
        "it in DistributedDataParallel first, which copies rank 0's",
        *(parameter.local for parameter in shards.parameters.values()),
        *(weight.mask for weight in weights if weight.mask is not None),
    )
