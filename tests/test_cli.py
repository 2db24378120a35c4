"""The command ``force-prune`` on real models and data: what it prints and writes."""

from __future__ import annotations

import csv
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from interpreter import Done, python, ranks
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from state import same
from timm.utils import random_seed

import force_plugin.cli
from force_plugin import (
    BatchError,
    CollapseError,
    MaskMismatchError,
    NoGradientError,
    NotFiniteError,
    NothingToPruneError,
    PruningError,
    RankError,
    force_prune,
    get_masks,
    load_masks,
    load_metadata,
)
from force_plugin.cli import main
from force_plugin.zoo import load_data, load_dataset, load_model

MODEL = "test_resnet"
QUICK = ["--sparsity", "0.9", "--steps", "2", "--batch-size", "16", "--quiet"]


def prune(out: Path, *options: str, model: str = MODEL) -> dict[str, torch.Tensor]:
    """Run the command in a quick setting and load its masks."""
    assert main([model, *QUICK, "--out", str(out), *options]) == 0
    return load_masks(out / "masks.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real images, ``train/CLASS/NUMBER.png``, of four classes."""
    images = tmp_path_factory.mktemp("data") / "images"
    bunch = load_digits(n_class=4)
    for i in range(40):
        folder = images / "train" / str(bunch.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (bunch.images[i] * 15).astype("uint8")
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{i}.png")
    return images


# What it writes and prints.


def test_a_run_prints_the_table_and_the_files_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    options = [option for option in QUICK if option != "--quiet"]
    assert main([MODEL, *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "conv1.0.weight" in printed and "90.00 %" in printed
    assert str(out) in printed
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            "masks.safetensors",
            "pruned.safetensors",
            "report.csv",
            "report.json",
            "sparsity.png",
        ]
    )
    assert all(path.name in printed for path in out.iterdir())


def test_the_files_tell_the_same_numbers(tmp_path: Path) -> None:
    masks = prune(tmp_path)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    assert sum(kept.values()) == total // 10

    report = json.loads((tmp_path / "report.json").read_text())
    assert {layer["name"]: layer["kept"] for layer in report["layers"]} == kept
    assert (report["kept"], report["total"]) == (sum(kept.values()), total)

    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: int(row["kept"]) for row in rows} == kept
    assert rows[0]["shape"] == "16x3x3x3"

    with Image.open(tmp_path / "sparsity.png") as image:
        assert image.format == "PNG"
        assert image.convert("L").getextrema() != (255, 255)


def test_the_pruned_weights_are_the_initial_ones_behind_the_masks(
    tmp_path: Path,
) -> None:
    masks = prune(tmp_path, "--seed", "3")
    timm.utils.random_seed(3)
    model = timm.create_model(MODEL, num_classes=10)
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(load_file(tmp_path / "pruned.safetensors"))
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask), name
        torch.testing.assert_close(weight[mask], dense[name][mask])


def test_the_report_holds_the_options_of_the_run(tmp_path: Path) -> None:
    prune(tmp_path, "--seed", "3", "--model-kwargs", "zero_init_last=False")
    options = json.loads((tmp_path / "report.json").read_text())["options"]
    assert (options["model"], options["seed"]) == (MODEL, 3)
    assert (options["sparsity"], options["method"]) == (0.9, "force")
    assert options["model_kwargs"] == [["zero_init_last", False]]


def test_the_masks_file_says_what_made_the_masks(tmp_path: Path) -> None:
    prune(
        tmp_path,
        *["--method", "iter_snip", "--schedule", "linear", "--batches", "all"],
        *["--seed", "3", "--num-classes", "12", "--no-open-gates"],
    )
    metadata = load_metadata(tmp_path / "masks.safetensors")
    created, versions = metadata.pop("created"), metadata.pop("versions")
    assert datetime.fromisoformat(created).date()
    assert versions["force_plugin"] == force_plugin.__version__
    assert versions["torch"] == torch.__version__
    assert versions["timm"] == timm.__version__
    assert metadata == {
        "model": MODEL,
        "data": None,
        "dataset": "",
        "batch_size": 16,
        "image_size": None,
        "num_classes": 12,
        "model_kwargs": [],
        "sparsity": 0.9,
        "method": "iter_snip",
        "steps": 2,
        "schedule": "linear",
        "batches": None,
        "open_gates": False,
        "microbatch": None,
        "autocast": None,
        "channels_last": False,
        "compile": False,
        "on_collapse": "raise",
        "guard": True,
        "seed": 3,
        "device": metadata["device"],
        "processes": 1,
    }


