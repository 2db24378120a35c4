"""Models and data that cannot be loaded: one clear error, and no change."""

from __future__ import annotations

from pathlib import Path

import pytest
import sklearn.model_selection  # noqa: F401 (its own imports may draw from random)
from faults import NO_MODULE, Fault, prune_it
from state import unchanged

from force_plugin.zoo import count_classes, digits, load_data, load_dataset, load_model


def test_a_file_for_a_folder_of_images_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.touch()
    message = rf"^data: cannot read class/\*\.jpg or .* from data={path}: "
    with pytest.raises(ValueError, match=message):
        load_dataset(path)


def test_images_that_cannot_be_read_leave_the_model_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.jpg").write_bytes(b"no image")
    model = load_model("test_resnet", num_classes=2)
    loader = load_data(model, load_dataset(tmp_path), image_size=32)
    with unchanged(model), pytest.raises(RuntimeError, match="Failed to load"):
        prune_it(model, loader=loader)


ARGUMENTS: dict[str, Fault] = {
    "digits without a test": Fault(
        lambda m: digits(test_fraction=0.0), ValueError, r"test_size.*0\.0"
    ),
    "classes of nothing": Fault(
        lambda m: count_classes(None),
        ValueError,
        "^dataset: NoneType does not say how many .*; give num_classes yourself$",
    ),
    "a model without a name": Fault(
        lambda m: load_model("", num_classes=3),
        ValueError,
        r"^model: expected a name from timm\.list_models\(\), got ''$",
    ),
    "a number for a model's name": Fault(
        lambda m: load_model(5, num_classes=3),
        TypeError,
        r"^model: expected a name from timm\.list_models\(\), got int$",
    ),
    "a number for a data set's name": Fault(
        lambda m: load_dataset(dataset=5),
        TypeError,
        "^dataset: expected a name such as 'torch/cifar10', got int$",
    ),
    "data for no model": Fault(
        lambda m: load_data(None, digits()[0]), TypeError, NO_MODULE + "NoneType$"
    ),
    "batches of no images": Fault(
        lambda m: load_data(m, digits()[0], batch_size=0),
        ValueError,
        "batch_size should be a positive integer value, but got batch_size=0",
    ),
    "fewer workers than none": Fault(
        lambda m: load_data(m, digits()[0], workers=-1),
        ValueError,
        "num_workers option should be non-negative",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(name: str) -> None:
    fault = ARGUMENTS[name]
    model = fault.model()
    with unchanged(model), pytest.raises(fault.error, match=fault.message):
        fault.call(model)
