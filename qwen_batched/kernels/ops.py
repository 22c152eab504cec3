"""The one door to the fused operations: each a PyTorch operator `qwen_batched::<name>`.

What an operation computes is said in `reference`. On a GPU it runs a Triton kernel, elsewhere the reference. Where a
gradient is wanted, a kernel runs that has one for its backward too (`derivatives`); else, for forward-mode derivatives
and in float64, it is the reference itself, which autograd sees through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import forward_ad

from qwen_batched.kernels import derivatives, reference
from qwen_batched.kernels.adapted_linear import adapted_linear
from qwen_batched.kernels.backend import (
    backend,
    has_kernels,
    reading_ahead,
    refuse_forced_triton,
    triton_kernels,
    use_backend,
)
from qwen_batched.kernels.dense_attention import fastest_attention
from qwen_batched.kernels.low_rank import LowRankUpdate
from qwen_batched.kernels.reference import NO_TOKEN, mrope_tables
from qwen_batched.kernels.segments import Run, Segments

__all__ = [
    "NO_TOKEN",
    "add_rms_norm",
    "backend",
    "causal_attention",
    "decode_attention",
    "expand_prompts",
    "frames_to_patches",
    "linear",
    "mrope",
    "mrope_tables",
    "reading_ahead",
    "rotary_attention",
    "swiglu",
    "swiglu_linear",
    "use_backend",
]
ResizeTables = tuple[Tensor, Tensor, Tensor, Tensor]
_library = torch.library.Library("qwen_batched", "DEF")


def add_rms_norm(update: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if _only_the_reference_serves(update, residual, parameters=(weight,), has_backward=True):
        return reference.add_rms_norm(update, residual, weight, eps)
    if _wants_gradient(update, residual, weight):
        if residual is not None and not _wants_gradient(update, residual):
            update, residual = residual + update, None  # the stream is no one's function that wants a gradient
        if residual is None:
            return derivatives.RMSNorm.apply(update, weight, eps), update
        return derivatives.AddRMSNorm.apply(update, residual, weight, eps)
    if residual is None:
        return torch.ops.qwen_batched.rms_norm(update, weight, eps), update
    return torch.ops.qwen_batched.add_rms_norm(update, residual, weight, eps)


def swiglu(gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> Tensor:
    """See `reference.swiglu`."""
    if _only_the_reference_serves(gate, up, parameters=(gate_bias, up_bias), has_backward=gate_bias is None):
        return reference.swiglu(gate, up, gate_bias, up_bias)
    if _wants_gradient(gate, up):
        return derivatives.SwiGLU.apply(gate, up)
    return torch.ops.qwen_batched.swiglu(gate, up, gate_bias, up_bias)


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`."""
    if _only_the_reference_serves(qkv, has_backward=True):
        return reference.rotary_attention(qkv, cos, sin, segments.runs, num_heads)
    if _wants_gradient(qkv):
        turned_IPHE = mrope(qkv.flatten(0, 1), cos, sin, num_heads).view(*qkv.shape[:2], 3 * num_heads, -1)
        return reference.segment_attention(*turned_IPHE.chunk(3, dim=2), segments.runs)
    runs = [number for run in segments.runs for number in (run.start, run.count, run.length)]
    return torch.ops.qwen_batched.rotary_attention(qkv, cos, sin, runs, segments.table, num_heads)


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
) -> Tensor:
    """See `reference.frames_to_patches`.

    `resize_tables` are those of `geometry.resize_axis`, the width's and the height's; None where the frames have their
    size, or where the reference is to resize them.
    """
    how = (scale, mean, std, window_order, patch_size, merge, repeat, dtype)
    if _only_the_reference_serves(frames):
        return reference.frames_to_patches(frames, height, width, *how)
    if resize_tables is None and tuple(frames.shape[-2:]) != (height, width):
        refuse_forced_triton("its kernel resizes by tables, and there are none")
        return reference.frames_to_patches(frames, height, width, *how)
    tables = resize_tables or (None,) * 4
    return torch.ops.qwen_batched.frames_to_patches(frames, height, width, *tables, *how)


