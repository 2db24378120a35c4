"""Files that are written whole or not at all: the old one is there until the new is."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import load
from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file beside the one that it replaces, and put it in place at once.

        with replacing("masks.safetensors") as file:
            file.write(content)

    Where this fails, as on a full disk or by Ctrl-C, the file is what it was, and
    nothing is left beside it. A process that is killed may leave an unfinished file
    whose name begins with ``.force_plugin-``.

    Args:
        path: File to write; its folder must exist. A link stays, and the file that it
            leads to is replaced, with the mode that it has. What is no regular file
            (a pipe, ``/dev/stdout``) is written to as it is.

    Yields:
        A binary file.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: Its folder does not exist.
        OSError: It cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(
            f"path: expected a file, got the folder {os.fspath(path)!r}; add the name "
            "of a file"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path: expected a file in an existing folder, got {os.fspath(path)!r}; "
            "create the folder first"
        )
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(
            errno.EACCES,
            f"{os.fspath(path)} is write-protected, and is what it was",
        )
    beside = target.parent / f".force_plugin-{secrets.token_hex(8)}"
    try:
        # With the rights of any new file, which those of tempfile have not.
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            before = target.stat()
            os.chmod(beside, stat.S_IMODE(before.st_mode))
            with suppress(OSError):  # somebody else's file, perhaps
                os.chown(beside, before.st_uid, before.st_gid)
        os.replace(beside, target)
    except OSError as error:
        if error.errno is None:
            raise
        # A failing write knows no name.
        why = f"{os.fspath(path)} is not written, and is what it was: {error.strerror}"
        raise OSError(error.errno, why) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    with suppress(OSError):  # a folder cannot be opened everywhere
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file as :func:`replacing` does, of what is at hand already."""
    with replacing(path) as file:
        file.write(content)


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and tensors of a safetensors file, of one and the same file.

    ``safetensors.safe_open`` opens a file twice (0.8.0). If it is replaced meanwhile,
    it gives the metadata of the old file and the tensors of the new one.

    Args:
        path: The file.

    Returns:
        The metadata, empty where there are none, and tensors by name, on the CPU.

    Raises:
        OSError: It cannot be read.
        safetensors.SafetensorError: It is no such file, or it is cut short.
    """
    content = Path(path).read_bytes()
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {}), tensors
