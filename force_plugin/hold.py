"""``python -m force_plugin.hold``: run a training script and keep pruned weights 0.

    python -m force_plugin.hold --initial-weights pruned.safetensors train.py ...
    python -m force_plugin.hold train.py --initial-checkpoint pruned.safetensors ...
    torchrun --nproc-per-node 4 -m force_plugin.hold train.py ...

The script may be any training script, such as timm's or torchvision's ``train.py``. The
script and its libraries are not changed. The script starts from pruned weights through
its own option, or through ``--initial-weights``. With ``--initial-weights``, the first
called module that has the keys and shapes of the file gets the values of the file. A
module that has the zeros of the file already is not changed.

At an optimizer's first step, the zeros of its weights are noted. After this step and
every later step, the noted weights are set to 0 again. So zeros that were loaded from a
checkpoint of a pruned training stay 0 too.

Weights are parameters with at least two dimensions. A 0 in a weight counts as pruned.
Some heads start at 0 without pruning, so :func:`save_pruned` writes 1e-30 instead.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_pre_hook

from force_plugin.files import write_whole
from force_plugin.masks.apply import get_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.module_names import unwrapped
from force_plugin.model.weights import named_parameters
from force_plugin.parallel.ranks import unwrap
from force_plugin.structure.cut_copies import deep_copy
from force_plugin.trainers.held_by_optimizers import hold_from_first_step
from force_plugin.trainers.initial_weights import (
    InitialWeights,
    least_value,
    weights_of,
)

USAGE = """\
usage: python -m force_plugin.hold [--initial-weights FILE] SCRIPT [ARGUMENT ...]

Runs a Python script that trains a network with torch.optim, as it is. Weights that are
0 at an optimizer's first step are 0 after every step.

  --initial-weights FILE  for scripts that have no such option: start from this
                          safetensors file. The first module that is called and has its
                          keys and shapes gets its values, and so do copies of the
                          module, unless it has the zeros already, as after --resume

examples:
  force-prune resnet50 --data data --sparsity 0.99 --out runs/r50
  python -m force_plugin.hold --initial-weights runs/r50/pruned.safetensors \\
      train.py --model resnet50 --data-path data
  python -m force_plugin.hold train.py --model resnet50 --data-dir data \\
      --initial-checkpoint runs/r50/pruned.safetensors"""


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Write the weights of a pruned model to a file, with plain keys and zeros.

    A training script starts from this file. The masks alone are not enough, because
    masks are chosen for certain initial weights. The keys are the dense model's keys.
    Pruned weights are 0 in the file. A kept weight that is 0 becomes 1e-30 (6e-5 in
    float16), so that it does not count as pruned. The model is not changed; a temporary
    copy of the model is made.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`.
        path: Safetensors file to write; its folder must exist. An existing file is
            replaced in one step, so the path never holds a partial file.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing is pruned in the model.
        OSError: The file cannot be written. An existing file is then unchanged.
    """
    model = unwrap(model)
    masks = get_masks(model)
    plain = deep_copy(model)
    for module in list(plain.modules()):  # remove wrappers around submodules
        for key, child in list(module.named_modules(remove_duplicate=False)):
            if key and "." not in key and unwrapped(child) is not child:
                setattr(module, key, unwrapped(child))
    if not masks or prune.is_pruned(plain):  # else pruning is permanent already
        make_permanent(plain, hold_zeros=False)
    with torch.no_grad():
        dense = {name: w.dense for name, w in named_parameters(plain).items()}
        for name, weight in weights_of(dense.items()).items():
            zeros = weight.abs() < torch.finfo(weight.dtype).tiny
            if name in masks:
                zeros &= masks[name]
            weight.masked_fill_(zeros, least_value(weight.dtype))
    # Safetensors refuses tensors that share memory, such as tied weights.
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    write_whole(path, save({key: value.contiguous() for key, value in state.items()}))


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script, and keep the zeros of its optimizers' weights.

    Args:
        argv: Options, the script and its arguments. ``None``: the arguments of the
            process.

    Raises:
        SystemExit: The script or the file does not exist (status 2), ``--help`` was
            given (status 0), or the script exits.
        RuntimeError: At the first step of an optimizer, none of its weights is partly
            0. Or at that step or at the end of the script, no called module had the
            keys and shapes of the file with initial weights.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        sys.exit(0)
    file = None
    if arguments[:1] == ["--initial-weights"]:
        file, arguments = arguments[1:2], arguments[2:]
    if not arguments or not Path(arguments[0]).is_file():
        came = repr(arguments[0]) if arguments else "nothing"
        _refuse(f"expected a Python script to run, got {came}; see --help")
    start = None
    if file is not None:
        # PyTorch would advise model.compile(), but then the hook would see no call.
        warnings.filterwarnings("ignore", r"Using `torch\.compile.* global hooks")
        try:
            start = InitialWeights(file[0])
        except ValueError as error:
            _refuse(str(error))
    sys.argv = arguments
    # `python SCRIPT` does so too, so that modules beside the script can be imported.
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    register_optimizer_step_pre_hook(hold_from_first_step)
    runpy.run_path(arguments[0], run_name="__main__")
    if start is not None:
        start.require("the end of the script")


def _refuse(message: str) -> NoReturn:
    print(f"force_plugin.hold: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
