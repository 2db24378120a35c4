"""A pruned model in a file without its zeros, and read into a whole model."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from networks import Mixed, conv_network, tiny_resnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from state import unchanged
from torch import Tensor, nn
from torch.nn.utils import prune

from force_plugin import (
    apply_masks,
    compact,
    get_masks,
    load_compact,
    load_sparse,
    make_permanent,
    save_compact,
    save_masks,
    save_sparse,
)
from force_plugin.structure.files import _digest


def inputs() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_resnet()


def smaller(model: nn.Module | None = None, density: float = 0.03) -> nn.Module:
    """What compact makes of a model, trained a little."""
    if model is None:
        return deepcopy(_smaller_network(density))
    return _smaller(model, density)


@cache
def _smaller_network(density: float) -> nn.Module:
    return _smaller(network(), density)


def _smaller(model: nn.Module, density: float) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    apply_masks(model, masks)
    small = compact(model, inputs(), progress=False)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(inputs()).square().sum().backward()
    optimizer.step()
    return small.eval()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Compare all that is saved: of what is under a mask nothing is."""
    masks, theirs = get_masks(model), get_masks(other)
    assert list(masks) == list(theirs)
    assert all(torch.equal(masks[name], theirs[name]) for name in masks)
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key in state:
        mask = masks.get(key.removesuffix("_orig"))
        if mask is None:
            assert torch.equal(state[key], expected[key])
        else:
            assert torch.equal(state[key], expected[key].masked_fill(~mask, 0))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "tiny_resnet": network,
    "test_resnet": lambda _: timm.create_model("test_resnet", num_classes=10),
    "test_convnext": lambda _: timm.create_model("test_convnext", num_classes=10),
    "test_efficientnet": lambda _: timm.create_model(
        "test_efficientnet", num_classes=10
    ),
}


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    small = smaller(MODELS[name](0))
    save_sparse(small, tmp_path / "small")
    whole = MODELS[name](1)
    assert size(small) < size(whole)
    loaded = load_sparse(whole, tmp_path / "small")
    assert loaded is whole
    assert_same(loaded, small)
    assert torch.equal(loaded.eval()(inputs()), small(inputs()))


def test_modules_know_their_sizes(tmp_path: Path) -> None:
    small = smaller(timm.create_model("regnetx_002", num_classes=10), 0.05)
    save_sparse(small, tmp_path / "small")
    loaded = load_sparse(
        timm.create_model("regnetx_002", num_classes=10), tmp_path / "small"
    )
    for one, other in zip(loaded.modules(), small.modules(), strict=True):
        assert repr(one) == repr(other)
    assert loaded.num_features == small.num_features
    assert type(loaded.stem.conv.kernel_size) is tuple
    loaded.reset_classifier(3)
    assert loaded.eval()(inputs()).shape == (2, 3)


@pytest.mark.parametrize("kind", [list, tuple])
def test_sizes_of_a_split_are_read_as_what_they_were(
    kind: type[list[int]] | type[tuple[int, ...]], tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Mixed(kind([2, 6])))

    model = make()
    prune.ln_structured(model[0], "weight", amount=3, n=1, dim=0)
    small = compact(model, inputs(), progress=False)
    save_sparse(small, tmp_path / "small.safetensors")
    loaded = load_sparse(make(), tmp_path / "small.safetensors")
    assert loaded[1].sizes == small[1].sizes
    assert isinstance(loaded[1].sizes, kind) and sum(loaded[1].sizes) == 5
    assert torch.equal(loaded(inputs()), small(inputs()))


def test_heads_that_went_stay_away(tmp_path: Path) -> None:
    def vit() -> nn.Module:
        return timm.create_model("test_vit", img_size=32, num_classes=4)

    model = vit()
    attention = model.blocks[0].attn
    mask = torch.ones_like(attention.proj.weight)
    mask[:, attention.head_dim :] = 0
    prune.custom_from_mask(attention.proj, "weight", mask)
    images = torch.randn(2, 3, 32, 32)
    small = compact(model, images, progress=False).eval()
    assert small.blocks[0].attn.num_heads == 1 < attention.num_heads
    save_sparse(small, tmp_path / "small")
    loaded = load_sparse(vit(), tmp_path / "small").eval()
    assert loaded.blocks[0].attn.num_heads == 1
    assert torch.equal(loaded(images), small(images))


