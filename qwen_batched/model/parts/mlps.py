"""The MLPs of the blocks: (..., D) to (..., D)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_batched.linear.apply import apply_linear
from qwen_batched.linear.fused import FusedLinear, pack_again
from qwen_batched.linear.padded import PaddedLinear, apply_padded_linear

# H200, bf16, 16384 tokens, the vision MLP's first product: width 3456 396 us, 3424 440 us; tiles are 128 wide.
WIDTH_MULTIPLE = 128

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's, arXiv:2103.00020
}


class MLP(nn.Module):
    """Two layers with biases and an activation between them: (..., D) to (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, activation: str, names: tuple[str, str] = ("fc1", "fc2")) -> None:
        """Takes the activation by its name in config.json, and the layers' published names."""
        super().__init__()
        self.activation, self.names = activation, names
        self.add_module(names[0], nn.Linear(dim, hidden_dim))
        self.add_module(names[1], nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        first, last = (self.get_submodule(name) for name in self.names)
        return apply_linear(last, ACTIVATIONS[self.activation](apply_linear(first, x)))


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
        # The padding stays zero: silu(0) * 0, times columns of zeros.
        return apply_padded_linear(self.down_proj, self._gate_up.swiglu(self, x), self.hidden_dim)

    def _apply(self, *arguments: Any, **keywords: Any) -> SwiGLU:
        super()._apply(*arguments, **keywords)
        pack_again(self)
        return self
