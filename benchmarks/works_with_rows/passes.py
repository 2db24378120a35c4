"""Rows on the forward pass."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from works_with_rows.cases import (
    STEPS,
    Case,
    Losses,
    make_optimizer,
    row,
)


@row("`torch.compile(fullgraph=True)`")
def compiles(case: Case) -> None:
    torch._dynamo.reset()
    model = case.build()
    case.train(model, torch.compile(model, fullgraph=True))


@row("gradient checkpointing, `set_grad_checkpointing`")
def checkpoints(case: Case) -> None:
    model = case.build()
    model.set_grad_checkpointing()
    case.train(model)


@row("autocast in bfloat16")
def autocasts_bfloat16(case: Case) -> None:
    model = case.build()
    case.train(model, torch.autocast("cpu", torch.bfloat16)(model), atol=0.05)


@row("autocast in float16 with a `GradScaler`")
def autocasts_float16(case: Case) -> None:
    def loop(model: nn.Module) -> Losses:
        optimizer, scaler = make_optimizer(model), torch.amp.GradScaler("cpu")
        losses = []
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.float16):
                loss = cross_entropy(model(case.inputs), case.batch[1])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    case.alike(loop, atol=0.05)


@row("`.to(dtype)`, there and back")
def changes_type(case: Case) -> None:
    model = case.build().to(torch.float64)
    model(case.inputs.double())
    case.train(model.to(torch.float32))


@row("`.to(device)` and `.to_empty`")
def changes_device(case: Case) -> None:
    model = case.build().to("meta").to_empty(device="cpu")
    model.load_state_dict(case.build().state_dict())
    case.train(model)


@row("channels-last")
def channels_last(case: Case) -> None:
    model, form = case.build(), torch.channels_last
    model.to(memory_format=form)
    case.train(model, lambda inputs: model(inputs.contiguous(memory_format=form)))


@row("`torch.export`")
def exports(case: Case) -> None:
    model = case.build().eval()
    exported = torch.export.export(model, (case.inputs,))
    torch.testing.assert_close(exported.module()(case.inputs), model(case.inputs))


@row("`torch.jit.trace`")
def is_traced(case: Case) -> None:
    model = case.build().eval()
    traced = torch.jit.trace(model, case.inputs)
    torch.testing.assert_close(traced(case.inputs), model(case.inputs))


def scripted(model: nn.Module, inputs: Tensor) -> None:
    model.eval()
    script = torch.jit.script(model)
    torch.testing.assert_close(script(inputs), model(inputs))


@row("`torch.jit.script`")
def is_scripted(case: Case) -> None:
    with timm.layers.set_scriptable(True):
        model = case.build()
    scripted(model, case.inputs)


@row("`torch.jit.script` after `prune.remove`")
def is_scripted_once_removed(case: Case) -> None:
    with timm.layers.set_scriptable(True):
        model = case.build()
    for module in model.modules():
        if isinstance(module, nn.Module) and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    scripted(model, case.inputs)


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