def test_what_is_under_a_mask_is_not_saved(tmp_path: Path) -> None:
    small = smaller()
    save_sparse(small, tmp_path / "small")
    loaded = load_sparse(network(1), tmp_path / "small")
    assert small[4].weight_orig[small[4].weight_mask == 0].any()
    assert not loaded[4].weight_orig[loaded[4].weight_mask == 0].any()


def test_what_was_permanent_is_so_again(tmp_path: Path) -> None:
    small = smaller()
    make_permanent(small)
    save_sparse(small, tmp_path / "small")
    loaded = load_sparse(network(1), tmp_path / "small")
    assert not prune.is_pruned(loaded)
    assert_same(loaded, small)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        loaded.train()(inputs()).square().sum().backward()
        optimizer.step()
    for name, mask in get_masks(loaded).items():
        assert not loaded.get_parameter(name)[~mask].any()
    assert not torch.equal(loaded[4].weight, small[4].weight)


def test_zeros_without_a_mask_are_left_out_and_come_back(tmp_path: Path) -> None:
    small, dense = smaller(), network()
    make_permanent(small, hold_zeros=False)
    small[4].weight.data.view(-1)[:4] = torch.tensor([-0.0, torch.nan, torch.inf, 0.0])
    for model, path in ((small, tmp_path / "small"), (dense, tmp_path / "dense")):
        save_sparse(model, path)
    with safe_open(tmp_path / "small", framework="np") as file:
        assert {"gaps of 0.weight", "gaps of 10.weight"} <= {*file.keys()}
    with safe_open(tmp_path / "dense", framework="np") as file:
        assert {*file.keys()} == {*dense.state_dict()}
    loaded = load_sparse(network(1), tmp_path / "small")
    assert not get_masks(loaded)
    for name, values in small.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.numpy().tobytes() == values.numpy().tobytes()


def test_layers_that_keep_nothing_or_zeros_come_back(tmp_path: Path) -> None:
    model = network()
    model[4].weight.data.flatten()[:50] = 0
    mask = torch.zeros_like(model[4].weight)
    mask.view(-1)[25:75] = 1
    apply_masks(model, {"0.weight": torch.zeros(24, 3, 3, 3), "4.weight": mask})
    save_sparse(model, tmp_path / "file")
    assert_same(load_sparse(network(1), tmp_path / "file"), model)


def test_the_code_in_the_documentation_reads_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "file-formats.md"
    text = page.read_text(encoding="utf-8")
    _, weights, masks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(60, 90)))
    apply_masks(model, {"fc.weight": torch.rand(90, 60) < 0.01})
    found: dict[str, Any] = {}
    save_sparse(model, "model.safetensors")
    exec(weights, found)
    assert found["weights"].keys() == {"fc.weight"}
    kept = model.fc.weight_orig * model.fc.weight_mask
    assert np.array_equal(found["weights"]["fc.weight"], kept.detach().numpy())
    save_masks(get_masks(model), "model.safetensors")
    exec(weights.split("sparse =")[0], found)
    exec(masks, found)
    assert np.array_equal(found["mask"], model.fc.weight_mask.numpy())


def test_a_file_of_version_0_1_is_read(tmp_path: Path) -> None:
    small = smaller()
    save_sparse(small, tmp_path / "now")
    with safe_open(tmp_path / "now", framework="pt") as file:
        modules = file.metadata()["modules"]
    masks = get_masks(small)
    tensors = {
        name.removesuffix("_orig"): values
        for name, values in small.state_dict().items()
        if not name.endswith("_mask")
    }
    for name, mask in masks.items():
        bits = np.packbits(mask.flatten().numpy())
        tensors[f"mask of {name}"] = torch.from_numpy(bits)
    digest = hashlib.sha256(modules.encode() + b"false")
    for name in sorted(tensors):
        values = tensors[name].flatten()
        digest.update(f"{name} {values.dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(values.numpy().tobytes())
    header = {"format": "force_plugin compact model", "modules": modules}
    header |= {"permanent": "false", "sha256": digest.hexdigest()}
    save_file(tensors, tmp_path / "then", header)
    loaded = load_sparse(network(1), tmp_path / "then")
    masks = get_masks(loaded)
    assert masks.keys() == get_masks(small).keys()
    for name, values in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values)


