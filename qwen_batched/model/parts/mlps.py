"""The MLPs of the blocks: (..., D) to (..., D)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qwen_batched.linear.apply import apply_gelu_linear, apply_linear
from qwen_batched.linear.fused import FusedLinear, pack_again
from qwen_batched.linear.padded import PaddedLinear, apply_padded_linear
from qwen_batched.model.parts.norms import resolve_norm

# H200, bf16, 16384 tokens, the vision MLP's first product: width 3456 396 us, 3424 440 us; tiles are 128 wide.
WIDTH_MULTIPLE = 128


class MLP(nn.Module):
    """Two layers with biases and a GELU between them: (..., D) to (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, activation: str, names: tuple[str, str] = ("fc1", "fc2")) -> None:
        """Takes the GELU by its name in config.json, and the layers' published names."""
        super().__init__()
        self.activation, self.names = activation, names
        self.add_module(names[0], nn.Linear(dim, hidden_dim))
        self.add_module(names[1], nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        first, last = (self.get_submodule(name) for name in self.names)
        return apply_linear(last, apply_gelu_linear(first, x, self.activation))


class SwiGLU(nn.Module):
    """The gated MLP: (..., D) to (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        padded = -(-hidden_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        if padded == hidden_dim:
            self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        else:
            self.down_proj = PaddedLinear(hidden_dim, dim, bias=bias, padded=padded)
        # Without padding, joining two large weights for a call would only cost.
        self._gate_up = FusedLinear(self, ("gate_proj", "up_proj"), WIDTH_MULTIPLE, joins=padded != hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self._gate_up.swiglu(self, x))

    def behind_norm(self, norm: nn.Module, update: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """This behind a norm, and the residual stream, by as few operations as can be."""
        scale = resolve_norm(norm)
        fused = None if scale is None else self._gate_up.behind_norm(self, update, residual, *scale, is_gated=True)
        if fused is None:
            x, stream = norm(update, residual)
            return self(x), stream
        hidden, stream = fused
        return self._down(hidden), stream

    def _down(self, hidden: Tensor) -> Tensor:
        # The padding stays zero: silu(0) * 0, times columns of zeros.
        return apply_padded_linear(self.down_proj, hidden, self.hidden_dim)

    def _apply(self, *arguments: Any, **keywords: Any) -> SwiGLU:
        super()._apply(*arguments, **keywords)
        pack_again(self)
        return self
