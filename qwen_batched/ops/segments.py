"""Segments: the ranges of tokens within which attention happens. Windows and whole images are both segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """`count` equal segments of `length` tokens each, back to back from token `start` of an image."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Segments:
    """All segments of an image: as runs, for dense batches, and as a table, for a kernel."""

    runs: tuple[Run, ...]  # they tile the image's tokens
    table: Tensor  # int32 (segments, 2), start and length of each, on the plan's device

    @classmethod
    def of(cls, runs: tuple[Run, ...], device: torch.device) -> Segments:
        """The segments of `runs`, with their table on `device`."""
        rows = [(run.start + index * run.length, run.length) for run in runs for index in range(run.count)]
        return cls(runs, torch.tensor(rows, dtype=torch.int32, device="cpu").to(device))

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], table: Tensor) -> Segments:
        """What `sizes` and `table` are of."""
        return cls(tuple(Run(*sizes[index : index + 3]) for index in range(0, len(sizes), 3)), table)

    @property
    def sizes(self) -> list[int]:
        """Start, count and length of all runs, one after the other."""
        return [size for run in self.runs for size in (run.start, run.count, run.length)]

    @property
    def tokens(self) -> int:
        return self.runs[-1].stop
