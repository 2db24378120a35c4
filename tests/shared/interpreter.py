"""Python commands as processes of their own, forked from one that has imported torch.

Most of a short script's time is importing torch and timm. Here it is spent once, by a
process that does nothing else and forks for every command; this package is imported by
each command for itself.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = ["torch", "torch.distributed", "torchvision", "timm", "timm.data"]
IMPORTED += ["sklearn.datasets", "sklearn.model_selection", "torch_pruning"]
IMPORTED += ["safetensors.torch", "matplotlib.figure", "tqdm"]

Done = subprocess.CompletedProcess[str]


class Running:
    """A command that was started."""

    def __init__(
        self,
        words: Sequence[object],
        env: Mapping[str, object] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        variables: dict[str, object] = {"OMP_NUM_THREADS": "1", **(env or {})}
        paths = [str(variables.pop("PYTHONPATH", "")), str(ROOT)]
        paths.append(os.environ.get("PYTHONPATH", ""))
        self.words = list(map(str, words))
        self.folder = TemporaryDirectory()
        job = {
            "words": self.words,
            "env": os.environ
            | {key: str(value) for key, value in variables.items()}
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            "cwd": str(cwd or Path.cwd()),
            "folder": self.folder.name,
        }
        server = _server()
        assert server.stdin is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()

    def ended(self) -> bool:
        return (Path(self.folder.name) / "status").exists()

    def stop(self) -> None:
        with suppress(OSError, ValueError):
            os.killpg(
                int((Path(self.folder.name) / "group").read_text()), signal.SIGKILL
            )

    def wait(self, seconds: float) -> Done:
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                self.stop()
                raise subprocess.TimeoutExpired(self.words, seconds)
            time.sleep(0.01)
        with self.folder as name:
            status, out, err = (
                (Path(name) / file).read_text() for file in ("status", "out", "err")
            )
        return subprocess.CompletedProcess(self.words, int(status), out, err)


def python(
    *words: object,
    env: Mapping[str, object] | None = None,
    cwd: str | Path | None = None,
    seconds: float = 300,
) -> Done:
    """What ``python WORDS`` does and says: a script, ``-m`` a module or ``-c`` code."""
    return Running(words, env, cwd).wait(seconds)


def ranks(
    *words: object, folders: Sequence[Path | None] = (None, None), seconds: float = 300
) -> list[Done]:
    """The same once in each folder, in the environment that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common: dict[str, object] = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": len(folders), "LOCAL_WORLD_SIZE": len(folders)}
    running = [
        Running(words, common | {"RANK": rank, "LOCAL_RANK": rank}, folder)
        for rank, folder in enumerate(folders)
    ]
    try:
        return [one.wait(seconds) for one in running]
    finally:
        for one in running:
            one.stop()


@cache
def _server() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve() -> None:
    del sys.path[0]
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        if not os.fork():
            os._exit(_supervise(json.loads(line)))
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _supervise(job: dict[str, Any]) -> int:
    """Wait for the command, and leave its status in a file that is whole at once."""
    folder = Path(job["folder"])
    command = os.fork()
    if not command:
        os.setsid()
        (folder / "group").write_text(str(os.getpid()))
        _execute(job)
    _, status = os.waitpid(command, 0)
    with suppress(OSError):  # nobody waited
        (folder / "new").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "new").rename(folder / "status")
    return 0


def _execute(job: dict[str, Any]) -> None:
    """Become the command."""
    for number, file in enumerate(("out", "err"), 1):
        path = Path(job["folder"]) / file
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    paths = job["env"]["PYTHONPATH"].split(os.pathsep)
    first, *words = job["words"]
    status = 0
    try:
        if first == "-m":
            sys.argv, sys.path[:0] = words, [job["cwd"], *paths]
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv, sys.path[:0] = ["-c", *words[1:]], ["", *paths]
            exec(words[0], {"__name__": "__main__"})
        else:
            sys.argv = [first, *words]
            sys.path[:0] = [str(Path(first).resolve().parent), *paths]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
