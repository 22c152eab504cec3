"""Full disks: room is looked for before anything is written, and an error does not end the process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO


def temporary() -> Path:
    """The folder that compilers write to, and that the loader of packages, which is in C++, unpacks them to."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir())  # where it is full, Python silently takes another


def check_free(needed: Sequence[tuple[Path, int]]) -> None:
    """Raises `ValueError` where disks have too little room for the bytes that their folders are to hold together."""
    sums: dict[int, int] = {}
    for folder, size in needed:
        device = folder.stat().st_dev
        sums[device] = sums.get(device, 0) + size
        if (free := shutil.disk_usage(folder).free) < sums[device]:
            raise ValueError(f"{folder} must have {sums[device] / 2**30:.3g} GiB free, got {free / 2**30:.3g}")


class DeferredErrors(io.RawIOBase):
    """Passes on to a file what is written, and keeps the first error for who closes both.

    PyTorch's writer of archives ends the process where a disk is full.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._kept():
            self._file.seek(offset, whence)
        return offset

    def write(self, data: memoryview) -> int:
        with self._kept():
            self._file.write(data)
        return len(data)

    def close(self) -> None:
        with self._kept():
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or OSError(error.errno, error.strerror, self._file.name)
