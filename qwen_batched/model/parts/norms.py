"""Norms with the residual addition before them: (update, residual) -> (normed, stream)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_batched import ops


class AddRMSNorm(nn.Module):
    """Adds a sub-layer's update to the residual stream and normalises the sum."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, update: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Takes (..., D) and the stream so far; returns the normalised stream and the stream, both (..., D)."""
        return ops.add_rms_norm(update, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def stream_of(update: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream, with the addition done that the blocks leave to the next norm."""
    return update if residual is None else residual + update
