"""A process's work: claims parts, has them decoded, encodes, and publishes shards, until all of them are there."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_batched.extraction.claims import Claims
from qwen_batched.extraction.decoding import Batch, Decoders, Segment, Slot
from qwen_batched.extraction.encoding import Encoder
from qwen_batched.extraction.shards import PartWriter, is_done, remove_drafts
from qwen_batched.extraction.sources.source import Source
from qwen_batched.extraction.streams import dtype_in
from qwen_batched.extraction.work import Part, segments

SPARE_SLOTS = 4  # beside one for each decoder
UNWRITTEN = 4  # batches between the encoder and the disk, and not more than a shard has: what a kill costs at most
WAIT = 0.2  # seconds between looks at what others have claimed

Report = Callable[[int], None]


def _tells_the_encoder(work: Callable[..., None]) -> Callable[..., None]:
    """What this raises ends the wait for batches, of which there may be none until another process fails too."""

    @functools.wraps(work)
    def run(worker: Worker, *arguments: Any) -> None:
        try:
            work(worker, *arguments)
        except BaseException as error:
            worker.decoding.ready.put(error)
            raise

    return run


class Worker:
    """See `run`."""

    def __init__(
        self,
        out: Path,
        manifest: dict[str, Any],
        source: Source,
        encoder: Encoder,
        decoders: int = 8,
        expiry: float = 120.0,
        parent: int | None = None,
    ) -> None:
        """`parent`: the process without which this one shall not go on; None for none."""
        self.out, self.manifest, self.source, self.encoder = out, manifest, source, encoder
        self.decoders, self.parent = decoders, parent
        self.claims = Claims(out, expiry)
        self.device = encoder.model.device
        self.dtype = dtype_in(manifest)
        sizes = [tuple(size) for size in manifest["data"]["cameras"].values()]
        pin = self.device.type == "cuda"
        self.slots = [Slot(manifest["batch_size"], sizes, pin) for _ in range(decoders + SPARE_SLOTS)]
        self.done: set[str] = set()

    def run(self, parts: Sequence[Part], report: Report) -> None:
        """Works until every one of `parts` is there, by this process or another; takes them in this order.

        `report` is called with the number of frames that were written, by another thread; those that a killed process
        has encoded are among them.

        Raises:
            DamagedData: A frame cannot be had, and is not to be skipped.
            OSError: A file cannot be written. Shards that are there stay, and nothing else is left.
        """
        self.parts = {part.name: part for part in parts}
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        heart.start()
        try:
            while not all(self._is_done(part.name) for part in parts):
                self._pass(report)
            remove_drafts(self.out, self.parts)
            self.claims.remove_left(self.parts)
        finally:
            ended.set()
            heart.join()
            self.claims.release_all()

    def _pass(self, report: Report) -> None:
        """Takes parts until none is free, and finishes what it took."""
        self.open: dict[str, PartWriter] = {}
        self.waiting: deque[Segment] = deque()
        self.guard = threading.Lock()
        in_a_shard = max(1, self.manifest["frames_of_a_shard"] // self.manifest["batch_size"])
        room = threading.Semaphore(min(UNWRITTEN, in_a_shard))
        self.unfinished: deque[Future[None]] = deque()
        self.report = report
        self.writing, self.publishing = ThreadPoolExecutor(1, "writer"), ThreadPoolExecutor(1, "publisher")
        decoders = Decoders(self.decoders, self.source, self.manifest, self.slots, self._next)
        self.decoding = decoders
        try:
            with decoders:
                for batch in decoders.batches():
                    while not room.acquire(timeout=1):
                        _raise_first(self.unfinished)
                    tensors, event = self._encode(batch)
                    self.unfinished.append(self.writing.submit(self._write, batch, tensors, event, room))
                    _raise_first(self.unfinished)
            self.writing.shutdown()
            self.publishing.shutdown()
            while self.unfinished:
                self.unfinished.popleft().result()
        finally:
            self.writing.shutdown(cancel_futures=True)
            self.publishing.shutdown(cancel_futures=True)
            for writer in self.open.values():
                writer.discard()

    def _next(self) -> Segment | None:
        """A segment for a decoder; waits for what others have claimed. None where only this process's are left."""
        with self.guard:
            while not self.decoding.stopped.is_set():
                if self.waiting:
                    return self.waiting.popleft()
                left = [name for name in self.parts if not self._is_done(name)]
                if name := self.claims.take(left, self._is_done):
                    self._begin(self.parts[name])
                elif all(name in self.claims.held for name in left):
                    return None
                else:
                    time.sleep(WAIT)
        return None

    def _begin(self, part: Part) -> None:
        cameras, streams = self.source.cameras, self.encoder.streams
        writer = PartWriter(self.out, part, self.source, cameras, streams, self.dtype)
        self.open[part.name] = writer
        batch_size = self.manifest["batch_size"]
        batches = range(0, part.frames, batch_size)
        taken = writer.take_over(batches, self.manifest["on_error"] == "skip")
        with self.claims.locked():
            if self.claims.is_mine(part.name):  # if not, this process stood still, and the drafts are its successor's
                writer.remove_left()
        if taken:
            self.unfinished.append(self.writing.submit(self.report, sum(writer.present)))
        writer.batches_left = len(batches) - len(taken)
        if not writer.batches_left:
            self.unfinished.append(self.publishing.submit(self._publish, writer))
        self.waiting.extend(Segment(writer, *bounds) for bounds in segments(part, batch_size, taken))

    def _encode(self, batch: Batch) -> tuple[list[Sequence[Tensor]], Any]:
        """Rows on the host, complete once the event is; None is always."""
        if not batch.rows:
            return [], None
        is_whole = len(batch.rows) == self.manifest["batch_size"]
        found = self.encoder(batch.slot.images(len(batch.rows)), batch.texts, is_whole)
        if self.device.type != "cuda":
            return found, None
        on_host = [[_to_pinned(x) for x in stream] for stream in found]
        event = torch.cuda.Event()
        event.record()
        return on_host, event

    @_tells_the_encoder
    def _write(self, batch: Batch, tensors: list[Sequence[Tensor]], event: Any, room: threading.Semaphore) -> None:
        if event is not None:
            event.synchronize()  # the frames were read by then too
        self.decoding.free.put(batch.slot)
        writer = batch.writer
        writer.write(batch.start, batch.rows, tensors, batch.skipped)
        room.release()
        self.report(len(batch.rows))
        writer.batches_left -= 1
        if not writer.batches_left:
            self.unfinished.append(self.publishing.submit(self._publish, writer))

    @_tells_the_encoder
    def _publish(self, writer: PartWriter) -> None:
        name = writer.part.name
        writer.finish()
        with self.claims.locked():
            if self.claims.is_mine(name) and not is_done(self.out, writer.part, self.encoder.streams):
                writer.publish()
            else:  # this process stood still for so long that another has done it
                writer.discard()
        del self.open[name]
        self.claims.release(name)

    def _is_done(self, name: str) -> bool:
        if name not in self.done and is_done(self.out, self.parts[name], self.encoder.streams):
            self.done.add(name)
        return name in self.done

    def _beat(self, ended: threading.Event) -> None:
        """Renews the claims."""
        every = min(1.0, self.claims.expiry / 4)
        renewed = time.monotonic()
        while not ended.wait(every):
            if self.parent is not None and os.getppid() != self.parent:
                os.kill(os.getpid(), signal.SIGKILL)  # its command was killed
            if time.monotonic() - renewed > self.claims.expiry / 8:
                self.claims.renew()
                renewed = time.monotonic()


def _raise_first(unfinished: deque[Future[None]]) -> None:
    """Raises what a thread has raised."""
    while unfinished and unfinished[0].done():
        unfinished.popleft().result()


def _to_pinned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
