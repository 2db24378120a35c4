"""What is saved is there whole, whenever the process ends and however full the disk."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn

from force_plugin import (
    apply_masks,
    files,
    get_masks,
    load_compact,
    load_masks,
    save_compact,
    save_masks,
    sparsity_report,
)
from force_plugin.cli import _write_csv, _write_json
from force_plugin.files import write_whole
from force_plugin.hold import save_pruned


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(width, 50), nn.ReLU(), nn.Linear(50, 4))
    apply_masks(model, {"0.weight": torch.rand(50, width) > 0.5})
    return model


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "bytes": lambda path, width: write_whole(path, b"0" * (100 * width)),
    "save_masks": lambda path, width: save_masks(get_masks(network(width)), path),
    "save_compact": lambda path, width: save_compact(network(width), path),
    "save_pruned": lambda path, width: save_pruned(network(width), path),
    "report.json": lambda path, width: _write_json(
        sparsity_report(network(width)), path, {"width": width * "o"}
    ),
    "report.csv": lambda path, width: _write_csv(sparsity_report(network(width)), path),
    "plot": lambda path, width: sparsity_report(network(width)).plot(path),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A process that ends in the middle.

# Without the package: its imports take a hundred times as long as a file.
ALONE = f"""
import runpy, sys
write_whole = runpy.run_path({files.__file__!r})["write_whole"]
path = sys.argv[1]
"""
WRITING = """
contents = [bytes([kind]) * 4_000_000 for kind in b"ab"]
write_whole(path, contents[0])
print("begins", flush=True)
for turn in range(10**6):
    write_whole(path, contents[turn % 2])
"""


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, rng = tmp_path / "file", random.Random(0)
    seen, midway = set(), 0
    command = [sys.executable, "-c", ALONE + WRITING, path]
    for _ in range(40):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout and writer.stdout.readline() == b"begins\n"
            time.sleep(rng.uniform(0, 0.03))
            during = path.read_bytes()
            writer.send_signal(signal.SIGKILL)
        for content in (during, path.read_bytes()):
            assert len(content) == content.count(content[:1]) == 4_000_000
            seen.add(content[:1])
        # What was written when it died is beside it, and under no name that counts.
        for other in set(tmp_path.iterdir()) - {path}:
            assert other.name.startswith(".file.") and other.suffix == ".tmp"
            other.unlink()
            midway += 1
    assert seen == {b"a", b"b"} and midway


def test_an_interrupt_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path,
) -> None:
    # Ctrl-C comes where Python looks for it: at some bytecode or other.
    path, at, finished = tmp_path / "file", 0, False
    while not finished:
        at += 1
        path.write_bytes(b"old")
        if at % 2:
            path.unlink()
        left, finished = at, False

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != files.__file__:
                return None
            left -= event == "line"
            if not left:
                raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            write_whole(path, b"the new one")
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        content = path.read_bytes() if path.exists() else b"old"
        assert content in (b"old", b"the new one")
        assert len(names(tmp_path)) <= 1, (at, names(tmp_path))
    assert at > 20 and path.read_bytes() == b"the new one"


# A disk that is full.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    with (folder / "other").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - left)


@pytest.mark.parametrize("left", [0, 4096])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(
    writer: str, left: int, small_disk: Path
) -> None:
    write, path = WRITERS[writer], small_disk / "file.png"
    write(path, 8)
    old = path.read_bytes()
    fill(small_disk, left)
    if left and writer == "report.csv":
        pytest.skip("a smaller file")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'$") as caught:
        write(path, 4000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == old
    assert names(small_disk) == ["file.png", "other"]


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(path, bytes(2000))
except OSError as error:
    print(error)
"""


def test_a_file_that_may_not_be_so_large_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", ALONE + LIMITED, path]
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert said == f"[Errno 27] nothing was written; File too large: '{path}'\n"
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


# What kind of file is there.


@pytest.mark.parametrize("writer", WRITERS)
def test_new_files_get_the_permissions_that_open_gives(
    writer: str, tmp_path: Path
) -> None:
    path, before = tmp_path / "file.png", os.umask(0o027)
    try:
        WRITERS[writer](path, 8)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["file.png"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o700])