def test_the_older_names_do_the_same(tmp_path: Path) -> None:
    small = smaller()
    save_compact(small, tmp_path / "older")
    save_sparse(small, tmp_path / "file")
    older, now = (load_file(tmp_path / name) for name in ("older", "file"))
    assert older.keys() == now.keys()
    assert_same(load_compact(network(1), tmp_path / "older"), small)


def test_masks_stay_masks(tmp_path: Path) -> None:
    small = smaller()
    save_sparse(small, tmp_path / "small")
    assert prune.is_pruned(load_sparse(network(1), tmp_path / "small"))


@pytest.mark.parametrize("permanent", [False, True])
def test_a_model_that_is_whole_or_not_pruned_will_do(
    permanent: bool, tmp_path: Path
) -> None:
    dense = network()
    if permanent:
        apply_masks(dense, {"4.weight": torch.ones_like(dense[4].weight)})
        make_permanent(dense)
    save_sparse(dense, tmp_path / "dense")
    loaded = load_sparse(network(1), tmp_path / "dense")
    assert_same(loaded, dense)
    assert not prune.is_pruned(loaded)


def test_it_can_be_read_again_and_again(tmp_path: Path) -> None:
    small = smaller()
    save_sparse(small, tmp_path / "a")
    again = load_sparse(network(1), tmp_path / "a")
    save_sparse(again, tmp_path / "b")
    assert_same(load_sparse(network(2), tmp_path / "b"), small)
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size


def test_a_loaded_model_can_be_pruned_further(tmp_path: Path) -> None:
    save_sparse(smaller(), tmp_path / "small")
    loaded = load_sparse(network(1), tmp_path / "small")
    masks = get_masks(loaded)
    apply_masks(loaded, {"4.weight": torch.rand(loaded[4].weight.shape) < 0.5})
    for name, mask in get_masks(loaded).items():
        assert not (mask & ~masks[name]).any()


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
def test_the_file_is_about_as_large_as_the_kept_values(tmp_path: Path) -> None:
    small = smaller(density=0.01)
    save_sparse(small, tmp_path / "small")
    masks = get_masks(small).values()
    kept = sum(int(mask.sum()) for mask in masks)
    others = size(small) - sum(mask.numel() for mask in masks)
    values = 4 * (kept + others + sum(b.numel() for b in bn_buffers(small)))
    written = (tmp_path / "small").stat().st_size
    assert kept <= written - values < 2 * kept + 9000  # names and sizes


def bn_buffers(model: nn.Module) -> list[Tensor]:
    return [b for name, b in model.named_buffers() if "running" in name]


def test_other_readers_of_safetensors_find_dense_names(tmp_path: Path) -> None:
    save_sparse(smaller(), tmp_path / "small")
    with safe_open(tmp_path / "small", framework="np") as file:
        names = {n for n in file.keys() if not n.startswith("gaps of ")}  # noqa: SIM118
    assert names == set(network().state_dict())


def test_saving_changes_nothing(tmp_path: Path) -> None:
    small = smaller()
    with unchanged(small):
        save_sparse(small, tmp_path / "small")


