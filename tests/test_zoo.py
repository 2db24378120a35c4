"""A timm model and its data by name: real models, real images, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from force_plugin.parallel.ranks import Ranks
from force_plugin.zoo import (
    _part_of,
    count_classes,
    digits,
    load_data,
    load_dataset,
    load_model,
)

ANY_SIZE = "test_resnet"
FIXED_SIZE = "test_vit"  # made for 160x160


def write_digits(root: Path, count: int = 60, black: bool = False) -> Path:
    """Write the first digits as ``root/CLASS/NUMBER.png``."""
    bunch = load_digits()
    for i, (image, target) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        if i == count:
            break
        folder = root / f"class_{target}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image * (0 if black else 15)).astype("uint8")
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{i}.png")
    return root


def write_mnist(root: Path) -> Path:
    """Write the first digits in the files that torchvision's MNIST reads."""
    bunch = load_digits()
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = bunch.images[:20].astype("uint8") * 15
    labels = bunch.target[:20].astype("uint8")
    for part in ("train", "t10k"):
        for name, array in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, array.ndim])
            header += b"".join(n.to_bytes(4, "big") for n in array.shape)
            path = raw / f"{part}-{name}-idx{array.ndim}-ubyte"
            path.write_bytes(header + array.tobytes())
    return root


# The digits.


def test_digits_are_split_with_the_same_share_of_each_class() -> None:
    train, test = digits(test_fraction=0.25)
    assert len(train) + len(test) == 1797
    every = train.targets.bincount() + test.targets.bincount()
    share = test.targets.bincount() / every
    assert share.numpy() == pytest.approx(0.25, abs=0.01)


def test_digits_have_no_image_in_both_parts() -> None:
    train, test = digits()
    every = torch.cat([train.images, test.images]).flatten(1)
    # Scikit-learn's own images are all different, too.
    assert len(every.unique(dim=0)) == 1797


def test_the_split_of_the_digits_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    first, _ = digits(seed=3)
    before = torch.get_rng_state()
    torch.manual_seed(1)
    again, _ = digits(seed=3)
    other, _ = digits(seed=4)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


def test_digits_are_the_real_ones_normalised_by_the_training_part() -> None:
    train, test = digits(size=8, channels=1)
    assert train.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.images.std().item() == pytest.approx(1, abs=1e-5)
    assert test.images.mean().item() != pytest.approx(0, abs=1e-5)

    image, target = test[5]
    grey = (image - image.min()) / (image.max() - image.min())
    bunch = load_digits()
    distances = [
        np.abs(grey[0].numpy() - other / other.max()).max() for other in bunch.images
    ]
    assert min(distances) < 1e-5
    assert target == bunch.target[int(np.argmin(distances))]


def test_a_digit_is_upsampled_and_its_channel_repeated() -> None:
    small, _ = digits(size=8, channels=1)
    large, _ = digits(size=32, channels=5)
    image, target = large[7]
    assert image.shape == (5, 32, 32) and image.dtype == torch.float32
    assert target.dtype == torch.int64 and target.ndim == 0
    assert all(torch.equal(channel, image[0]) for channel in image)
    # Bilinear: pixel 14 of 32 lies an eighth of the way from pixel 3 of 8 to pixel 4.
    share = torch.tensor([7 / 8, 1 / 8])
    expected = share @ small[7][0][0, 3:5, 3:5] @ share
    assert image[0, 14, 14].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs", "shape"),
    [
        (ANY_SIZE, None, {}, (3, 32, 32)),
        (ANY_SIZE, 48, {}, (3, 48, 48)),
        (ANY_SIZE, None, {"in_chans": 1}, (1, 32, 32)),
        (FIXED_SIZE, None, {}, (3, 160, 160)),
        (FIXED_SIZE, 64, {}, (3, 64, 64)),
        ("vit_tiny_patch16_224", 32, {}, (3, 32, 32)),
    ],
)
def test_digits_come_at_a_size_that_the_model_takes(
    name: str,
    image_size: int | None,
    kwargs: dict[str, int],
    shape: tuple[int, int, int],
) -> None:
    model = load_model(name, num_classes=10, image_size=image_size, **kwargs)
    loader = load_data(model, load_dataset(), image_size=image_size, batch_size=4)
    inputs, targets = next(iter(loader))
    assert inputs.shape == (4, *shape) and inputs.dtype == torch.float32
    assert targets.shape == (4,) and targets.dtype == torch.int64
    assert model(inputs).shape == (4, 10)


def test_a_model_that_needs_more_than_32_pixels_gets_its_own_size() -> None:
    model: Any = load_model(ANY_SIZE, num_classes=10)
    model.pretrained_cfg["min_input_size"] = (3, 64, 64)
    inputs, _ = next(iter(load_data(model, load_dataset(), batch_size=2)))
    assert inputs.shape == (2, 3, 160, 160)


def test_the_order_of_the_digits_comes_from_the_global_generator() -> None:
    model = load_model(ANY_SIZE, num_classes=10)
    loader = load_data(model, load_dataset())

    def order(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([targets for _, targets in loader])

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))


# Folders and named data sets.


