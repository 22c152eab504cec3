"""The fused operations as PyTorch operators `qwen_batched::<name>`, which compilers and tracers see whole.

Each runs a Triton kernel or the reference (`backend.triton_kernels`), and has no derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run
from qwen_batched.runtime.backend import triton_kernels

_library = torch.library.Library("qwen_batched", "DEF")


def _operator(schema: str, fake: Callable[..., object]) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Defines the operator `schema` with one implementation for all devices, and puts a call of it in its place."""
    name = schema.partition("(")[0]
    _library.define(schema)

    def decorate(function: Callable[..., object]) -> Callable[..., object]:
        def on_its_device(x: Tensor, *rest: object) -> object:
            if x.device.index == torch.cuda.current_device():
                return function(x, *rest)
            with torch.cuda.device(x.device):  # Triton launches on the current device, whatever its inputs are on
                return function(x, *rest)

        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, on_its_device, "CUDA")
        torch.library.register_fake(f"qwen_batched::{name}", fake, lib=_library)
        through_pytorch = getattr(torch.ops.qwen_batched, name)

        @functools.wraps(function)
        def call(x: Tensor, *rest: object) -> object:
            return (on_its_device if _nobody_looks_on(x) else through_pytorch)(x, *rest)

        return call

    return decorate


def _nobody_looks_on(x: Tensor) -> bool:
    """Whether PyTorch would only call the kernel's launcher, which costs the host more than the launch itself.

    A profiler then sees the kernel alone.
    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and type(x) in (Tensor, nn.Parameter)
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", fake=lambda x, weight, eps: _like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.add_rms_norm`."""
    kernels = triton_kernels(x.device) or reference
    return kernels.add_rms_norm(x, None, weight, eps)[0].contiguous()


@_operator(
    "add_rms_norm(Tensor update, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda update, residual, weight, eps: (_like(update), _like(update)),
)
def add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    kernels = triton_kernels(update.device) or reference
    normed, stream = kernels.add_rms_norm(update, residual, weight, eps)
    return normed.contiguous(), stream.contiguous()


