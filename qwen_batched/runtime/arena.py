"""Where the CUDA graphs of a device are captured: one memory pool, cuBLAS's workspaces in it, and a stream."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import ClassVar

import torch

STREAMS_OF_A_PRIORITY = 32  # PyTorch hands out so many streams of a device, in turn


class Arena:
    """Where all graphs of a device are captured: one memory pool, and a stream of its own.

    The pool is shared, since graphs run one after the other; after an invalidated capture the next ones get another.
    cuBLAS keeps a workspace for each stream, and graphs go on using the one that they were captured with. So it must
    lie in a pool: nothing of ours runs on the stream but captures, and of the streams of high priority, which PyTorch
    hands out in turn, each serves one arena only.
    """

    _living: ClassVar[weakref.WeakValueDictionary[torch.device, Arena]] = weakref.WeakValueDictionary()
    _used_streams: ClassVar[set[tuple[torch.device, int]]] = set()
    _immortal: ClassVar[list[Arena]] = []
    _lock = threading.Lock()
    _one_capture = threading.RLock()  # PyTorch allows one at a time in a process

    @classmethod
    def of(cls, device: torch.device) -> Arena:
        """The arena of `device`. It lives as long as anything captured there."""
        with cls._lock:
            arena = cls._living.get(device)
            if arena is None:
                arena = cls._living[device] = cls(device)
            return arena

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = threading.Lock()
        self._last_use = torch.cuda.Event()
        self._stream = self._unused_stream()
        self._anchors: list[torch.cuda.CUDAGraph] = []  # each keeps a pool and the workspaces in it
        with self._one_capture:
            self._open_pool()
        self._used_streams.add((device, self._stream.cuda_stream))
        if sum(used == device for used, _ in self._used_streams) == STREAMS_OF_A_PRIORITY:
            self._immortal.append(self)  # there is no stream for another

    def _unused_stream(self) -> torch.cuda.Stream:
        """A stream whose workspace does not lie in the pool of an arena that is gone."""
        while True:
            stream = torch.cuda.Stream(self.device, priority=-1)
            if (self.device, stream.cuda_stream) not in self._used_streams:
                return stream

    @contextlib.contextmanager
    def capture(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures what is done inside the `with` block.

        Not by `torch.cuda.graph`, which first waits for the device and gives all cached memory back. No garbage is
        collected meanwhile: what its finalizers ask of the device can invalidate the capture.
        """
        with self._one_capture, self._turn, _no_garbage_collection(), self._record(self._anchors[-1].pool()) as graph:
            yield graph

    def _open_pool(self) -> None:
        """A pool for captures from now on, kept by a graph of its own when all others have gone."""
        with torch.inference_mode(False), torch.no_grad(), self._record(None) as anchor:
            torch.zeros(1, device=self.device)
        self._anchors.append(anchor)

    @contextlib.contextmanager
    def _record(self, pool: tuple[int, int] | None) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Room for what a capture begins with: PyTorch 2.11 aborts the process where there is none.
            spare = torch.empty(1, device=self.device)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield graph
            finally:
                self._end(graph, pool)
        del spare

    def _end(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int] | None) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # PyTorch 2.11 raises for an invalidated capture before it ends the recording to the pool, and refuses every
            # later one of that pool; and it leaves random generators in a capture, until another one ends well.
            if pool is not None:
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, pool)
                    self._open_pool()
            raise

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[torch.cuda.Event]:
        """One replay after the other, on whatever streams and from whatever threads; yields the event of its end."""
        with self._turn, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_use)
            self._last_use = torch.cuda.Event()
            try:
                yield self._last_use
            finally:
                self._last_use.record(stream)


def synchronize(device: torch.device) -> None:
    """Returns when all that was launched on a device is done; on a CPU at once.

    CUDA allows no wait for a whole device while any thread captures there: that would fail, and so would the capture.
    So it comes after a capture of another thread.
    """
    if device.type == "cuda":
        with Arena._one_capture:
            torch.cuda.synchronize(device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
