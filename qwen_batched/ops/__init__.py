"""The one door to the fused operations: each a PyTorch operator `qwen_batched::<name>`.

What an operation computes is said in `reference`. On a GPU it runs a Triton kernel, elsewhere the reference. Where a
gradient is wanted, a kernel runs that has one for its backward too (`derivatives`); else, for forward-mode derivatives
and in float64, it is the reference itself, which autograd sees through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from qwen_batched.ops import derivatives, operators, reference
from qwen_batched.ops.adapted_linear import adapted_linear
from qwen_batched.ops.dense_attention import fastest_attention
from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.ops.packed_linear import packed_linear
from qwen_batched.ops.reference import NO_TOKEN, PILLOW, TORCHVISION, check_resample_backend, mrope_tables
from qwen_batched.ops.segments import Segments
from qwen_batched.runtime.backend import (
    backend,
    has_kernels,
    reading_ahead,
    refuse_forced_triton,
    use_backend,
)

__all__ = [
    "NO_TOKEN",
    "PILLOW",
    "TORCHVISION",
    "add_rms_norm",
    "backend",
    "causal_attention",
    "check_resample_backend",
    "decode_attention",
    "expand_prompts",
    "frames_to_patches",
    "linear",
    "mrope",
    "mrope_tables",
    "packed_linear",
    "reading_ahead",
    "rotary_attention",
    "swiglu",
    "swiglu_linear",
    "use_backend",
]
ResizeTables = tuple[Tensor, Tensor, Tensor, Tensor]


def add_rms_norm(update: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if _only_the_reference_serves(update, residual, parameters=(weight,), has_backward=True):
        return reference.add_rms_norm(update, residual, weight, eps)
    if derivatives.wants_gradient(update, residual, weight):
        if residual is not None and not derivatives.wants_gradient(update, residual):
            update, residual = residual + update, None  # the stream is no one's function that wants a gradient
        if residual is None:
            return derivatives.RMSNorm.apply(update, weight, eps), update
        return derivatives.AddRMSNorm.apply(update, residual, weight, eps)
    if residual is None:
        return operators.rms_norm(update, weight, eps), update
    return operators.add_rms_norm(update, residual, weight, eps)


def swiglu(gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> Tensor:
    """See `reference.swiglu`."""
    if _only_the_reference_serves(gate, up, parameters=(gate_bias, up_bias), has_backward=gate_bias is None):
        return reference.swiglu(gate, up, gate_bias, up_bias)
    if derivatives.wants_gradient(gate, up):
        return derivatives.SwiGLU.apply(gate, up)
    return operators.swiglu(gate, up, gate_bias, up_bias)


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`."""
    if _only_the_reference_serves(qkv, has_backward=True):
        return reference.rotary_attention(qkv, cos, sin, segments.runs, num_heads)
    if derivatives.wants_gradient(qkv):
        turned_IPHE = mrope(qkv.flatten(0, 1), cos, sin, num_heads).view(*qkv.shape[:2], 3 * num_heads, -1)
        return reference.segment_attention(*turned_IPHE.chunk(3, dim=2), segments.runs)
    runs = [number for run in segments.runs for number in (run.start, run.count, run.length)]
    return operators.rotary_attention(qkv, cos, sin, runs, segments.table, num_heads)


def frames_to_patches(
    frames: Tensor,
    height: int,
    width: int,
    resize_tables: ResizeTables | None,
    scale: float,
    mean: Tensor,
    std: Tensor,
    window_order: Tensor,
    patch_size: int,
    merge: int,
    repeat: int,
    dtype: torch.dtype,
    *,
    resample_backend: str,
) -> Tensor:
    """See `reference.frames_to_patches`.

    `resize_tables` are those of `geometry.resize_axis`, the width's and the height's; None where the frames have their
    size, or where the reference is to resize them.
    """
    how = (scale, mean, std, window_order, patch_size, merge, repeat, dtype)
    if _only_the_reference_serves(frames):
        return reference.frames_to_patches(frames, height, width, *how, resample_backend=resample_backend)
    if resize_tables is None and tuple(frames.shape[-2:]) != (height, width):
        refuse_forced_triton("its kernel resizes by tables, and there are none")
        return reference.frames_to_patches(frames, height, width, *how, resample_backend=resample_backend)
    tables = resize_tables or (None,) * 4
    return operators.frames_to_patches(frames, height, width, *tables, *how, resample_backend)


