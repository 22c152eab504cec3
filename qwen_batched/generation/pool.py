"""States of generations that have ended, kept with their graphs for the next of their kind."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qwen_batched.generation.decoding import Decoding, DecodingKind

MAX_IDLE = 16
MAX_BYTES = 4 << 30  # of all idle states


class DecodingPool:
    """Lends a state to one generation at a time: a second thread, or a callback that generates, gets another."""

    def __init__(self, forget: Callable[[Decoding], None]) -> None:
        """`forget` is called for a state that is given up."""
        self._idle: list[Decoding] = []  # the one used last at the end
        self._forget = forget
        self._epoch = 0
        self._lock = threading.Lock()

    def take(self, kind: DecodingKind) -> tuple[Decoding | None, int]:
        """An idle state, or None, and what `give` wants to know."""
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].kind == kind:
                    return self._idle.pop(index), self._epoch
            return None, self._epoch

    def give(self, decoding: Decoding, epoch: int) -> None:
        """Takes a state back, unless all were forgotten meanwhile."""
        with self._lock:
            if epoch != self._epoch:
                self._give_up(decoding)  # it may have earned a graph since
                return
            self._idle.append(decoding)
            while len(self._idle) > MAX_IDLE or sum(each.nbytes for each in self._idle) > MAX_BYTES:
                self._give_up(self._idle.pop(0))

    def clear(self) -> None:
        """Forgets all, those too that are lent."""
        with self._lock:
            self._epoch += 1
            while self._idle:
                self._give_up(self._idle.pop())

    def _give_up(self, decoding: Decoding) -> None:
        decoding.wait()
        self._forget(decoding)
