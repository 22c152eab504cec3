"""A sample of rows, computed again from the data set and compared bit by bit with what is there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from qwen_batched.extraction.decoding import Batch, Decoders, Segment
from qwen_batched.extraction.reading import open_shard
from qwen_batched.extraction.shards import PartWriter, Skipped, index_path, is_done, shard_path, skipped_in
from qwen_batched.extraction.work import Part
from qwen_batched.extraction.worker import Worker


def check_rows(worker: Worker, parts: Sequence[Part], rows: int) -> tuple[list[str], int]:
    """Computes the batches of `rows` random rows of the parts that are there.

    Returns a sentence for each row and stream that differs and for each frame that cannot be read any more, and how
    many rows were compared: all of the batches.
    """
    there = [part for part in parts if is_done(worker.out, part, worker.encoder.streams)]
    size = worker.manifest["batch_size"]
    picks = random.Random(0)
    chosen = set()
    for _ in range(rows):
        part = picks.choice(there)
        chosen.add((part.number, picks.randrange(part.frames) // size))
    by_number = {part.number: part for part in there}
    segments = iter(sorted(chosen))

    def next_segment() -> Segment | None:
        if (pick := next(segments, None)) is None:
            return None
        part = by_number[pick[0]]
        return Segment(_Nowhere(worker, part), pick[1] * size, min(part.frames, (pick[1] + 1) * size))

    differing, compared = [], 0
    with Decoders(1, worker.source, worker.manifest, worker.slots, next_segment) as decoders:
        for batch in decoders.batches():
            compared += len(batch.rows)
            differing += _compare(worker, batch)
            decoders.free.put(batch.slot)
    return differing, compared


class _Nowhere(PartWriter):
    """Knows what of a part was skipped, and opens no file."""

    def __init__(self, worker: Worker, part: Part) -> None:
        super().__init__(worker.out, part, worker.source, worker.source.cameras, (), worker.dtype)
        self.stored_skips = {(episode, frame) for _, episode, frame, _ in skipped_in(index_path(worker.out, part))}
        self.places = self._stored_places()

    def lost(self, skipped: Sequence[Skipped]) -> list[str]:
        """Those of the frames that cannot be read now which are stored."""
        return [
            f"{self.part.name}: camera {camera}, episode {episode}, frame {frame} cannot be read now: {reason}"
            for camera, episode, frame, reason in skipped
            if (episode, frame) not in self.stored_skips
        ]

    def _stored_places(self) -> dict[int, int]:
        """Row of the part -> row of its shard, which lacks what was skipped."""
        episodes = self.source.episodes
        names = [(episodes[run.episode].name, frame) for run in self.part.runs for frame in range(run.start, run.stop)]
        kept = [row for row, name in enumerate(names) if name not in self.stored_skips]
        return {row: place for place, row in enumerate(kept)}


def _compare(worker: Worker, batch: Batch) -> list[str]:
    part, places = batch.writer.part, batch.writer.places
    if unexpected := [row for row in batch.rows if row not in places]:
        return [f"{part.name}: frame {unexpected[0]} was skipped, and can be read now"]
    differing = batch.writer.lost(batch.skipped)
    if not batch.rows:
        return differing
    whole = len(batch.rows) == worker.manifest["batch_size"]
    found = worker.encoder(batch.slot.images(len(batch.rows)), batch.texts, whole)
    for stream, tensors in zip(worker.encoder.streams, found, strict=True):
        with open_shard(shard_path(worker.out, stream, part)) as shard:
            for place, row in enumerate(batch.rows):
                stored = shard.row(places[row])
                again = [x[place].cpu() for x in tensors]
                if not all(_is_same(a, b) for a, b in zip(stored, again, strict=True)):
                    differing.append(f"{stream.folder}/{part.name}, row {places[row]}: differs")
    return differing


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, NaN included."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
