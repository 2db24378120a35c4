"""Masks in a file: saved, loaded, and what the file says of its making."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import GOOD, TYPES, WRONG, assert_same, pruned_thrice, random_masks
from networks import conv_network as network
from networks import tiny_resnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import force_plugin
from force_plugin import apply_masks, get_masks, load_masks, load_metadata, save_masks

SHAPES = [
    (),
    (1,),
    (7,),
    (8,),
    (9,),
    (3, 5),
    (2, 3, 1, 5, 3),
    (1, 1, 1),
    (0,),
    (4, 0, 3),
    (1_000_003,),
    (257, 63, 3, 3),
]


def test_saved_masks_come_back_with_their_names_shapes_and_order(
    tmp_path: Path,
) -> None:
    masks = {f"layers.{len(SHAPES) - i}": _random(s, i) for i, s in enumerate(SHAPES)}
    save_masks(masks, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert_same(loaded, masks)
    assert {mask.device.type for mask in loaded.values()} == {"cpu"}


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 4), max_size=5).map(tuple),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_any_masks_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[int, ...]],
    seed: int,
) -> None:
    path = str(tmp_path_factory.getbasetemp() / "any.safetensors")
    masks = {name: _random(s, seed + i) for i, (name, s) in enumerate(shapes.items())}
    save_masks(masks, path)
    assert_same(load_masks(path), masks)


def test_masks_of_a_model_go_through_a_file_onto_another(tmp_path: Path) -> None:
    model, twin = tiny_resnet(), tiny_resnet()
    apply_masks(model, random_masks(model))
    save_masks(get_masks(model), tmp_path / "masks")
    apply_masks(twin, load_masks(tmp_path / "masks"))
    assert_same(get_masks(twin), get_masks(model))


def test_a_loaded_mask_can_be_written_to(tmp_path: Path) -> None:
    save_masks({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "masks")
    loaded = load_masks(tmp_path / "masks")
    loaded["a"].zero_()
    assert loaded["b"].all()


def test_a_file_takes_a_bit_a_weight(tmp_path: Path) -> None:
    masks = {"a": _random((1_000_001,), 0), "b": _random((100, 101), 1)}
    save_masks(masks, tmp_path / "masks")
    bits = math.ceil(1_000_001 / 8) + math.ceil(10_100 / 8)
    assert bits <= (tmp_path / "masks").stat().st_size <= bits + 500


def test_the_bits_of_a_file_are_in_row_major_order(tmp_path: Path) -> None:
    mask = _random((3, 4, 5, 2), 0)
    masks = {"a": mask.to(memory_format=torch.channels_last), "b": mask.mT}
    save_masks(masks, tmp_path / "masks")
    stored = load_file(tmp_path / "masks")
    for name, expected in {"a": mask, "b": mask.mT}.items():
        bits = [int(bit) for byte in stored[name].tolist() for bit in f"{byte:08b}"]
        assert bits == expected.int().flatten().tolist()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_masks_of_any_type_are_saved_as_bits(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    mask = _random((3, 7), 0)
    save_masks({"a": mask.to(dtype)}, tmp_path / "masks")
    assert_same(load_masks(tmp_path / "masks"), {"a": mask})


@pytest.mark.parametrize("case", ["half", "nan", "array", "none", "list", "empty"])
def test_what_cannot_be_saved_leaves_an_earlier_file_alone(
    case: str, tmp_path: Path
) -> None:
    masks, error, message = WRONG[case]
    save_masks(GOOD, tmp_path / "masks")
    before = (tmp_path / "masks").read_bytes()
    with pytest.raises(error, match=message):
        save_masks(masks, tmp_path / "masks")
    assert (tmp_path / "masks").read_bytes() == before


def test_saving_replaces_an_earlier_file(tmp_path: Path) -> None:
    save_masks({"a": torch.ones(100)}, tmp_path / "masks")
    save_masks({"b": torch.zeros(3)}, tmp_path / "masks")
    assert_same(load_masks(tmp_path / "masks"), {"b": torch.zeros(3)})


def test_saving_into_a_folder_that_does_not_exist_says_so(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "masks"
    message = f"existing folder, got '{path}'; create the folder first"
    with pytest.raises(FileNotFoundError, match=message):
        save_masks(GOOD, path)


def test_saving_over_a_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        save_masks(GOOD, tmp_path)


def test_a_name_that_is_no_string_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^masks: .*int"):
        save_masks({0: torch.ones(3)}, tmp_path / "masks")  # type: ignore[dict-item]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "masks", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; pass"):
            load_masks(path)


NO_MASKS = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"0.weight 1 0 1 1\n" * 20,
    "huge_header": b"\xff" * 64,
    **{f"random_{seed}": random.Random(seed).randbytes(300) for seed in range(5)},
}


@pytest.mark.parametrize("content", NO_MASKS)
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "masks").write_bytes(NO_MASKS[content])
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: not a masks file"):
        load_masks(tmp_path / "masks")


def test_a_checkpoint_of_pytorch_is_refused(tmp_path: Path) -> None:
    torch.save(get_masks(pruned_thrice(network())), tmp_path / "masks")
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: not a masks file"):
        load_masks(tmp_path / "masks")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"shapes": "{}"}], ids=str
)
def test_a_safetensors_file_of_something_else_is_told_apart(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(3, dtype=torch.uint8)}, tmp_path / "masks", metadata)
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: .* save_masks wrote"):
        load_masks(tmp_path / "masks")


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    save_masks(random_masks(network()), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "short"
    for length in {*range(12), *range(12, len(whole), 37), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{path}: not a masks file, .*cut short"):
            load_masks(path)


@pytest.mark.parametrize(
    "shapes",
    [None, "[", "[3]", '{"a": 3}', '{"a": [9]}', '{"b": [3]}', '{"a": [-3]}'],
)
def test_a_file_whose_shapes_do_not_fit_its_bits_is_refused(
    shapes: str | None, tmp_path: Path
) -> None:
    metadata = {"format": "force_plugin masks"}
    if shapes is not None:
        metadata["shapes"] = shapes
    save_file({"a": torch.ones(1, dtype=torch.uint8)}, tmp_path / "masks", metadata)
    with pytest.raises(ValueError, match=f"^{tmp_path}/masks: "):
        load_masks(tmp_path / "masks")


# What a file says of its making


def test_what_was_said_of_the_making_comes_back_with_versions_and_date(
    tmp_path: Path,
) -> None:
    told = {"method": "force", "sparsity": 0.99, "batches": None, "θ": [1, {"a": "b"}]}
    before = datetime.now(timezone.utc).replace(microsecond=0)
    save_masks(GOOD, tmp_path / "masks", told)
    metadata = load_metadata(tmp_path / "masks")
    created = datetime.fromisoformat(metadata.pop("created"))
    assert before <= created <= datetime.now(timezone.utc)
    assert metadata.pop("versions") == {
        "force_plugin": force_plugin.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    assert metadata == told
    assert_same(load_masks(tmp_path / "masks"), GOOD)


def test_other_readers_of_safetensors_find_it_as_json(tmp_path: Path) -> None:
    save_masks(GOOD, tmp_path / "masks", {"seed": 3})
    with safe_open(tmp_path / "masks", framework="np") as file:
        assert json.loads(file.metadata()["metadata"])["seed"] == 3


def test_masks_that_are_saved_again_keep_date_and_versions(tmp_path: Path) -> None:
    first = {"created": "1843-10-01", "versions": {"torch": "0.1"}, "seed": 1}
    save_masks(GOOD, tmp_path / "a", first)
    save_masks(GOOD, tmp_path / "b", load_metadata(tmp_path / "a"))
    assert load_metadata(tmp_path / "b") == first


def test_a_file_says_when_it_was_made_even_if_nothing_was_said(tmp_path: Path) -> None:
    save_masks(GOOD, tmp_path / "masks")
    assert list(load_metadata(tmp_path / "masks")) == ["created", "versions"]


def test_a_file_of_before_there_was_metadata_is_read(tmp_path: Path) -> None:
    shapes = '{"a": [9]}'
    bits = torch.tensor([255, 0], dtype=torch.uint8)
    checksum = hashlib.sha256(shapes.encode() + bytes([255, 0])).hexdigest()
    header = {"format": "force_plugin masks", "shapes": shapes, "sha256": checksum}
    save_file({"a": bits}, tmp_path / "masks", header)
    assert load_metadata(tmp_path / "masks") == {}
    assert_same(load_masks(tmp_path / "masks"), {"a": torch.arange(9) < 8})


@pytest.mark.parametrize("read", [load_masks, load_metadata])
@pytest.mark.parametrize("change", [None, "{}", '{"seed": 4}', "[", ""])
def test_metadata_that_was_changed_is_refused(
    read: Callable[[Path], object], change: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "masks"
    save_masks(GOOD, path, {"seed": 3})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    header.pop("metadata")
    if change is not None:
        header["metadata"] = change
    save_file(load_file(path), path, header)
    with pytest.raises(ValueError, match=f"^{path}: not a masks file, .*checksum"):
        read(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": nn.functional.cross_entropy},
        {"out": Path("out")},
        {"scores": torch.ones(3)},
        {("a", "b"): 1},
        ["method"],
        "force",
    ],
)
def test_metadata_that_json_does_not_hold_is_refused(
    wrong: Any, tmp_path: Path
) -> None:
    message = "^metadata: expected a mapping of names to what JSON holds .*: .+"
    with pytest.raises(TypeError, match=message):
        save_masks(GOOD, tmp_path / "masks", wrong)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("content", ["empty", "text", "random_0"])
def test_there_is_no_metadata_in_a_file_of_something_else(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "masks"
    with pytest.raises(FileNotFoundError, match=f"^{path}: no such file; pass"):
        load_metadata(path)
    path.write_bytes(NO_MASKS[content])
    with pytest.raises(ValueError, match=f"^{path}: not a masks file"):
        load_metadata(path)
