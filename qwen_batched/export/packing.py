"""Programs as a GPU is fast at them.

MLPs have weights that are constants: gate and up are one product, widths are padded with zeros. The attention within
windows is a kernel inside the program, where the GPU has kernels.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.model.parts.mlps import WIDTH_MULTIPLE, SwiGLU
from qwen_batched.model.vision import VisionAttention


class PackedSwiGLU(nn.Module):
    """A `SwiGLU` with an inner width that is a multiple of `WIDTH_MULTIPLE`: (..., D) to (..., D)."""

    def __init__(self, mlp: SwiGLU) -> None:
        super().__init__()
        width = -(-mlp.hidden_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.gate_up = _constant(torch.cat([_padded(each.weight, width) for each in (mlp.gate_proj, mlp.up_proj)]))
        self.down = _constant(_padded(mlp.down_proj.weight.t(), width).t())
        self.gate_up_bias = self.down_bias = None
        if mlp.gate_proj.bias is not None:
            biases = [_padded(each.bias, width) for each in (mlp.gate_proj, mlp.up_proj)]
            self.gate_up_bias, self.down_bias = _constant(torch.cat(biases)), mlp.down_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        # The padding stays zero: silu(0) * 0, times columns of zeros.
        return F.linear(ops.swiglu(F.linear(x, self.gate_up, self.gate_up_bias)), self.down, self.down_bias)


def packed(program: nn.Module, with_kernels: bool) -> nn.Module:
    """A copy with `PackedSwiGLU` where a width is no multiple, and with kernels if any; it shares other parameters."""
    program = copy.deepcopy(program, {id(parameter): parameter for parameter in program.parameters()})
    for module in [*program.modules()]:
        if with_kernels and isinstance(module, VisionAttention):
            module.attend = ops.inlined_rotary_attention
        for name, child in module.named_children():
            if isinstance(child, SwiGLU) and child.hidden_dim % WIDTH_MULTIPLE:
                setattr(module, name, PackedSwiGLU(child))
    return program


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros behind its own."""
    return torch.cat((x.detach(), x.new_zeros(rows - len(x), *x.shape[1:])))


def _constant(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.contiguous(), requires_grad=False)