@pytest.mark.parametrize(
    ("method", "steps", "schedule"),
    [("snip", 1, "linear"), ("snip_it", 7, "snip_it"), ("force", 2, "linear")],
)
def test_the_masks_file_has_the_steps_and_schedule_that_the_method_took(
    method: str, steps: int, schedule: str, tmp_path: Path
) -> None:
    prune(tmp_path, "--method", method, "--schedule", "linear")
    metadata = load_metadata(tmp_path / "masks.safetensors")
    assert (metadata["steps"], metadata["schedule"]) == (steps, schedule)


def test_the_options_in_a_masks_file_make_the_masks_again(tmp_path: Path) -> None:
    options = ["--method", "snip", "--seed", "4", "--model-kwargs", "act_layer=gelu"]
    masks = prune(tmp_path, *options)
    made_by = load_metadata(tmp_path / "masks.safetensors")
    random_seed(made_by["seed"])
    model = load_model(
        made_by["model"], num_classes=10, **dict(made_by["model_kwargs"])
    )
    loader = load_data(model, load_dataset(), batch_size=made_by["batch_size"])
    force_prune(
        model,
        loader,
        made_by["sparsity"],
        progress=False,
        **{key: made_by[key] for key in ("method", "steps", "schedule", "batches")},
    )
    assert same(masks, get_masks(model))


def test_a_quiet_run_prints_nothing_but_the_reports_warnings(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    options = ["--sparsity", "0.999", "--no-open-gates", "--on-collapse", "warn"]
    prune(tmp_path, *options)
    printed = capfd.readouterr()
    warnings = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert warnings
    assert not [w for w in recwarn if w.category is UserWarning]
    assert printed.out == ""
    assert printed.err.splitlines() == [
        f"force-prune: warning: {warning}" for warning in warnings
    ]


def test_without_out_the_folder_is_named_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([MODEL, *QUICK, "--method", "magnitude"]) == 0
    assert (tmp_path / "runs/test_resnet-magnitude-0.9/masks.safetensors").exists()


# That each option arrives.


def test_the_masks_are_those_of_force_prune_with_the_same_seed(tmp_path: Path) -> None:
    masks = prune(
        tmp_path,
        *["--method", "iter_snip", "--steps", "3", "--schedule", "linear"],
        *["--batches", "2", "--seed", "5", "--num-classes", "12"],
    )
    random_seed(5)
    model = load_model(MODEL, num_classes=12)
    loader = load_data(model, load_dataset(), batch_size=16)
    force_prune(
        model,
        loader,
        0.9,
        method="iter_snip",
        steps=3,
        schedule="linear",
        batches=2,
        progress=False,
    )
    assert same(masks, get_masks(model))


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "1"],
        ["--method", "synflow"],
        ["--steps", "3"],
        ["--schedule", "linear"],
        ["--batches", "2"],
        ["--batches", "all"],
        ["--batch-size", "8"],
        ["--image-size", "48"],
        ["--no-open-gates"],
        ["--microbatch", "8"],
        ["--autocast", "bfloat16"],
        ["--model-kwargs", "act_layer=gelu"],
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_changes_the_masks(
    tmp_path: Path, default_masks: dict[str, torch.Tensor], options: list[str]
) -> None:
    assert not same(prune(tmp_path, *options), default_masks)