@_operator(
    "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_stream, Tensor stream, Tensor weight, float eps, "
    "bool for_weight) -> (Tensor, Tensor)",
    fake=lambda grad_normed, grad_stream, stream, weight, eps, for_weight: (
        _like(stream),
        _like(weight) if for_weight else weight.new_empty(0),
    ),
)
def add_rms_norm_backward(
    grad_normed: Tensor, grad_stream: Tensor | None, stream: Tensor, weight: Tensor, eps: float, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm_backward`."""
    kernels = triton_kernels(stream.device) or reference
    grad, of_weight = kernels.add_rms_norm_backward(grad_normed, grad_stream, stream, weight, eps, for_weight)
    return grad.contiguous(), of_weight.contiguous()


@_operator(
    "swiglu(Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    fake=lambda gate, up, gate_bias, up_bias: _like(gate),
)
def swiglu(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """See `reference.swiglu`."""
    return (triton_kernels(gate.device) or reference).swiglu(gate, up, gate_bias, up_bias).contiguous()


@_operator(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> Tensor",
    fake=lambda grad, gate, up: gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1]),
)
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu_backward`."""
    return (triton_kernels(gate.device) or reference).swiglu_backward(grad, gate, up).contiguous()


@_operator(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    return (triton_kernels(x.device) or reference).linear(x, weight, bias).contiguous()


@_operator(
    "swiglu_linear(Tensor x, Tensor gate_up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    fake=lambda x, gate_up, gate_bias, up_bias: x.new_empty(*x.shape[:-1], gate_up.shape[0] // 2),
)
def swiglu_linear(x: Tensor, gate_up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """See `reference.swiglu_linear`."""
    return (triton_kernels(x.device) or reference).swiglu_linear(x, gate_up, gate_bias, up_bias).contiguous()


@_operator(
    "add_low_rank(Tensor(a!) out, Tensor low, Tensor factor, float scaling) -> ()",
    fake=lambda out, low, factor, scaling: None,
)
def add_low_rank(out: Tensor, low: Tensor, factor: Tensor, scaling: float) -> None:
    """See `reference.add_low_rank`."""
    (triton_kernels(out.device) or reference).add_low_rank(out, low, factor, scaling)


@_operator(
    "mixed_product(Tensor x, Tensor y, float scaling, bool turned) -> Tensor",
    fake=lambda x, y, scaling, turned: y.new_empty((y.shape[1], len(x)) if turned else (len(x), y.shape[1])),
)
def mixed_product(x: Tensor, y: Tensor, scaling: float, turned: bool) -> Tensor:
    """See `reference.mixed_product`."""
    return (triton_kernels(x.device) or reference).mixed_product(x, y, scaling, turned).contiguous()


@_operator(
    "mrope(Tensor qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? slots, int rows) -> Tensor",
    fake=lambda qkv, cos, sin, num_kv_heads, slots, rows: qkv.new_empty(rows, qkv.shape[1]),
)
def mrope(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, slots: Tensor | None, rows: int) -> Tensor:
    """See `reference.mrope`."""
    return (triton_kernels(qkv.device) or reference).mrope(qkv, cos, sin, num_kv_heads, slots, rows).contiguous()


@_operator(
    "decode_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "Tensor(c!) tickets) -> Tensor",
    fake=lambda qkv, cos, sin, keys, values, lengths, tickets: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * keys.shape[2] * keys.shape[3]
    ),
)
def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tickets: Tensor
) -> Tensor:
    """See `reference.decode_attention`."""
    kernels = triton_kernels(qkv.device)
    if kernels is None:
        return reference.decode_attention(qkv, cos, sin, keys, values, lengths).contiguous()
    return kernels.decode_attention(qkv, cos, sin, keys, values, lengths, tickets)


@_operator(
    "rotary_attention(Tensor qkv, Tensor cos, Tensor sin, int[] runs, Tensor table, int num_heads) -> Tensor",
    fake=lambda qkv, cos, sin, runs, table, num_heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
)
def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, runs: list[int], table: Tensor, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`."""
    kernels = triton_kernels(qkv.device)
    parsed = tuple(Run(*runs[index : index + 3]) for index in range(0, len(runs), 3))
    if kernels is None:
        return reference.rotary_attention(qkv, cos, sin, parsed, num_heads).contiguous()
    return kernels.rotary_attention(qkv, cos, sin, parsed, table, num_heads).contiguous()


@_operator(
    "expand_prompts(Tensor prompts, Tensor grids, Tensor? camera_mask, int image_token_id, int pad_token_id, "
    "int length, bool left) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda prompts, grids, camera_mask, image_token_id, pad_token_id, length, left: (
        prompts.new_empty(len(prompts), length),
        prompts.new_empty(len(prompts), length, dtype=torch.bool),
        prompts.new_empty(3, len(prompts), length),
        prompts.new_empty(len(prompts), length),
        prompts.new_empty(len(prompts), length),
    ),
)
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
    kernels = triton_kernels(prompts.device) or reference
    return kernels.expand_prompts(prompts, grids, camera_mask, image_token_id, pad_token_id, length, left)


@_operator(
    "frames_to_patches(Tensor frames, int height, int width, Tensor? column_starts, Tensor? column_weights, "
    "Tensor? row_starts, Tensor? row_weights, float scale, Tensor mean, Tensor std, Tensor window_order, "
    "int patch_size, int merge, int repeat, ScalarType dtype, str resample_backend) -> Tensor",
    fake=lambda frames, height, width, cs, cw, rs, rw, scale, mean, std, order, patch, merge, repeat, dtype, backend: (
        frames.new_empty(frames.shape[0], height * width // patch**2, 3 * repeat * patch**2, dtype=dtype)
    ),
)
def frames_to_patches(
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
    resample_backend: str,
) -> Tensor:
    """See `reference.frames_to_patches`."""
    how = (scale, mean, std, window_order, patch_size, merge, repeat, dtype)
    kernels = triton_kernels(frames.device)
    if kernels is None:
        patches = reference.frames_to_patches(frames, height, width, *how, resample_backend=resample_backend)
        return patches.contiguous()
    columns = None if column_starts is None else (column_starts, column_weights)
    rows = None if row_starts is None else (row_starts, row_weights)
    return kernels.frames_to_patches(frames, columns, rows, width, *how)
