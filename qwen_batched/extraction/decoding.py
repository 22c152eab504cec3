"""Segments of parts -> batches of frames in buffers, by threads that decode.

PyAV, Pillow and NumPy's copies let other threads run, so threads keep as many cores busy as there are, share the
buffers with who encodes, and die with their process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_batched.extraction.journal import Skipped
from qwen_batched.extraction.shards import PartWriter
from qwen_batched.extraction.sources.source import Damage, Source
from qwen_batched.extraction.work import cut

PATIENCE = 0.1  # seconds between looks at whether to stop


class DamagedData(ValueError):
    """A frame cannot be had, and was not to be skipped."""


@dataclass(frozen=True)
class Segment:
    """Frames of a part that one worker decodes, in whole batches."""

    writer: PartWriter
    start: int
    stop: int


class Slot:
    """Memory of a batch's frames, pinned where a GPU will read it."""

    def __init__(self, batch_size: int, sizes: Sequence[tuple[int, int]], pin: bool) -> None:
        """`sizes`: height and width of each camera."""
        if len(set(sizes)) == 1:
            whole = torch.empty(batch_size, len(sizes), 3, *sizes[0], dtype=torch.uint8, pin_memory=pin)
            self._images: Tensor | list[Tensor] = whole
            self.cameras = [camera.numpy() for camera in whole.unbind(1)]
        else:
            self._images = [torch.empty(batch_size, 3, *size, dtype=torch.uint8, pin_memory=pin) for size in sizes]
            self.cameras = [camera.numpy() for camera in self._images]

    def images(self, count: int) -> Tensor | list[Tensor]:
        """The first frames, as `encode_images` takes them: a tensor, or a list where cameras differ in size."""
        images = self._images
        return images[:count] if isinstance(images, Tensor) else [camera[:count] for camera in images]


@dataclass(frozen=True)
class Batch:
    """Frames of a part that were decoded."""

    writer: PartWriter
    start: int  # its first row of the part
    rows: list[int]  # of the part; those left out are not among them
    texts: list[str] | None
    skipped: list[Skipped]
    slot: Slot


class Decoders:
    """Threads that fill slots; a context, whose end ends them."""

    def __init__(
        self,
        count: int,
        source: Source,
        manifest: dict[str, Any],
        slots: Sequence[Slot],
        next_segment: Callable[[], Segment | None],
    ) -> None:
        """`next_segment` is called by the threads; None ends one."""
        self.source, self.next_segment = source, next_segment
        sizes = manifest["data"]["cameras"]
        self.sizes = {camera: tuple(size) for camera, size in sizes.items()}
        self.batch_size, self.text = manifest["batch_size"], manifest["text"]
        self.has_texts = any(what != "image_features" for what in manifest["what"])
        self.skips = manifest["on_error"] == "skip"
        self.free: queue.Queue[Slot] = queue.Queue()
        for slot in slots:
            self.free.put(slot)
        self.ready: queue.Queue[Batch | BaseException | None] = queue.Queue()  # bounded by the slots
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self._run, name=f"decoder-{i}", daemon=True) for i in range(count)]

    def __enter__(self) -> Decoders:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def batches(self) -> Iterator[Batch]:
        """All of them, in the order in which they are ready. Raises what a thread has raised."""
        running = len(self.threads)
        while running:
            found = self.ready.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield found

    def _run(self) -> None:
        try:
            while not self.stopped.is_set() and (segment := self.next_segment()) is not None:
                self._decode(segment)
            self.ready.put(None)
        except BaseException as error:  # for the thread that waits
            self.ready.put(error)

    def _decode(self, segment: Segment) -> None:
        writer, source = segment.writer, self.source
        runs = cut(writer.part.runs, segment.start, segment.stop)
        places = iter([(run.episode, frame) for run in runs for frame in range(run.start, run.stop)])
        texts = {run.episode: source.texts(run.episode) for run in runs} if self.has_texts and self.text is None else {}
        readers = [source.frames(camera, runs) for camera in source.cameras]
        for start in range(segment.start, segment.stop, self.batch_size):
            if (slot := self._free_slot()) is None:
                return
            rows, of_batch, skipped = [], [], []
            for row in range(start, min(start + self.batch_size, segment.stop)):
                episode, frame = next(places)
                if self._fill(slot, len(rows), [next(reader) for reader in readers], skipped, episode, frame):
                    rows.append(row)
                    of_batch.append(texts[episode][frame] if texts else self.text or "")
            self.ready.put(Batch(writer, start, rows, of_batch if self.has_texts else None, skipped, slot))

    def _fill(
        self, slot: Slot, place: int, images: list[Any], skipped: list[Skipped], episode: int, frame: int
    ) -> bool:
        """Copies a frame's images; False where one cannot be had."""
        name = self.source.episodes[episode].name
        for camera, image in zip(self.source.cameras, images, strict=True):
            size = self.sizes[camera]
            if not isinstance(image, Damage) and image.shape[:2] != size:
                got, expected = ("{}x{}".format(*each) for each in (image.shape[:2], size))
                image = Damage(f"episode {name}", f"is of {got}, where camera {camera} has frames of {expected}")
            if isinstance(image, Damage):
                if not self.skips:
                    raise DamagedData(f"camera {camera}, episode {name}, frame {frame}: {image}")
                skipped.append((camera, name, frame, str(image)))
                return False
        for buffer, image in zip(slot.cameras, images, strict=True):
            buffer[place] = image.transpose(2, 0, 1)
        return True

    def _free_slot(self) -> Slot | None:
        while not self.stopped.is_set():
            try:
                return self.free.get(timeout=PATIENCE)
            except queue.Empty:
                continue
        return None
