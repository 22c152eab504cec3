"""A manifest -> the work list: which frames each shard has. A pure function, the same wherever it runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_batched.extraction.sources.source import Run

MAX_BYTES = 512 * 10**6  # of a file
MIN_PARTS, MIN_FRAMES = 64, 1024  # a small data set is cut into so many parts where each then has so many frames
SEGMENT = 256  # frames, about, that a decoding worker reads in one go


@dataclass(frozen=True)
class Part:
    """The frames of one shard of every stream."""

    number: int
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"part-{self.number:05d}"

    @property
    def frames(self) -> int:
        """How many there are to read; as many rows, where none is damaged."""
        return sum(run.stop - run.start for run in self.runs)


def frames_of_a_shard(total: int, row_bytes: int, shard_mb: int | None, shard_frames: int | None) -> int:
    """Most frames of a part.

    As many as `MAX_BYTES` (or `shard_mb`) hold of the widest stream. Narrow streams of small data sets would then be
    one shard, which no two processes can share: they are cut into `MIN_PARTS` of at least `MIN_FRAMES`; or as
    `shard_frames` says.
    """
    most = max(1, (MAX_BYTES if shard_mb is None else shard_mb * 10**6) // row_bytes)
    if shard_frames is not None:
        return min(most, shard_frames)
    if shard_mb is None:
        most = min(most, max(MIN_FRAMES, -(-total // MIN_PARTS)))
    return most


def work_list(manifest: dict[str, Any]) -> list[Part]:
    """The parts of all frames, in the data set's order.

    Whole episodes as long as they fit; one that does not begins a part of its own and is split at frames.
    """
    most = manifest["frames_of_a_shard"]
    lengths = [frames for _, frames in manifest["data"]["episodes"]]
    parts: list[list[Run]] = [[]]
    room = most
    for episode, length in enumerate(lengths):
        if length > room and parts[-1]:
            parts.append([])
            room = most
        start = 0
        while start < length:
            if not room:
                parts.append([])
                room = most
            stop = min(length, start + room)
            parts[-1].append(Run(episode, start, stop))
            room -= stop - start
            start = stop
    return [Part(number, tuple(runs)) for number, runs in enumerate(parts) if runs]


def cut(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """Frames from `start` to `stop`, counted through the runs."""
    found, before = [], 0
    for run in runs:
        length = run.stop - run.start
        low, high = max(start - before, 0), min(stop - before, length)
        if low < high:
            found.append(Run(run.episode, run.start + low, run.start + high))
        before += length
    return found


def segments(part: Part, batch_size: int, kept: Collection[int] = ()) -> list[tuple[int, int]]:
    """A part cut into pieces for decoding workers, in whole batches: where each begins and ends.

    Without the batches that begin with the rows `kept`.
    """
    length = batch_size * max(1, SEGMENT // batch_size)
    found: list[tuple[int, int]] = []
    for start in range(0, part.frames, batch_size):
        if start in kept:
            continue
        first = found.pop()[0] if found and found[-1][1] == start and start % length else start
        found.append((first, min(part.frames, start + batch_size)))
    return found
