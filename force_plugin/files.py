"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that at any moment the old or the new one is there, and whole.

    It is written beside under another name, flushed to the disk, and renamed. A link
    stays one, and the file that it leads to is replaced. A file that was there keeps
    its permissions. What is no file, as a pipe or ``/dev/stdout``, is written to.

    Args:
        path: File to write; its folder must exist.
        content: All of it.

    Raises:
        OSError: It cannot be written. What was there is as it was, and nothing else is
            left behind. A :class:`FileNotFoundError` where there is no folder for it,
            an :class:`IsADirectoryError` where it is one.
    """
    path = Path(path)
    try:
        old = path.stat()
    except FileNotFoundError:
        old = None
    if old and stat.S_ISDIR(old.st_mode):
        raise _error(path, errno.EISDIR, "expected a file, got a folder; ")
    if old and (not stat.S_ISREG(old.st_mode) or _is_open_file(path)):
        path.write_bytes(content)
        return
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        came = f"expected an existing folder, got {str(path.parent)!r}, create it first"
        raise _error(path, errno.ENOENT, f"{came}; ")
    if old:
        with target.open("r+b"):  # a rename would not ask whether it may be written
            pass
    beside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            if old:
                _give(beside, old)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno:
            problem = "nothing was written"
            if error.errno in _REFUSED:
                folder = str(target.parent)
                problem = f"expected a folder that takes new files, got {folder!r}"
            raise _error(path, error.errno, f"{problem}; ") from error
        raise
    _flush_folder(target.parent)


_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


def _error(path: Path, number: int, problem: str) -> OSError:
    """Of the class of its number; the words of the system come last."""
    return OSError(number, problem + os.strerror(number), str(path))


def _is_open_file(path: Path) -> bool:
    """Whether it leads to a file by a process's number for it, as /dev/stdout does.

    The process would go on writing to what was replaced.
    """
    while path.is_symlink():
        folder = os.path.realpath(path.parent)
        if re.fullmatch(r"/proc/\d+/(task/\d+/)?fd", folder):
            return True
        path = Path(folder, path.readlink())
    return False


def _give(path: Path, old: os.stat_result) -> None:
    """Owner and permissions of the file that was there, as far as one may."""
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(path, old.st_uid, old.st_gid)
    path.chmod(stat.S_IMODE(old.st_mode))


def _flush_folder(folder: Path) -> None:
    """The new name, too, is to be on the disk; not all systems can do it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
