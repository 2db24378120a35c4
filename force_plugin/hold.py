"""``python -m force_plugin.hold``: run a training script, and pruned weights stay 0.

    python -m force_plugin.hold --initial-weights pruned.safetensors train.py ...
    python -m force_plugin.hold train.py --initial-checkpoint pruned.safetensors ...
    torchrun --nproc-per-node 4 -m force_plugin.hold train.py ...

The script is somebody else's, timm's or torchvision's ``train.py`` say, and runs as it
is; nothing of the script or its libraries is replaced. It starts from pruned weights by
an option of its own, or by ``--initial-weights``: then the first module that is called
and has the keys of the file gets its values, unless it has the zeros already. When an
optimizer takes its first step, the zeros of its weights are noted, and after this and
every later step they are 0 again. So it also holds what was loaded from a checkpoint of
the same training.

Weights are parameters with two dimensions or more. What is 0 in them was pruned: some
heads start at 0 without, and :func:`save_pruned` writes 1e-30 in its place.
"""

from __future__ import annotations

import gc
import os
import re
import runpy
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from force_plugin.errors import FileFormatError, NotPrunedError
from force_plugin.files import write_whole
from force_plugin.masks.apply import apply_masks, get_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.model.names import name_some, unwrapped
from force_plugin.model.weights import named_parameters
from force_plugin.parallel.ranks import unwrap
from force_plugin.structure.copies import deep_copy

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
    """Write a pruned model's weights as those of a plain model, with zeros.

    A training script starts from this file; the masks alone would not do, as they were
    chosen for these initial weights and no others. The keys are the dense model's.
    Pruned weights are 0; a weight that was kept and is 0 is 1e-30 in the file (6e-5 in
    float16), so that it is not taken for a pruned one. The model stays as it is; a copy
    of it is made meanwhile.

    Args:
        model: Any module that was pruned with :mod:`torch.nn.utils.prune`.
        path: Safetensors file to write; its folder must exist. A file that is there is
            replaced at once, by a whole one.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing is pruned in it.
        OSError: The file cannot be written; one that was there is what it was.
    """
    model = unwrap(model)
    masks = get_masks(model)
    plain = deep_copy(model)
    for module in list(plain.modules()):  # without wrappers around parts of it
        for key, child in module._modules.items():
            module._modules[key] = None if child is None else unwrapped(child)
    if not masks or prune.is_pruned(plain):  # else it is permanent already
        make_permanent(plain, hold_zeros=False)
    with torch.no_grad():
        dense = {name: w.dense for name, w in named_parameters(plain).items()}
        for name, weight in _weights(dense.items()).items():
            zeros = weight.abs() < torch.finfo(weight.dtype).tiny
            if name in masks:
                zeros &= masks[name]
            weight.masked_fill_(zeros, _least(weight.dtype))
    # Safetensors takes no tensors that share memory, as tied weights do.
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    write_whole(path, save({key: value.contiguous() for key, value in state.items()}))


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script with its optimizers' zeros held.

    Args:
        argv: Options, the script and its arguments. None: those of the process.

    Raises:
        SystemExit: There is no such script or file (status 2), help was asked for
            (status 0), or the script exits.
        RuntimeError: Raised in the script, by the first step of an optimizer none of
            whose weights is partly 0; or there or at its end, where no module that was
            called has the keys and shapes of the file with initial weights.
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
        # PyTorch would advise model.compile(), after which the hook sees no call.
        warnings.filterwarnings("ignore", r"Using `torch\.compile.* global hooks")
        try:
            start = InitialWeights(file[0])
        except ValueError as error:
            _refuse(str(error))
    sys.argv = arguments
    # As `python SCRIPT` has it, for the modules beside the script.
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    register_optimizer_step_pre_hook(_before_step)
    runpy.run_path(arguments[0], run_name="__main__")
    if start is not None:
        start.require("the end of the script")


def _refuse(message: str) -> NoReturn:
    print(f"force_plugin.hold: error: {message}", file=sys.stderr)
    sys.exit(2)


