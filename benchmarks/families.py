"""Prune models of every timm family by FORCE: empty layers, and two training steps.

    python benchmarks/families.py                 # all, resumes where it stopped
    python benchmarks/families.py --models resnet50 convnext_tiny
    python benchmarks/families.py --table docs/families-table.md

The models are the smallest of every timm module, and some larger classics, at timm's
own initialisation. If the smallest is one of timm's test models, the smallest other
model is added. The data are scikit-learn's digits.

FORCE prunes each model at 90 % in 60 steps and at 99 % in 10. The pruned model takes
two training steps. Its masks are saved, loaded and applied. Its pruning is made
permanent, and the outputs must not change. SNIP takes one step with closed gates and
one step with opened gates, to show the effect of the gates alone. Each model is a line
of JSON in ``--out``.

The whole run takes some hours on two cores. Processes can share the run and its file:
``--share 0/2`` and ``--share 1/2``. Small models come first.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from harness.machine import made_with
from harness.options import add_threads, parser_of, use_threads
from harness.reports import gates_opened, is_disconnected
from harness.storage import append_line, read_lines, write_json
from harness.tables import markdown
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from force_plugin import (
    SparsityReport,
    apply_masks,
    force_prune,
    get_masks,
    load_masks,
    make_permanent,
    save_masks,
)
from force_plugin.files import write_whole
from force_plugin.zoo import digits, load_data, load_model

CLASSICS = {
    "resnet50": "resnet",
    "vit_base_patch16_224": "vision_transformer",
    "convnext_tiny": "convnext",
    "efficientnet_b0": "efficientnet",
    "vgg16_bn": "vgg",
    "swin_tiny_patch4_window7_224": "swin_transformer",
}
HERE = Path(__file__).parent


def models_to_run(path: Path) -> dict[str, str]:
    """Return the family of each model by name, small models first.

    The result is stored in a file, and read from the file if timm has not changed.
    """
    if path.exists():
        known = json.loads(path.read_text())
        if known["timm"] == timm.__version__:
            kept: dict[str, str] = known["models"]
            return kept
    sizes: dict[str, int] = {}
    families: dict[str, str] = {}
    for family in timm.list_modules():
        print(f"measuring the models of {family}", file=sys.stderr)
        names = timm.list_models(module=family)
        for name in names:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=10)
            sizes[name] = sum(p.numel() for p in model.parameters())
        names.sort(key=sizes.__getitem__)
        real = [name for name in names if not name.startswith("test_")]
        families |= dict.fromkeys([names[0], real[0]], family)
    families |= CLASSICS
    models = {name: families[name] for name in sorted(families, key=sizes.__getitem__)}
    write_json(path, {"timm": timm.__version__, "models": models})
    return models


def image_size(name: str, smallest: int) -> int:
    """Return the height and width to run at; a fixed-size model keeps its own."""
    cfg = timm.get_pretrained_cfg(name)
    own: int = cfg.input_size[-1]
    if cfg.fixed_input_size or own < smallest:
        return own
    return max(smallest, *(cfg.min_input_size or (0,)))


def smallest_models(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the smallest model of each family, and the family, for this process."""
    smallest: dict[str, str] = {}
    for name, family in models_to_run(HERE / "families-models.json").items():
        smallest.setdefault(family, name)
    share, shares = map(int, args.share.split("/"))
    names = [(n, f) for f, n in smallest.items() if n in (args.models or [n])]
    return names[share::shares]


def prepare(name: str, args: argparse.Namespace) -> tuple[nn.Module, Any, int]:
    """Return a model at its own initialisation, digits in its size, and the size."""
    size = image_size(name, args.size)
    try:
        load_model(name, num_classes=10, image_size=size)
    except ValueError:
        # Some models take only their own size, but their config does not say so.
        size = timm.get_pretrained_cfg(name).input_size[-1]
    torch.manual_seed(0)
    model = load_model(name, num_classes=10)
    batch = args.batch if size < 192 else args.batch // 2
    loader = load_data(model, digits()[0], image_size=size, batch_size=batch)
    return model, loader, size