def mrope(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, slots: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """See `reference.mrope`."""
    if _only_the_reference_serves(qkv, has_backward=True):
        return reference.mrope(qkv, cos, sin, num_kv_heads, slots, rows)
    run = derivatives.MRope.apply if derivatives.wants_gradient(qkv) else operators.mrope
    return run(qkv, cos, sin, num_kv_heads, slots, len(qkv) if slots is None else rows)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.causal_attention`."""
    if (
        not q.is_cuda
        or backend() == "reference"
        or torch.compiler.is_compiling()
        or _only_the_reference_serves(q, k, v)
    ):
        return reference.causal_attention(q, k, v)
    out = fastest_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    return rearrange(out, "b n s e -> b s (n e)")


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tickets: Tensor
) -> Tensor:
    """See `reference.decode_attention`. `tickets` are the kernel's own: int32 (B * K,), zero before and after."""
    if _only_the_reference_serves(qkv, keys, values):
        return reference.decode_attention(qkv, cos, sin, keys, values, lengths)
    return operators.decode_attention(qkv, cos, sin, keys, values, lengths, tickets)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, updates: Sequence[LowRankUpdate] = ()) -> Tensor:
    """See `reference.linear`. A single row has a kernel: cuBLAS would leave memory idle."""
    if updates:
        return adapted_linear(x, weight, bias, updates)
    if not _is_one_row(x, weight, bias):
        return reference.linear(x, weight, bias)
    return operators.linear(x, weight, bias)


def swiglu_linear(
    x: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
) -> Tensor:
    """See `reference.swiglu_linear`."""
    if updates or derivatives.wants_gradient(x, gate_up, gate_bias, up_bias):
        bias = None if gate_bias is None else torch.cat((gate_bias, up_bias))
        if updates:
            return adapted_linear(x, gate_up, bias, updates, gated=True)
        product = reference.linear(x, gate_up, bias)
        if _only_the_reference_serves(product, has_backward=True):
            return reference.swiglu(*product.chunk(2, dim=-1))
        return derivatives.SwiGLU.apply(product, None)
    if not _is_one_row(x, gate_up, gate_bias, up_bias):
        # The bias goes in with the gate: on an H200 the product with a bias takes 23 us for 768 tokens, without 21 us.
        return swiglu(*reference.linear(x, gate_up).chunk(2, dim=-1), gate_bias, up_bias)
    return operators.swiglu_linear(x, gate_up, gate_bias, up_bias)


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.expand_prompts`."""
    return operators.expand_prompts(prompts, grids, camera_mask, image_token_id, pad_token_id, length, left)


def _is_one_row(x: Tensor, weight: Tensor, *biases: Tensor | None) -> bool:
    """Whether the kernel for a single row takes these; what fits nowhere is left to PyTorch, which says why."""
    biases = [bias for bias in biases if bias is not None]
    parameters = (weight, *biases)
    return (
        x.ndim == weight.ndim == 2
        and x.shape[0] == 1
        and x.shape[1] == weight.shape[1]
        and weight.is_contiguous()
        and all(bias.shape == (len(weight) // len(biases),) for bias in biases)
        and all(parameter.dtype == x.dtype and parameter.device == x.device for parameter in parameters)
        and x.device.type != "meta"
        and not torch.is_autocast_enabled(x.device.type)
        and not _only_the_reference_serves(x, parameters=parameters)
    )


def _only_the_reference_serves(
    *activations: Tensor | None, parameters: tuple[Tensor | None, ...] = (), has_backward: bool = False
) -> bool:
    """Whether the kernels cannot: most have no derivative, all compute in float32 and take one dtype of activations.

    Where there are no kernels, autograd is to see through the reference too.

    Raises:
        RuntimeError: Triton was asked for all the same.
    """
    given = [tensor for tensor in (*activations, *parameters) if tensor is not None]
    dtypes = {tensor.dtype for tensor in activations if tensor is not None}
    reason = None
    wants_gradient = derivatives.wants_gradient(*given)
    if wants_gradient and not has_backward:
        reason = "its kernels have no backward: call them under torch.no_grad()"
    elif wants_gradient and not has_kernels(given[0].device):
        return True
    elif any(tensor.dtype == torch.float64 for tensor in given):
        reason = "its kernels compute in float32, and there is a float64 input"
    elif len(dtypes) > 1:
        reason = f"its kernels take inputs of one dtype, got {' and '.join(sorted(map(str, dtypes)))}"
    elif not torch.compiler.is_compiling() and any(map(derivatives.has_tangent, given)):
        reason = "its kernels have no forward-mode derivative"
    if reason is None:
        return False
    refuse_forced_triton(reason)
    return True
