"""Other people's trainers, as they are: every example, and what is ours in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from interpreter import python
from networks import tiny_resnet
from safetensors.torch import load_file, save_file
from state import differences, process_state, unchanged
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from force_plugin import force_prune, get_masks, make_permanent
from force_plugin.hold import save_pruned
from force_plugin.trainers.initial_weights import InitialWeights
from force_plugin.zoo import digits

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "shared" / "training_script.py"


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


def test_torchvisions_own_script_keeps_every_zero() -> None:
    script = os.environ.get("TORCHVISION_TRAIN")
    if not script:
        pytest.skip("set TORCHVISION_TRAIN to references/classification/train.py")
    printed = run_example("torchvision_loop.py", script)
    counts = re.findall(r"([\d,]+) of ([\d,]+) in model", printed)
    assert len(counts) == 8  # checkpoints, each with its average
    assert all(zeros == pruned == "309,672" for zeros, pruned in counts)


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
    state = {name.removeprefix("module."): value for name, value in state.items()}
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


@pytest.mark.parametrize("average", ["timm", "torch"])
def test_a_script_without_such_an_option_starts_from_the_file(
    average: str, start: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, masks = start
    hold = ["-m", "force_plugin.hold", "--initial-weights", path, SCRIPT]
    first, second = tmp_path / "1.pt", tmp_path / "2.pt"
    done = python(*hold, first, "--average", average)
    assert done.returncode == 0, done.stderr
    assert f"loaded {path} into ResNet and a copy of it" in done.stderr
    assert "(90.00%) and stay 0" in done.stderr
    # The same command, as one has it in the shell's history.
    done = python(*hold, second, "--average", average, "--resume", first)
    assert done.returncode == 0, done.stderr
    assert f"did not load {path}: ResNet has its zeros already" in done.stderr
    states = [torch.load(file) for file in (first, second)]
    for state in states:
        assert_held(state["model"], masks)
        assert_held(state["average"], masks)
    # What was learned before the checkpoint has not been overwritten.
    steps = [state["model"]["bn1.num_batches_tracked"] for state in states]
    assert [int(step) for step in steps] == [3, 6]


def test_both_ways_to_start_are_the_same_training(
    start: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, _ = start
    mine, theirs = tmp_path / "1.pt", tmp_path / "2.pt"
    hold = ["-m", "force_plugin.hold"]
    python(*hold, "--initial-weights", path, SCRIPT, mine)
    python(*hold, SCRIPT, theirs, "--initial-checkpoint", path)
    for part in ("model", "average"):
        torch.testing.assert_close(torch.load(mine)[part], torch.load(theirs)[part])


def test_every_process_starts_from_the_file_and_one_says_so(
    start: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, masks = start
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    hold = ["-m", "force_plugin.hold", "--initial-weights", path, SCRIPT]
    done = python(*torchrun, *hold, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"loaded {path}") == 1
    for rank in "01":
        state = torch.load(tmp_path / f"out{rank}")
        assert_held(state["model"], masks)
        assert_held(state["average"], masks)


def test_weights_that_the_model_does_not_fit_are_an_error(tmp_path: Path) -> None:
    path, out = tmp_path / "pruned.safetensors", tmp_path / "1.pt"
    save_pruned(pruned_network(), path)
    done = python("-m", "force_plugin.hold", "--initial-weights", path, SCRIPT, out)
    assert done.returncode == 1
    assert (
        f"shapes of {path} to be called before the first step of AdamW, got none"
        in (done.stderr)
    )
    assert not out.exists()


def test_a_script_that_calls_no_such_model_is_an_error(tmp_path: Path) -> None:
    path, script = tmp_path / "pruned.safetensors", tmp_path / "script.py"
    save_pruned(pruned_network(), path)
    script.write_text("print('done')\n")
    done = python("-m", "force_plugin.hold", "--initial-weights", path, script)
    assert done.returncode == 1
    assert done.stdout == "done\n"
    assert "to be called before the end of the script, got none; none that has" in (
        done.stderr
    )


def test_what_pytorch_says_of_hooks_and_compilation_is_not_repeated(
    tmp_path: Path,
) -> None:
    path, script = tmp_path / "pruned.safetensors", tmp_path / "script.py"
    save_pruned(pruned_network(), path)
    script.write_text(
        "import torch\n"
        "torch.compile(torch.nn.Linear(2, 2), backend='eager')(torch.ones(2))\n"
    )
    done = python("-m", "force_plugin.hold", "--initial-weights", path, script)
    assert "the closest that was called is OptimizedModule" in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("kind", ["missing", "none", "dense"])
def test_what_is_no_file_of_pruned_weights_is_one_line(
    kind: str, tmp_path: Path
) -> None:
    path, script = tmp_path / "weights", tmp_path / "script.py"
    if kind == "none":
        torch.save(pruned_network().state_dict(), path)
    if kind == "dense":
        save_file(tiny_resnet().state_dict(), path)
    script.write_text("print('started')\n")
    done = python("-m", "force_plugin.hold", "--initial-weights", path, script)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"force_plugin.hold: error: expected a safetensors file of pruned weights, .*, "
        rf"got {re.escape(repr(str(path)))}(: |, which has no zeros ).*\n",
        done.stderr,
    )


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
        (["--help"], 0, "usage: python -m force_plugin.hold [--initial-weights FILE]"),
        (["--initial-weights"], 2, "expected a Python script to run, got nothing"),
        (["--initial-weights", "f", "a.py"], 2, "script to run, got 'a.py'"),
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
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 6))
    model.to(dtype)
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


# InitialWeights

INPUTS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[dict[str, Tensor]]:
    """Those of a file that waits for the first call of a module which it fits."""
    model = pruned_network()
    for value in [*model.buffers(), *model.parameters()]:
        if value.ndim == 1 and value.is_floating_point():
            nn.init.uniform_(value)
    save_pruned(model, tmp_path / "pruned.safetensors")
    waiting = InitialWeights(str(tmp_path / "pruned.safetensors"))
    yield load_file(tmp_path / "pruned.safetensors")
    waiting.remove()


def dense_network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_resnet().eval()


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name].to(value)), name


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module, fullgraph: bool = False) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="eager", fullgraph=fullgraph)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        partial(compiled, fullgraph=True),
        nn.DataParallel,
        DistributedDataParallel,
        lambda model: DistributedDataParallel(compiled(model)),
        lambda model: compiled(DistributedDataParallel(model)),
        nn.Sequential,  # a part of something else
    ],
)
def test_the_model_has_the_weights_before_its_first_forward_pass(
    wrap: Callable[[nn.Module], nn.Module], weights: dict[str, Tensor]
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = dense_network().to(device)
    model[0].weight.requires_grad_(False)
    expected = dense_network().to(device)
    expected.load_state_dict(weights)
    parameters = dict(model.named_parameters())  # as an optimizer has them
    outputs = wrap(model)(INPUTS.to(device))
    assert_state(model, weights)
    torch.testing.assert_close(outputs, expected(INPUTS.to(device)))
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == (name != "0.weight")


def test_nothing_is_left_in_the_way(tmp_path: Path) -> None:
    save_pruned(pruned_network(), tmp_path / "pruned.safetensors")
    model = dense_network()
    before, steps = process_state(), dict(_global_optimizer_pre_hooks)
    InitialWeights(str(tmp_path / "pruned.safetensors"))
    assert differences(before, process_state()) == ["hooks"]
    assert steps != _global_optimizer_pre_hooks
    model(INPUTS)
    assert differences(before, process_state()) == []  # nor in the random states
    assert steps == _global_optimizer_pre_hooks


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_module_called_before_is_no_obstacle(
    weights: dict[str, Tensor],
) -> None:
    compiled(nn.Conv2d(3, 3, 1), fullgraph=True)(INPUTS)
    model = dense_network()
    compiled(model, fullgraph=True)(INPUTS)
    assert_state(model, weights)


def test_a_model_is_evaluated_with_the_weights(weights: dict[str, Tensor]) -> None:
    model = dense_network()
    with torch.inference_mode():
        model(INPUTS)
    assert_state(model, weights)
    model(INPUTS).sum().backward()  # none of its tensors is one of inference mode


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_weight_becomes_0_in_the_precision_of_the_model(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model: Any = tiny_resnet()
    nn.init.zeros_(model[-1].weight)  # 1e-30 in the file
    force_prune(model, [], 0.5, method="random", progress=False)
    save_pruned(model, tmp_path / "pruned.safetensors")
    InitialWeights(str(tmp_path / "pruned.safetensors"))
    dense = dense_network().to(dtype)
    dense(INPUTS.to(dtype))
    for name, mask in get_masks(model).items():
        assert dense.get_parameter(name).dtype == dtype
        assert torch.equal(dense.get_parameter(name) != 0, mask)


@pytest.mark.parametrize(
    "copy",
    [
        deepcopy,
        AveragedModel,
        lambda model: AveragedModel(compiled(model)),
        lambda model: deepcopy(model).requires_grad_(False).double().float(),
        lambda model: {"average": [deepcopy(model)]},
    ],
)
def test_copies_get_the_weights_too(
    copy: Callable[[nn.Module], object],
    weights: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = dense_network()
    average: Any = copy(model)
    model(INPUTS)
    said = capsys.readouterr().err
    assert "into Sequential and a copy of it\n" in said
    assert "warning" not in said
    if isinstance(average, dict):
        average = average["average"][0]
    average = getattr(average, "module", average)
    assert_state(getattr(average, "_orig_mod", average), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_in_another_precision_gets_the_weights_too(
    dtype: torch.dtype, weights: dict[str, Tensor]
) -> None:
    model = dense_network().to(dtype)
    average = deepcopy(model)
    average.bfloat16() if dtype == torch.float32 else average.float()
    model(INPUTS.to(dtype))
    assert_state(average, weights)
    assert_state(model, weights)


def test_an_average_that_is_called_first_is_no_harm(
    weights: dict[str, Tensor],
) -> None:
    model = dense_network()
    average = AveragedModel(model)
    average(INPUTS)
    assert_state(model, weights)
    assert_state(average.module, weights)


def test_a_teacher_keeps_its_weights(weights: dict[str, Tensor]) -> None:
    teacher, student = dense_network(2).requires_grad_(False), dense_network()
    teacher(INPUTS)
    student(INPUTS)
    assert_state(student, weights)
    assert_state(teacher, dense_network(2).state_dict())


@pytest.mark.usefixtures("weights")
def test_what_nobody_has_any_more_is_no_copy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = dense_network()
    copy: Any = deepcopy(model)
    copy.itself = [copy]
    del copy
    model(INPUTS)
    assert capsys.readouterr().err.endswith("into Sequential\n")


def shadow(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def half_copied(model: nn.Module) -> nn.Module:
    copy = deepcopy(model)
    nn.init.normal_(model[-1].weight)
    return copy


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("copy", "number"), [(shadow, 7), (half_copied, 6)])
def test_copies_that_are_not_found_as_modules_are_said_aloud(
    copy: Callable[[nn.Module], object],
    number: int,
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = dense_network().to(dtype)
    average: Any = copy(model)
    model(INPUTS.to(dtype))
    assert f"warning: {number} other tensors have its" in capsys.readouterr().err
    del average


def test_a_model_from_a_checkpoint_stays_as_it_is(
    weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    model = dense_network()
    model.load_state_dict(weights)
    make_permanent(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    average = deepcopy(model)
    before = deepcopy(model.state_dict())
    model(INPUTS)
    assert_state(model, before)
    assert_state(average, before)
    assert "Sequential has its zeros already" in capsys.readouterr().err


def test_other_zeros_are_not_those_of_a_checkpoint(weights: dict[str, Tensor]) -> None:
    model = dense_network()
    model.load_state_dict(weights)
    pruned = (model[0].weight == 0).nonzero()[0]
    with torch.no_grad():
        model[0].weight[tuple(pruned)] = 1
    model(INPUTS)
    assert_state(model, weights)


def test_one_process_of_several_says_what_was_loaded(
    weights: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    model = dense_network()
    model(INPUTS)
    assert_state(model, weights)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "came"),
    [
        (None, "none that has parameters was called."),
        (
            tiny_resnet().append(nn.Linear(10, 2)),
            "the closest that was called is Sequential, where 11.weight is (2, 10) "
            "instead of nothing, 11.bias is (2,) instead of nothing.",
        ),
        (
            tiny_resnet()[:-1].append(nn.Linear(48, 100)),
            "where 10.weight is (100, 48) instead of (10, 48), 10.bias is (100,) "
            "instead of (10,).",
        ),
        (tiny_resnet()[:-1], "where 10.bias is nothing instead of (10,), 10.weight"),
        (nn.Conv2d(3, 3, 1), "is Conv2d, where weight is (3, 3, 1, 1) instead of"),
        (
            nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
            "1.num_batches_tracked is nothing instead of ()",
        ),
        (
            tiny_resnet().requires_grad_(False),
            "is Sequential, where no parameter requires a gradient.",
        ),
    ],
)
@pytest.mark.usefixtures("weights")
def test_the_error_says_what_came(model: nn.Module | None, came: str) -> None:
    nn.Flatten()(INPUTS)
    if model is not None:
        model(INPUTS)
    parameter = nn.Parameter(torch.ones(3, 3))
    parameter.grad = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"to be called before the first") as raised:
        torch.optim.SGD([parameter]).step()
    assert came in str(raised.value)
    assert (parameter == 1).all()


@pytest.mark.usefixtures("weights")
def test_a_call_that_is_not_seen_is_an_error_too() -> None:
    torch.compiler.reset()
    model = dense_network()
    model.compile(backend="eager")
    model(INPUTS).sum().backward()
    with pytest.raises(RuntimeError, match=r"or after model.compile\(\) is not seen"):
        torch.optim.SGD(model.parameters()).step()
