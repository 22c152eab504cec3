"""A bounded cache for tables that depend on shapes only: geometry, token ids, constants."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")


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
