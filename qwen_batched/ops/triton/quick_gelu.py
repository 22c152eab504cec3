"""quick_gelu and its gradient, each in one pass. See `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, pdl_launch_dependents, pdl_wait

BLOCK, WARPS = 2048, 8


@triton.jit
def _quick_gelu_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    pdl_launch_dependents(USE_PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    pdl_wait(USE_PDL)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    tl.store(out_ptr + at, (wide / (1.0 + tl.exp(-1.702 * wide))).to(x.dtype), mask=mask)


def quick_gelu(x: Tensor) -> Tensor:
    """(...) to (...)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if count := x.numel():
        launch(_quick_gelu_kernel, (cdiv(count, BLOCK),), (x, out), (count,), BLOCK=BLOCK, num_warps=WARPS)
    return out


@triton.jit
def _quick_gelu_backward_kernel(grad_ptr, x_ptr, out_ptr, count, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    pdl_wait(USE_PDL)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    scaled = 1.702 * x.to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-scaled))
    tl.store(out_ptr + at, (grad * share * (1.0 + scaled * (1.0 - share))).to(x.dtype), mask=mask)


def quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """(...) and the input of `quick_gelu` to (...)."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    if count := x.numel():
        launch(
            _quick_gelu_backward_kernel, (cdiv(count, BLOCK),), (grad, x, out), (count,), BLOCK=BLOCK, num_warps=WARPS
        )
    return out