@pytest.mark.parametrize("train", ["", "train"])
def test_a_folder_gives_batches_of_the_models_own_size(
    tmp_path: Path, train: str
) -> None:
    write_digits(tmp_path / train)
    dataset = load_dataset(tmp_path)
    assert len(dataset) == 60  # type: ignore[arg-type]
    assert count_classes(dataset) == 10
    model = load_model(FIXED_SIZE, num_classes=10)
    inputs, targets = next(iter(load_data(model, dataset, batch_size=8)))
    assert inputs.shape == (8, 3, 160, 160) and inputs.dtype == torch.float32
    assert targets.shape == (8,) and targets.dtype == torch.int64


def test_the_training_images_are_read_where_a_folder_has_several_splits(
    tmp_path: Path,
) -> None:
    write_digits(tmp_path / "train", count=20)
    write_digits(tmp_path / "val", count=30)
    assert len(load_dataset(tmp_path)) == 20  # type: ignore[arg-type]
    assert len(load_dataset(tmp_path, split="val")) == 30  # type: ignore[arg-type]


def test_images_are_normalised_as_the_model_has_it(tmp_path: Path) -> None:
    write_digits(tmp_path, count=20, black=True)
    model = load_model(ANY_SIZE, num_classes=10, image_size=32)
    mean = torch.tensor(model.pretrained_cfg["mean"])
    std = torch.tensor(model.pretrained_cfg["std"])
    inputs, _ = next(iter(load_data(model, load_dataset(tmp_path), image_size=32)))
    # Black stays black under flips, crops and colour jitter.
    expected = (-mean / std)[:, None, None].expand_as(inputs)
    assert torch.allclose(inputs, expected)


def test_images_are_augmented(tmp_path: Path) -> None:
    dataset = load_dataset(write_digits(tmp_path, count=20))
    load_data(load_model(ANY_SIZE, num_classes=10), dataset)
    torch.manual_seed(0)
    assert not torch.equal(dataset[0][0], dataset[0][0])


def test_a_data_set_smaller_than_a_batch_makes_one_batch(tmp_path: Path) -> None:
    dataset = load_dataset(write_digits(tmp_path, count=20))
    model = load_model(ANY_SIZE, num_classes=10)
    loader = load_data(model, dataset, image_size=32, batch_size=128)
    assert [len(targets) for _, targets in loader] == [20]


def rank(number: int, size: int) -> Ranks:
    ranks = Ranks(None)
    ranks.rank, ranks.size = number, size
    return ranks


def test_ranks_share_out_a_data_set() -> None:
    dataset, _ = digits()
    parts: list[Any] = [_part_of(dataset, rank(number, 5)) for number in range(5)]
    (size,) = {len(part) for part in parts}
    assert size == len(dataset) // 5
    assert len({index for part in parts for index in part.indices}) == 5 * size
    for part in parts:
        counts = torch.stack([target for _, target in part]).bincount()
        assert counts.min() > size / 20  # of 10 classes


def test_more_ranks_than_images_are_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_digits(tmp_path, count=20))
    with pytest.raises(ValueError, match=r"each of 21 processes, got 20"):
        _part_of(dataset, rank(0, 21))


def test_a_grey_data_set_is_read_by_name(tmp_path: Path) -> None:
    dataset = load_dataset(write_mnist(tmp_path), dataset="torch/mnist")
    model = load_model(ANY_SIZE, num_classes=count_classes(dataset))
    inputs, targets = next(iter(load_data(model, dataset, image_size=32)))
    assert inputs.shape == (20, 3, 32, 32)
    assert sorted(targets.tolist()) == sorted(load_digits().target[:20].tolist())


def test_a_missing_folder_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/such/folder.*does not exist"):
        load_dataset(tmp_path / "no/such/folder")


def test_a_folder_without_images_says_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train/class/\*\.jpg"):
        load_dataset(tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    write_digits(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"two or more classes.*got 1"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "torch/cifar11", "torch/cifar10"])
def test_a_data_set_that_cannot_be_read_is_named_in_the_error(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        load_dataset(tmp_path, dataset=name)


def test_a_data_set_that_does_not_say_its_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        count_classes(torch.utils.data.TensorDataset(torch.zeros(3)))


def test_colour_images_for_a_model_of_one_channel_are_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_digits(tmp_path, count=20))
    model = load_model(ANY_SIZE, num_classes=10, in_chans=1)
    with pytest.raises(ValueError, match="in_chans=3"):
        load_data(model, dataset)


# Models.


def test_a_model_has_the_outputs_and_the_options_asked_for() -> None:
    model = load_model("resnet10t", num_classes=7, zero_init_last=False)
    assert model.get_classifier().out_features == 7
    assert all(block.bn2.weight.all() for block in model.layer1)


def test_a_model_made_for_an_image_size_still_trains() -> None:
    model = load_model(ANY_SIZE, num_classes=10, image_size=32)
    assert all(module.training for module in model.modules())
    assert not model.bn1.running_mean.any()


def test_an_unknown_model_is_answered_with_close_names() -> None:
    with pytest.raises(ValueError, match=r"'resnet_50'; did you mean .*resnet50"):
        load_model("resnet_50", num_classes=10)


@pytest.mark.skipif(
    not timm.list_models("test_maxvit"), reason="this timm has no test_maxvit"
)
@pytest.mark.parametrize(
    ("image_size", "kwargs"), [(None, {"depths": 3}), (33, {}), (32, {"name": "other"})]
)
def test_what_a_model_does_not_take_is_named_in_the_error(
    image_size: int | None, kwargs: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=f"test_maxvit does not take.*{image_size}"):
        load_model("test_maxvit", num_classes=10, image_size=image_size, **kwargs)