def test_types_and_frozen_parameters_are_those_of_the_receiver(tmp_path: Path) -> None:
    small = smaller()
    save_sparse(small, tmp_path / "small")
    whole = network(1).double()
    whole[4].weight.requires_grad_(False)
    load_sparse(whole, tmp_path / "small")
    assert [n for n, p in whole.named_parameters() if not p.requires_grad] == [
        "4.weight_orig"
    ]
    assert {p.dtype for p in whole.parameters()} == {torch.float64}
    assert whole[1].running_mean.dtype == torch.float64
    assert whole[1].num_batches_tracked.dtype == torch.int64
    values = small[4].weight_orig * small[4].weight_mask
    assert torch.equal(whole[4].weight_orig, values.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_kept_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    small = smaller().to(dtype)
    save_sparse(small, tmp_path / "small")
    assert_same(load_sparse(network(1).to(dtype), tmp_path / "small"), small)


def test_weights_that_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    small = smaller().to(memory_format=torch.channels_last)
    save_sparse(small, tmp_path / "small")
    assert_same(load_sparse(network(1), tmp_path / "small"), small)


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Embedding(9, 8), nn.Linear(8, 12)
        self.back, self.last = nn.Linear(12, 8), nn.Linear(8, 9, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("once", torch.rand(3), persistent=False)
        self.register_buffer("kept", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.back(torch.relu(self.hidden(self.first(x)))))


def small_tied() -> nn.Module:
    torch.manual_seed(0)
    model = Tied()
    model.hidden.bias.data[:3] = 0
    mask = torch.ones(12, 8)
    mask[:3] = 0
    apply_masks(
        model, {"hidden.weight": mask, "first.weight": torch.rand(9, 8).gt(0.3)}
    )
    return compact(model, torch.arange(9).view(3, 3), progress=False)


def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    small = small_tied()
    save_sparse(small, tmp_path / "small")
    with safe_open(tmp_path / "small", framework="pt") as file:
        names = {*file.keys()}
    assert "first.weight" in names and "last.weight" not in names
    loaded = load_sparse(Tied(), tmp_path / "small")
    assert loaded.last.weight_orig is loaded.first.weight_orig
    assert loaded.hidden.out_features == 9
    x = torch.arange(9).view(3, 3)
    assert torch.equal(loaded(x), small(x))


def test_buffers_that_no_state_dict_has_are_those_of_the_receiver(
    tmp_path: Path,
) -> None:
    small: Any = small_tied()
    save_sparse(small, tmp_path / "small")
    whole: Any = Tied()
    once, kept = whole.once, whole.kept
    load_sparse(whole, tmp_path / "small")
    assert whole.once is once
    assert torch.equal(whole.kept, small.kept) and not torch.equal(whole.kept, kept)


# Errors: one that says what is wrong, and the model is unchanged.


def _pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[4], "weight", 0.5)
    return model


def _held() -> nn.Module:
    model = _pruned()
    make_permanent(model)
    return model


def _narrower() -> nn.Module:
    model = network()
    model[4] = nn.Conv2d(24, 7, 3, bias=False)
    return model


def _unbiased() -> nn.Module:
    model = network()
    model[10] = nn.Linear(48, 10, bias=False)
    return model


def _other_kind() -> nn.Module:
    model = network()
    model[6] = nn.GELU()
    return model


def _longer() -> nn.Module:
    return network().append(nn.ReLU())


RECEIVERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pruned": (_pruned, r"^model: expected one that is not pruned, but 4\.weight is"),
    "held": (_held, r"^model: expected one that is not pruned, but 4\.weight is"),
    "other": (conv_network, "small: of another network than the model: "),
    "narrower": (_narrower, r"small: of another .*smaller than .*4's out_channels is"),
    "compact": (smaller, r"expected one that is not pruned"),
    "unbiased": (_unbiased, r"small: of another .*10\.bias is only in one of them"),
    "kind": (_other_kind, "6 is ReLU in the file, and GELU in the model"),
    "longer": (_longer, "11 is missing in the file, and ReLU in the model"),
}


@pytest.mark.parametrize("case", RECEIVERS)
def test_a_model_that_does_not_fit_is_refused_and_stays(
    case: str, tmp_path: Path
) -> None:
    build, message = RECEIVERS[case]
    save_sparse(smaller(density=0.1), tmp_path / "small")
    model = build()
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_sparse(model, tmp_path / "small")


