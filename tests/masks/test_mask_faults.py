"""Masks and files of masks that are refused: one clear error, and no change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import MASK, NO_MODULE, NO_PATH, Fault, network, pruned
from safetensors.torch import save_file
from state import unchanged
from torch import Tensor, nn

from force_plugin import (
    apply_masks,
    get_masks,
    load_masks,
    make_permanent,
    save_masks,
    sparsity_report,
)


def permanent() -> nn.Sequential:
    model = pruned()
    make_permanent(model)
    return model


def made_permanent(wrong: Any) -> Callable[[Any], None]:
    return lambda _: make_permanent(wrong)


NO_MASKS = r"^masks: expected a mapping of parameter names to tensors, got "

UNPRUNED = (
    r"^make_permanent: expected a model pruned with torch.nn.utils.prune, or .*, got "
    "one without any mask or zero$"
)


# Files


WHOLE = {"0.weight": torch.eye(8, 6) == 1, "3.weight": torch.eye(4, 8) == 1}


def test_bytes_behind_the_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    save_masks(WHOLE, path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"^{path}: not a masks file, or one that is"):
        load_masks(path)


def write_by_hand(path: Path, bits: Tensor, shapes: str) -> None:
    """A file of a mask "a" as another program might write it: its checksum is right."""
    written = f'{{"a": {shapes}}}'
    checksum = hashlib.sha256(written.encode() + bits.numpy().tobytes()).hexdigest()
    metadata = {"shapes": written, "sha256": checksum, "format": "force_plugin masks"}
    save_file({"a": bits}, path, metadata)


def test_a_file_by_hand_is_read_where_its_bits_fit_its_shapes(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "masks", torch.full((2,), 255).byte(), "[9]")
    assert load_masks(tmp_path / "masks")["a"].tolist() == [True] * 9


@pytest.mark.parametrize(
    ("bits", "shapes"),
    [
        (torch.ones(2, dtype=torch.int8), "[9]"),
        (torch.ones(2), "[9]"),
        (torch.ones(1, 2, dtype=torch.uint8), "[9]"),
        (torch.ones(2, dtype=torch.uint8), "[3]"),
        (torch.ones(1, dtype=torch.uint8), "[9]"),
        (torch.ones(2, dtype=torch.uint8), "[9.0]"),
        (torch.ones(2, dtype=torch.uint8), '"9"'),
        (torch.ones(2, dtype=torch.uint8), "[-3, -3]"),
        (torch.ones(1, dtype=torch.uint8), f"[{2**62}, 4]"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.dtype} {value.shape}"
    ),
)
def test_bits_that_are_none_or_of_another_number_are_refused(
    bits: Tensor, shapes: str, tmp_path: Path
) -> None:
    path = tmp_path / "masks"
    write_by_hand(path, bits, shapes)
    with pytest.raises(ValueError, match=f"^{path}: not a masks file"):
        load_masks(path)


def test_a_folder_or_a_path_through_a_file_is_no_masks_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "masks", ""):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; pass"):
            load_masks(path)


def test_a_path_that_cannot_be_written_is_named_by_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "file" / "masks", FileNotFoundError),
        (tmp_path / ("long" * 99), OSError),
    ):
        with pytest.raises(error, match=f"'{path}'"):
            save_masks(WHOLE, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(
    "change", [Tensor.to_sparse, lambda mask: mask.to("meta")], ids=["sparse", "meta"]
)
def test_a_mask_without_values_is_named(
    change: Callable[[Tensor], Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    masks = {"0.weight": change(torch.ones(8, 6, dtype=dtype))}
    model = network()
    message = r"^masks: 0\.weight has layout .* on device .*; expected a dense tensor"
    with unchanged(model), pytest.raises(ValueError, match=message):
        apply_masks(model, masks)
    with pytest.raises(ValueError, match=message):
        save_masks(masks, tmp_path / "masks")
    assert not [*tmp_path.iterdir()]


def test_masks_are_not_saved_under_a_name_that_cannot_be_read_again(
    tmp_path: Path,
) -> None:
    message = "^masks: expected parameter names, got '__metadata__', which is res"
    with pytest.raises(ValueError, match=message):
        save_masks({"__metadata__": torch.ones(3)}, tmp_path / "masks")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        save_masks(WHOLE, "/dev/full")


def test_masks_of_another_model_do_not_change_it(tmp_path: Path) -> None:
    model = pruned()
    save_masks(get_masks(model), tmp_path / "masks")
    other = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    message = (
        r"^masks: 1 of 2 names are no parameters of the model: '3\.weight'; .*"
        r"0\.weight \(8, 6\) instead of \(9, 6\)$"
    )
    with unchanged(other), pytest.raises(ValueError, match=message):
        apply_masks(other, load_masks(tmp_path / "masks"))


# What is taken back that a model or a method has written


def test_making_permanent_that_is_interrupted_half_way_keeps_the_dense_values() -> None:
    class Stubborn(nn.Linear):
        """A layer that cannot be given its weight back."""

        armed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.armed and name == "weight":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Stubborn(8, 4))
    masks = {
        name: torch.eye(*p.shape) for name, p in model.named_parameters() if "w" in name
    }
    apply_masks(model, masks)
    Stubborn.armed = True
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        make_permanent(model)


ARGUMENTS: dict[str, Fault] = {
    # masks
    "a report for masks": Fault(
        lambda m: apply_masks(m, sparsity_report(m)), TypeError, NO_MASKS + "SparsityR"
    ),
    "names for masks": Fault(
        lambda m: apply_masks(m, {"0.weight"}), TypeError, NO_MASKS + "set$"
    ),
    "masks for the model": Fault(
        lambda m: apply_masks(MASK, m), TypeError, NO_MODULE + "dict$"
    ),
    "a mask of statistics": Fault(
        lambda m: apply_masks(m, {"1.running_mean": torch.ones(8)}),
        ValueError,
        r"^masks: 1 of 1 names are no parameters of the model: "
        r"'1\.running_mean'; the model's own begin with 0\.weight, 0\.bias, 1\.weight$",
    ),
    "a mask of a module": Fault(
        lambda m: apply_masks(m, {"0": torch.ones(8, 6)}),
        ValueError,
        "no parameters of the model: '0';",
    ),
    "a mask by pytorch's name": Fault(
        lambda m: apply_masks(m, {"0.weight_orig": torch.ones(8, 6)}),
        ValueError,
        r"'0\.weight_orig' \(did you mean '0\.weight'\?\); the model's own begin with",
        pruned,
    ),
    "a mask of minus ones": Fault(
        lambda m: apply_masks(m, {"0.weight": -torch.ones(8, 6)}),
        ValueError,
        r"^masks: 0\.weight holds other values than 0 and 1$",
        pruned,
    ),
    "a mask of 255": Fault(
        lambda m: apply_masks(m, {"0.weight": torch.full((8, 6), 255).byte()}),
        ValueError,
        r"^masks: 0\.weight holds other values than 0 and 1$",
    ),
    "a path for masks to save": Fault(
        lambda m: save_masks("masks", MASK), TypeError, NO_MASKS + "str$"
    ),
    "a report to save": Fault(
        lambda m: save_masks(sparsity_report(m), "masks"), TypeError, NO_MASKS + "Spar"
    ),
    "no path to save to": Fault(
        lambda m: save_masks(MASK, None), TypeError, NO_PATH + "NoneType$"
    ),
    "masks to load masks from": Fault(
        lambda m: load_masks(MASK), TypeError, NO_PATH + "dict$"
    ),
    # make_permanent
    "nothing to make permanent": Fault(make_permanent, ValueError, UNPRUNED),
    "a permanent model made permanent": Fault(
        lambda m: make_permanent(m, hold_zeros=False), ValueError, UNPRUNED, permanent
    ),
    **{
        f"{type(wrong).__name__} made permanent": Fault(
            made_permanent(wrong),
            TypeError,
            f"{NO_MODULE}{type(wrong).__name__}$",
        )
        for wrong in (None, MASK, "resnet18", nn.Linear)
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(
    name: str,
) -> None:
    fault = ARGUMENTS[name]
    model = fault.model()
    with unchanged(model), pytest.raises(fault.error, match=fault.message):
        fault.call(model)
