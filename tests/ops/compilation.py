"""Compiles every Triton kernel for GPUs that need not be there: `python -m tests.ops.compilation`.

The launchers are called with tensors on the device "meta", which have shapes but no memory. A stand-in for Triton's
driver names a GPU; Triton specialises and compiles for it what is launched, and stops there. It takes a process without
TRITON_INTERPRET: the interpreter, which the other tests use where there is no GPU, accepts what the compiler refuses.

Prints JSON: the kernels that the package has, and what each launch on each target came to.
"""

import ast
import importlib
import json
import pkgutil
import sys
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import qwen_batched.ops.triton as package
from qwen_batched.model.geometry import resize_axis
from qwen_batched.ops import PILLOW
from qwen_batched.ops.segments import Run, Segments
from qwen_batched.ops.triton import launch
from qwen_batched.ops.triton.add_low_rank import add_low_rank
from qwen_batched.ops.triton.add_norm import add_norm, add_norm_backward
from qwen_batched.ops.triton.column_sums import column_sums
from qwen_batched.ops.triton.decode_attention import decode_attention
from qwen_batched.ops.triton.expand_prompts import expand_prompts
from qwen_batched.ops.triton.extend_attention import extend_attention
from qwen_batched.ops.triton.frames_to_patches import frames_to_patches
from qwen_batched.ops.triton.likeliest_token import likeliest_token
from qwen_batched.ops.triton.linear import linear, swiglu_linear
from qwen_batched.ops.triton.mixed_product import mixed_product
from qwen_batched.ops.triton.mrope import mrope, mrope_backward
from qwen_batched.ops.triton.norm_linear import norm_linear
from qwen_batched.ops.triton.quick_gelu import quick_gelu, quick_gelu_backward
from qwen_batched.ops.triton.rotary import rotary
from qwen_batched.ops.triton.rotary_attention import rotary_attention
from qwen_batched.ops.triton.swiglu import swiglu, swiglu_backward

# Name, compute capability, dtype, whether kernels start early where the GPU can (see `launch.launch_options`), and
# whether odd shapes are compiled too. No dtype or shape on every target: an attention kernel compiles for a second or
# two, and the target with less shared memory is the narrower.
TARGETS = (
    ("sm_80", 80, torch.bfloat16, True, True),
    ("sm_90", 90, torch.bfloat16, True, False),
    ("sm_90, late", 90, torch.float16, False, False),
)


def all_kernels():
    """Every function of the package that Triton compiles and no other such function calls."""
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    jitted = [one for one in members if isinstance(one, JITFunction) and one.fn.__module__ in names]
    called = {node.id for one in jitted for node in ast.walk(one.parse()) if isinstance(node, ast.Name)}
    return sorted({name_of(one) for one in jitted if one.fn.__name__ not in called})


def name_of(kernel):
    return f"{kernel.fn.__module__.removeprefix(package.__name__ + '.')}.{kernel.fn.__name__}"


# --- launches ---


