"""What is saved is there whole, the old file or the new one, whatever happens."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from force_plugin import (
    apply_masks,
    get_masks,
    load_compact,
    load_masks,
    save_compact,
    save_masks,
    sparsity_report,
)
from force_plugin.command_line import results
from force_plugin.files import replacing, write_whole
from force_plugin.hold import save_pruned


def pruned(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40))
    masks = {f"{i}.weight": torch.rand_like(model[i].weight) < 0.5 for i in range(2)}
    apply_masks(model, masks)
    return model


SAVERS: dict[str, tuple[str, Callable[[nn.Module, Path], object]]] = {
    "masks": ("file", lambda model, path: save_masks(get_masks(model), path)),
    "compact model": ("file", save_compact),
    "weights": ("file", save_pruned),
    "plot": ("file.png", lambda model, path: sparsity_report(model).plot(path)),
    "json": (
        "file.json",
        lambda model, path: results._write_json(sparsity_report(model), path, {}),
    ),
    "csv": (
        "file.csv",
        lambda model, path: results._write_csv(sparsity_report(model), path),
    ),
    "bytes": ("file", lambda model, path: write_whole(path, b"x" * 40_000)),
}
every_saver = pytest.mark.parametrize("saver", SAVERS)


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond that many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@every_saver
@pytest.mark.parametrize("old", [None, b"what was there"])
def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(
    old: bytes | None, saver: str, tmp_path: Path
) -> None:
    name, save = SAVERS[saver]
    if old is not None:
        (tmp_path / name).write_bytes(old)
    model = pruned(0)
    with no_larger_than(20), pytest.raises(OSError, match="is what it was"):
        save(model, tmp_path / name)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == ({} if old is None else {name: old})
    save(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if mount is None or subprocess.run([mount, *options], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_small_file_system_that_is_full_leaves_the_old_masks(
    small_disk: Path,
) -> None:
    path, model = small_disk / "masks.safetensors", pruned(0)
    save_masks(get_masks(model), path)
    (small_disk / "rest").write_bytes(b"x" * (1 << 14))
    large = {"weight": torch.rand(1000, 1000) < 0.5}
    with pytest.raises(OSError, match=r"masks\.safetensors is not written"):
        save_masks(large, path)
    left, saved = load_masks(path), get_masks(model)
    assert all(torch.equal(left[name], mask) for name, mask in saved.items())
    assert {one.name for one in small_disk.iterdir()} == {"masks.safetensors", "rest"}


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path, moments = tmp_path / "masks.safetensors", random.Random(0)
    both = [{"weight": torch.full((1500, 1500), kept)} for kept in (True, False)]
    save_masks(both[0], path)
    for _ in range(20):
        writer = os.fork()
        if not writer:
            try:
                for number in itertools.count():
                    save_masks(both[number % 2], path, {"number": number})
            finally:
                os._exit(1)
        stop = time.monotonic() + moments.uniform(0.01, 0.1)
        while time.monotonic() < stop:  # while it writes, too
            assert load_masks(path)["weight"].unique().numel() == 1
        os.kill(writer, signal.SIGKILL)
        _, status = os.waitpid(writer, 0)
        assert os.WIFSIGNALED(status)
        assert load_masks(path)["weight"].unique().numel() == 1
    others = [one.name for one in tmp_path.iterdir() if one != path]
    assert all(name.startswith(".force_plugin-") for name in others)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_leaves_the_old_file(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(file)
    for content in (b"first", b"second"):
        write_whole(link, content)
        assert link.is_symlink() and file.read_bytes() == content


def test_modes_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    write_whole(path, b"new")
    other.write_bytes(b"new")
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    write_whole(path, b"newer")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"through")
    reader.join()
    assert read == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    write_whole("/dev/null", b"nowhere")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@every_saver
def test_a_path_that_cannot_be_is_one_clear_error(saver: str, tmp_path: Path) -> None:
    name, save = SAVERS[saver]
    model = pruned(0)
    with pytest.raises(FileNotFoundError, match="create the folder first"):
        save(model, tmp_path / "none" / name)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match="add the name of a file"):
        save(model, tmp_path / name)


def test_a_compact_model_that_replaces_another_is_read(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    for seed in range(2):
        save_compact(pruned(seed), path)
    fresh = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40))
    expected, loaded = pruned(1), load_compact(fresh, path)
    x = torch.randn(3, 60)
    assert torch.equal(loaded(x), expected(x))
