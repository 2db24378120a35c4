"""Write files whole or not at all; an old file stays until the new file is complete."""

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
    """Write a new file beside an old file, and replace the old file in one step.

        with replacing("masks.safetensors") as file:
            file.write(content)

    If writing fails, for example on a full disk or by Ctrl-C, the old file is unchanged
    and the new file is deleted. A process that is killed may leave an unfinished file
    whose name begins with ``.force_plugin-``.

    Args:
        path: File to write; its folder must exist. If the path is a link, the link
            stays and its target is replaced. The new file gets the mode of the old
            file. A path that is no regular file (a pipe, ``/dev/stdout``) is written to
            directly.

    Yields:
        A binary file.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: The folder of ``path`` does not exist.
        OSError: The file cannot be written.
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
        # The file gets the usual rights of a new file; tempfile would restrict them.
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            before = target.stat()
            os.chmod(beside, stat.S_IMODE(before.st_mode))
            with suppress(OSError):  # the file may belong to another user
                os.chown(beside, before.st_uid, before.st_gid)
        os.replace(beside, target)
    except OSError as error:
        if error.errno is None:
            raise
        # The error of a failed write does not name the file.
        why = f"{os.fspath(path)} is not written, and is what it was: {error.strerror}"
        raise OSError(error.errno, why) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    with suppress(OSError):  # some systems cannot open a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes to a file, whole or not at all, as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(content)


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file, read at once.

    ``safetensors.safe_open`` opens a file twice (0.8.0). If the file is replaced in
    between, it returns the metadata of the old file and the tensors of the new file.

    Args:
        path: The file to read.

    Returns:
        The metadata, empty if the file has none, and tensors by name, on the CPU.

    Raises:
        OSError: The file cannot be read.
        safetensors.SafetensorError: The file is no safetensors file, or is cut short.
    """
    content = Path(path).read_bytes()
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {}), tensors