def zeros(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_norm(rows, width, dtype, with_residual=True, with_bias=False):
    x, weight = zeros(rows, width, dtype=dtype), zeros(width, dtype=dtype)
    add_norm(x, x if with_residual else None, weight, weight if with_bias else None, 1e-6)


def launch_norm_backward(rows, dim, dtype, with_stream=True, for_weight=True, with_bias=False):
    grad, stream = zeros(rows, dim, dtype=dtype), zeros(rows, dim, dtype=dtype)
    weight = zeros(dim, dtype=dtype)
    bias = weight if with_bias else None
    add_norm_backward(grad, grad if with_stream else None, stream, weight, bias, 1e-6, for_weight)


def launch_column_sums(rows, width, dtype):
    column_sums(zeros(rows, width, dtype=dtype), dtype)


def launch_swiglu_backward(rows, width, dtype):
    swiglu_backward(zeros(rows, width, dtype=dtype), *zeros(rows, 2 * width, dtype=dtype).chunk(2, dim=-1))


def launch_quick_gelu(rows, width, dtype):
    x = zeros(rows, width, dtype=dtype)
    quick_gelu(x), quick_gelu_backward(x, x)


def launch_swiglu(rows, width, dtype, with_bias):
    biases = zeros(2 * width, dtype=dtype).chunk(2) if with_bias else ()
    swiglu(*zeros(rows, 2 * width, dtype=dtype).chunk(2, dim=-1), *biases)


def launch_one_row(inner, outer, dtype, with_bias, gated):
    weight = zeros(2 * outer if gated else outer, inner, dtype=dtype)
    biases = [zeros(outer, dtype=dtype) if with_bias else None for _ in range(2 if gated else 1)]
    (swiglu_linear if gated else linear)(zeros(1, inner, dtype=dtype), weight, *biases)


def launch_norm_linear(inner, outer, dtype, with_residual, with_bias, is_gated):
    x, weight = zeros(1, inner, dtype=dtype), zeros(2 * outer if is_gated else outer, inner, dtype=dtype)
    bias = zeros(outer, dtype=dtype) if with_bias else None
    norm_linear(x, x if with_residual else None, zeros(inner, dtype=dtype), 1e-6, weight, bias, is_gated)


def launch_likeliest(rows, width, dtype, with_mask):
    likeliest_token(zeros(rows, width, dtype=dtype), zeros(1, width, dtype=torch.bool) if with_mask else None)


def launch_low_rank(rows, width, rank, dtype, transposed):
    """As in the forward pass, where the factor is an adapter's second matrix turned round, or as in the backward."""
    factor = zeros(width, rank).t() if transposed else zeros(rank, width)
    add_low_rank(zeros(rows, width, dtype=dtype), zeros(rows, rank), factor, 0.5)


def launch_mixed_product(rows, inner, rank, dtype, turned):
    """By rows of a matrix as they lie, or by its columns."""
    x = zeros(inner, rows, dtype=dtype).t() if turned else zeros(rows, inner, dtype=dtype)
    mixed_product(x, zeros(inner, rank), 0.5, turned)


def launch_mrope(tokens, heads, kv_heads, size, dtype, with_slots, with_norms=False):
    tables = zeros(tokens, size // 2), zeros(tokens, size // 2)
    slots = zeros(tokens, dtype=torch.int64) if with_slots else None
    qkv, weight = zeros(tokens, (heads + 2 * kv_heads) * size, dtype=dtype), zeros(size, dtype=dtype)
    norms = (weight, weight, 1e-6) if with_norms else (None, None, 0.0)
    mrope(qkv, *tables, kv_heads, slots, tokens, *norms)
    mrope_backward(qkv, qkv if with_norms else None, *tables, kv_heads, slots, *norms, with_norms)


def launch_decoding(batch, capacity, heads, kv_heads, size, dtype, with_norms=False):
    qkv = zeros(batch, (heads + 2 * kv_heads) * size, dtype=dtype)
    tables = zeros(batch, size // 2), zeros(batch, size // 2)
    keys, values = (zeros(batch, capacity, kv_heads, size, dtype=dtype) for _ in range(2))
    tickets = zeros(batch * kv_heads, dtype=torch.int32)
    norms = (zeros(size, dtype=dtype), zeros(size, dtype=dtype), 1e-6) if with_norms else ()
    decode_attention(qkv, *tables, keys, values, zeros(batch, dtype=torch.int64), tickets, *norms)


def launch_extension(batch, capacity, tokens, heads, kv_heads, size, dtype, with_norms=False, with_mask=False):
    qkv = zeros(batch * tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    tables = zeros(batch * tokens, size // 2), zeros(batch * tokens, size // 2)
    keys, values = (zeros(batch, capacity, kv_heads, size, dtype=dtype) for _ in range(2))
    lengths, tickets = zeros(batch, dtype=torch.int64), zeros(batch * tokens * heads, dtype=torch.int32)
    mask = zeros(batch, tokens, capacity + tokens, dtype=torch.bool) if with_mask else None
    norms = (zeros(size, dtype=dtype), zeros(size, dtype=dtype), 1e-6) if with_norms else ()
    extend_attention(qkv, *tables, keys, values, lengths, tickets, not with_mask, mask, *norms)


def launch_windows(images, count, length, heads, size, dtype):
    tokens = count * length
    tables = zeros(tokens, size // 2), zeros(tokens, size // 2)
    segments = Segments((Run(0, count, length),), zeros(count, 2, dtype=torch.int32))
    rotary_attention(zeros(images, tokens, 3 * heads * size, dtype=dtype), *tables, segments, heads)


def launch_rotary(images, tokens, heads, size, dtype):
    """What comes before attention over whole images; that itself is PyTorch's."""
    tables = zeros(tokens, size // 2), zeros(tokens, size // 2)
    rotary(zeros(images, tokens, 3 * heads * size, dtype=dtype), *tables, heads)


def launch_prompts(batch, tokens, cameras, length, with_mask, left):
    prompts, grids = zeros(batch, tokens, dtype=torch.int64), zeros(cameras, 2, dtype=torch.int64)
    mask = zeros(batch, cameras, dtype=torch.bool) if with_mask else None
    expand_prompts(prompts, grids, mask, 151655, 151643, length, left)


def launch_frames(source, target, frames_dtype, dtype):
    """Frames of `source` height and width, resized where `target` is another."""
    tables = None
    if source != target:
        rows, columns = (resize_axis(*sizes, torch.device("cpu")) for sizes in zip(source, target, strict=True))
        tables = [x.to("meta") for x in (*columns, *rows)]
    frames, colours = zeros(2, 3, *source, dtype=frames_dtype), zeros(3, 1, 1)
    cells = zeros(target[0] * target[1] // 28**2, dtype=torch.int64)
    frames_to_patches(frames, *target, tables, 1 / 255, colours, colours, cells, 14, 2, 2, dtype, PILLOW)


def launch_real_shapes(dtype):
    """Those of Qwen2.5-VL-3B, and of Qwen3-VL-4B where it has others."""
    launch_norm(768, 1280, dtype)
    launch_norm(768, 1024, dtype, with_bias=True)
    launch_norm_backward(8192, 1280, dtype)
    launch_norm_backward(8192, 1024, dtype, with_bias=True)
    launch_column_sums(8192, 3456, dtype)
    launch_quick_gelu(768, 5120, dtype)
    launch_swiglu_backward(8192, 3456, dtype)
    launch_swiglu(768, 3456, dtype, with_bias=True)
    launch_swiglu(512, 11008, dtype, with_bias=False)
    launch_one_row(2048, 2560, dtype, with_bias=True, gated=False)
    launch_one_row(4096, 2560, dtype, with_bias=False, gated=False)
    launch_one_row(11008, 2048, dtype, with_bias=False, gated=False)
    launch_one_row(2048, 11008, dtype, with_bias=False, gated=True)
    launch_norm_linear(2048, 2560, dtype, with_residual=True, with_bias=True, is_gated=False)
    launch_norm_linear(2048, 4096, dtype, with_residual=False, with_bias=False, is_gated=False)
    launch_norm_linear(2048, 11008, dtype, with_residual=True, with_bias=False, is_gated=True)
    launch_likeliest(1, 151936, dtype, with_mask=True)
    launch_low_rank(2784, 11008, 16, dtype, transposed=True)
    launch_low_rank(2784, 2048, 48, dtype, transposed=False)
    launch_mixed_product(2784, 11008, 16, dtype, turned=False)
    launch_mixed_product(2048, 2784, 48, dtype, turned=True)
    for with_slots in (True, False):
        launch_mrope(512, 16, 2, 128, dtype, with_slots)
    launch_mrope(512, 32, 8, 128, dtype, with_slots=True, with_norms=True)
    launch_decoding(1, 512, 16, 2, 128, dtype)
    launch_decoding(1, 512, 32, 8, 128, dtype, with_norms=True)
    launch_extension(1, 512, 8, 16, 2, 128, dtype)
    launch_extension(1, 512, 8, 32, 8, 128, dtype, with_norms=True, with_mask=True)
    launch_windows(3, 4, 64, 16, 80, dtype)
    launch_rotary(3, 256, 16, 80, dtype)
    launch_frames((480, 640), (224, 224), torch.uint8, dtype)
    launch_frames((224, 224), (224, 224), dtype, dtype)
    launch_prompts(8, 64, 3, 512, with_mask=True, left=True)


def launch_odd_shapes(dtype):
    """Sizes that no tile divides, one of what there are many of, the widest rows, the largest head and frame."""
    launch_norm(5, 33, dtype, with_residual=False)
    launch_norm(5, 3584, dtype)
    launch_norm(5, 33, dtype, with_residual=False, with_bias=True)
    launch_norm_backward(5, 33, dtype, with_stream=False)
    launch_norm_backward(5, 33, dtype, for_weight=False)
    launch_norm_backward(5, 3584, dtype)
    launch_column_sums(5, 33, dtype)
    launch_quick_gelu(5, 33, dtype)
    launch_swiglu_backward(5, 33, dtype)
    launch_swiglu(5, 33, dtype, with_bias=True)
    launch_one_row(1100, 9, dtype, with_bias=True, gated=True)
    launch_one_row(7, 1, dtype, with_bias=False, gated=False)
    launch_norm_linear(7, 1, dtype, with_residual=False, with_bias=True, is_gated=False)
    launch_norm_linear(1100, 9, dtype, with_residual=True, with_bias=False, is_gated=True)
    launch_likeliest(3, 70, dtype, with_mask=False)
    launch_low_rank(3, 5, 1, dtype, transposed=True)
    launch_low_rank(65, 129, 200, dtype, transposed=False)  # in four parts
    launch_mixed_product(3, 5, 1, dtype, turned=True)
    launch_mixed_product(65, 129, 200, dtype, turned=False)
    launch_mrope(1, 3, 1, 6, dtype, with_slots=True)
    launch_mrope(5, 5, 2, 24, dtype, with_slots=False, with_norms=True)
    launch_decoding(3, 49, 6, 2, 40, dtype)  # the context in one part
    launch_extension(3, 49, 70, 6, 2, 40, dtype)  # and more new tokens than a tile has
    launch_windows(1, 5, 17, 1, 20, dtype)
    launch_windows(1, 1, 64, 1, 128, dtype)  # in float32 takes the most shared memory of all
    launch_rotary(1, 65, 3, 20, dtype)
    launch_frames((37, 61), (28, 56), dtype, dtype)
    launch_frames((2160, 3840), (224, 224), torch.uint8, dtype)  # more taps than are unrolled
    launch_prompts(1, 1, 1, 1, with_mask=False, left=False)


# --- compiling ---


class NoGPU:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton remembers the target of each device

    def get_current_stream(self, device):
        return 0


def options_on(capability, early):
    """What `launch.launch_options` says on such a GPU."""
    if not early:
        return {"USE_PDL": False}
    with (
        mock.patch.object(torch.version, "cuda", "12.8"),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10)),
    ):
        return launch.launch_options.__wrapped__(torch.device("cuda"))


def compile_all(target, capability, dtype, early, odd):
    """Calls the launchers, and says of each of their launches what compiling it came to."""
    driver.set_active(NoGPU(capability))
    options = options_on(capability, early)
    launches, compile_and_launch = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **named):
        named |= options if "USE_PDL" in named else {}
        done = {"target": target, "kernel": name_of(kernel), "arguments": described(args, named), "error": None}
        done["flags"] = {name: value for name, value in named.items() if isinstance(value, bool)}
        print(target, done["kernel"], done["arguments"], file=sys.stderr, flush=True)  # the compiler may crash
        try:
            done["shared"] = compile_and_launch(kernel, *args, grid=grid, warmup=True, **named).metadata.shared
        except Exception as error:
            done["error"] = f"{type(error).__name__}: {error}"
        launches.append(done)

    with mock.patch.object(JITFunction, "run", compile_only):
        launch_real_shapes(dtype)
        if odd:
            launch_odd_shapes(torch.float32)
    return launches


def described(args, named):
    values = [f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else str(x) for x in args]
    return ", ".join([*values, *(f"{name}={value}" for name, value in named.items())])


if __name__ == "__main__":
    launches = [one for target in TARGETS for one in compile_all(*target)]
    print(json.dumps({"kernels": all_kernels(), "launches": launches}))
