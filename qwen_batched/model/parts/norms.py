"""Norms with the residual addition before them: (update, residual) -> (normed, stream)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.runtime.fast_path import can_fuse

# Adds a sub-layer's update to the residual stream and normalises the sum. Takes (..., D) and the stream so far, None at
# its start; returns the normalised stream and the stream, both (..., D).
AddNorm = Callable[..., tuple[Tensor, Tensor]]

# Weights (E,) of the query and key norms, and their eps; () without them.
QKNorm = tuple[Tensor, Tensor, float] | tuple[()]


class AddRMSNorm(nn.Module):
    """`AddNorm` by root mean square (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, unit_offset: bool = False) -> None:
        """`unit_offset`: the scale is 1 + weight."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if unit_offset else torch.ones(dim))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, update: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `AddNorm`."""
        if not self.unit_offset:
            return ops.add_norm(update, residual, self.weight, None, self.eps)
        # Not the kernel, which reads the scale before the kernel in front of it, which makes this one, has ended.
        stream = stream_of(update, residual)
        wide = torch.promote_types(stream.dtype, torch.float32)  # 1 + weight has few bits left in bfloat16
        normed = F.rms_norm(stream.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps)
        return normed.to(stream.dtype), stream

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class AddLayerNorm(nn.LayerNorm):
    """`AddNorm` by mean and variance (arXiv:1607.06450)."""

    def forward(self, update: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `AddNorm`."""
        return ops.add_norm(update, residual, self.weight, self.bias, self.eps)


def stream_of(update: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream, with the addition done that the blocks leave to the next norm."""
    return update if residual is None else residual + update


def resolve_norm(norm: nn.Module) -> tuple[Tensor, float] | None:
    """Weight and eps of an RMS norm, for an operation that does it instead; None if it must be called."""
    return (norm.weight, norm.eps) if can_fuse(norm, AddRMSNorm) and not norm.unit_offset else None


def resolve_qk_norm(q_norm: nn.Module, k_norm: nn.Module) -> QKNorm | None:
    """What two norms of heads do, for an operation that does it instead; None if they must be called."""
    q, k = resolve_norm(q_norm), resolve_norm(k_norm)
    return (q[0], k[0], q[1]) if q is not None and k is not None and q[1] == k[1] else None