@pytest.fixture(scope="module")
def default_masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The masks of a quick run without further options."""
    return prune(tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ([], "channels_last", False),
        (["--channels-last"], "channels_last", True),
        ([], "compile", False),
        (["--compile"], "compile", "default"),
        (["--compile", "reduce-overhead"], "compile", "reduce-overhead"),
    ],
    ids=str,
)
def test_an_option_that_changes_roundings_arrives(
    options: list[str],
    name: str,
    value: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def arrived(*_: object, **given: object) -> None:
        assert given[name] == value
        raise KeyboardInterrupt

    monkeypatch.setattr(force_plugin.cli, "force_prune", arrived)
    assert main([MODEL, *QUICK, "--out", str(tmp_path), *options]) == 130


def test_a_run_repeats_itself(
    tmp_path: Path, default_masks: dict[str, torch.Tensor]
) -> None:
    assert same(prune(tmp_path), default_masks)


def test_opened_gates_are_those_of_a_model_made_without_closed_ones(
    tmp_path: Path, default_masks: dict[str, torch.Tensor]
) -> None:
    options = ["--no-open-gates", "--model-kwargs", "zero_init_last=False"]
    assert same(prune(tmp_path, *options), default_masks)


def test_a_folder_of_images_sets_the_classes_of_the_model(
    tmp_path: Path, images: Path
) -> None:
    options = ["--data", str(images), "--image-size", "32", "--num-classes"]
    assert prune(tmp_path / "a", *options[:-1])["fc.weight"].shape[0] == 4
    assert prune(tmp_path / "b", *options, "9")["fc.weight"].shape[0] == 9


def test_a_vit_is_built_for_the_image_size(tmp_path: Path) -> None:
    masks = prune(tmp_path, "--image-size", "32", model="test_vit")
    assert any(name.endswith("attn.qkv.weight") for name in masks)


# What it refuses.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([MODEL], "--sparsity"),
        ([MODEL, "--sparsity", "1"], "--sparsity"),
        ([MODEL, "--sparsity", "-0.1"], "--sparsity"),
        ([MODEL, "--sparsity", "99%"], "--sparsity"),
        ([MODEL, "--sparsity", "nan"], "--sparsity"),
        ([MODEL, *QUICK, "--steps", "0"], "--steps"),
        ([MODEL, *QUICK, "--batches", "some"], "--batches"),
        ([MODEL, *QUICK, "--batch-size", "1.5"], "--batch-size"),
        ([MODEL, *QUICK, "--microbatch", "0"], "--microbatch"),
        ([MODEL, *QUICK, "--autocast", "float16"], "--autocast"),
        ([MODEL, *QUICK, "--compile", "fast"], "--compile"),
        ([MODEL, *QUICK, "--compile", "--method", "grasp"], "second derivatives"),
        ([MODEL, *QUICK, "--seed", "-1"], "--seed"),
        ([MODEL, *QUICK, "--method", "forse"], "--method"),
        ([MODEL, *QUICK, "--schedule", "cosine"], "--schedule"),
        ([MODEL, *QUICK, "--device", "abacus"], "abacus"),
        ([MODEL, *QUICK, "--device", "two\nlines"], "two lines"),
        ([MODEL, *QUICK, "--model-kwargs", "drop_rate"], "KEY=VALUE"),
        ([MODEL, *QUICK, "--model-kwargs", "depths=3"], "depths"),
        (["test_resnett", *QUICK], "test_resnet"),
        ([MODEL, *QUICK, "--data", "no/such/folder"], "no/such/folder"),
        ([MODEL, *QUICK, "--data", "."], "train/class/*.jpg"),
        ([MODEL, *QUICK, "--data", ".", "--dataset", "torch/cifar10"], "torch/cifar10"),
        (["test_vit", *QUICK, "--image-size", "33"], "33"),
        ([MODEL, *QUICK, "--num-classes", "5"], "out of bounds"),
        ([MODEL, *QUICK, "--sparsity", "0.9999999"], "0.9999999"),
        ([MODEL, *QUICK, "--out", "file"], "--out"),
        ([MODEL, *QUICK, "--out", "file/out"], "--out"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_wrong_value_is_one_line_and_status_2(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("force-prune: error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert not list(tmp_path.rglob("masks.safetensors"))


def test_the_folder_to_write_to_is_checked_before_the_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(*_: object, **__: object) -> None:
        pytest.fail("pruned before the folder was checked")

    monkeypatch.setattr(force_plugin.cli, "force_prune", too_early)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([MODEL, *QUICK, "--out", str(tmp_path / "file")])


def test_a_pruning_that_fails_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # This model halves 32x32 images until nothing is left.
    with pytest.raises(SystemExit) as exit_:
        main(["inception_v3", *QUICK, "--out", str(tmp_path)])
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("force-prune: error: ") and printed.count("\n") == 1


# What to do about an error in Python; there it is an option.
PYTHON = re.compile(r"\w\(|\w=|apply_|forward|loss_fn")


@pytest.mark.parametrize(
    ("method", "steps"), [("force", True), ("snip", False), ("iter_snip", True)]
)
def test_a_collapse_advises_options(
    method: str, steps: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sparsity", "0.99999", "--steps", "2", "--method", method]
    with pytest.raises(SystemExit) as exit_:
        main([MODEL, *options, "--out", str(tmp_path)])
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    (line,) = [li for li in printed.splitlines() if li.startswith("force-prune: ")]
    assert "--on-collapse warn" in line
    assert ("--steps" in line) == steps
    assert not PYTHON.search(line)


@pytest.mark.parametrize(
    ("error", "status", "advised"),
    [
        (BatchError, 2, "--num-classes"),
        (CollapseError, 1, "--sparsity"),
        (NoGradientError, 1, "--method"),
        (NotFiniteError, 1, "--autocast"),
        (NothingToPruneError, 2, "another model"),
        (MaskMismatchError, 2, "it was so"),
        (RankError, 1, "it was so"),
        (torch.cuda.OutOfMemoryError, 1, "--microbatch"),
    ],
)
def test_the_advice_is_of_options(
    error: Any,
    status: int,
    advised: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> None:
        if issubclass(error, PruningError):
            raise error("it was so,\nand so", "pass forward= and parameters=")
        raise error("it was so,\nand so")

    monkeypatch.setattr(force_plugin.cli, "force_prune", fails)
    with pytest.raises(SystemExit) as exit_:
        main([MODEL, *QUICK, "--out", str(tmp_path)])
    assert exit_.value.code == status
    printed = capsys.readouterr().err
    assert printed.startswith("force-prune: error: it was so, and so")
    assert printed.count("\n") == 1
    assert advised in printed
    assert not PYTHON.search(printed)


@pytest.mark.parametrize("quiet", [False, True])
def test_warnings_advise_nothing_in_python(
    quiet: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["layers=(1,1,1,1)", "embed_dims=(16,16,16,16)"]
    sizes += ["hidden_sizes=(16,16,16,16)", "mlp_ratios=(1,1,1,1)"]
    options = ["--sparsity", "0.5", "--method", "random", "--model-kwargs", *sizes]
    options += ["--quiet"] * quiet
    assert main(["sequencer2d_s", *options, "--out", str(tmp_path)]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    (warning,) = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert "passed over: LSTM 32,768" in warning
    assert not PYTHON.search(warning)
    assert warning in said
    assert "parameters" not in said


def test_ctrl_c_is_one_line_and_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(force_plugin.cli, "force_prune", interrupted)
    assert main([MODEL, *QUICK, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "force-prune: interrupted\n"


def test_help_names_every_option_with_its_default() -> None:
    run = python("-m", "force_plugin.cli", "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: force-prune")
    assert "examples:" in run.stdout
    _, *options = run.stdout.partition("examples:")[0].split("\n  --")
    assert len(options) == 24
    without_default = ("download", "quiet", "sparsity")
    for option in options:
        assert "(default:" in option or option.startswith(without_default)


# Several processes.


COMMAND = ["-m", "force_plugin.cli", MODEL, *QUICK]
LIBRARY = """
import sys

