"""A request with its folder and data set open, as every engine begins; and what has come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from qwen_batched.checkpoint.device import resolve_device
from qwen_batched.extraction.encoding import Encoder
from qwen_batched.extraction.manifest import agree, make_manifest
from qwen_batched.extraction.request import Request
from qwen_batched.extraction.shards import Skipped, index_path, is_done, skipped_in
from qwen_batched.extraction.sources.opening import open_source
from qwen_batched.extraction.sources.source import Source
from qwen_batched.extraction.streams import streams_in
from qwen_batched.extraction.syncing import check_renames
from qwen_batched.extraction.work import Part, work_list
from qwen_batched.extraction.worker import Report, Worker


@dataclass(frozen=True)
class Job:
    """See `open_job`."""

    request: Request
    manifest: dict[str, Any]
    source: Source
    parts: tuple[Part, ...]

    def work(
        self, report: Report, first: int = 0, step: int = 1, device: str | None = None, parent: int | None = None
    ) -> None:
        """Extracts, in this process, until all parts are there.

        Takes every `step`th part from `first` on before the others, so that processes do not meet.
        """
        self.work_on(order(self.parts, first, step), report, device, parent)

    def work_on(
        self, parts: Sequence[Part], report: Report, device: str | None = None, parent: int | None = None
    ) -> None:
        """The same of some parts."""
        self.worker(device, parent).run(parts, report)

    def worker(self, device: str | None = None, parent: int | None = None) -> Worker:
        """Loads the model."""
        return make_worker(self.request, self.manifest, self.source, device, parent)


@dataclass(frozen=True)
class Outcome:
    """What a folder has and lacks."""

    parts: int  # that are there
    missing: int  # parts that are not
    frames: int  # rows that are there, each with all cameras
    skipped: tuple[Skipped, ...]
    left_out: int  # files and episodes that could not be counted
    bytes: int  # of the features

    @property
    def is_complete(self) -> bool:
        """Whether every frame of the data set is there."""
        return not (self.missing or self.skipped or self.left_out)


def open_job(request: Request) -> Job:
    """Opens the data set and agrees on the manifest. Raises `ValueError` or `TypeError` before any work."""
    source = open_request_source(request)
    data = Path(request.dataset).resolve()
    if not source.form.startswith("lerobot") and request.out.resolve().is_relative_to(data):
        raise ValueError(f"OUT must not be inside of the data set, all that is below {data}, got {request.out}")
    made = make_manifest(request, source)
    request.out.mkdir(parents=True, exist_ok=True)
    check_renames(request.out)
    manifest = agree(request.out, made, request)
    return Job(request, manifest, source, tuple(work_list(manifest)))


def open_request_source(request: Request) -> Source:
    """The data set that a request names."""
    return open_source(
        request.dataset, request.cameras, request.skips, request.tolerance, request.text_column, request.revision
    )


def make_worker(
    request: Request, manifest: dict[str, Any], source: Source, device: str | None = None, parent: int | None = None
) -> Worker:
    """Loads the model on `device`, or the request's, with the manifest's number of threads."""
    on = resolve_device(device or request.device)
    if on.index is not None and on.type == "cuda":
        torch.cuda.set_device(on)  # events are of the current device
    if manifest["threads"]:
        torch.set_num_threads(manifest["threads"])
    encoder = Encoder.load(request.model, manifest, on)
    return Worker(request.out, manifest, source, encoder, request.decoders, request.claim_expiry, parent)


def order(parts: Sequence[Part], first: int, step: int) -> list[Part]:
    """A rank's own parts, then the others'."""
    own = list(parts[first::step])
    return own + [part for part in parts if part.number % step != first]


def outcome(out: Path, manifest: dict[str, Any]) -> Outcome:
    """Reads what is there."""
    parts = work_list(manifest)
    streams = streams_in(manifest)
    there = [index_path(out, part) for part in parts if is_done(out, part, streams)]
    cameras = len(manifest["data"]["cameras"])
    frames = sum(pq.read_metadata(path).num_rows for path in there) // cameras
    skipped = tuple(each for path in there for each in skipped_in(path))
    size = sum(path.stat().st_size for path in (out / "features").rglob("part-*"))
    left_out = len(manifest["data"]["left_out"])
    return Outcome(len(there), len(parts) - len(there), frames, skipped, left_out, size)
