"""Layers that the vision transformer and the decoder share, on top of the fused operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_batched.kernels import ops


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


class SwiGLU(nn.Module):
    """The gated MLP: (..., D) to (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
