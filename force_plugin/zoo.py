"""A timm model and its data loader, by name.

The order is data, model, loader: the data say how many classes the model needs, and
the model says how its images are cropped, resized and normalised.

    >>> dataset = load_dataset()
    >>> model = load_model("test_resnet", num_classes=count_classes(dataset))
    >>> loader = load_data(model, dataset, batch_size=64)
    >>> inputs, targets = next(iter(loader))
    >>> inputs.shape
    torch.Size([64, 3, 32, 32])
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import timm
import timm.data
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms import v2

from force_plugin.errors import BatchError
from force_plugin.parallel.ranks import Ranks

DIGITS_SIZE = 32
"""Height and width of the digits, in pixels, for models that take any size."""

# timm.data.create_dataset reads any other name as an image folder, without a word.
_SOURCES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")

_FOLDER = "class/*.jpg or train/class/*.jpg"


@dataclass(frozen=True, eq=False)
class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Handwritten digits, upsampled on access to the size a model takes.

    Kept at 8x8 pixels, the images take 0.5 MB whatever the size they are asked for.

    Attributes:
        images: Normalised grey images, float32 of shape ``[N, 1, 8, 8]``.
        targets: Classes 0 to 9, int64 of shape ``[N]``.
        size: Height and width of an item, in pixels.
        channels: Channels of an item, each a copy of the grey image.
    """

    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")

    images: Tensor
    targets: Tensor
    size: tuple[int, int] = (DIGITS_SIZE, DIGITS_SIZE)
    channels: int = 3

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image, float32 ``[channels, *size]``, and its class, an int64 scalar."""
        image = interpolate(self.images[index, None], self.size, mode="bilinear")
        return image[0].expand(self.channels, -1, -1), self.targets[index]


def digits(
    size: int = DIGITS_SIZE,
    *,
    channels: int = 3,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[Digits, Digits]:
    """Scikit-learn's handwritten digits: real images that need no download.

    The 1797 grey images of 8x8 pixels and 10 classes are split with the same share of
    each class in both parts, and normalised with the training part's mean and standard
    deviation.

    Args:
        size: Height and width to upsample to (bilinear), in pixels.
        channels: How often the grey channel is repeated.
        test_fraction: Fraction of the images in the test part, between 0 and 1.
        seed: Seed of the split; the global generators are left alone.

    Returns:
        The training and the test part.
    """
    # Here, because only the digits need scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)
    targets = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        list(range(len(targets))),
        test_size=test_fraction,
        stratify=bunch.target,
        random_state=seed,
    )
    images = (images - images[train].mean()) / images[train].std()
    return (
        Digits(images[train], targets[train], (size, size), channels),
        Digits(images[test], targets[test], (size, size), channels),
    )


def load_dataset(
    data: str | Path | None = None,
    *,
    dataset: str = "",
    split: str = "train",
    download: bool = False,
) -> Dataset[Any]:
    """Open a labelled image data set.

    Args:
        data: Folder (or .tar file) of the data, ``data/class/*.jpg`` or
            ``data/train/class/*.jpg``. None, without a ``dataset``: the training part
            of the ``digits``.
        dataset: Empty for a folder of images, or a name that
            ``timm.data.create_dataset`` reads, such as ``"torch/cifar10"``.
        split: The split to read, where the data have several.
        download: Whether to download a named data set that is not in ``data`` yet.

    Returns:
        The data set; images are untransformed until ``load_data`` gives them a model's
        own transforms.

    Raises:
        TypeError: If ``dataset`` is no text.
        FileNotFoundError: If ``data`` does not exist.
        BatchError: If there are no images in class folders in ``data``, or if timm
            cannot read the ``dataset``.
        ValueError: If ``dataset`` is no name that timm knows.
    """
    if not isinstance(dataset, str):
        raise TypeError(
            "dataset: expected a name such as 'torch/cifar10', got "
            + type(dataset).__name__
        )
    if data is None and not dataset:
        return digits()[0]
    if dataset and not dataset.startswith(_SOURCES):
        raise ValueError(
            f"dataset: expected a name that starts with {', '.join(_SOURCES)} as in "
            f"'torch/cifar10', got {dataset!r}; leave it out to read a folder of images"
        )
    if data is not None and not Path(data).exists():
        raise FileNotFoundError(
            f"data: expected a folder that holds {dataset or _FOLDER}, got "
            f"{str(data)!r}, which does not exist"
        )
    try:
        opened: Dataset[Any] = timm.data.create_dataset(
            dataset,
            root=None if data is None else str(data),
            split=split,
            download=download,
            is_training=True,
        )
    # Every source says no in its own way: assertions, missing packages, ...
    except Exception as error:
        raise BatchError(
            f"data: cannot read {dataset or _FOLDER} from data={data}: {error}"
        ) from error
    # With one class the loss is 0 whatever the weights, and so is every score.
    if not dataset and (classes := count_classes(opened)) < 2:
        raise BatchError(
            f"data: expected {_FOLDER} for each of two or more classes in "
            f"{str(data)!r}, got {classes}"
        )
    return opened


def count_classes(dataset: Dataset[Any]) -> int:
    """How many classes a data set has.

    Args:
        dataset: A data set of ``load_dataset``'s, or any with ``classes``.

    Returns:
        The number of classes.

    Raises:
        BatchError: If the data set does not say, as some streams do not.
    """
    labelled = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "classes"):
        if classes := getattr(labelled, attribute, None):
            return len(classes)
    raise BatchError(
        f"dataset: {type(dataset).__name__} does not say how many classes it has",
        "give num_classes yourself",
    )


def load_model(
    name: str, /, *, num_classes: int, image_size: int | None = None, **kwargs: Any
) -> nn.Module:
    """Make a timm model with fresh weights.

    Args:
        name: Name of the model, as ``timm.list_models`` has it.
        num_classes: Outputs of the classifier.
        image_size: Height and width of the images, in pixels. None: the model's own.
            Also the way to build a ViT for small images.
        **kwargs: Passed on to ``timm.create_model``: ``in_chans=1``,
            ``zero_init_last=False``, ...

    Returns:
        The model, on the CPU, in training mode. ``model.pretrained_cfg["input_size"]``
        is what it takes, ``(channels, height, width)``.

    Raises:
        TypeError: If ``name`` is no text.
        ValueError: If timm has no such model, or the model does not take
            ``image_size`` or ``kwargs``.
    """
    if not isinstance(name, str):
        raise TypeError(
            "model: expected a name from timm.list_models(), got " + type(name).__name__
        )
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"model: expected a name from timm.list_models(), got {name!r}"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    try:
        cfg = get_pretrained_cfg(name)
        channels, height, width = cfg.input_size if cfg else (3, 224, 224)
        # The overlay builds models of a fixed size at this one, leaves the others as
        # they are, and tells load_data in either case.
        input_size = (
            kwargs.get("in_chans", channels),
            image_size or height,
            image_size or width,
        )
        model: nn.Module = timm.create_model(
            name,
            num_classes=num_classes,
            pretrained_cfg_overlay={"input_size": input_size},
            **kwargs,
        )
        if image_size is not None:
            # Many a size that does not fit only shows in a forward pass.
            with torch.no_grad():
                model.eval()(torch.zeros(1, *input_size))
            model.train()
    # Each model refuses what it does not take with errors of its own.
    except Exception as error:
        options = {"num_classes": num_classes, "image_size": image_size, **kwargs}
        raise ValueError(f"model: {name} does not take {options}: {error}") from error
    return model


def load_data(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    image_size: int | None = None,
    batch_size: int = 128,
    workers: int = 0,
) -> DataLoader[Any]:
    """Load a data set in shuffled batches that a model takes.

    Images get the model's own size, crop, interpolation and normalisation, and timm's
    training augmentation; ``digits`` are only resized, to 32x32 where the model takes
    any size and to the model's own size otherwise. The order comes from torch's global
    generator, which ``torch.manual_seed`` fixes; the augmentation draws from Python's
    too, and ``timm.utils.random_seed`` fixes both.

    Where :mod:`torch.distributed` is initialised, each rank loads a part of its own;
    the parts are of the same size and have no image in common.

    Args:
        model: A timm model.
        dataset: A data set of ``load_dataset``'s; but for ``digits``, its
            ``transform`` is replaced.
        image_size: Height and width, in pixels, as ``load_model`` was given it. None:
            as above.
        batch_size: Samples a batch, of each rank; a smaller data set makes one batch.
            The last, incomplete batch is left out.
        workers: Processes that load; 0 loads in this one.

    Returns:
        A loader of ``(inputs, targets)``: float32 of shape ``[B, C, H, W]`` and int64
        of shape ``[B]``.

    Raises:
        TypeError: If ``model`` is no module.
        BatchError: If there are more ranks than images.
        ValueError: If the model takes other than 3 channels and the data are not the
            ``digits``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    config = timm.data.resolve_model_data_config(model)
    channels, *own_size = config["input_size"]
    size = [image_size, image_size] if image_size else own_size
    if isinstance(dataset, Digits):
        if image_size is None and _takes_any_size(model):
            size = [DIGITS_SIZE, DIGITS_SIZE]
        dataset = replace(dataset, size=tuple(size), channels=channels)
    elif channels != 3:
        raise ValueError(
            f"model: expected in_chans=3, as images are read in colour, got {channels}"
        )
    part = _part_of(dataset, Ranks(model))
    if not isinstance(part, IterableDataset):
        batch_size = min(batch_size, len(part))  # type: ignore[arg-type]
    if isinstance(dataset, Digits):
        return DataLoader(
            part,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
        )

    config["input_size"] = (channels, *size)
    loader: DataLoader[Any] = timm.data.create_loader(
        part,
        **config,
        batch_size=batch_size,
        is_training=True,
        num_workers=workers,
        persistent_workers=workers > 0,  # older timm asks for them without any
        use_prefetcher=False,
    )
    # MNIST and other data sets of torchvision are grey.
    made: Any = loader.dataset
    images: Any = dataset
    images.transform = v2.Compose([v2.RGB(), made.transform])
    return loader


def _part_of(dataset: Dataset[Any], ranks: Ranks) -> Dataset[Any]:
    """What one of several ranks loads."""
    # timm's streams divide themselves.
    if ranks.size == 1 or isinstance(dataset, IterableDataset):
        return dataset
    count = len(dataset)  # type: ignore[arg-type]
    if count < ranks.size:
        raise BatchError(
            f"dataset: expected an image or more for each of {ranks.size} processes, "
            f"got {count} in all"
        )
    # Folders are in the order of their classes. A DistributedSampler would go through
    # its part in one and the same order, unless told of each pass.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shares = order[: count - count % ranks.size].view(-1, ranks.size)
    return Subset(dataset, shares[:, ranks.rank].tolist())


def _takes_any_size(model: nn.Module) -> bool:
    cfg = getattr(model, "pretrained_cfg", {})
    smallest = cfg.get("min_input_size") or (0,)
    return not cfg.get("fixed_input_size") and max(smallest) <= DIGITS_SIZE