@pytest.mark.filterwarnings("ignore:the masks have disconnected the network")
def test_a_smaller_model_does_not_take_a_larger_one(tmp_path: Path) -> None:
    save_sparse(network(), tmp_path / "whole")
    small = smaller(density=0.01)
    for module in list(small.modules()):
        for key in ("weight", "bias"):
            if hasattr(module, f"{key}_mask"):
                prune.remove(module, key)
    with unchanged(small), pytest.raises(ValueError, match="the model is smaller"):
        load_sparse(small, tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", bytes(64), b"text " * 99, b"\xff" * 64])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    model = network()
    with unchanged(model), pytest.raises(ValueError, match=f"^{tmp_path}/file: no "):
        load_sparse(model, tmp_path / "file")


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save_sparse(smaller(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    model = network()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "file").write_bytes(content[:length])
        with unchanged(model), pytest.raises(ValueError, match="cut short"):
            load_sparse(model, tmp_path / "file")


def test_masks_and_state_dicts_are_told_apart(tmp_path: Path) -> None:
    model = network()
    save_masks({"4.weight": torch.ones(48, 24, 3, 3)}, tmp_path / "masks")
    save_file(model.state_dict(), tmp_path / "state")
    for name in ("masks", "state"):
        message = f"^{tmp_path}/{name}: .*not one that save_sparse wrote"
        with unchanged(model), pytest.raises(ValueError, match=message):
            load_sparse(model, tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = network()
    for path in (tmp_path / "none", tmp_path):
        message = f"^{path}: no such file; pass"
        with unchanged(model), pytest.raises(FileNotFoundError, match=message):
            load_sparse(model, path)


@pytest.mark.parametrize("wrong", [None, nn.Linear, {}])
def test_what_is_no_model_is_refused(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module"):
        save_sparse(wrong, tmp_path / "file")  # type: ignore[arg-type]
    assert not (tmp_path / "file").exists()
    save_sparse(network(), tmp_path / "file")
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module"):
        load_sparse(wrong, tmp_path / "file")  # type: ignore[arg-type]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_sparse(network(), tmp_path / "nowhere" / "file")


def _tampered(path: Path, **changes: str | None) -> None:
    """Write a file again with other metadata."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {k: v for k, v in {**header, **changes}.items() if v is not None}
    save_file(tensors, path, header)


def assert_refused(path: Path) -> None:
    model = network(1)
    with unchanged(model), pytest.raises(ValueError, match=f"^{path}: "):
        load_sparse(model, path)


@pytest.mark.parametrize("change", [None, "["])
@pytest.mark.parametrize("key", ["modules", "sparse", "permanent"])
def test_a_header_that_was_changed_is_refused(
    key: str, change: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "small"
    save_sparse(smaller(), path)
    _tampered(path, **{key: change})
    assert_refused(path)


def test_gaps_that_were_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small"
    save_sparse(smaller(), path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["gaps of 4.weight"] = tensors["gaps of 4.weight"][:3]
    save_file(tensors, path, header)
    assert_refused(path)


@pytest.mark.parametrize("name", ["4.weight", "gaps of 4.weight"])
def test_gaps_and_values_that_do_not_belong_together_are_refused(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "small"
    save_sparse(smaller(), path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors[name] = tensors[name][:3]
    # Another program may write a file with the right checksum and wrong content.
    save_file(tensors, path, header | {"sha256": _digest(header, tensors)})
    assert_refused(path)


def test_sizes_that_belong_to_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small"
    save_sparse(smaller(), path)
    with safe_open(path, framework="pt") as file:
        modules = file.metadata()["modules"]
    changed = modules.replace('"out_features": 10', '"out_features": 9')
    assert changed != modules
    _tampered(path, modules=changed)
    assert_refused(path)


def test_heads_that_run_in_training_only_are_in_the_file(tmp_path: Path) -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.aux = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.a(x).relu()
            parts = nn.functional.adaptive_avg_pool2d(y, 2).flatten(1)
            out = self.head(y.mean((2, 3)))
            return [out, self.aux(parts)] if self.training else [out]

    model = Auxiliary()
    read = torch.arange(8) < 6
    masks = {"head.weight": read.expand(5, 8)}
    masks["aux.weight"] = read.repeat_interleave(4).expand(5, 32)
    apply_masks(model, masks)
    small = compact(model, inputs(), progress=False)
    save_sparse(small, tmp_path / "small.safetensors")
    loaded = load_sparse(Auxiliary(), tmp_path / "small.safetensors")
    assert (loaded.a.out_channels, loaded.aux.in_features) == (6, 24)
    for one, other in zip(loaded.train()(inputs()), small(inputs()), strict=True):
        assert torch.equal(one, other)
