"""A bounded cache for tables that depend on shapes only: geometry, token ids, constants."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import ClassVar, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _disable_current_modes

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
    """Remembers the most recently used values, each made on first use, up to a number and a size of them.

    Keys carry everything that a value depends on, the device included. Values are made outside every mode of PyTorch's
    (inference, gradients, default device, fake tensors, functional transforms): a table first needed while the model is
    exported serves the live model too. A copied or unpickled cache is empty: its values can always be made again, and
    must not pin another device's memory. A forked process can go on using it, whatever threads of its parent did.
    """

    _instances: ClassVar[weakref.WeakSet[LRUCache]] = weakref.WeakSet()

    def __init__(
        self, max_size: int, max_bytes: int | None = None, bytes_of: Callable[[Hashable, object], int] | None = None
    ) -> None:
        """Takes how many values to keep and, by `bytes_of(key, value)`, how many bytes; larger ones are not kept."""
        self.max_size, self.max_bytes = max_size, max_bytes
        self._bytes_of = bytes_of
        self._bytes = 0
        self._values: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._instances.add(self)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, from `make()` where it is not known. An error of `make` leaves the cache as it was."""
        with self._lock:
            entry = self._values.get(key)
            if entry is not None:
                self._values.move_to_end(key)
        value = self._make(key, make) if entry is None else entry[0]
        held = _held.get()
        if held is not None:
            held.append(value)
        return value

    def _make(self, key: Hashable, make: Callable[[], T]) -> T:
        with _outside_all_modes():
            value = make()
        size = 0 if self._bytes_of is None else self._bytes_of(key, value)
        if self.max_bytes is None or size <= self.max_bytes:
            with self._lock:
                self._keep(key, value, size)
        return value

    def _keep(self, key: Hashable, value: object, size: int) -> None:
        try:
            _, replaced = self._values.pop(key, (None, 0))  # another thread may have made it meanwhile
            self._values[key] = value, size
            self._bytes += size - replaced
            while len(self._values) > self.max_size or (self.max_bytes is not None and self._bytes > self.max_bytes):
                _, (_, evicted) = self._values.popitem(last=False)
                self._bytes -= evicted
        except BaseException:  # Ctrl-C between two of these lines: the count must not drift from what is kept
            self._bytes = sum(size for _, size in self._values.values())
            raise

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[type[LRUCache], tuple[object, ...]]:
        return LRUCache, (self.max_size, self.max_bytes, self._bytes_of)


def _reset_locks() -> None:
    """In a forked process: a lock that a thread of the parent held would never be released."""
    for cache in LRUCache._instances:
        cache._lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_reset_locks)


@contextlib.contextmanager
def _outside_all_modes() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())  # a default device is such a mode
        # The two are slow, and seldom needed.
        if torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch():
            stack.enter_context(_disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        yield