import torch
import torch.distributed as dist
from timm.utils import random_seed

from force_plugin import force_prune, get_masks
from force_plugin.zoo import load_data, load_dataset, load_model

dist.init_process_group("gloo")
rank = dist.get_rank()
random_seed(0)
dataset = load_dataset(sys.argv[1])
model = load_model("test_resnet", num_classes=4)
loader = load_data(model, dataset, image_size=32, batch_size=16)
if rank:
    random_seed(0, rank)
force_prune(model, loader, 0.9, steps=2, progress=False)
torch.save(get_masks(model), f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, images: Path
) -> tuple[Done, Path]:
    """Two processes of a torchrun: what they printed, and the folder they wrote to."""
    out = tmp_path_factory.mktemp("together")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "force_plugin.cli", MODEL, *QUICK[:-1], "--data", str(images)]
    done = python(*command, "--image-size", "32", "--out", out, cwd=out)
    assert done.returncode == 0, done.stderr
    return done, out


def test_several_processes_print_once_and_write_one_set_of_files(
    together: tuple[Done, Path],
) -> None:
    done, out = together
    assert done.stdout.count("90.00 %") == 1
    assert done.stdout.count(f"written to {out}") == 1
    assert len(list(out.iterdir())) == 5
    assert load_metadata(out / "masks.safetensors")["processes"] == 2


def test_several_processes_prune_as_the_library_does_in_them(
    together: tuple[Done, Path], images: Path, tmp_path: Path
) -> None:
    command = ["-c", LIBRARY, images, tmp_path]
    for done in ranks(*command, folders=[tmp_path, tmp_path]):
        assert done.returncode == 0, done.stderr
    masks = load_masks(together[1] / "masks.safetensors")
    for rank in (0, 1):
        assert same(torch.load(tmp_path / f"{rank}.pt"), masks)
    alone = prune(tmp_path / "alone", "--data", str(images), "--image-size", "32")
    assert not same(alone, masks)


def failed(first: Done, second: Done) -> str:
    """The one line that two processes print that both fail."""
    assert first.returncode in (1, 2) and second.returncode in (1, 2)
    assert first.stdout + second.stdout + second.stderr == ""
    assert first.stderr.startswith("force-prune: error: ")
    assert first.stderr.count("\n") == 1
    return first.stderr


def test_a_wrong_value_in_several_processes_is_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "--batches", "some"]
    assert "--batches" in failed(*ranks(*command, folders=[tmp_path, tmp_path]))


def test_what_one_of_several_processes_lacks_is_one_line(
    tmp_path: Path, images: Path
) -> None:
    command = [*COMMAND, "--data", images.name, "--out", str(tmp_path)]
    said = failed(*ranks(*command, folders=[images.parent, tmp_path]))
    assert "rank 1 of 2 failed" in said
    assert "got 'images', which does not exist" in said
    assert not list(tmp_path.iterdir())


def test_several_processes_fail_where_the_first_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "masks.safetensors").mkdir()
    command = [*COMMAND, "--out", str(tmp_path)]
    assert "masks.safetensors" in failed(*ranks(*command, folders=[tmp_path, tmp_path]))