def _say(message: str) -> None:
    """Once, where there are several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"force_plugin.hold: {message}", file=sys.stderr)


_AnyTensor = TypeVar("_AnyTensor", bound=Tensor)


def _weights(parameters: Iterable[tuple[str, _AnyTensor]]) -> dict[str, _AnyTensor]:
    """Without biases and normalisations, which are 0 without having been pruned."""
    return {name: p for name, p in parameters if p.ndim > 1 and p.is_floating_point()}


def _least(dtype: torch.dtype) -> float:
    """What stands for the 0 of a weight that was not pruned."""
    return max(1e-30, torch.finfo(dtype).tiny)


class InitialWeights:
    """Loads weights into the first module that is called and that they fit.

    Then all is as if the module had been made with them: what was copied from it
    before, as an average of the weights is, gets them too. A module that has their
    zeros comes from a checkpoint, and stays as it is.

    Args:
        path: Safetensors file, as :func:`save_pruned` writes it.

    Raises:
        FileFormatError: It cannot be read.
        NotPrunedError: No zeros are among its weights.
    """

    def __init__(self, path: str) -> None:  # noqa: D107 (the class has it)
        expected = (
            "expected a safetensors file of pruned weights, as force-prune and "
            f"force_plugin.hold.save_pruned write it, got {path!r}"
        )
        try:
            values = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"{expected}: {error}") from None
        if not any((weight == 0).any() for weight in _weights(values.items()).values()):
            raise NotPrunedError(f"{expected}, which has no zeros among its weights")
        self._path = path
        self._values = {_plain(key): value for key, value in values.items()}
        self._shapes = {key: value.shape for key, value in self._values.items()}
        self._found = False
        # Name and shapes of what came closest, of all that was called.
        self._closest: tuple[str, dict[str, torch.Size]] | None = None
        self._hooks = (
            register_module_forward_pre_hook(self._before_forward),
            register_optimizer_step_pre_hook(self._before_first_step),
        )

    def remove(self) -> None:
        """Let go of the weights, and leave modules and optimizers alone."""
        for hook in self._hooks:
            hook.remove()
        self._values.clear()

    def require(self, moment: str) -> None:
        """Raise RuntimeError if no module that they fit was called until now."""
        if self._found:
            return
        came = "none that has parameters was called"
        if self._closest is not None:
            name, shapes = self._closest
            differing = [
                f"{key} is {_shown(shapes.get(key))} instead of "
                f"{_shown(self._shapes.get(key))}"
                for key in {**shapes, **self._shapes}
                if shapes.get(key) != self._shapes.get(key)
            ]
            came = f"the closest that was called is {name}, where "
            came += name_some(differing) or "no parameter requires a gradient"
        raise RuntimeError(
            "force_plugin.hold: expected a module with the keys and shapes of "
            f"{self._path} to be called before {moment}, got none; {came}. Write the "
            "file from the model that the script makes, with as many classes; what is "
            "called as model.forward(inputs) or after model.compile() is not seen"
        )

    def _before_first_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.require(f"the first step of {type(optimizer).__name__}")

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        # Nothing can be loaded while torch.compile traces. Transforms are modules too.
        if torch.compiler.is_compiling() or next(module.parameters(), None) is None:
            return
        shapes = _shapes(module)
        # A teacher may have the same keys, and is frozen.
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if shapes == self._shapes and trained:
            self._found = True
            self._start(module)
            self.remove()
        elif self._closest is None or (
            len(shapes.items() ^ self._shapes.items())
            < len(self._closest[1].items() ^ self._shapes.items())
        ):
            self._closest = type(module).__name__, shapes

    def _start(self, module: nn.Module) -> None:
        """Give the values to a module and its copies, and say what was done."""
        name = type(module).__name__
        weights = _named_weights(module)
        # Pruned in the file and not in the module.
        dense = {
            key: weight.clone()
            for key, weight in weights.items()
            if weight[(self._values[key] == 0).to(weight.device)].any()
        }
        if not dense:
            _say(
                f"did not load {self._path}: {name} has its zeros already, as from a "
                "checkpoint"
            )
            return
        gc.collect()  # what nobody has any more is no average
        classes = {type(part) for part in module.modules()}
        copies = {id(next(module.parameters())): module}
        copies |= {
            id(next(other.parameters())): other  # wrappers share their parameters
            for other in gc.get_objects()
            if type(other) in classes
            and _shapes(other) == self._shapes
            and _equal(_named_weights(other), weights)
        }
        for copy in copies.values():
            copy.load_state_dict(
                {
                    key: _as(self._values[_plain(key)], value)
                    for key, value in copy.state_dict().items()
                }
            )
        others = {1: "", 2: " and a copy of it"}
        _say(
            f"loaded {self._path} into {name}"
            + others.get(len(copies), f" and {len(copies) - 1} copies of it")
        )
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        left = sum(_is_copy(tensor, dense.values()) for tensor in tensors)
        if left:
            _say(
                f"warning: {left} other tensors have its weights from before; an "
                "average that starts from those will not be pruned, so let it start "
                "after the first call of the model"
            )


def _plain(key: str) -> str:
    """A state-dict key without what torch.compile and DistributedDataParallel add."""
    return re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {
        _plain(key): value.shape
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor) and not is_lazy(value)
    }


def _shown(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))


def _named_weights(module: nn.Module) -> dict[str, Tensor]:
    return {_plain(n): p for n, p in _weights(module.named_parameters()).items()}


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(some[key], others[key].to(some[key])) for key in some)


def _is_copy(tensor: Tensor, weights: Collection[Tensor]) -> bool:
    """Whether it has the values of one of them, and is none of them."""
    return not any(tensor is weight for weight in weights) and any(
        tensor.shape == weight.shape
        # An average may be more precise.
        and tensor.dtype in (weight.dtype, torch.float32)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and torch.equal(tensor, weight.to(tensor))
        for weight in weights
    )


def _as(value: Tensor, like: Tensor) -> Tensor:
    """A value in another's precision, in which no more of it is 0."""
    result = value.to(like.dtype)
    if result.is_floating_point():
        result.masked_fill_((result == 0) & (value != 0), _least(result.dtype))
    return result


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
            "zeros among its weights; start from pruned weights, by --initial-weights "
            "FILE before the script or an option of its own, as timm's "
            "--initial-checkpoint FILE"
        )
    apply_masks(holder, {n: m for n, m in masks.items() if kept[n] < m.numel()})
    make_permanent(holder)
    for name, weight in weights.items():
        # This step's gradients were there before.
        if weight.grad is not None:
            weight.grad.masked_fill_(~masks[name], 0)
    empty = [tuple(w.shape) for name, w in weights.items() if not kept[name]]
    _say(
        f"{held:,} of {total:,} weights are 0 ({held / total:.2%}) and stay 0; "
        f"{len(empty)} of {len(kept)} tensors hold nothing else"
    )
    if empty:
        _say(
            f"warning: tensors of shapes {name_some([*map(str, empty)])} are all 0. "
            "They lost every weight, or start at 0 and will not train: then write the "
            "file from the model that the script makes"
        )


if __name__ == "__main__":
    main()
