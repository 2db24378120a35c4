"""Make a timm model and its data loader, by name.

The order is data, model, loader. The data determine the number of classes of the model.
The model determines the crop, the size and the normalisation of its images.

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

# timm.data.create_dataset silently reads any other name as an image folder.
_SOURCES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")

_FOLDER = "class/*.jpg or train/class/*.jpg"


@dataclass(frozen=True, eq=False)
class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Handwritten digits, upsampled on access to the size that a model takes.

    The images are stored at 8x8 pixels and take 0.5 MB, whatever the size of an item.

    Attributes:
        images: Normalised grey images, float32 of shape ``[N, 1, 8, 8]``.
        targets: Classes 0 to 9, int64 of shape ``[N]``.
        size: Height and width of an item, in pixels.
        channels: Number of channels of an item, each a copy of the grey image.
    """

    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")

    images: Tensor
    targets: Tensor
    size: tuple[int, int] = (DIGITS_SIZE, DIGITS_SIZE)
    channels: int = 3

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, float32 ``[channels, *size]``, and a class, int64 scalar."""
        image = interpolate(self.images[index, None], self.size, mode="bilinear")
        return image[0].expand(self.channels, -1, -1), self.targets[index]


def digits(
    size: int = DIGITS_SIZE,
    *,
    channels: int = 3,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[Digits, Digits]:
    """Return scikit-learn's handwritten digits: real images that need no download.

    There are 1797 grey images of 8x8 pixels and 10 classes. The split into two parts
    keeps the share of each class. All images are normalised by the mean and standard
    deviation of the training part.

    Args:
        size: Height and width to upsample to (bilinear), in pixels.
        channels: Number of channels, each a copy of the grey channel.
        test_fraction: Fraction of the images in the test part, between 0 and 1.
        seed: Seed of the split. The global generators are not used.

    Returns:
        The training and the test part.
    """
    # Imported here, because only the digits need scikit-learn.
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
            ``data/train/class/*.jpg``. ``None`` without a ``dataset``: the training
            part of the ``digits``.
        dataset: Empty for a folder of images, or a name that
            ``timm.data.create_dataset`` reads, such as ``"torch/cifar10"``.
        split: The split to read, if the data have several.
        download: Whether to download a named data set that is not in ``data`` yet.

    Returns:
        The data set. Its images have no transforms until ``load_data`` sets the
        transforms of a model.

    Raises:
        TypeError: ``dataset`` is no text.
        FileNotFoundError: ``data`` does not exist.
        BatchError: ``data`` has no images in class folders or fewer than two classes,
            or timm cannot read the ``dataset``.
        ValueError: ``dataset`` is no name that timm knows.
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
    # Each source raises other errors: assertions, missing packages, ...
    except Exception as error:
        raise BatchError(
            f"data: cannot read {dataset or _FOLDER} from data={data}: {error}"
        ) from error
    # With one class, the loss is 0 for any weights, and every score is 0.
    if not dataset and (classes := count_classes(opened)) < 2:
        raise BatchError(
            f"data: expected {_FOLDER} for each of two or more classes in "
            f"{str(data)!r}, got {classes}"
        )
    return opened


def count_classes(dataset: Dataset[Any]) -> int:
    """Return the number of classes of a data set.

    Args:
        dataset: A data set from ``load_dataset``, or any data set with ``classes``.

    Returns:
        The number of classes.

    Raises:
        BatchError: The data set does not name its classes, as some streams.
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
        name: Name of the model in ``timm.list_models``.
        num_classes: Number of outputs of the classifier.
        image_size: Height and width of the images, in pixels. ``None``: the model's own
            size. A ViT for small images needs this argument.
        **kwargs: Passed on to ``timm.create_model``: ``in_chans=1``,
            ``zero_init_last=False``, ...

    Returns:
        The model, on the CPU, in training mode. Its input size
        ``(channels, height, width)`` is ``model.pretrained_cfg["input_size"]``.

    Raises:
        TypeError: ``name`` is no text.
        ValueError: timm has no model of this name, or the model does not take
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
        # The overlay builds a fixed-size model at this size, and does not change other
        # models. In both cases, load_data reads the size from the model.
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
            # Many sizes that do not fit fail only in a forward pass.
            with torch.no_grad():
                model.eval()(torch.zeros(1, *input_size))
            model.train()
    # Each model raises other errors for arguments that it does not take.
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
    """Return a loader that yields a data set in shuffled batches for a model.

    Images get the model's own size, crop, interpolation and normalisation, and timm's
    training augmentation. ``digits`` are only resized: to 32x32 if the model takes any
    size, else to the model's own size. The order comes from torch's global generator,
    which ``torch.manual_seed`` fixes. The augmentation also draws from Python's
    generator; ``timm.utils.random_seed`` fixes both.

    If :mod:`torch.distributed` is initialised, each rank loads its own part. The parts
    have equal sizes and no image in common.

    Args:
        model: A timm model.
        dataset: A data set from ``load_dataset``. Its ``transform`` is replaced, except
            for ``digits``.
        image_size: Height and width in pixels, as given to ``load_model``. ``None``:
            as above.
        batch_size: Samples in a batch of each rank. A smaller data set makes one batch.
            The last, incomplete batch is left out.
        workers: Number of processes that load data. 0 loads in the calling process.

    Returns:
        A loader of ``(inputs, targets)``: float32 of shape ``[B, C, H, W]`` and int64
        of shape ``[B]``.

    Raises:
        TypeError: ``model`` is no module.
        BatchError: There are more ranks than images.
        ValueError: The model does not take 3 channels, and the data are not the
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
        persistent_workers=workers > 0,  # older timm sets it without workers
        use_prefetcher=False,
    )
    # MNIST and other data sets of torchvision are grey.
    made: Any = loader.dataset
    images: Any = dataset
    images.transform = v2.Compose([v2.RGB(), made.transform])
    return loader


def _part_of(dataset: Dataset[Any], ranks: Ranks) -> Dataset[Any]:
    """Return the part of a data set that this rank loads."""
    # timm's streams divide themselves between ranks.
    if ranks.size == 1 or isinstance(dataset, IterableDataset):
        return dataset
    count = len(dataset)  # type: ignore[arg-type]
    if count < ranks.size:
        raise BatchError(
            f"dataset: expected an image or more for each of {ranks.size} processes, "
            f"got {count} in all"
        )
    # Folders are sorted by class, so the images are shuffled first. A
    # DistributedSampler would repeat one order in each pass, unless told of each pass.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shares = order[: count - count % ranks.size].view(-1, ranks.size)
    return Subset(dataset, shares[:, ranks.rank].tolist())


def _takes_any_size(model: nn.Module) -> bool:
    cfg = getattr(model, "pretrained_cfg", {})
    smallest = cfg.get("min_input_size") or (0,)
    return not cfg.get("fixed_input_size") and max(smallest) <= DIGITS_SIZE
