"""``python -m force_plugin.hold``: run a training script, and pruned weights stay 0.

    python -m force_plugin.hold train.py --initial-checkpoint pruned.safetensors ...
    torchrun --nproc-per-node 4 -m force_plugin.hold train.py ...

The script is somebody else's, timm's ``train.py`` say, and runs as it is. All that it
needs is an option to start from given weights; nothing of the script or its libraries
is replaced. When an optimizer takes its first step, the zeros of its weights are noted,
and after this and every later step they are 0 again. So it also holds what was loaded
from a checkpoint of the same training.

Weights are parameters with two dimensions or more. What is 0 in them was pruned: some
heads start at 0 without, and :func:`save_pruned` writes 1e-30 in its place.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from force_plugin.masks import apply_masks, get_masks
from force_plugin.permanent import make_permanent

USAGE = """\
usage: python -m force_plugin.hold SCRIPT [ARGUMENT ...]

Runs a Python script that trains a network with torch.optim, as it is. Weights that are
0 at an optimizer's first step are 0 after every step.

example:
  force-prune resnet50 --data data --sparsity 0.99 --out runs/r50
  python -m force_plugin.hold train.py --model resnet50 --data-dir data \\
      --initial-checkpoint runs/r50/pruned.safetensors"""


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Write a pruned model's weights as those of a plain model, with zeros.

    A training script starts from this file; the masks alone would not do, as they were
    chosen for these initial weights and no others. The keys are the dense model's.
    Pruned weights are 0; a weight that was kept and is 0 is 1e-30 in the file (6e-5 in
    float16), so that it is not taken for a pruned one. The model stays as it is; a copy
    of it is made meanwhile.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`.
        path: Safetensors file to write; its folder must exist.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing is pruned in it.
        OSError: The file cannot be written.
    """
    masks = get_masks(model)
    plain = deepcopy(model)
    if not masks or prune.is_pruned(plain):  # else it is permanent already
        make_permanent(plain, hold_zeros=False)
    with torch.no_grad():
        for name, weight in _weights(plain.named_parameters()).items():
            zeros = weight == 0
            if name in masks:
                zeros &= masks[name]
            weight.masked_fill_(zeros, max(1e-30, torch.finfo(weight.dtype).tiny))
    # Safetensors takes no tensors that share memory, as tied weights do.
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    # save_file makes files that only their owner may read.
    Path(path).write_bytes(
        save({key: value.contiguous() for key, value in state.items()})
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script with its optimizers' zeros held.

    Args:
        argv: The script and its arguments. None: those of the process.

    Raises:
        SystemExit: There is no such script (status 2), help was asked for (status 0),
            or the script exits.
        RuntimeError: Raised in the script, by the first step of an optimizer none of
            whose weights is partly 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        sys.exit(0)
    if not arguments or not Path(arguments[0]).is_file():
        came = repr(arguments[0]) if arguments else "nothing"
        print(
            f"force_plugin.hold: error: expected a Python script to run, got {came}; "
            "see --help",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = arguments
    # As `python SCRIPT` has it, for the modules beside the script.
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    register_optimizer_step_pre_hook(_before_step)
    runpy.run_path(arguments[0], run_name="__main__")


def _weights(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> dict[str, nn.Parameter]:
    """Without biases and normalisations, which are 0 without having been pruned."""
    return {name: p for name, p in parameters if p.ndim > 1 and p.is_floating_point()}


# A holder lives as long as its optimizer, and its zeros are held as long as it lives.
_holders: WeakKeyDictionary[Optimizer, nn.Module] = WeakKeyDictionary()


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hold the zeros of an optimizer's weights from its first step on."""
    if optimizer in _holders:
        return
    holder = _holders[optimizer] = nn.Module()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = _weights((f"weight{i}", p) for i, p in enumerate(parameters))
    if not weights:
        return
    for name, weight in weights.items():
        holder.register_parameter(name, weight)
    masks = {name: weight != 0 for name, weight in weights.items()}
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    total = sum(weight.numel() for weight in weights.values())
    held = total - sum(kept.values())
    # A tensor of zeros alone may just start there.
    if not any(0 < kept[name] < weight.numel() for name, weight in weights.items()):
        raise RuntimeError(
            "force_plugin.hold: expected pruned weights at the first step of "
            f"{type(optimizer).__name__}, got {len(weights)} tensors of which none has "
            "zeros among its weights; give the script the pruned weights to start "
            "from, as in timm's --initial-checkpoint runs/r50/pruned.safetensors"
        )
    apply_masks(holder, {n: m for n, m in masks.items() if kept[n] < m.numel()})
    make_permanent(holder)
    for name, weight in weights.items():
        # This step's gradients were there before.
        if weight.grad is not None:
            weight.grad.masked_fill_(~masks[name], 0)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"force_plugin.hold: {held:,} of {total:,} weights are 0 "
            f"({held / total:.2%}) and stay 0; {list(kept.values()).count(0)} of "
            f"{len(kept)} tensors hold nothing else",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
