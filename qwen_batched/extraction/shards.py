"""Rows of a part in any order -> its safetensors files, then its index: beside, synced, renamed, indexed."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from qwen_batched.arguments import dtype_name
from qwen_batched.checkpoint.atomic_save import naming
from qwen_batched.extraction.sources.source import Source
from qwen_batched.extraction.streams import MASK, Stream
from qwen_batched.extraction.syncing import sync_folder
from qwen_batched.extraction.work import Part

FEATURES, INDEX, ROWS = "features", "index", "rows"
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}  # of safetensors
MAGIC = b"PAR1"  # with which parquet files begin and end
MAX_HEADER = 2**20  # bytes of a header, more than any here has
SKIPPED = b"skipped"  # in an index file's metadata: a JSON list of [camera, episode, frame, reason]

Skipped = tuple[str, int | str, int, str]


class ShardFile:
    """A safetensors file of which rows are written in any order, under a name of its own until it is whole.

    `rows` is its tensor of rows; a stream with masks has `mask` behind it.
    """

    def __init__(self, path: Path, stream: Stream, dtype: torch.dtype, frames: int) -> None:
        """Opens it beside `path`, with room for all frames."""
        self.path, self.frames = path, frames
        self.tensors = [(ROWS, dtype, stream.shape)]
        if stream.has_mask:
            self.tensors.append((MASK, torch.bool, stream.shape[:1]))
        self.row_bytes = [dtype.itemsize * _product(shape) for _, dtype, shape in self.tensors]
        self.header_bytes = len(self._header(frames))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.draft = draft_of(path)
        self.file = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, row: int, tensors: Sequence[Tensor]) -> None:
        """Rows from `row` on, of each tensor, on the host."""
        with naming(self.path):
            self._write(row, tensors)

    def _write(self, row: int, tensors: Sequence[Tensor]) -> None:
        for index, x in enumerate(tensors):
            _, dtype, shape = self.tensors[index]
            assert x.dtype == dtype and x.shape[1:] == shape, (x.dtype, x.shape, self.tensors[index])
            data = memoryview(x.contiguous().view(torch.uint8).reshape(-1).numpy())
            _write_at(self.file, data, self._start(index, self.frames) + row * self.row_bytes[index])

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
        """Opens a file for each stream, after removing what a killed process left of them."""
        self.out, self.part, self.source, self.cameras = out, part, source, cameras
        self.present = [False] * part.frames
        self.skipped: list[Skipped] = []
        self.batches_left = 0  # set by who cuts the part into batches
        self.lock = threading.Lock()
        self.files: list[ShardFile] = []
        remove_drafts(out, part, streams)
        try:
            for stream in streams:
                self.files.append(ShardFile(shard_path(out, stream, part), stream, dtype, part.frames))
        except BaseException:
            self.discard()
            raise

    def write(self, rows: Sequence[int], tensors: Sequence[Sequence[Tensor]]) -> None:
        """A batch: of each stream its tensors, whose rows go to `rows`, ascending."""
        for file, of_stream in zip(self.files, tensors, strict=True):
            first = 0
            for place in range(1, len(rows) + 1):  # stretches without a gap in one go
                if place == len(rows) or rows[place] != rows[place - 1] + 1:
                    file.write(rows[first], [x[first:place] for x in of_stream])
                    first = place
        for row in rows:
            self.present[row] = True

    def finish(self) -> None:
        """Makes the files whole, and the index file beside its place."""
        rows = [row for row, present in enumerate(self.present) if present]
        for file in self.files:
            file.finish(rows)
        path = index_path(self.out, self.part)
        path.parent.mkdir(exist_ok=True)
        self.index_draft = draft_of(path)
        with naming(path), self.index_draft.open("wb") as opened:
            pq.write_table(self._index(rows), opened)
            opened.flush()
            os.fsync(opened.fileno())

    def publish(self) -> None:
        """Renames the files to their places, and then the index, by which the part is done."""
        for file in self.files:
            os.replace(file.draft, file.path)
        for folder in {file.path.parent for file in self.files}:
            sync_folder(folder)
        path = index_path(self.out, self.part)
        os.replace(self.index_draft, path)
        sync_folder(path.parent)

    def discard(self) -> None:
        """Removes what is not published."""
        for file in self.files:
            file.close()
            file.draft.unlink(missing_ok=True)
        if draft := getattr(self, "index_draft", None):
            draft.unlink(missing_ok=True)

    def _index(self, rows: Sequence[int]) -> pa.Table:
        """A row for each frame and camera: those of the same frame have the same row, in every stream's shard."""
        places = [(run.episode, frame) for run in self.part.runs for frame in range(run.start, run.stop)]
        kept = [places[row] for row in rows]
        times = {run.episode: self.source.timestamps(run.episode) for run in self.part.runs}
        count = len(self.cameras)

        def repeated(values: list[object]) -> list[object]:
            return [value for value in values for _ in range(count)]

        seconds = repeated([float(times[episode][frame]) for episode, frame in kept])
        names = [self.source.episodes[episode].name for episode, _ in kept]
        table = pa.table(
            {
                "episode": pa.array(repeated(names), _episode_type(self.source)),
                "frame": pa.array(repeated([frame for _, frame in kept]), pa.int64()),
                "camera": pa.array(list(self.cameras) * len(kept), pa.string()),
                "timestamp": pa.array(seconds, pa.float64(), from_pandas=True),  # NaN becomes null
                "shard": pa.array([f"{self.part.name}.safetensors"] * count * len(kept), pa.string()),
                "row": pa.array(repeated(list(range(len(kept)))), pa.int64()),
            }
        )
        skipped = json.dumps(sorted(self.skipped, key=lambda x: (str(x[1]), x[2], x[0]))).encode()
        return table.replace_schema_metadata({SKIPPED: skipped})


def shard_path(out: Path, stream: Stream, part: Part) -> Path:
    """Where a stream's shard is."""
    return out / FEATURES / stream.folder / f"{part.name}.safetensors"


def index_path(out: Path, part: Part) -> Path:
    """Where a part's index is, by which it is done."""
    return out / INDEX / f"{part.name}.parquet"


def is_done(out: Path, part: Part, streams: Sequence[Stream]) -> bool:
    """Whether a part's index is there, and every shard that it speaks of, whole."""
    return _is_index(index_path(out, part)) and all(_is_whole(shard_path(out, stream, part)) for stream in streams)


def _is_index(path: Path) -> bool:
    """Whether a parquet file is there with its end."""
    try:
        with path.open("rb") as file:
            file.seek(-len(MAGIC), os.SEEK_END)
            return file.read() == MAGIC
    except OSError:
        return False


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, and as long as its header says."""
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


def draft_of(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def remove_drafts(out: Path, part: Part, streams: Sequence[Stream]) -> None:
    """Removes what a killed process left of a part; the caller has its claim."""
    for path in (*(shard_path(out, stream, part) for stream in streams), index_path(out, part)):
        for draft in path.parent.glob(f".{path.name}.*"):
            with suppress(FileNotFoundError):
                draft.unlink()


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
