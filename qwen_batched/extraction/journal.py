"""Batches that are in a part's drafts, a line each: what a killed process has encoded need not be encoded again.

A line has checksums of the batch's rows, so that it holds whatever became of the drafts: of those of a machine that
lost power, too. Nothing here waits for the disk.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

Skipped = tuple[str, int | str, int, str]  # camera, episode, frame, reason


@dataclass(frozen=True)
class Entry:
    """A batch that was written."""

    start: int  # the batch's first row of the part
    rows: list[int]  # of the part, ascending; those left out are not among them
    checksums: list[int]  # of each stream, see `checksum`
    skipped: list[Skipped]


class Journal:
    """The lines of one process about one part."""

    def __init__(self, path: Path) -> None:
        """The file is made with the first line."""
        self.path = path
        self.file: int | None = None

    def add(self, entry: Entry) -> None:
        """Appends a line; the rows are in the drafts by then."""
        if self.file is None:
            self.path.parent.mkdir(exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        line = memoryview((json.dumps(asdict(entry), separators=(",", ":")) + "\n").encode())
        while line:
            line = line[os.write(self.file, line) :]

    def close(self) -> None:
        """Twice is once."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def remove(self) -> None:
        """Closes it as well."""
        self.close()
        self.path.unlink(missing_ok=True)


def read_journal(path: Path) -> list[Entry]:
    """The lines up to the first that is not whole."""
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            entry = Entry(**json.loads(line))
            if not line.endswith("\n"):
                break
            found.append(Entry(entry.start, entry.rows, entry.checksums, [tuple(each) for each in entry.skipped]))
    except (OSError, ValueError, TypeError):
        pass
    return found


def checksum(tensors: Sequence[Tensor]) -> int:
    """CRC-32 of some rows: all of a stream's first tensor, then those of the next."""
    found = 0
    for x in tensors:
        found = zlib.crc32(data_of(x), found)
    return found


def data_of(x: Tensor) -> memoryview:
    """A tensor's bytes."""
    return memoryview(x.contiguous().view(torch.uint8).reshape(-1).numpy())
