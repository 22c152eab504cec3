"""A bounded cache for tables that depend on shapes only: geometry, token ids, constants."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch

T = TypeVar("T")
_held: ContextVar[list[object] | None] = ContextVar("qwen_batched_held_values", default=None)


@contextlib.contextmanager
def hold_values() -> Iterator[list[object]]:
    """Collects what caches give out inside the `with` block, for those who need it longer than a cache may keep it."""
    values: list[object] = []
    token = _held.set(values)
    try:
        yield values
    finally:
        _held.reset(token)


class LRUCache:
    """Remembers the `max_size` most recently used values, each made on first use.

    Keys carry everything that a value depends on, the device included. Values are made outside inference mode,
    so that a table first needed in inference can still be used in training. A copied or unpickled cache is empty:
    its values can always be made again, and must not pin another device's memory.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._values: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, from `make()` where it is not known."""
        value = self._find_or_make(key, make)
        held = _held.get()
        if held is not None:
            held.append(value)
        return value

    def _find_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        with self._lock:
            self._values[key] = value
            if len(self._values) > self.max_size:
                self._values.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[type[LRUCache], tuple[int]]:
        return LRUCache, (self.max_size,)