def test_a_file_that_was_there_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_whole(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_stays_one(writer: str, tmp_path: Path) -> None:
    for folder in ("real", "links"):
        (tmp_path / folder).mkdir()
    real, link = tmp_path / "real" / "file.png", tmp_path / "links" / "link.png"
    (tmp_path / "links" / "one.png").symlink_to(Path("..", "real", "file.png"))
    link.symlink_to("one.png")
    for width in (8, 9):  # at first it leads nowhere
        WRITERS[writer](link, width)
        assert link.is_symlink() and link.resolve() == real
    assert names(tmp_path / "real") == ["file.png"]
    assert names(tmp_path / "links") == ["link.png", "one.png"]
    assert not real.is_symlink()


def test_links_in_a_circle_and_links_to_nowhere_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to(Path("no", "file"))
    for name in "abc":
        with pytest.raises(OSError, match=f"'{tmp_path / name}'"):
            write_whole(tmp_path / name, b"new")
    assert names(tmp_path) == ["a", "b", "c"]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    write_whole("/dev/null", b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"new")
    reader.join()
    assert read == [b"new"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_is_written_to(kind: str, tmp_path: Path) -> None:
    code = "print('before', flush=True)\nwrite_whole(path, b'new ')\nprint('after')"
    command = [sys.executable, "-c", ALONE + code, "/dev/stdout"]
    if kind == "pipe":
        found = subprocess.run(command, capture_output=True, check=True).stdout
        assert found == b"before\nnew after\n"
        return
    with (tmp_path / "out").open("ab") as out:
        subprocess.run(command, stdout=out, check=True)
    # Opened anew and cut short, as by any program; and no other file.
    assert (tmp_path / "out").read_bytes() == b"new after\n"
    assert names(tmp_path) == ["out"]


# Paths.


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no/where/file.png", FileNotFoundError, "exist.*where.*create"),
        ("folder.png", IsADirectoryError, "expected a file, got"),
        (250 * "o" + "longer", OSError, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_leaves_nothing_behind(
    writer: str, name: str, error: type[OSError], message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    if writer == "plot" and len(name) > 99:
        name += ".png"
    with pytest.raises(error, match=message) as caught:
        WRITERS[writer](tmp_path / name, 8)
    assert str(tmp_path / name) in str(caught.value)
    assert names(tmp_path) == ["folder.png"] and not names(tmp_path / "folder.png")


def test_a_name_as_long_as_a_system_takes_it(tmp_path: Path) -> None:
    for name in (255 * "o", 127 * "é"):
        write_whole(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(names(tmp_path)) == 2


def test_a_relative_path_is_that_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_whole("file", b"new")
    write_whole("folder/../file2", b"new")
    assert names(tmp_path) == ["file", "file2", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_may_not_be_written_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=f"'{path}'"):
        write_whole(path, b"new")
    path.chmod(0o644)
    tmp_path.chmod(0o555)
    message = f"a folder that takes new files, got '{tmp_path}'; .*'{path}'"
    try:
        with pytest.raises(PermissionError, match=message):
            write_whole(path, b"new")
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_many_who_write_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(kind: int) -> None:
        for _ in range(20):
            write_whole(path, bytes([kind]) * 100_000)

    threads = [Thread(target=write, args=(kind,)) for kind in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == content.count(content[:1]) == 100_000
    assert names(tmp_path) == ["file"]


def test_what_is_read_from_a_file_can_be_saved_to_it(tmp_path: Path) -> None:
    masks = get_masks(network())
    save_masks(masks, tmp_path / "masks")
    loaded = load_masks(tmp_path / "masks")
    save_masks(loaded, tmp_path / "masks")
    assert torch.equal(load_masks(tmp_path / "masks")["0.weight"], masks["0.weight"])
    save_compact(network(), tmp_path / "model")
    fresh = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 4))
    save_compact(load_compact(fresh, tmp_path / "model"), tmp_path / "model")
    report = sparsity_report(network())
    _write_json(report, tmp_path / "json", {})
    assert json.loads((tmp_path / "json").read_text())["kept"] == report.kept


def test_a_plot_without_a_suffix_is_named_as_matplotlib_does(tmp_path: Path) -> None:
    for name in ("plot", "dot.", "a.b/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        figure = sparsity_report(network()).plot(tmp_path / name)
        (tmp_path / "theirs").mkdir(exist_ok=True)
        figure.savefig(tmp_path / "theirs" / Path(name).name)
    assert names(tmp_path) == ["a.b", "dot.png", "plot.png", "theirs"]
    assert names(tmp_path / "theirs") == ["c.png", "dot.png", "plot.png"]
    assert names(tmp_path / "a.b") == ["c.png"]
