"""What people do with a model: does it still work when the model is pruned?

    python benchmarks/works_with.py                              # print the table
    python benchmarks/works_with.py --table docs/works-with-table.md

Each row is run with a dense model, with the same model pruned by plain
``torch.nn.utils.prune``, with ours as ``force_prune`` leaves it, and with ours after
``make_permanent``. It works if nothing is raised, every loss is that of a dense model
whose weights are multiplied by the masks by hand (``atol`` below), and what is pruned
is 0 at the end.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import timm
import timm.layers
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from force_plugin import (
    apply_masks,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
)
from force_plugin.zoo import digits, load_data

Masks = dict[str, Tensor]
NAME, SIZE = "test_vit", 32


class Case:
    """One kind of model, and the way it is trained.

    Args:
        masks: What is pruned; nothing in a dense model.
        build: Makes the same model again and again.
        load: Loads a state dict of such a model into a dense one.
    """

    def __init__(  # noqa: D107 (the class has it)
        self,
        masks: Masks,
        build: Callable[[], nn.Module],
        load: Callable[[nn.Module, Any], object] = nn.Module.load_state_dict,
    ) -> None:
        self.masks, self.build, self.load = masks, build, load
        loader = load_data(dense(), digits()[0], image_size=SIZE, batch_size=8)
        self.inputs, self.targets = next(iter(loader))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Decay and momentum would revive what is pruned, if anything did."""
        return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01)

    def train(
        self,
        model: nn.Module,
        run: Callable[[Tensor], Tensor] | None = None,
        *,
        atol: float = 1e-5,
        inputs: Tensor | None = None,
        steps: int = 4,
    ) -> None:
        """Take a few steps, and compare the losses with those by hand."""
        optimizer = self.optimizer(p for p in model.parameters() if p.requires_grad)
        losses = []
        for _ in range(steps):
            x = self.inputs if inputs is None else inputs
            loss = cross_entropy((run or model.__call__)(x).float(), self.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected = self.losses_by_hand(steps)
        if not torch.allclose(torch.tensor(losses), torch.tensor(expected), atol=atol):
            raise AssertionError(f"losses {losses}, by hand {expected}")
        self.check(model)

    def losses_by_hand(self, steps: int) -> list[float]:
        """Of a dense model, its weights multiplied by the masks in every forward."""
        model, losses = dense(), []
        parameters = dict(model.named_parameters())
        optimizer = self.optimizer(model.parameters())
        for _ in range(steps):
            lent = {
                name: p * self.masks[name] if name in self.masks else p
                for name, p in parameters.items()
            }
            outputs = functional_call(model, lent, (self.inputs,))
            loss = cross_entropy(outputs, self.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def check(self, model: nn.Module) -> None:
        """What is pruned must be 0 when it is used."""
        model.eval()(self.inputs.to(next(model.parameters()).dtype))
        for name, mask in self.masks.items():
            path, _, tensor = name.rpartition(".")
            weight = getattr(model.get_submodule(path), tensor)
            if weight[~mask].any():
                raise AssertionError(f"{name} has come back to life")


def dense() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(NAME, num_classes=10, img_size=SIZE)
    return model


def masks_by_force() -> Masks:
    model = dense()
    loader = load_data(model, digits()[0], image_size=SIZE, batch_size=8)
    force_prune(model, loader, 0.8, steps=5, progress=False)
    return get_masks(model)


def forms(masks: Masks) -> dict[str, Case]:
    def plain() -> nn.Module:
        model = dense()
        for name, mask in masks.items():
            path, _, tensor = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(path), tensor, mask)
        return model

    def ours() -> nn.Module:
        model = dense()
        apply_masks(model, masks)
        return model

    def permanent() -> nn.Module:
        model = ours()
        make_permanent(model)
        return model

    def load_permanent(model: nn.Module, state: Any) -> None:
        model.load_state_dict(state)
        make_permanent(model)

    return {
        "dense": Case({}, dense),
        "torch.nn.utils.prune": Case(masks, plain),
        "ours": Case(masks, ours, load_pruned_state_dict),
        "ours, permanent": Case(masks, permanent, load_permanent),
    }


Row = Callable[[Case], None]
ROWS: dict[str, Row] = {}


def row(label: str) -> Callable[[Row], Row]:
    """Add a function to the table."""
    return lambda function: ROWS.setdefault(label, function)


@row("training")
def trains(case: Case) -> None:
    case.train(case.build())


@row("`copy.deepcopy`, fresh")
def copies_fresh(case: Case) -> None:
    case.train(copy.deepcopy(case.build()))


@row("`copy.deepcopy` after training")
def copies_trained(case: Case) -> None:
    model = case.build()
    case.train(model)
    case.check(copy.deepcopy(model.train()))


@row("pickle")
def pickles(case: Case) -> None:
    case.train(pickle.loads(pickle.dumps(case.build())))


@row("`torch.save` and `torch.load` of the module, then `copy.deepcopy`")
def saves_module(case: Case) -> None:
    file = BytesIO()
    torch.save(case.build(), file)
    file.seek(0)
    case.train(copy.deepcopy(torch.load(file, weights_only=False)))


@row("`torch.save` and `torch.load(weights_only=True)` of the state dict")
def saves_state(case: Case) -> None:
    model, again, file = case.build(), case.build(), BytesIO()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(2)
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    case.train(again)


@row("timm's `ModelEmaV3`")
def averages_ema(case: Case) -> None:
    model = case.build()
    ema = ModelEmaV3(model, decay=0.5)
    case.train(model)
    ema.update(model)
    case.check(ema.module)


@row("`swa_utils.AveragedModel`")
def averages_swa(case: Case) -> None:
    model = case.build()
    average = AveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
    case.check(average.module)


@row("`swa_utils.AveragedModel(use_buffers=True)`")
def averages_buffers(case: Case) -> None:
    model = case.build()
    average = AveragedModel(model, use_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    case.check(average.module)


@row("`torch.compile(fullgraph=True)`")
def compiles(case: Case) -> None:
    torch._dynamo.reset()
    model = case.build()
    compiled = torch.compile(model, fullgraph=True)
    case.train(model, compiled.__call__)


@row("gradient checkpointing, `set_grad_checkpointing`")
def checkpoints(case: Case) -> None:
    model = case.build()
    model.set_grad_checkpointing()  # type: ignore[operator]
    case.train(model)


@row("autocast in bfloat16")
def autocasts_bfloat16(case: Case) -> None:
    model = case.build()

    def run(inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs)

    case.train(model, run, atol=0.05)


@row("autocast in float16 with a `GradScaler`")
def autocasts_float16(case: Case) -> None:
    model, scaler = case.build(), torch.amp.GradScaler("cpu")
    optimizer = case.optimizer(model.parameters())
    for _ in range(3):
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(case.inputs), case.targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    case.check(model)


@row("`.to(dtype)`, there and back")
def changes_type(case: Case) -> None:
    model = case.build().to(torch.float64)
    model(case.inputs.double())
    case.train(model.to(torch.float32))


@row("`.to(device)` and `.to_empty`")
def changes_device(case: Case) -> None:
    model = case.build()
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(case.build().state_dict())
    case.train(model)


@row("channels-last")
def channels_last(case: Case) -> None:
    model = case.build().to(memory_format=torch.channels_last)
    inputs = case.inputs.contiguous(memory_format=torch.channels_last)
    case.train(model, inputs=inputs)


@row("`torch.export`")
def exports(case: Case) -> None:
    model = case.build().eval()
    exported = torch.export.export(model, (case.inputs,))
    torch.testing.assert_close(exported.module()(case.inputs), model(case.inputs))


@row("ONNX export")
def exports_onnx(case: Case) -> None:
    from onnx.reference import ReferenceEvaluator

    model = case.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (case.inputs,), path, dynamo=True, verbose=False)
        session = ReferenceEvaluator(path)
        (outputs,) = session.run(None, {session.input_names[0]: case.inputs.numpy()})
    expected = model(case.inputs)
    torch.testing.assert_close(torch.tensor(outputs), expected, atol=1e-3, rtol=1e-3)


@row("`torch.func.functional_call`, then `copy.deepcopy`")
def calls_functionally(case: Case) -> None:
    model = case.build()
    lent = {name: 2 * p for name, p in model.named_parameters()}
    functional_call(model, lent, (case.inputs,)).sum().backward()
    case.train(copy.deepcopy(model))


@row("an ensemble by `torch.func.vmap`, then `copy.deepcopy`")
def runs_ensembles(case: Case) -> None:
    models = [case.build().eval() for _ in range(2)]
    parameters, buffers = stack_module_state(models)

    def run(parameters: Any, buffers: Any) -> Any:
        return functional_call(models[0], (parameters, buffers), (case.inputs,))

    outputs = vmap(run, randomness="different")(parameters, buffers)
    expected = models[1](case.inputs)
    torch.testing.assert_close(outputs[1], expected, atol=1e-4, rtol=1e-4)
    copy.deepcopy(models[0])


@row("`nn.DataParallel`")
def runs_data_parallel(case: Case) -> None:
    model = case.build()
    case.train(model, nn.DataParallel(model).__call__)


@row("`DistributedDataParallel`, one process")
def runs_distributed(case: Case) -> None:
    model = case.build()
    case.train(model, DistributedDataParallel(model).__call__)


@row("FSDP2, `fully_shard`, one process")
def is_sharded(case: Case) -> None:
    model = case.build()
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    optimizer = case.optimizer(model.parameters())
    losses = []
    for _ in range(4):
        loss = cross_entropy(model(case.inputs), case.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = case.losses_by_hand(4)
    if not torch.allclose(torch.tensor(losses), torch.tensor(expected), atol=1e-5):
        raise AssertionError(f"losses {losses}, by hand {expected}")


@row("frozen but for its head, `train()` and `eval()` in turns")
def is_frozen(case: Case) -> None:
    model = case.build()
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    optimizer = case.optimizer(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        model.train()
        cross_entropy(model(case.inputs), case.targets).backward()
        optimizer.step()
        case.check(model)


@row("gradient accumulation")
def accumulates(case: Case) -> None:
    model, whole = case.build(), case.build()
    for half in (slice(0, 4), slice(4, 8)):
        loss = cross_entropy(model(case.inputs[half]), case.targets[half])
        (loss / 2).backward()
    cross_entropy(whole(case.inputs), case.targets).backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@row("gradients clipped by their norm")
def clips(case: Case) -> None:
    model, by_hand = case.build(), dense()
    norms = []
    for one in (model, by_hand):
        lent = {
            name: p * case.masks[name] if name in case.masks else p
            for name, p in one.named_parameters()
        }
        run = functional_call(one, lent, (case.inputs,)) if one is by_hand else None
        outputs = model(case.inputs) if run is None else run
        cross_entropy(outputs, case.targets).backward()
        norms.append(nn.utils.clip_grad_norm_(one.parameters(), 0.1))
    torch.testing.assert_close(*norms)


@row("every optimizer of `torch.optim`, also one with momentum from before")
def steps_of_torch(case: Case) -> None:
    skipped = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        if name in skipped or not isinstance(kind, type):
            continue
        model = case.build()
        optimizer = kind(model.parameters(), lr=0.01)
        for _ in range(3):
            cross_entropy(model(case.inputs), case.targets).backward()
            optimizer.step()
        case.check(model)


@row("every optimizer of timm's factory")
def steps_of_timm(case: Case) -> None:
    for name in timm.optim.list_optimizers():
        info = timm.optim.get_optimizer_info(name)
        # The others need a package for GPUs; Kron compiles itself for minutes.
        if isinstance(info.opt_class, str) or "kron" in name:
            continue
        model = case.build()
        optimizer = timm.optim.create_optimizer_v2(model, name, 0.01, 0.05)
        second = getattr(optimizer, "is_second_order", False)
        for _ in range(2):
            optimizer.zero_grad()
            loss = cross_entropy(model(case.inputs), case.targets)
            loss.backward(create_graph=second)
            optimizer.step()
        case.check(model)


@row("its state dict loads into a fresh model (ours: `load_pruned_state_dict`)")
def loads_into_fresh(case: Case) -> None:
    model = dense()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    case.load(model, case.build().state_dict())
    case.train(model)


@row("parameters in the dense model's order (what optimizer checkpoints go by)")
def keeps_order(case: Case) -> None:
    names = [name.removesuffix("_orig") for name, _ in case.build().named_parameters()]
    if names != [name for name, _ in dense().named_parameters()]:
        raise AssertionError("another order")


def outcome(function: Row, case: Case) -> str:
    """``works``, or the error in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(case)
    except Exception as error:
        said = " ".join(str(error).split("\n")[0].replace("`", "").split())
        return f"{type(error).__name__}: {said}"
    return "works"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", help="only these functions")
    parser.add_argument("--table", type=Path, help="also write the table, in Markdown")
    args = parser.parse_args()

    # The fused kernels have no second derivative, which some optimizers want.
    timm.layers.set_fused_attn(False)
    # What fully_shard and DistributedDataParallel ask for, with one process.
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        kinds, errors = forms(masks_by_force()), ["works"]
        lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
        for label, function in ROWS.items():
            if args.rows and function.__name__ not in args.rows:
                continue
            print(f"{function.__name__:20}", end="", flush=True, file=sys.stderr)
            cells = [outcome(function, case) for case in kinds.values()]
            errors += [cell for cell in dict.fromkeys(cells) if cell not in errors]
            numbers = [errors.index(cell) for cell in cells]
            cells = [f"breaks ({number})" if number else "works" for number in numbers]
            print(*(f"{cell:11}" for cell in cells), file=sys.stderr)
            lines.append(f"| {label} | {' | '.join(cells)} |")
    finally:
        torch.distributed.destroy_process_group()
    lines += ["", *(f"{n}. {error}" for n, error in enumerate(errors) if n)]
    lines += [
        "",
        f"timm's `{NAME}`, FORCE at 80 %. torch {torch.__version__}, timm "
        f"{timm.__version__}, {platform.machine()}, {date.today()}.",
        "",
    ]
    print("\n".join(lines))
    if args.table:
        args.table.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
