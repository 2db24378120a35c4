"""The loop that scores, selects and masks at each step, and then prunes the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
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
from force_plugin.pruning.descent import Descent
from force_plugin.pruning.doubts import Doubts
from force_plugin.report.sparsity import SparsityReport, report_of
from force_plugin.scoring import gates
from force_plugin.scoring.disconnection import Disconnected
from force_plugin.scoring.passes import Loader, Passes, PassOptions
from force_plugin.scoring.probe import Probe
from force_plugin.selection.schedules import (
    Schedule,
    check_count,
    check_left,
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
    guard: bool = True,
    progress: bool = True,
    **options: Unpack[PassOptions],
) -> SparsityReport:
    """Prune a model in place, before the model is trained.

    The methods ``"force"`` and ``"iter_snip"`` are Algorithm 1 of de Jorge et al. 2021
    (arXiv 2006.09081). The other methods are its one-step and data-free relatives.
    Afterwards the model is pruned as :func:`torch.nn.utils.prune.global_unstructured`
    prunes: with ``weight_orig``, ``weight_mask`` and a forward pre-hook. Everything
    else is unchanged, bit for bit: values, running statistics, gradients, modes, hooks
    and, except for ``"random"``, the global random state. After an error or Ctrl-C the
    model is unchanged too.

    Scoring keeps the mode of each module. In training mode, normalisation uses the
    statistics of the scoring batches, and dropout is on.

    If :mod:`torch.distributed` is initialised, every rank must call this function, with
    the same model and with its own batches. Gradients are averaged over the ranks, and
    every rank gets the same mask. Only rank 0 shows progress and warnings.

    Args:
        model: Any module. If the model is pruned already, only more weights are
            removed. If :class:`torch.nn.parallel.DistributedDataParallel`,
            ``torch.compile`` or another wrapper is around the model, the module inside
            is pruned, and names are the names inside. A model that ``fully_shard`` has
            sharded is pruned in its shards: no rank holds the whole model or all
            scores. Afterwards its pruned weights are 0, and stay 0 in training, as
            after :func:`force_plugin.make_permanent`.
        loader: Iterable of batches ``(inputs, targets)``: a ``DataLoader``, a list.
            Each step takes the next batches, also a step that the guard takes again.
            After the last batch the loader starts again. Tensors are moved to the
            device of the model's first prunable weight.
        sparsity: Fraction of the prunable weights to remove, 0 ≤ sparsity < 1; exactly
            ⌊(1 − sparsity) · m⌋ of m weights stay.
        method: A name of ``force_plugin.METHODS`` or a subclass of
            :class:`~force_plugin.SaliencyMethod`. ``"steady_force"`` is a FORCE that
            holds with few steps and at high sparsity.
        steps: T, the number of steps (default: 60). The FORCE paper takes 60, the
            SynFlow paper 100. Some methods fix the number: ``"snip"``, ``"grasp"``,
            ``"magnitude"`` and ``"random"`` take 1 step, ``"snip_it"`` takes 7.
        schedule: Density after each step: ``"exponential"``, ``"linear"``,
            ``"snip_it"`` or a callable ``(step, steps, density) -> density``. The
            method ``"snip_it"`` always uses its own schedule. If ``schedule`` is not
            used, the report says so.
        batches: Number of batches in a step (default: 1), over which the gradient is
            averaged; ``None``: the whole loader at each step.
        loss_fn: ``loss_fn(model(inputs), targets)``, a scalar; default:
            :func:`torch.nn.functional.cross_entropy`.
        forward: ``forward(model, batch)``, a scalar loss, for batches that are no
            ``(inputs, targets)`` pair; replaces ``loss_fn``.
        parameters: ``[(module, "weight"), ...]`` as in
            :func:`torch.nn.utils.prune.global_unstructured`. Default: the weight of
            every convolution and linear layer, and of every module that behaves as a
            linear layer. Examples are transformers' ``Conv1D``, and a user's class that
            multiplies by its two-dimensional ``weight``. A weight that an embedding
            shares is left out. A weight that several modules share counts once.
        open_gates: Open closed gates while scoring (default: True). A closed gate
            multiplies a branch by 0 or nearly 0 (``zero_init_last``, LayerScale,
            ReZero, skip-init gains), and so hides the weights of the branch from the
            gradient. Weights that are all (nearly) 0 are opened too. See
            :mod:`force_plugin.scoring.gates`. ``False`` gives the scores of the papers.
            The model keeps its own values.
        microbatch: Cut each batch into microbatches of about equal size, with at most
            this many samples. Only one microbatch has to fit into memory. ``None`` (the
            default): each batch passes as a whole. A microbatch has the types of the
            batch. Tensors and arrays in tuples, lists, mappings and dataclasses are cut
            if they are as long as the first tensor or array of the batch. Lists with an
            item for each sample (images of different sizes, dictionaries) are cut too.
            Everything else goes with each microbatch. The loss of a microbatch counts
            by its share of the samples. So the gradient is that of the whole batch, if
            the loss is a mean over samples. It differs for layers and losses that
            combine samples: batch normalisation in training mode normalises over a
            microbatch, and a contrastive loss compares within a microbatch.
            ``"synflow"`` passes a single sample anyway.
        autocast: ``torch.bfloat16``: run the network and the loss under
            :func:`torch.autocast`; ``None`` (the default): keep the autocast state of
            the caller. ``"synflow"`` needs float64, and runs without autocast.
        channels_last: Convert floating-point inputs of 4 dimensions to
            ``torch.channels_last``, and of 5 dimensions to ``torch.channels_last_3d``,
            which may be faster (default: False). Weights and masks keep their formats.
        compile: Run the scoring passes by :func:`torch.compile` (default: False). A
            string is the ``mode``, as ``"reduce-overhead"``. The first pass, which
            looks for gates, is not compiled. Compiling takes a while, and again for
            each new size of a batch. It changes roundings and random numbers (dropout).
            Methods that need more than gradients (``"grasp"``, ``"synflow"``) and
            sharded models cannot be compiled. If compiling fails, the error is
            PyTorch's own.
        on_collapse: What to do if the mask disconnects the network, so that the outputs
            no longer depend on the inputs. ``"raise"`` (the default) raises an error
            and leaves the model unchanged. ``"warn"`` warns and prunes the model.
            ``"magnitude"`` and ``"random"`` read no data and cannot tell.
        guard: If the masks of a step disconnect the network, go back to the masks
            before, and take the step in smaller ones (default: True). If smaller steps
            do not help, no pruned weight returns until the step is done. If this does
            not help either, the layers whose last live weights are at stake lose no
            more weights. Else the ranking stays that of the method. The report names
            such steps and layers. ``False`` goes on as the papers do, as long as a
            gradient reaches any weight. Methods with a single step, ``"magnitude"`` and
            ``"random"`` have no guard.
        progress: Show a progress bar with step and density on standard error (default:
            True).

    Returns:
        The sparsity of every prunable layer, and the matrices and kernels that were
        passed over. Its ``warnings`` name the gates that were opened, the layers that
        were emptied (and since which step), and reasons to doubt the mask:

        - layers without any saliency;
        - the step at which the network collapsed: far fewer of the kept weights than
          of the dense network's weights have a saliency other than 0;
        - more than one half of the kept weights is idle: nothing reaches their
          channels, or nothing leads on from there;
        - the gradients of the pruned network are NaN or infinite;
        - less than one half of the matrix and kernel weights is prunable.

    Raises:
        TypeError, ValueError: An argument is not as expected. All errors below are
            ValueErrors or RuntimeErrors too, see :class:`force_plugin.PruningError`.
        NothingToPruneError: The model has no weight to prune.
        BatchError: The loader, a batch or the loss is not as expected.
        MethodError: A user's ``method`` returns scores that are not as expected.
        NoGradientError: The loss does not use a weight.
        NotFiniteError: A loss or a score is NaN or infinite.
        CollapseError: The mask disconnects the network.
        RankError: Another rank has failed, which the message quotes, or the ranks'
            arguments or weights differ.

    Warns:
        UserWarning: There are reasons to doubt the mask, as above, or layers lost every
            weight.
    """
    model = unwrap(model)
    with Ranks(model) as ranks:
        shards = Shards(model, ranks)
        criterion = find_method(method)
        method_name = method if isinstance(method, str) else method.__name__
        weights = find_weights(model, parameters, shards.parameters)
        shards.check(weights)
        check_count("steps", steps)
        find_schedule(schedule)  # also if the method has its own
        if on_collapse not in ("raise", "warn"):
            raise ValueError(
                f'on_collapse: expected "raise" or "warn", got {on_collapse!r}'
            )
        if not isinstance(guard, bool):
            raise TypeError(f"guard: expected True or False, got {guard!r}")
        total = sum(weight.dense.numel() for weight in weights)
        kept_after = kept_per_step(
            criterion.schedule or schedule,
            criterion.steps or steps,
            sparsity,
            total,
            criterion.refining,
        )
        # The masks of an earlier pruning, if any. Removed weights never come back.
        earlier = {
            w.name: torch.ones_like(w.local, dtype=torch.bool)
            if w.mask is None
            else shards.local(w.name, w.mask)
            for w in (weights if any(w.mask is not None for w in weights) else ())
        }
        removed = shards.totals.count({name: ~mask for name, mask in earlier.items()})
        available = total - sum(removed.values())
        check_left(kept_after[-1], available, total, sparsity)
        kept_after = [min(kept, available) for kept in kept_after]
        passes = Passes.of(options, "force_prune")
        settings = method_name, passes.open_gates, kept_after, on_collapse, guard
        require_one_start(shards, weights, *settings)

        doubts = Doubts(kept_after, on_collapse, criterion, shards)
        if parameters is None:
            rest = passed_over(model, shards.parameters, {w.name for w in weights})
            doubts.problems += Coverage(total, rest).doubts()
        guarded = guard and criterion.looks and len(kept_after) > 1
        descent = Descent(kept_after, total, guarded, shards.totals, available)
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
            kept=available,
        )
        bar = tqdm(
            total=len(kept_after),
            desc=method_name,
            unit="step",
            disable=not progress or ranks.rank > 0,
        )
        with bar, probe:
            for scores in _measured(criterion, probe, descent, doubts):
                step, before = descent.step, descent.masks
                if not doubts.begun:
                    doubts.on_first_scores(scores, earlier, probe)
                returns = criterion.regrows and not descent.holding
                among = earlier if returns else before or earlier
                kept = descent.next
                ranked = descent.sparing(scores)
                masks, threshold = top_k_masks(ranked, kept, shards.totals, among)
                shards.require_same(
                    f"the masks of step {step}", _REPORT, *masks.values()
                )
                doubts.on_selection(step, scores, among, masks, threshold, probe.masks)
                del scores, ranked  # make room for the gradients of the next step
                descent.go(masks)
                probe.prune(masks, kept, descent.step)
                bar.set_postfix_str(f"density {kept / total:.4g}", refresh=False)
                bar.update(descent.taken - bar.n)

        kept_in, emptied = shards.totals.count(descent.masks), doubts.emptied()
        # Warn before the model is touched, as a filter may turn warnings into errors.
        said = [*doubts.problems, *(["; ".join(emptied)] if emptied else [])]
        _warn(said, ranks)
        remarks = [
            *gates.remarks_on(probe.gates),
            *doubts.problems,
            *emptied,
            *descent.said(len(kept_after)),
        ]
    # 60 and "exponential" are the defaults, so the caller may not have chosen them.
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
    # The model is changed last, as nothing can fail after that.
    pairs = [(weight, descent.masks[weight.name]) for weight in weights]
    if shards.sharded:
        prune_in_place(pairs, shards)
    else:
        prune_with(pairs, criterion)
    return report


def _measured(
    criterion: type[SaliencyMethod], probe: Probe, descent: Descent, doubts: Doubts
) -> Iterator[dict[str, Tensor]]:
    """Yield the scores of each step, and look at the network after the last step.

    If a step has disconnected the network, it is taken again.
    """
    probe.watch.on = descent.guarded
    while True:
        try:
            while not descent.done:
                # The scores get no name here, so that the caller can free them.
                yield scores_of(criterion, probe)
            look = probe.flow() if descent.sparse else None
            break
        except Disconnected as cut:
            descent.back(cut.layers)
        probe.watch.on = descent.guarded
        probe.prune(descent.masks, descent.kept, descent.step)
    if look is not None:
        doubts.on_flow(look.connected, look.idle, look.broken)


@torch.inference_mode(False)
def saliency(
    model: nn.Module,
    loader: Loader,
    method: str | type[SaliencyMethod] = "force",
    *,
    parameters: Iterable[tuple[nn.Module, str]] | None = None,
    **options: Unpack[PassOptions],
) -> dict[str, Tensor]:
    """Return the scores of a model's prunable weights, without pruning the model.

    These are the scores of the first step of :func:`force_plugin.force_prune` with the
    same arguments. Afterwards the model, its gradients and modes and the global random
    state are unchanged. In a distributed job every rank must call this function, and
    every rank gets the scores of all batches.

    Args:
        model: Any module, pruned before or not.
            :class:`torch.nn.parallel.DistributedDataParallel`, ``torch.compile`` or
            another wrapper may be around the model.
        loader: Batches, as in :func:`force_plugin.force_prune`.
        method: A name of ``force_plugin.METHODS``, or a subclass of
            :class:`~force_plugin.SaliencyMethod`.
        batches: Number of batches (default: 1); ``None``: the whole loader.
        loss_fn: ``loss_fn(model(inputs), targets)``, a scalar; default: cross entropy.
        forward: ``forward(model, batch)``, a scalar loss, for batches that are no
            ``(inputs, targets)`` pair.
        parameters: ``[(module, "weight"), ...]``; default as in
            :func:`force_plugin.force_prune`.
        open_gates: Score with closed gates opened, as in
            :func:`force_plugin.force_prune`.
        microbatch: The largest number of samples to pass through the network at once,
            as in :func:`force_plugin.force_prune`; ``None`` (the default): a batch.
        autocast: ``torch.bfloat16``: run the network and the loss under
            :func:`torch.autocast`; ``None`` (the default): keep the autocast state of
            the caller.
        channels_last: Convert images to ``torch.channels_last`` (default: False).
        compile: Run all passes but the first by :func:`torch.compile`; a string is the
            ``mode``. Default: False.

    Returns:
        By parameter name (``"layer1.0.conv1.weight"``), a tensor of scores with the
        weight's shape and device, sharded if the weight is sharded; higher = keep. The
        dtype is ``float64`` for SynFlow, and at least ``float32`` for the methods that
        need gradients.

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
    """Warn the caller of the public function, on rank 0."""
    for problem in problems if ranks.rank == 0 else ():
        warnings.warn(problem, stacklevel=4)  # past inference_mode


def _name(schedule: str | Schedule) -> str:
    name = schedule if isinstance(schedule, str) else None
    return repr(name) if name else getattr(schedule, "__name__", "a callable")


def require_one_start(
    shards: Shards, weights: Sequence[Weight], *settings: object
) -> None:
    """Raise RankError if the ranks' arguments or their networks differ."""
    shards.ranks.require_same(
        "the arguments, or the model",
        "pass the same method, sparsity, steps, schedule, parameters, open_gates, "
        "on_collapse and guard, and a model of the same architecture, on every rank",
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