def mrope(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, slots: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """See `reference.mrope`."""
    if _only_the_reference_serves(qkv, has_backward=True):
        return reference.mrope(qkv, cos, sin, num_kv_heads, slots, rows)
    run = derivatives.MRope.apply if _wants_gradient(qkv) else torch.ops.qwen_batched.mrope
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
    return torch.ops.qwen_batched.decode_attention(qkv, cos, sin, keys, values, lengths, tickets)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, updates: Sequence[LowRankUpdate] = ()) -> Tensor:
    """See `reference.linear`. A single row has a kernel: cuBLAS would leave memory idle."""
    if updates:
        return adapted_linear(x, weight, bias, updates)
    if not _is_one_row(x, weight, bias):
        return reference.linear(x, weight, bias)
    return torch.ops.qwen_batched.linear(x, weight, bias)


def swiglu_linear(
    x: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
) -> Tensor:
    """See `reference.swiglu_linear`."""
    if updates or _wants_gradient(x, gate_up, gate_bias, up_bias):
        bias = None if gate_bias is None else torch.cat((gate_bias, up_bias))
        product = linear(x, gate_up, bias, updates)
        if not _wants_gradient(product) or _only_the_reference_serves(product, has_backward=True):
            return swiglu(*product.chunk(2, dim=-1))
        return derivatives.SwiGLU.apply(product, None)
    if not _is_one_row(x, gate_up, gate_bias, up_bias):
        # The bias goes in with the gate: on an H200 the product with a bias takes 23 us for 768 tokens, without 21 us.
        return swiglu(*reference.linear(x, gate_up).chunk(2, dim=-1), gate_bias, up_bias)
    return torch.ops.qwen_batched.swiglu_linear(x, gate_up, gate_bias, up_bias)


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    tokens: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.expand_prompts`."""
    how = (image_token_id, pad_token_id, length, tokens, left)
    return torch.ops.qwen_batched.expand_prompts(prompts, grids, camera_mask, *how)


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


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    wants_gradient = _wants_gradient(*given)
    if wants_gradient and not has_backward:
        reason = "its kernels have no backward: call them under torch.no_grad()"
    elif wants_gradient and not has_kernels(given[0].device):
        return True
    elif any(tensor.dtype == torch.float64 for tensor in given):
        reason = "its kernels compute in float32, and there is a float64 input"
    elif len(dtypes) > 1:
        reason = f"its kernels take inputs of one dtype, got {' and '.join(sorted(map(str, dtypes)))}"
    elif not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        reason = "its kernels have no forward-mode derivative"
    if reason is None:
        return False
    refuse_forced_triton(reason)
    return True


def _register(schema: str, fake: Callable[..., object]) -> Callable[[Callable[..., object]], None]:
    """Defines the operator `schema` with one implementation for all devices."""
    name = schema.partition("(")[0]
    _library.define(schema)

    def decorate(function: Callable[..., object]) -> None:
        @functools.wraps(function)
        def on_its_device(x: Tensor, *rest: object) -> object:
            with torch.cuda.device(x.device):  # Triton launches on the current device, whatever its inputs are on
                return function(x, *rest)

        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, on_its_device, "CUDA")
        torch.library.register_fake(f"qwen_batched::{name}", fake, lib=_library)

    return decorate


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", fake=lambda x, weight, eps: _like(x))
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernels = triton_kernels(x.device) or reference
    return kernels.add_rms_norm(x, None, weight, eps)[0].contiguous()


@_register(
    "add_rms_norm(Tensor update, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda update, residual, weight, eps: (_like(update), _like(update)),
)
def _add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels(update.device) or reference
    normed, stream = kernels.add_rms_norm(update, residual, weight, eps)
    return normed.contiguous(), stream.contiguous()


@_register(
    "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_stream, Tensor stream, Tensor weight, float eps) "
    "-> (Tensor, Tensor)",
    fake=lambda grad_normed, grad_stream, stream, weight, eps: (_like(stream), _like(weight)),
)
def _add_rms_norm_backward(
    grad_normed: Tensor, grad_stream: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels(stream.device) or reference
    grad, grad_weight = kernels.add_rms_norm_backward(grad_normed, grad_stream, stream, weight, eps)
    return grad.contiguous(), grad_weight.contiguous()


@_register(
    "swiglu(Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    fake=lambda gate, up, gate_bias, up_bias: _like(gate),
)
def _swiglu(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    return (triton_kernels(gate.device) or reference).swiglu(gate, up, gate_bias, up_bias).contiguous()


@_register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> Tensor",
    fake=lambda grad, gate, up: gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1]),
)
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return (triton_kernels(gate.device) or reference).swiglu_backward(grad, gate, up).contiguous()


@_register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (triton_kernels(x.device) or reference).linear(x, weight, bias).contiguous()


@_register(
    "swiglu_linear(Tensor x, Tensor gate_up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    fake=lambda x, gate_up, gate_bias, up_bias: x.new_empty(*x.shape[:-1], gate_up.shape[0] // 2),
)
def _swiglu_linear(x: Tensor, gate_up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    return (triton_kernels(x.device) or reference).swiglu_linear(x, gate_up, gate_bias, up_bias).contiguous()


@_register(
    "mrope(Tensor qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? slots, int rows) -> Tensor",
    fake=lambda qkv, cos, sin, num_kv_heads, slots, rows: qkv.new_empty(rows, qkv.shape[1]),
)
def _mrope(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, slots: Tensor | None, rows: int) -> Tensor:
    return (triton_kernels(qkv.device) or reference).mrope(qkv, cos, sin, num_kv_heads, slots, rows).contiguous()


@_register(
    "decode_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "Tensor(c!) tickets) -> Tensor",
    fake=lambda qkv, cos, sin, keys, values, lengths, tickets: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * keys.shape[2] * keys.shape[3]
    ),
)
def _decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tickets: Tensor
) -> Tensor:
    kernels = triton_kernels(qkv.device)
    if kernels is None:
        return reference.decode_attention(qkv, cos, sin, keys, values, lengths).contiguous()
    return kernels.decode_attention(qkv, cos, sin, keys, values, lengths, tickets)


@_register(
    "rotary_attention(Tensor qkv, Tensor cos, Tensor sin, int[] runs, Tensor table, int num_heads) -> Tensor",
    fake=lambda qkv, cos, sin, runs, table, num_heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
)
def _rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, runs: list[int], table: Tensor, num_heads: int) -> Tensor:
    kernels = triton_kernels(qkv.device)
    parsed = tuple(Run(*runs[index : index + 3]) for index in range(0, len(runs), 3))
    if kernels is None:
        return reference.rotary_attention(qkv, cos, sin, parsed, num_heads).contiguous()
    return kernels.rotary_attention(qkv, cos, sin, parsed, table, num_heads).contiguous()


@_register(
    "expand_prompts(Tensor prompts, Tensor grids, Tensor? camera_mask, int image_token_id, int pad_token_id, "
    "int length, int tokens, bool left) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda prompts, grids, camera_mask, image_token_id, pad_token_id, length, tokens, left: (
        prompts.new_empty(len(prompts), length),
        prompts.new_empty(len(prompts), length, dtype=torch.bool),
        prompts.new_empty(3, len(prompts), length),
        prompts.new_empty(len(prompts), length),
        prompts.new_empty(len(prompts), length),
        prompts.new_empty(tokens),
    ),
)
def _expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    tokens: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = triton_kernels(prompts.device) or reference
    return kernels.expand_prompts(prompts, grids, camera_mask, image_token_id, pad_token_id, length, tokens, left)


@_register(
    "frames_to_patches(Tensor frames, int height, int width, Tensor? column_starts, Tensor? column_weights, "
    "Tensor? row_starts, Tensor? row_weights, float scale, Tensor mean, Tensor std, Tensor window_order, "
    "int patch_size, int merge, int repeat, ScalarType dtype) -> Tensor",
    fake=lambda frames, height, width, cs, cw, rs, rw, scale, mean, std, order, patch, merge, repeat, dtype: (
        frames.new_empty(frames.shape[0], height * width // patch**2, 3 * repeat * patch**2, dtype=dtype)
    ),
)
def _frames_to_patches(
    frames: Tensor,
    height: int,
    width: int,
    column_starts: Tensor | None,
    column_weights: Tensor | None,
    row_starts: Tensor | None,
    row_weights: Tensor | None,
    scale: float,
    mean: Tensor,
    std: Tensor,
    window_order: Tensor,
    patch_size: int,
    merge: int,
    repeat: int,
    dtype: torch.dtype,
) -> Tensor:
    how = (scale, mean, std, window_order, patch_size, merge, repeat, dtype)
    kernels = triton_kernels(frames.device)
    if kernels is None:
        return reference.frames_to_patches(frames, height, width, *how).contiguous()
    columns = None if column_starts is None else (column_starts, column_weights)
    rows = None if row_starts is None else (row_starts, row_weights)
    return kernels.frames_to_patches(frames, columns, rows, width, *how)
