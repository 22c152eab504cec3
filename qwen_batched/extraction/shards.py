"""Rows of a part in any order -> its safetensors or parquet files, then its index: beside, synced, renamed, indexed.

Files beside, drafts, are called `.<name>.<token>`, with one token for all of a part by one process. What a killed
process has left of them is read again: see `PartWriter.take_over`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from qwen_batched.arguments import dtype_name
from qwen_batched.checkpoint.atomic_save import naming
from qwen_batched.extraction.journal import Entry, Journal, Skipped, checksum, data_of, read_journal
from qwen_batched.extraction.parquet import is_whole, rows_of_a_group, write_parquet
from qwen_batched.extraction.request import PARQUET
from qwen_batched.extraction.sources.source import Source
from qwen_batched.extraction.streams import MASK, Stream
from qwen_batched.extraction.syncing import sync_folder
from qwen_batched.extraction.work import Part

FEATURES, INDEX, ROWS = "features", "index", "rows"
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}  # of safetensors
MAX_HEADER = 2**20  # bytes of a header, more than any here has
SKIPPED = b"skipped"  # in an index file's metadata: a JSON list of [camera, episode, frame, reason]


class ShardFile:
    """A safetensors file of which rows are written in any order, under a name of its own until it is whole.

    `rows` is its tensor of rows; a stream with masks has `mask` behind it.
    """

    def __init__(self, path: Path, stream: Stream, dtype: torch.dtype, frames: int, token: str) -> None:
        """Opens it beside `path`, with room for all frames."""
        self.path, self.frames = path, frames
        self.tensors = [(ROWS, dtype, stream.shape)]
        if stream.has_mask:
            self.tensors.append((MASK, torch.bool, stream.shape[:1]))
        self.row_bytes = [dtype.itemsize * _product(shape) for _, dtype, shape in self.tensors]
        self.header_bytes = len(self._header(frames))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.draft = draft_of(path, token)
        self.file = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, row: int, tensors: Sequence[Tensor]) -> None:
        """Rows from `row` on, of each tensor, on the host."""
        with naming(self.path):
            self._write(row, tensors)

    def _write(self, row: int, tensors: Sequence[Tensor]) -> None:
        for index, x in enumerate(tensors):
            _, dtype, shape = self.tensors[index]
            assert x.dtype == dtype and x.shape[1:] == shape, (x.dtype, x.shape, self.tensors[index])
            _write_at(self.file, data_of(x), self._start(index, self.frames) + row * self.row_bytes[index])

    def read_left(self, token: str, rows: Sequence[int], kept: Sequence[int], crc: int) -> list[Tensor] | None:
        """Rows of each tensor as another process has left them; None where they have not this checksum.

        They are at their places, or, where that process has finished the file or begun to, at those among `kept`.
        """
        places = {row: place for place, row in enumerate(kept)}
        for path in (draft_of(self.path, token), self.path):  # it may have been renamed already
            for frames, at in ((self.frames, rows), (len(kept), [places[row] for row in rows])):
                with suppress(FileNotFoundError), path.open("rb") as file:
                    found = self._read(file.fileno(), frames, at)
                    if found is not None and checksum(found) == crc:
                        return found
        return None

    def _read(self, file: int, frames: int, rows: Sequence[int]) -> list[Tensor] | None:
        """Rows of a file of so many; None where it is too short."""
        found = []
        for index, (_, dtype, shape) in enumerate(self.tensors):
            size, start = self.row_bytes[index], self._start(index, frames)
            data = bytearray().join(os.pread(file, size, start + row * size) for row in rows)
            if len(data) != size * len(rows):
                return None
            found.append(torch.frombuffer(data, dtype=dtype).view(-1, *shape))
        return found

    def finish(self, rows: Sequence[int]) -> None:
        """Keeps these rows, ascending, closes the gaps, and waits until the disk has it; the name stays its own."""
        with naming(self.path):
            self._finish(rows)

    def _finish(self, rows: Sequence[int]) -> None:
        if len(rows) < self.frames:
            for index, size in enumerate(self.row_bytes):
                for place, row in enumerate(rows):
                    data = os.pread(self.file, size, self._start(index, self.frames) + row * size)
                    _write_at(self.file, memoryview(data), self._start(index, len(rows)) + place * size)
        os.truncate(self.file, self._start(len(self.tensors), len(rows)))
        _write_at(self.file, memoryview(self._header(len(rows))), 0)
        os.fsync(self.file)
        self.close()

    def close(self) -> None:
        """Twice is once."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def publish(self) -> None:
        """Renames what is finished to its place."""
        os.replace(self.draft, self.path)

    def remove(self) -> None:
        """Removes what has not been renamed."""
        self.close()
        self.draft.unlink(missing_ok=True)

    def _start(self, index: int, rows: int) -> int:
        """Where a tensor begins in a file of so many rows."""
        return self.header_bytes + rows * sum(self.row_bytes[:index])

    def _header(self, rows: int) -> bytes:
        """Of one length, whatever the number of rows."""
        said, start = {}, 0
        for (name, dtype, shape), size in zip(self.tensors, self.row_bytes, strict=True):
            stop = start + rows * size
            said[name] = {"dtype": CODES[dtype_name(dtype)], "shape": [rows, *shape], "data_offsets": [start, stop]}
            start = stop
        text = json.dumps({"__metadata__": {"format": "pt"}, **said}, separators=(",", ":"))
        spare = 0 if rows == self.frames else self.header_bytes - 8 - len(text)
        text += " " * (spare if spare else -len(text) % 8)
        return len(text).to_bytes(8, "little") + text.encode()


