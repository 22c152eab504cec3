"""Room behind a tensor for more of it along one dimension, so that tensors of several sizes share a graph's buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Room(NamedTuple):
    """Up to `size` along `dim`, filled with `fill`, or, None, with what is never read."""

    dim: int
    size: int
    fill: int | None = None

    def shape(self, value: Tensor) -> torch.Size:
        """Of a tensor that has `value` and the room behind it."""
        return torch.Size((*value.shape[: self.dim], self.size, *value.shape[self.dim + 1 :]))

    def padded(self, value: Tensor) -> Tensor:
        """`value` with what the room is filled with behind it; as it is where nothing would read that."""
        more = self.size - value.shape[self.dim]
        if more == 0 or self.fill is None:
            return value
        return F.pad(value, (0, 0) * (value.ndim - 1 - self.dim) + (0, more), value=self.fill)

    def write(self, value: Tensor, buffer: Tensor, last: int | None) -> None:
        """Copies `value` to a buffer, without a wait, and fills what is behind it.

        `last` is the size of the value that was written before, behind which the buffer is filled; None where there was
        none.
        """
        size = value.shape[self.dim]
        if size == self.size:
            buffer.copy_(value, non_blocking=True)
            return
        buffer.narrow(self.dim, 0, size).copy_(value, non_blocking=True)
        if self.fill is not None and (last is None or last > size):
            end = self.size if last is None else last
            buffer.narrow(self.dim, size, end - size).fill_(self.fill)


def pad_all(values: Sequence[Tensor], rooms: Sequence[Room | None]) -> list[Tensor]:
    """`values` with the room of each filled up."""
    return [x if room is None else room.padded(x) for x, room in zip(values, rooms, strict=True)]
