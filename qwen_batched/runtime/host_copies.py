"""What the host has worked out -> the device, copied once and remembered, without a wait."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from qwen_batched.runtime.lru_cache import LRUCache

T = TypeVar("T")


def cached_h2d(cache: LRUCache, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What `make` copies to the device without a wait, once for each stream: others may not read it yet.

    The key ends with the device. A capture takes what was copied on any stream: it reads nothing before a replay.
    """
    device = key[-1]
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return cache.get(key, make)

    def make_for_all() -> T:
        value = make()
        cache.get(key, lambda: value)
        return value

    return cache.get((*key, torch.cuda.current_stream(device).cuda_stream), make_for_all)


def to_device(values: T, device: torch.device) -> T:
    """A pytree with its tensors on `device`; from pinned memory without a wait."""
    return _pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), values)


def h2d(device: torch.device, value: Tensor) -> Tensor:
    """`value`, which lies in pageable memory of our own, without a wait; in a capture with one, which is refused."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return value.to(device, non_blocking=not capturing)
