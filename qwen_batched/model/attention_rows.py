"""Tokens of a ragged batch back to back, and the rows in which each sample's attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRows:
    """The rows that attention works on: one of `length` places for each sample, its tokens first.

    Attributes:
        slots: Int64 (T,), the place b * length + s of each token; None where tokens fill the rows.
    """

    batch: int
    length: int
    slots: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """Rows (batch, length, ...) to tokens back to back, (T, ...)."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


def back_to_back(attention_mask: Tensor, tokens: int) -> tuple[Tensor, AttentionRows]:
    """How `tokens` tokens of (B, S) stand back to back: all real ones, and padding where there is more room.

    Returns:
        Their places b * S + s, (T,), real ones first, and the rows that attention works on.
    """
    batch, length = attention_mask.shape
    padding_BS = (~attention_mask).to(torch.uint8)
    order_BS = torch.argsort(padding_BS, dim=1, stable=True)
    first_B1 = torch.arange(batch, device=order_BS.device)[:, None] * length
    if tokens == batch * length:
        return (first_B1 + order_BS).flatten(), AttentionRows(batch, length)
    places_T = torch.argsort(padding_BS.flatten(), stable=True)[:tokens]
    slots_BS = first_B1 + torch.argsort(order_BS, dim=1)
    return places_T, AttentionRows(batch, length, slots_BS.flatten().index_select(0, places_T))
