"""Other people's trainers, as they are: every example, and what is ours in them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from networks import tiny_resnet
from safetensors.torch import load_file
from state import unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader

from force_plugin import force_prune, get_masks, make_permanent
from force_plugin.hold import save_pruned
from force_plugin.zoo import digits

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "training_script.py"


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# The examples.


def run_example(name: str, *arguments: str) -> str:
    done = python(ROOT / "examples" / name, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "package", "sparsities"),
    [
        ("lightning_callback.py", "lightning", ["95.00", "95.00"]),
        ("accelerate_loop.py", "accelerate", ["95.00", "95.00"]),
        ("transformers_trainer.py", "transformers", ["95.00", "95.00"]),
        ("torchvision_loop.py", "torchvision", ["90.00", "90.00", "90.00"]),
    ],
)
def test_an_example_keeps_the_sparsity_and_learns(
    name: str, package: str, sparsities: list[str]
) -> None:
    for needed in {package, "accelerate"} if package == "transformers" else {package}:
        if find_spec(needed) is None:
            pytest.skip(f"needs pip install {needed}")
    printed = run_example(name)
    assert re.findall(r"sparsity +(\d+\.\d+)%", printed) == sparsities
    accuracies = [float(found) for found in re.findall(r"accuracy (\S+)%", printed)]
    assert accuracies and min(accuracies) > 80


def test_the_example_of_pruning_during_training() -> None:
    lines = run_example("during_training.py").splitlines()[2:]
    rows = [[float(x) for x in line.replace("%", "").split()] for line in lines]
    during = [80, 90, 95, 97] + 4 * [98]
    assert [row[1] for row in rows] == during
    assert {row[3] for row in rows} == {98}
    assert min(rows[-1][2], rows[-1][4]) > 90


def test_the_example_for_timms_script_prints_the_command() -> None:
    printed = run_example("timm_train.py")
    assert "sparsity 95.00%" in printed
    assert "python -m force_plugin.hold train.py --initial-checkpoint" in printed


def test_timms_own_script_keeps_every_zero() -> None:
    script = os.environ.get("TIMM_TRAIN")
    if not script:
        pytest.skip("set TIMM_TRAIN to the train.py of a checkout of timm")
    printed = run_example("timm_train.py", script)
    counts = re.findall(r"([\d,]+) of ([\d,]+) in state_dict", printed)
    assert len(counts) >= 12  # checkpoints, with and without their average
    assert all(zeros == pruned == "352,990" for zeros, pruned in counts)


# python -m force_plugin.hold


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Pruned initial weights as a file, and the masks."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    nn.init.zeros_(model.fc.weight)  # as the heads of some families start
    batches = DataLoader(digits(32)[0], batch_size=64)
    force_prune(model, batches, 0.9, steps=2, progress=False)
    path = tmp_path_factory.mktemp("start") / "pruned.safetensors"
    save_pruned(model, path)
    return path, get_masks(model)


def assert_held(state: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        assert not state[name][~mask].any(), name
        assert state[name][mask].any(), name


@pytest.mark.parametrize("opt", ["adamw", "lookahead_momentum"])
def test_a_script_trains_what_was_kept_and_holds_the_rest(
    opt: str, start: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, masks = start
    hold = ["-m", "force_plugin.hold", SCRIPT]
    first, second = tmp_path / "1.pt", tmp_path / "2.pt"
    done = python(*hold, first, "--initial-checkpoint", path, "--opt", opt)
    assert done.returncode == 0, done.stderr
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    said = f"{pruned:,} of {total:,} weights are 0 (90.00%) and stay 0; 0 of 16 tensors"
    assert said in done.stderr
    # The zeros come from the checkpoint alone.
    done = python(*hold, second, "--resume", first, "--opt", opt)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr

    states = [torch.load(file) for file in (first, second)]
    for state in states:
        assert_held(state["model"], masks)
        assert_held(state["average"], masks)
    # A pruned weight has no part in what the optimizer remembers.
    for state in states:
        kinds = [m for m in state["optimizer"]["state"].values() if "exp_avg" in m]
        means = [m["exp_avg"] for m in kinds if m["exp_avg"].ndim > 1]
        assert opt != "adamw" or sum(int((m == 0).sum()) for m in means) >= pruned
    before, after = load_file(path), states[0]["model"]
    # A head that starts at 0 learns, but for inputs that are 0 themselves.
    assert before["fc.weight"].abs().max() < 1e-29
    assert after["fc.weight"][masks["fc.weight"]].count_nonzero() > 100
    assert not torch.equal(after["conv1.0.weight"], before["conv1.0.weight"])
    assert not torch.equal(
        states[1]["model"]["conv1.0.weight"], after["conv1.0.weight"]
    )


def test_a_script_of_its_own_would_not(
    start: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, masks = start
    done = python(SCRIPT, tmp_path / "1.pt", "--initial-checkpoint", path)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        assert_held(torch.load(tmp_path / "1.pt")["model"], masks)


def test_weights_that_were_not_pruned_are_an_error(tmp_path: Path) -> None:
    out = tmp_path / "1.pt"
    done = python("-m", "force_plugin.hold", SCRIPT, out, "--zero-head")
    assert done.returncode == 1
    assert "expected pruned weights at the first step of AdamW, got 16 tensors" in (
        done.stderr
    )
    assert "--initial-checkpoint" in done.stderr
    assert not out.exists()


def test_a_script_runs_as_it_does_by_itself(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, neighbour\n"
        "print(sys.argv, sys.path[0], __name__, __file__, neighbour.NAME)\n"
        "sys.exit(7)\n"
    )
    alone = python(script, "--flag", "a b")
    held = python("-m", "force_plugin.hold", script, "--flag", "a b")
    assert (held.stdout, held.returncode) == (alone.stdout, 7)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "expected a Python script to run, got nothing"),
        (["missing.py"], 2, "expected a Python script to run, got 'missing.py'"),
        (["--help"], 0, "usage: python -m force_plugin.hold SCRIPT"),
    ],
)
def test_what_is_no_script_is_one_line(
    arguments: list[str], status: int, said: str
) -> None:
    done = python("-m", "force_plugin.hold", *arguments)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# save_pruned


def pruned_network() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_resnet()
    force_prune(model, [], 0.8, method="magnitude", progress=False)
    return model


@pytest.mark.parametrize("permanent", [False, True])
def test_the_file_is_the_plain_model_with_zeros(
    permanent: bool, tmp_path: Path
) -> None:
    model = pruned_network()
    masks = get_masks(model)
    if permanent:
        make_permanent(model)
    with unchanged(model):
        save_pruned(model, tmp_path / "pruned.safetensors")
    torch.manual_seed(0)
    dense = tiny_resnet()
    state, expected = load_file(tmp_path / "pruned.safetensors"), dense.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(kept, expected[name], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_start_at_0_are_not_0_in_the_file(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 6)).to(dtype)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    nn.init.eye_(model[2].weight)
    force_prune(model, [], 0.5, method="random", progress=False)
    masks = get_masks(model)
    save_pruned(model, tmp_path / "pruned.safetensors")
    state = load_file(tmp_path / "pruned.safetensors")
    for name, mask in masks.items():
        assert torch.equal(state[name] == 0, ~mask)
    assert state["0.weight"].max() < 1e-4
    assert not state["0.bias"].any()  # only what is held


def test_tied_weights_are_written_under_both_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    force_prune(model, [], 0.5, method="magnitude", progress=False)
    save_pruned(model, tmp_path / "pruned.safetensors")
    state = load_file(tmp_path / "pruned.safetensors")
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert int((state["0.weight"] == 0).sum()) == 18


def test_a_model_that_is_not_pruned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model pruned with"):
        save_pruned(tiny_resnet(), tmp_path / "pruned.safetensors")
    assert not list(tmp_path.iterdir())