class ParquetShard(ShardFile):
    """A parquet file of pooled rows, made from a `ShardFile` when that has all of them."""

    def __init__(
        self,
        path: Path,
        stream: Stream,
        dtype: torch.dtype,
        frames: int,
        token: str,
        keys: Callable[[Sequence[int]], pa.Table],
    ) -> None:
        """`keys`: the columns that name some rows' frames."""
        super().__init__(path, stream, dtype, frames, token)
        (self.width,), self.keys = stream.shape, keys
        self.made = draft_of(path, f"made.{token}")

    def _finish(self, rows: Sequence[int]) -> None:
        """Leaves the draft as it is, for who takes over from a process that is killed now."""
        step = rows_of_a_group(self.width)
        groups = (self._read(self.file, self.frames, rows[i : i + step])[0] for i in range(0, len(rows), step))
        with self.made.open("wb") as opened:
            write_parquet(opened, self.keys(rows), groups, self.width)
            opened.flush()
            os.fsync(opened.fileno())
        self.close()

    def publish(self) -> None:
        """See there; the draft stays until it is removed."""
        os.replace(self.made, self.path)

    def remove(self) -> None:
        """See there."""
        super().remove()
        self.made.unlink(missing_ok=True)


class PartWriter:
    """The files of a part while it is worked on."""

    def __init__(
        self,
        out: Path,
        part: Part,
        source: Source,
        cameras: Sequence[str],
        streams: Sequence[Stream],
        dtype: torch.dtype,
    ) -> None:
        """Opens a file for each stream."""
        self.out, self.part, self.source, self.cameras = out, part, source, cameras
        self.present = [False] * part.frames
        self.skipped: list[Skipped] = []
        self.batches_left = 0  # set by who cuts the part into batches
        self.files: list[ShardFile] = []
        self.token = uuid.uuid4().hex
        self.index_draft = draft_of(index_path(out, part), self.token)
        self.journal = Journal(draft_of(journal_path(out, part), self.token))
        try:
            for stream in streams:
                given = shard_path(out, stream, part), stream, dtype, part.frames, self.token
                self.files.append(ParquetShard(*given, self._keys) if stream.format == PARQUET else ShardFile(*given))
        except BaseException:
            self.discard()
            raise

    def take_over(self, batches: Collection[int], skips: bool) -> set[int]:
        """Copies what killed processes have encoded of this part; the caller has its claim.

        Copied, as one that only stood still may write on. Where the disk has no room for both, the rest is left out.

        Args:
            batches: The first row of each batch.
            skips: Whether frames may be left out, so that batches which lack some serve.

        Returns:
            The batches that are there now, by their first rows.
        """
        taken: set[int] = set()
        with suppress(OSError):
            for path in drafts_of(journal_path(self.out, self.part)):
                self._take_from(path, batches, skips, taken)
        return taken

    def remove_left(self) -> None:
        """Removes what others have left of this part; the caller has its claim, and keeps it meanwhile."""
        paths = [*(file.path for file in self.files), index_path(self.out, self.part)]
        for path in (*paths, journal_path(self.out, self.part)):
            for draft in drafts_of(path):
                if token_of(draft) != self.token:
                    draft.unlink(missing_ok=True)

    def _take_from(self, path: Path, batches: Collection[int], skips: bool, taken: set[int]) -> None:
        entries, token = read_journal(path), token_of(path)
        if token == self.token:
            return
        kept = sorted({row for entry in entries for row in entry.rows})
        for entry in entries:
            if entry.start not in batches or entry.start in taken or (entry.skipped and not skips):
                continue
            found = []
            for file, crc in zip(self.files, entry.checksums, strict=False):  # of no rows there are none
                if (tensors := file.read_left(token, entry.rows, kept, crc)) is None:
                    break
                found.append(tensors)
            if len(found) == len(self.files) or not entry.rows:
                self.write(entry.start, entry.rows, found, entry.skipped)
                taken.add(entry.start)

    def write(
        self, start: int, rows: Sequence[int], tensors: Sequence[Sequence[Tensor]], skipped: Sequence[Skipped] = ()
    ) -> None:
        """The batch that begins at row `start`: of each stream its tensors, whose rows go to `rows`, ascending.

        Rows that were skipped are not among them; where all were, there are no tensors.
        """
        for file, of_stream in zip(self.files, tensors, strict=bool(rows)):
            first = 0
            for place in range(1, len(rows) + 1):  # stretches without a gap in one go
                if place == len(rows) or rows[place] != rows[place - 1] + 1:
                    file.write(rows[first], [x[first:place] for x in of_stream])
                    first = place
        with naming(index_path(self.out, self.part)):
            self.journal.add(Entry(start, list(rows), [checksum(x) for x in tensors], list(skipped)))
        for row in rows:
            self.present[row] = True
        self.skipped += skipped

    def finish(self) -> None:
        """Makes the files whole, and the index file beside its place."""
        rows = [row for row, present in enumerate(self.present) if present]
        for file in self.files:
            file.finish(rows)
        path = index_path(self.out, self.part)
        path.parent.mkdir(exist_ok=True)
        with naming(path), self.index_draft.open("wb") as opened:
            pq.write_table(self._index(rows), opened)
            opened.flush()
            os.fsync(opened.fileno())

    def publish(self) -> None:
        """Renames the files to their places, and then the index, by which the part is done."""
        for file in self.files:
            file.publish()
        for folder in {file.path.parent for file in self.files}:
            sync_folder(folder)
        path = index_path(self.out, self.part)
        os.replace(self.index_draft, path)
        sync_folder(path.parent)
        self.discard()

    def discard(self) -> None:
        """Removes what is not published."""
        for file in self.files:
            file.remove()
        self.index_draft.unlink(missing_ok=True)
        self.journal.remove()

    def _index(self, rows: Sequence[int]) -> pa.Table:
        """A row for each frame and camera: those of the same frame have the same row, in every stream's shard."""
        count, keys = len(self.cameras), self._keys(rows)
        episode, frame, timestamp = keys.take(np.repeat(np.arange(len(rows)), count)).columns
        table = pa.table(
            {
                "episode": episode,
                "frame": frame,
                "camera": pa.array(list(self.cameras) * len(rows), pa.string()),
                "timestamp": timestamp,
                "shard": pa.array([self.files[0].path.name] * count * len(rows), pa.string()),
                "row": pa.array(np.repeat(np.arange(len(rows)), count), pa.int64()),
            }
        )
        skipped = json.dumps(sorted(self.skipped, key=lambda x: (str(x[1]), x[2], x[0]))).encode()
        return table.replace_schema_metadata({SKIPPED: skipped})

    def _keys(self, rows: Sequence[int]) -> pa.Table:
        """Episode, frame and timestamp of some rows."""
        places = [(run.episode, frame) for run in self.part.runs for frame in range(run.start, run.stop)]
        kept = [places[row] for row in rows]
        times = {run.episode: self.source.timestamps(run.episode) for run in self.part.runs}
        seconds = [float(times[episode][frame]) for episode, frame in kept]
        return pa.table(
            {
                "episode": pa.array([self.source.episodes[i].name for i, _ in kept], _episode_type(self.source)),
                "frame": pa.array([frame for _, frame in kept], pa.int64()),
                "timestamp": pa.array(seconds, pa.float64(), from_pandas=True),  # NaN becomes null
            }
        )


