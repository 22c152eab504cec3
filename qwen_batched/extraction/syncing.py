"""Files that are whole or not there, also after a loss of power."""

from __future__ import annotations

import errno
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from qwen_batched.checkpoint.atomic_save import UNSUPPORTED

RENAMED = ".rename-"  # how names begin of the files that `check_renames` tries with
LEFT = 3600  # seconds after which a file that should live for less than one is a killed process's


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder, on file systems that can be told to."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *UNSUPPORTED):
            raise
    finally:
        os.close(file)


def remove_left(folder: Path, pattern: str) -> None:
    """Removes files of a moment that killed processes have left, on this machine or another."""
    for left in folder.glob(pattern):
        with suppress(OSError):  # another has just removed it, or the folder is read only
            if left.stat().st_mtime < time.time() - LEFT:
                left.unlink()


def check_renames(folder: Path) -> None:
    """Raises `ValueError` where files of a folder cannot be synced and renamed over another, as some stores."""
    remove_left(folder, f"{RENAMED}*")
    first, second = (folder / f"{RENAMED}{uuid.uuid4().hex}" for _ in range(2))
    try:
        write_synced(first, b"1")
        write_synced(second, b"2")
        os.replace(first, second)
        works = second.read_bytes() == b"1"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        works = False
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)
    if not works:
        raise ValueError(f"OUT must be on a file system that renames files, got {folder}: extract elsewhere and copy")