def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
    """Return the cross entropy, summed over all heads.

    An encoder without a classifier (Gemma's) returns tokens. The first channels of the
    mean token then serve as classes.
    """
    heads = outputs if isinstance(outputs, tuple | list) else [outputs]
    logits = [head.mean(1) if head.dim() == 3 else head for head in heads]
    return sum((cross_entropy(one, targets) for one in logits), torch.zeros(()))


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of the first head in evaluation mode."""
    with torch.no_grad():
        outputs = model.eval()(inputs)
    first: Tensor = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return first


def try_out(model: nn.Module, loader: Any) -> None:
    """Train a pruned model, store and load its masks, and make pruning permanent."""
    masks = get_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batches = iter(loader)
    for _ in range(2):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise RuntimeError("the loss of the pruned model is not finite")
    with tempfile.TemporaryDirectory() as folder:
        save_masks(masks, Path(folder) / "masks.safetensors")
        loaded = load_masks(Path(folder) / "masks.safetensors")
    if not all(torch.equal(loaded[name], mask) for name, mask in masks.items()):
        raise RuntimeError("the loaded masks are not the saved ones")

    before = outputs_of(model, inputs)
    make_permanent(model)
    if not torch.equal(outputs_of(model, inputs), before):
        raise RuntimeError("make_permanent changed the outputs")
    parameters = dict(model.named_parameters())
    if any(parameters[name].detach()[~mask].any() for name, mask in masks.items()):
        raise RuntimeError("a pruned weight is not 0 after make_permanent")
    apply_masks(model, loaded)
    if not torch.equal(outputs_of(model, inputs), before):
        raise RuntimeError("the loaded masks changed the outputs")


def summary(report: SparsityReport) -> dict[str, Any]:
    """Return the stored part of a report."""
    return {
        "layers": len(report.layers),
        "weights": report.total,
        "kept": report.kept,
        "empty": [layer.name for layer in report.empty_layers],
        "warnings": list(report.warnings),
    }


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune and try out one model, and return all measurements."""
    start = time.perf_counter()
    model, loader, size = prepare(name, args)
    options: dict[str, Any] = {"loss_fn": loss_fn, "progress": False}
    options |= {"on_collapse": "warn", "guard": False}  # as published

    def prune(model: nn.Module, sparsity: float, **more: Any) -> dict[str, Any]:
        torch.manual_seed(1)
        return summary(force_prune(model, loader, sparsity, **options, **more))

    result: dict[str, Any] = {
        "image_size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "snip_closed": prune(deepcopy(model), 0.9, method="snip", open_gates=False),
        "snip_open": prune(deepcopy(model), 0.9, method="snip"),
        "force": {},
    }
    for sparsity, steps in args.runs:
        pruned = deepcopy(model)
        report = prune(pruned, sparsity, steps=steps)
        result["force"][str(sparsity)] = report | {"steps": steps}
        try_out(pruned, loader)
    if 2 * len(result["force"]["0.9"]["empty"]) >= result["force"]["0.9"]["layers"]:
        # To see whether FORCE, which lets pruned weights return, is the cause.
        more = {"method": "iter_snip", "steps": 60}
        result["iter_snip"] = prune(deepcopy(model), 0.9, **more)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def why(warnings: list[str]) -> str:
    """Return, in short, the report's warning on layers that lost every weight."""
    patterns = {
        r"(\d+) of \d+ layers .* of exactly 0 .*: (.*);": "no saliency ({}): {}",
        r"in (\d+) of them: (.*) times": "small weights ({}): {}",
        r"have left weights in (\d+) of": "a single step leaves weights in {}",
        r"had (\d+ %) of the saliency, ([\d,]+) times": "dead channels: {}, {} times",
    }
    return "; ".join(
        words.format(*found.groups())
        for warning in warnings
        for pattern, words in patterns.items()
        if (found := re.search(pattern, warning))
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return the results in Markdown: how many models lose half, and all rows."""
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "SNIP, gates closed": lambda r: r["snip_closed"],
        "SNIP": lambda r: r["snip_open"],
        "FORCE": lambda r: r["force"]["0.9"],
        "FORCE, 99 %, 10 steps": lambda r: r["force"].get("0.99"),
        "Iter SNIP": lambda r: r.get("iter_snip"),
    }
    smallest: dict[str, dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: r.get("parameters", 0)):
        if "error" not in result:
            smallest.setdefault(result["family"], result)

    def emptied(run: dict[str, Any]) -> int:
        return len(run["empty"])

    def cut(run: dict[str, Any]) -> bool:
        return is_disconnected(run["warnings"])

    def counts(condition: Callable[[dict[str, Any]], bool]) -> list[str]:
        found = []
        for column in columns.values():
            runs = [run for r in smallest.values() if (run := column(r))]
            of = f" of {len(runs)}" if len(runs) < len(smallest) else ""
            found.append(f"{sum(map(condition, runs))}{of}")
        return found

    titles = [f"of {len(smallest)} families, smallest model", *columns]
    rows = [
        ["lose half of their layers", *counts(lambda r: 2 * emptied(r) >= r["layers"])],
        ["lose any layer", *counts(lambda r: emptied(r) > 0)],
        ["are disconnected", *counts(cut)],
    ]
    lines = [*markdown(titles, rows), ""]

    titles = ["model (family)", "layers", "gates", *columns]
    rows, notes = [], []
    for result in sorted(results, key=lambda r: (r["family"], r["model"])):
        cells = [f"`{result['model']}` ({result['family']})"]
        if "error" in result:
            notes.append(f"- {cells[0]}: {result['error']}")
            continue
        force = result["force"]["0.9"]
        cells += [str(force["layers"]), str(gates_opened(force["warnings"]))]
        for column in columns.values():
            run = column(result)
            cells.append(f"{emptied(run)}{' ✂' if cut(run) else ''}" if run else "")
        rows.append(cells)
        if 2 * max(emptied(force), emptied(result["snip_open"])) >= force["layers"]:
            notes.append(f"- {cells[0]}: {why(force['warnings']) or 'no reason known'}")
    lines += [*markdown(titles, rows), ""]
    run = max(results, key=lambda r: r["date"])
    lines += [
        "Layers without a weight at 90 % (✂: disconnected), with gates open "
        "but for the first column. Iter SNIP was run where FORCE empties half of them. "
        f"torch {run['torch']}, timm {run['timm']}, {run['machine']}, {run['date']}.",
        "",
        "Where SNIP or FORCE empties half of the layers, the report of FORCE says why:",
        "",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def families_to_run(args: argparse.Namespace) -> dict[str, str]:
    """Return the families of the selected models without a result, by name."""
    if args.models:
        modules = [timm.models.model_entrypoint(m).__module__ for m in args.models]
        families = {
            name: module.rpartition(".")[2]
            for name, module in zip(args.models, modules, strict=True)
        }
    else:
        families = models_to_run(HERE / "families-models.json")
    share, shares = map(int, args.share.split("/"))
    done = {result["model"] for result in read_lines(args.out)}
    names = list(families)[share::shares]
    return {name: families[name] for name in names if name not in done}


def add_sweep(parser: argparse.ArgumentParser, out: Path) -> None:
    """Add the options of a sweep that stores its results in a file."""
    add = parser.add_argument
    add("--models", nargs="+", help="only these (default: all)")
    add("--batch", type=int, default=8, help="half of it from 192x192")
    add("--size", type=int, default=64, help="where a model takes any")
    add("--share", default="0/1", metavar="K/N")
    add("--out", type=Path, default=out)
    add("--table", type=Path, help="only write a table of the results")
    add_threads(parser)


def sparsity_and_steps(text: str) -> tuple[float, int]:
    """Return the sparsity and the steps of a text such as "0.9:60"."""
    sparsity, _, steps = text.partition(":")
    return float(sparsity), int(steps)


def main() -> None:
    parser = parser_of(__doc__)
    add_sweep(parser, HERE / "families.jsonl")
    parser.add_argument(
        "--runs",
        type=sparsity_and_steps,
        nargs="+",
        default=[(0.9, 60), (0.99, 10)],
        metavar="SPARSITY:STEPS",
    )
    args = parser.parse_args()
    if args.table:
        write_whole(args.table, table(read_lines(args.out)).encode())
        return
    use_threads(args)
    todo = families_to_run(args)
    warnings.simplefilter("ignore", UserWarning)
    for number, (name, family) in enumerate(todo.items(), start=1):
        result = {
            "model": name,
            "family": family,
            "batch": args.batch,
            "machine": platform.machine(),
            **made_with(),
        }
        try:
            result |= run(name, args)
        except Exception as error:
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {error}"
        append_line(args.out, result)
        found = [
            f"{len(one['empty'])} of {one['layers']} empty at {sparsity}"
            for sparsity, one in result.get("force", {}).items()
        ]
        print(
            f"[{number}/{len(todo)}] {name}: "
            f"{result.get('error') or ', '.join(found)}, {result.get('seconds', 0)} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