def shard_path(out: Path, stream: Stream, part: Part) -> Path:
    """Where a stream's shard is."""
    return out / FEATURES / stream.folder / f"{part.name}.{stream.format}"


def index_path(out: Path, part: Part) -> Path:
    """Where a part's index is, by which it is done."""
    return out / INDEX / f"{part.name}.parquet"


def is_done(out: Path, part: Part, streams: Sequence[Stream]) -> bool:
    """Whether a part's index is there, and every shard that it speaks of, whole."""
    return is_whole(index_path(out, part)) and all(_is_whole(shard_path(out, stream, part)) for stream in streams)


def _is_whole(path: Path) -> bool:
    """Whether a file is there, and as long as it says itself."""
    if path.suffix == f".{PARQUET}":
        return is_whole(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            said = json.loads(file.read(min(length, MAX_HEADER)))
            stop = max(tensor["data_offsets"][1] for name, tensor in said.items() if name != "__metadata__")
            return os.fstat(file.fileno()).st_size == 8 + length + stop
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def skipped_in(path: Path) -> list[Skipped]:
    """What an index file says was left out."""
    metadata = pq.read_schema(path).metadata or {}
    return [tuple(each) for each in json.loads(metadata.get(SKIPPED, b"[]"))]


def journal_path(out: Path, part: Part) -> Path:
    """Beside which there are journals of a part, as long as it is worked on."""
    return out / INDEX / f"{part.name}.jsonl"


def draft_of(path: Path, token: str) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{token}")


def drafts_of(path: Path) -> list[Path]:
    """All that are there beside `path`."""
    return sorted(path.parent.glob(f".{path.name}.*"))


def token_of(draft: Path) -> str:
    """Whose it is."""
    return draft.name.rpartition(".")[2]


def remove_drafts(out: Path, names: Collection[str]) -> None:
    """Removes what killed processes left of these parts, which are done."""
    for folder in (out / FEATURES, out / INDEX):
        for draft in folder.rglob(".part-*"):
            if draft.name[1:].partition(".")[0] in names:
                draft.unlink(missing_ok=True)


def _episode_type(source: Source) -> pa.DataType:
    return pa.int64() if all(isinstance(episode.name, int) for episode in source.episodes) else pa.string()


def _write_at(file: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


def _product(shape: Sequence[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product
