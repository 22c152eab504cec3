"""Every Triton kernel equals its reference, and `ops` chooses between the two as it says.

On the CPU kernels run under Triton's interpreter, in float32 only (its bfloat16 is wrong there).
"""

import contextlib
import dataclasses
import importlib
import itertools
import logging
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_batched import ops
from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.model.geometry import make_vision_plan, resize_axis
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run, Segments
from qwen_batched.runtime import backend
from tests.kernels.support import assert_kernel_is_right, normal, rope_tables
from tests.support import FLOAT32_TOLERANCE, assert_equal_to, noise, relative_error

launchers = pytest.importorskip("qwen_batched.ops.triton.launchers", reason="needs Triton")
rotary = pytest.importorskip("qwen_batched.ops.triton.rotary").rotary
KernelInterface = pytest.importorskip("triton.runtime.jit").KernelInterface

# Sums of the same products in another order: values within about 1e-6 of a half may round to the other side. A small
# frame may have one such value; a still image shows it twice.
SHARE_APART, FEW_APART = 1e-4, 4

pytestmark = pytest.mark.usefixtures("poisoned")


# --- add_rms_norm ---

NORM_SHAPES = [(1, 1), (3, 7), (2, 3, 80), (1, 33), (5, 127), (2, 1280), (3, 2048), (2, 2049), (1, 3584), (0, 80)]
LARGE_NORM_SHAPES = [(768, 1280), (16384, 1280), (1025, 80)]


def check_add_rms_norm(update, residual, weight, eps=1e-6):
    normed, stream = launchers.add_rms_norm(update, residual, weight, eps)
    wide = [None if x is None else x.double() for x in (update, residual, weight)]
    exact_normed, exact_stream = reference.add_rms_norm(*wide, eps)
    plain_stream = update if residual is None else update + residual
    plain = plain_stream * torch.rsqrt(plain_stream.square().mean(-1, keepdim=True) + eps) * weight
    assert_kernel_is_right(stream, exact_stream, plain_stream)
    assert_kernel_is_right(normed, exact_normed, plain)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_add_rms_norm_equals_the_reference(shape, with_residual, where):
    residual = normal(*shape, where=where, seed=1) if with_residual else None
    check_add_rms_norm(normal(*shape, where=where), residual, normal(shape[-1], where=where, seed=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE_NORM_SHAPES, ids=str)
def test_add_rms_norm_equals_the_reference_at_real_shapes(shape, dtype):
    where = ("cuda", dtype)
    check_add_rms_norm(
        normal(*shape, where=where), normal(*shape, where=where, seed=1), normal(shape[-1], where=where, seed=2)
    )


def test_add_rms_norm_counts_eps(where):
    # Mean squares of 1e-6, against an eps of 1e-5.
    update, residual = (normal(5, 80, where=where, seed=seed, scale=1e-3) for seed in (0, 1))
    check_add_rms_norm(update, residual, normal(80, where=where, seed=2), eps=1e-5)


@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm_takes_inputs_of_any_strides(where, with_residual):
    update = normal(80, 6, where=where).t()
    residual = normal(6, 160, where=where, seed=1)[:, ::2] if with_residual else None
    check_add_rms_norm(update, residual, normal(80, where=where, seed=2))


def test_add_rms_norm_changes_none_of_its_inputs(where):
    inputs = [normal(3, 80, where=where), normal(3, 80, where=where, seed=1), normal(80, where=where, seed=2)]
    before = [x.clone() for x in inputs]
    launchers.add_rms_norm(*inputs, 1e-6)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("with_stream", [True, False])
@pytest.mark.parametrize("shape", NORM_SHAPES[1:], ids=str)  # a single value's is 0 but for eps
def test_the_gradient_of_add_rms_norm_equals_autograds(shape, with_stream, where):
    check_add_rms_norm_backward(shape, with_stream, where)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8192, 1280), (2901, 2048)], ids=str)
def test_the_gradient_of_add_rms_norm_equals_autograds_at_real_shapes(shape, dtype):
    check_add_rms_norm_backward(shape, True, ("cuda", dtype))


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_the_gradient_of_add_rms_norm_is_right_where_programs_have_several_rows(rows, where, monkeypatch):
    monkeypatch.setattr(importlib.import_module("qwen_batched.ops.triton.add_rms_norm"), "PROGRAMS", 3)
    check_add_rms_norm_backward((rows, 16), True, where)


def test_the_gradient_of_add_rms_norm_counts_eps(where):
    check_add_rms_norm_backward((3, 33), True, where, eps=0.3)


def check_add_rms_norm_backward(shape, with_stream, where, eps=1e-6):
    stream, grad = normal(*shape, where=where, scale=3), normal(*shape, where=where, seed=1)
    grad_stream = normal(*shape, where=where, seed=2) if with_stream else torch.zeros(shape).to(*where)
    weight = normal(shape[-1], where=where, seed=3)

    def autograds(dtype, norm):
        leaves = [x.to(dtype).requires_grad_() for x in (stream, weight)]
        normed = norm(*leaves)
        return torch.autograd.grad((normed, leaves[0] * 1), leaves, (grad.to(dtype), grad_stream.to(dtype)))

    exact = autograds(torch.float64, lambda x, weight: reference.add_rms_norm(x, None, weight, eps)[0])
    plain = autograds(where[1], lambda x, weight: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)
    ours = launchers.add_rms_norm_backward(grad, grad_stream if with_stream else None, stream, weight, eps)
    spec = reference.add_rms_norm_backward(grad, grad_stream if with_stream else None, stream, weight, eps)
    for found in (ours, spec):
        for mine, right, rounded in zip(found, exact, plain, strict=True):
            assert_kernel_is_right(mine, right, rounded)
    for kernels in (launchers, reference):
        arguments = (grad, grad_stream if with_stream else None, stream, weight, eps)
        both, alone = (kernels.add_rms_norm_backward(*arguments, wanted) for wanted in (True, False))
        assert torch.equal(both[0], alone[0]) and alone[1].shape == (0,)


# --- add_low_rank ---

LOW_RANK_SHAPES = [(1, 1, 1), (5, 3, 7), (64, 16, 128), (65, 17, 129), (70, 130, 40), (0, 4, 9), (9, 4, 0)]


def check_add_low_rank(rows, rank, width, dtype, device, gap=3):
    """Into columns of a wider tensor, from columns of a wider one, by a matrix turned round; the rest stays."""
    whole = normal(rows, width + 2 * gap, where=(device, dtype))
    low = normal(rows, rank + gap, where=(device, torch.float32), seed=1)[:, gap:]
    factor = normal(width, rank, where=(device, torch.float32), seed=2).t()
    before, out = whole.clone(), whole[:, gap : gap + width]
    exact = out.double() + 0.3 * low.double() @ factor.double()
    plain = (out.float() + 0.3 * (low @ factor)).to(dtype)
    launchers.add_low_rank(out, low, factor, 0.3)
    if rows * width:
        tolerance = 1e-6 if dtype == torch.float32 else 1.001 * relative_error(plain, exact) + 1e-5
        assert relative_error(out, exact) <= tolerance
    assert torch.equal(whole[:, :gap], before[:, :gap]) and torch.equal(
        whole[:, gap + width :], before[:, gap + width :]
    )


@pytest.mark.parametrize("shape", LOW_RANK_SHAPES, ids=str)
def test_add_low_rank_equals_the_reference(shape, where):
    device, dtype = where
    check_add_low_rank(*shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2784, 16, 11008), (2784, 48, 2048), (333, 300, 3420)], ids=str)
def test_add_low_rank_at_real_shapes(shape, dtype):
    check_add_low_rank(*shape, dtype, "cuda", gap=8)


# --- mixed_product ---

MIXED_SHAPES = [(1, 1, 1), (5, 3, 7), (64, 64, 16), (65, 300, 17), (130, 65, 70), (0, 4, 9), (4, 0, 9)]


def check_mixed_product(rows, inner, rank, device, dtype):
    """Matrices as they lie, turned round, and columns of wider ones."""
    where, wide = (device, dtype), (device, torch.float32)
    xs = [
        normal(rows, inner, where=where),
        normal(inner, rows, where=where, seed=1).t(),
        normal(rows, inner + 3, where=where, seed=2)[:, 3:],
    ]
    ys = [normal(inner, rank, where=wide, seed=3), normal(rank, inner + 1, where=wide, seed=4)[:, 1:].t()]
    for x, y in itertools.product(xs, ys):
        exact = 0.3 * x.double() @ y.double()
        for turned in (False, True):
            found = launchers.mixed_product(x, y, 0.3, turned)
            assert found.dtype == torch.float32 and found.is_contiguous()
            expected = exact.t() if turned else exact
            assert found.shape == expected.shape
            if expected.numel():
                assert_equal_to(found, expected, 2e-6)


@pytest.mark.parametrize("shape", MIXED_SHAPES, ids=str)
def test_mixed_product_equals_the_reference(shape, where):
    check_mixed_product(*shape, where[0], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2784, 11008, 16), (2784, 2048, 48), (256, 2784, 16), (33, 9001, 130)], ids=str)
def test_mixed_product_at_real_shapes(shape, dtype):
    check_mixed_product(*shape, "cuda", dtype)


# --- swiglu ---

SWIGLU_SHAPES = [(1, 1), (5, 90), (2, 3, 33), (7,), (3, 2048), (2, 3420), (2, 3456), (1, 5000), (0, 90), (2, 0, 3)]


def check_swiglu(gate, up, gate_bias=None, up_bias=None):
    ours = launchers.swiglu(gate, up, gate_bias, up_bias)
    wide = [None if x is None else x.double() for x in (gate, up, gate_bias, up_bias)]
    x, y = (gate, up) if gate_bias is None else (gate + gate_bias, up + up_bias)
    assert_kernel_is_right(ours, reference.swiglu(*wide), x / (1 + torch.exp(-x)) * y)


def biases(width, where):
    """Unlike each other, and as large as what they are added to."""
    return normal(width, where=where, seed=2, scale=2), normal(width, where=where, seed=3)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=str)
def test_swiglu_equals_the_reference(shape, with_bias, where):
    gate, up = normal(*shape, where=where, scale=3), normal(*shape, where=where, seed=1)
    check_swiglu(gate, up, *(biases(shape[-1], where) if with_bias else ()))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (5, 180), (2, 3, 66), (2, 6912), (2, 256)], ids=str)
def test_swiglu_takes_the_halves_of_a_packed_product(shape, with_bias, where):
    packed, bias = normal(*shape, where=where, scale=3), normal(shape[-1], where=where, seed=2)
    check_swiglu(*packed.chunk(2, dim=-1), *(bias.chunk(2) if with_bias else ()))


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_the_reference_at_the_real_shape(dtype, with_bias):
    where = ("cuda", dtype)
    bias = normal(2 * 3456, where=where, seed=2)
    halves = normal(16384, 2 * 3456, where=where, scale=3).chunk(2, dim=-1)
    check_swiglu(*halves, *(bias.chunk(2) if with_bias else ()))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SWIGLU_SHAPES if len(shape) > 1], ids=str)
def test_the_gradient_of_swiglu_equals_autograds(shape, halves, where):
    check_swiglu_backward(shape, halves, where)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_swiglu_equals_autograds_at_the_real_shape(dtype):
    check_swiglu_backward((8192, 3456), True, ("cuda", dtype))


def check_swiglu_backward(shape, halves, where):
    width = shape[-1]
    packed = normal(*shape[:-1], 2 * width, where=where, scale=3)
    gate, up = packed.chunk(2, dim=-1) if halves else (x.contiguous() for x in packed.chunk(2, dim=-1))
    grad = normal(*shape, where=where, seed=1)

    def autograds(dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (gate, up)]
        out = leaves[0] / (1 + torch.exp(-leaves[0])) * leaves[1]
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    for found in (launchers.swiglu_backward(grad, gate, up), reference.swiglu_backward(grad, gate, up)):
        for mine, right, rounded in zip(
            found.chunk(2, dim=-1), autograds(torch.float64), autograds(where[1]), strict=True
        ):
            assert_kernel_is_right(mine.contiguous(), right, rounded)


def test_swiglu_takes_inputs_of_any_strides(where):
    gate = normal(90, 6, where=where, scale=3).t()
    up = normal(6, 180, where=where, seed=1)[:, ::2]
    gate_bias, up_bias = biases(180, where)
    check_swiglu(gate, up)
    check_swiglu(gate, up, gate_bias[::2], up_bias[1::2])
    check_swiglu(normal(4, 6, 90, where=where)[::2], normal(2, 90, 6, where=where, seed=1).transpose(1, 2))


def test_swiglu_changes_none_of_its_inputs(where):
    inputs = [normal(3, 80, where=where), normal(3, 80, where=where, seed=1), *biases(80, where)]
    before = [x.clone() for x in inputs]
    launchers.swiglu(*inputs)
    assert all(map(torch.equal, inputs, before))


def test_swiglu_stays_finite_far_from_zero(where):
    gate = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4]]).to(*where)
    ones = torch.ones_like(gate)
    assert_equal_to(launchers.swiglu(gate, ones), reference.swiglu(gate.double(), ones.double()), 2**-8)
    # The same, all of it from the bias.
    assert_equal_to(
        launchers.swiglu(torch.zeros_like(gate), ones, gate[0], ones[0]),
        2 * reference.swiglu(gate.double(), ones.double()),
        2**-8,
    )


# --- rotary ---

HEADS = [(1, 16), (3, 40), (2, 64), (3, 72), (5, 80), (2, 128)]


@pytest.mark.parametrize(("num_heads", "size"), [*HEADS, (1, 4), (16, 80), (1, 160)])
@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (2, 12), (0, 4)])
def test_rotary_equals_the_reference(images, tokens, num_heads, size, where):
    qkv = normal(images, tokens, 3 * num_heads * size, where=where)
    cos, sin = rope_tables(tokens, size, where[0])
    heads = qkv[..., : 2 * num_heads * size].unflatten(-1, (2 * num_heads, size))
    exact = reference.rotate(heads.double(), cos[:, None].double(), sin[:, None].double())
    x, y = heads.chunk(2, dim=-1)
    c, s = (table[:, None].to(where[1]) for table in (cos, sin))
    plain = torch.cat([x * c - y * s, y * c + x * s], dim=-1)
    assert_kernel_is_right(rotary(qkv, cos, sin, num_heads), exact.flatten(-2), plain.flatten(-2))


# --- rotary_attention ---


def plain_attention(qkv, cos, sin, runs, num_heads):
    """In the inputs' dtype at every step."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    cos, sin = (torch.cat([table, table], dim=-1).to(qkv.dtype) for table in (cos, sin))
    q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], dim=-1) * sin for x in (q, k))
    outs = []
    for run in runs:
        for start in range(run.start, run.stop, run.length):
            segment = slice(start, start + run.length)
            scores = q[:, :, segment] @ k[:, :, segment].transpose(-1, -2) / math.sqrt(q.shape[-1])
            outs.append(scores.softmax(-1) @ v[:, :, segment])
    return torch.cat(outs, dim=2).transpose(1, 2).flatten(2)


def check_attention(qkv, cos, sin, segments, num_heads):
    ours = launchers.rotary_attention(qkv, cos, sin, segments.runs, segments.table, num_heads)
    exact = reference.rotary_attention(qkv.double(), cos.double(), sin.double(), segments.runs, num_heads)
    assert_kernel_is_right(ours, exact, plain_attention(qkv, cos, sin, segments.runs, num_heads))


def check_windows(grid, num_heads, size, where, images=1, whole_image=False, **config):
    """The windows of an image of `grid` merged cells, in its own order and with its own rotary tables."""
    config = dataclasses.replace(VisionConfig(), hidden_size=num_heads * size, num_heads=num_heads, **config)
    plan = make_vision_plan(config, *grid, torch.device(where[0]))
    # Queries and keys large enough that attention is far from uniform.
    qkv = normal(images, plan.image.tokens, 3 * num_heads * size, where=where, scale=1.5)
    check_attention(qkv, plan.cos, plan.sin, plan.image if whole_image else plan.windows, num_heads)
    return plan


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (5, 7), (9, 11), (17, 23), (4, 8)], ids=str)
def test_trap1_window_attention_equals_the_reference_with_partial_edges(grid, where):
    check_windows(grid, 1 if where[0] == "cpu" else 16, 80, where, images=2)


@pytest.mark.parametrize(("num_heads", "size"), [*HEADS, (1, 4), (1, 20), (1, 24), (1, 96), (1, 100), (2, 112)])
def test_trap9_window_attention_equals_the_reference_at_any_head_size(num_heads, size, where):
    check_windows((5, 7), num_heads, size, where)


@pytest.mark.parametrize("window_size", [28, 56, 84])
def test_trap6_window_attention_equals_the_reference_at_other_window_sizes(window_size, where):
    check_windows((7, 6), 1, 40, where, window_size=window_size)


@pytest.mark.parametrize(("patch_size", "merge"), [(14, 1), (7, 3), (16, 2), (28, 1)])
def test_trap6_window_attention_equals_the_reference_at_other_patch_sizes(patch_size, merge, where):
    check_windows((5, 4), 2, 40, where, patch_size=patch_size, spatial_merge_size=merge)


@pytest.mark.parametrize(("window_size", "num_heads", "size"), [(140, 1, 40), (168, 2, 40), (224, 1, 80)])
def test_windows_longer_than_a_tile_equal_the_reference(window_size, num_heads, size, where):
    plan = check_windows((6, 9), num_heads, size, where, window_size=window_size)
    assert max(run.length for run in plan.windows.runs) > 64


@pytest.mark.parametrize(
    ("grid", "num_heads", "size"),
    [*(((1, 1), *head) for head in HEADS), *(((5, 7), *head) for head in [(1, 16), (3, 40), (5, 80), (1, 160)])],
    ids=str,
)
def test_whole_image_attention_equals_the_reference(grid, num_heads, size, where):
    check_windows(grid, num_heads, size, where, whole_image=True)


def test_whole_image_attention_of_several_images_equals_the_reference(where):
    check_windows((5, 7), 2, 80, where, images=2, whole_image=True)


@pytest.mark.parametrize("size", [132, 160])
def test_window_attention_equals_the_reference_beyond_the_largest_head(size, where):
    check_windows((5, 7), 1, size, where)


# Lengths that no tile divides, the longest tile, and one more; a mix in one launch.
@pytest.mark.parametrize(
    "runs",
    [
        (Run(0, 1, 1),),
        (Run(0, 3, 1), Run(3, 1, 2)),
        (Run(0, 2, 17), Run(34, 3, 5), Run(49, 1, 63)),
        (Run(0, 1, 33), Run(33, 1, 64)),
        (Run(0, 1, 65), Run(65, 1, 2)),
        (Run(0, 2, 64),),
    ],
    ids=str,
)
def test_attention_within_segments_of_any_length_equals_the_reference(runs, where):
    segments = Segments.of(runs, torch.device(where[0]))
    cos, sin = rope_tables(segments.tokens, 80, where[0])
    check_attention(normal(2, segments.tokens, 3 * 2 * 80, where=where, scale=1.5), cos, sin, segments, num_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("grid", [(16, 16), (17, 23)], ids=str)
def test_attention_equals_the_reference_at_the_real_shape(grid, whole_image, dtype):
    check_windows(grid, 16, 80, ("cuda", dtype), images=8, whole_image=whole_image)


@pytest.mark.parametrize(("length", "images"), [(12, 2), (70, 1)])
def test_attention_takes_inputs_of_any_strides(length, images, where):
    segments = Segments.of((Run(0, 1, length),), torch.device(where[0]))
    cos, sin = rope_tables(length, 16, where[0])
    qkv = normal(96, length, images, where=where, scale=1.5).permute(2, 1, 0)
    assert not qkv.is_contiguous()
    check_attention(qkv, cos, sin, segments, num_heads=2)
    qkv = normal(2 * images, length, 192, where=where, scale=1.5)[::2, :, ::2]
    check_attention(qkv, cos, sin, segments, num_heads=2)


@pytest.mark.parametrize("length", [12, 70])
def test_attention_of_no_images_is_empty(length, where):
    segments = Segments.of((Run(0, 1, length),), torch.device(where[0]))
    cos, sin = rope_tables(length, 16, where[0])
    qkv = normal(0, length, 96, where=where)
    out = launchers.rotary_attention(qkv, cos, sin, segments.runs, segments.table, 2)
    assert out.shape == (0, length, 32)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_attention_that_is_uniform_or_nearly_hard_equals_the_reference(scale, where):
    segments = Segments.of((Run(0, 2, 12),), torch.device(where[0]))
    cos, sin = rope_tables(24, 16, where[0])
    qkv = normal(1, 24, 96, where=where)
    qkv[..., :64] *= scale
    check_attention(qkv, cos, sin, segments, num_heads=2)


def test_trap5_a_window_sees_no_other_window_or_image(where):
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device(where[0]))
    cos, sin = rope_tables(29, 16, where[0])
    qkv = normal(3, 29, 96, where=where)
    before = launchers.rotary_attention(qkv, cos, sin, segments.runs, segments.table, 2)
    qkv[1, 12:24] = math.inf
    after = launchers.rotary_attention(qkv, cos, sin, segments.runs, segments.table, 2)
    others = torch.ones(3, 29, dtype=torch.bool)
    others[1, 12:24] = False
    assert torch.equal(before[others], after[others])


# --- frames_to_patches ---

# (height, width) before and after: up, down, both, one axis alone, from next to nothing. Few rows: each is a program.
RESIZES = [
    ((5, 7), (14, 28)),
    ((11, 27), (14, 42)),
    ((33, 13), (14, 28)),
    ((14, 20), (14, 42)),
    ((20, 14), (42, 14)),
    ((1, 5), (14, 14)),
]
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)


def frames_of(before, dtype, device, images=2):
    frames = noise(images, 1, *before)[:, 0]
    return (frames if dtype == torch.uint8 else (frames / 255).to(dtype)).to(device)


def patches_of(frames, after, dtype, patch_size=14, merge=2, repeat=2, launch=launchers.frames_to_patches):
    device = frames.device
    cells = after[0] * after[1] // (patch_size * merge) ** 2
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(3)).to(device)
    scale = 1 / 255 if frames.dtype == torch.uint8 else 1.0
    how = (scale, MEAN.to(device), STD.to(device), order, patch_size, merge, repeat)
    columns = rows = None
    if frames.shape[-2:] != after:
        rows, columns = (resize_axis(frames.shape[axis], after[axis], device) for axis in (-2, -1))
    ours = launch(frames, columns, rows, after[1], *how, dtype)
    pixels = frames.float()
    if frames.shape[-2:] != after:
        # Rounded once, as on a GPU; of uint8 frames on a CPU `reference.resize` rounds after each axis.
        pixels = reference.resize(pixels, *after, ops.PILLOW)
        pixels = pixels.round().clamp(0, 255) if frames.dtype == torch.uint8 else pixels
    return ours, reference.patchify(pixels, *how).to(dtype)


def assert_same_patches(ours, expected, frames, resized):
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    if not (resized and frames.dtype == torch.uint8):
        # bfloat16 values are roundings of float32 ones that are equal to 1e-6, so that few fall apart.
        assert_equal_to(ours, expected, FLOAT32_TOLERANCE if ours.dtype == torch.float32 else 2e-4)
        return
    step = 1 / 255 / STD.min()
    apart = (ours.float() - expected.float()).abs()
    # A value that only rounds to the next bfloat16 is not a step of a pixel.
    assert (apart > step / 8).sum() <= max(FEW_APART, SHARE_APART * ours.numel())
    assert apart.max() <= 1.1 * step


@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
def test_frames_to_patches_with_resize_equals_the_reference(before, after, frame_dtype, where):
    frames = frames_of(before, frame_dtype, where[0])
    assert_same_patches(*patches_of(frames, after, where[1], patch_size=7), frames, resized=True)


@pytest.mark.parametrize("frame_dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_frames_to_patches_takes_half_precision_frames(frame_dtype, where):
    if where[0] == "cpu" and frame_dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")
    frames = frames_of((23, 53), frame_dtype, where[0])
    assert_same_patches(*patches_of(frames, (28, 84), where[1]), frames, resized=True)


@pytest.mark.parametrize(
    ("frame_dtype", "limit"), [(torch.uint8, 0), (torch.uint8, 1000), (torch.float32, None)], ids=str
)
@pytest.mark.parametrize(("before", "after"), [((34, 3), (2, 4)), ((6, 34), (8, 2))], ids=str)
def test_many_taps_are_right_in_a_loop_and_unrolled(before, after, frame_dtype, limit, where, monkeypatch):
    """A side of 34 shrunk to 2 takes 34 taps, more than are unrolled; the other side takes few."""
    module = importlib.import_module("qwen_batched.ops.triton.frames_to_patches")
    few, many = sorted(resize_axis(*side, torch.device("cpu"))[1].shape[0] for side in zip(before, after, strict=True))
    assert few <= module.MAX_UNROLLED_TAPS < many
    if limit is not None:
        monkeypatch.setattr(module, "MAX_UNROLLED_TAPS", limit)
    frames = frames_of(before, frame_dtype, where[0], images=1)
    assert_same_patches(*patches_of(frames, after, where[1], patch_size=2, merge=1), frames, resized=True)


@pytest.mark.gpu
@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("before", "after", "images"),
    [
        ((480, 640), (448, 448), 24),
        ((480, 640), (476, 644), 24),
        ((240, 320), (252, 308), 24),
        ((2160, 3840), (224, 224), 2),
    ],
    ids=str,
)
def test_frames_to_patches_equals_the_reference_at_camera_sizes(before, after, images, frame_dtype):
    frames = frames_of(before, frame_dtype, "cuda", images=images)
    assert_same_patches(*patches_of(frames, after, torch.float32), frames, resized=True)


@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(28, 28), (56, 84), (140, 28)], ids=str)
def test_frames_to_patches_without_resize_equals_the_reference(size, frame_dtype, where):
    frames = frames_of(size, frame_dtype, where[0])
    assert_same_patches(*patches_of(frames, size, where[1]), frames, resized=False)


@pytest.mark.parametrize(("patch_size", "merge", "repeat"), [(3, 3, 1), (5, 1, 3), (16, 2, 2), (2, 1, 1), (7, 4, 2)])
@pytest.mark.parametrize(("frame_dtype", "resized"), [(torch.uint8, True), (torch.float32, False)])
def test_trap6_frames_to_patches_equals_the_reference_at_other_patch_sizes(
    patch_size, merge, repeat, frame_dtype, resized, where
):
    side = patch_size * merge
    after = (2 * side, 3 * side)
    frames = frames_of((5, 7) if resized else after, frame_dtype, where[0])
    assert_same_patches(*patches_of(frames, after, where[1], patch_size, merge, repeat), frames, resized)


@pytest.mark.parametrize("after", [(2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
def test_frames_to_patches_takes_frames_of_any_strides(after, frame_dtype, where):
    frames = frames_of((8, 2), frame_dtype, where[0])
    for view in (
        frames[:, :, ::2],
        frames.flip(1).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)[:, :, :4],
        frames[:, :, :4].contiguous(memory_format=torch.channels_last),
        frames[:1, :, :4].expand(3, -1, -1, -1),
    ):
        assert not view.is_contiguous()
        assert_same_patches(*patches_of(view, after, where[1], patch_size=2, merge=1), view, resized=after != (4, 2))


@pytest.mark.parametrize("after", [(28, 56), (56, 56)], ids=str)
@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
def test_frames_to_patches_of_no_frames_is_empty(after, frame_dtype, where):
    frames = frames_of((56, 56), frame_dtype, where[0])[:0]
    ours, expected = patches_of(frames, after, where[1])
    assert ours.shape == expected.shape == (0, after[0] * after[1] // 196, 1176)


def test_trap10_only_uint8_frames_are_rounded_and_clamped(where):
    """Bicubic overshoots at a hard edge; floating frames keep that."""
    edge = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    edge[..., 13:] = 255
    patches = {}
    for frames in (edge.to(where[0]), (edge / 255).to(where[0])):
        patches[frames.dtype], expected = patches_of(frames, (56, 56), where[1])
        assert_same_patches(patches[frames.dtype], expected, frames, resized=True)
    assert patches[torch.float32].max() > patches[torch.uint8].max() + 0.1
    assert patches[torch.float32].min() < patches[torch.uint8].min() - 0.1


def test_halves_round_to_even(where):
    """Means of two neighbours, by a table of weights that is exact."""
    frames = torch.arange(28 * 28, dtype=torch.float32).remainder(256).byte().view(1, 1, 28, 28).repeat(1, 3, 1, 1)
    frames[..., 1::2] = frames[..., 0::2] + (frames[..., 0::2] < 255).byte()
    frames = frames.to(where[0])
    device = frames.device
    identity = torch.arange(28, dtype=torch.int32, device=device), torch.ones(1, 28, device=device)
    starts = torch.arange(0, 28, 2, dtype=torch.int32, device=device).repeat_interleave(2)
    halves = starts, torch.full((2, 28), 0.5, device=device)
    order = torch.zeros(1, dtype=torch.int64, device=device)
    how = (1.0, torch.zeros(3, 1, 1, device=device), torch.ones(3, 1, 1, device=device), order, 28, 1, 1)
    ours = launchers.frames_to_patches(frames, halves, identity, 28, *how, torch.float32)
    pairs = frames.float().unflatten(-1, (14, 2)).mean(-1)
    assert torch.equal(ours.view(3, 28, 28), pairs.round().repeat_interleave(2, dim=-1)[0])


# --- the operators ---


def decode_inputs(device="cpu"):
    """Three samples of 0, 5 and 8 tokens in a cache of 9, with 4 heads on 2."""
    cos, sin = rope_tables(3, 16, device)
    keys, values = (normal(3, 9, 2, 16, seed=seed).to(device) for seed in (1, 2))
    tickets = torch.zeros(6, dtype=torch.int32, device=device)
    return normal(3, 128).to(device), cos, sin, keys, values, torch.tensor([0, 5, 8], device=device), tickets


def prompt_inputs():
    """Two prompts of one image of 2 x 3 cells, token 9."""
    return torch.tensor([[1, 9, 2, -1], [1, 2, 9, 4]]), torch.tensor([[2, 3]])


def op_cases():
    """(name, inputs) by case: each registered operator, also with inputs that are not contiguous."""
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device("cpu"))
    cos, sin = rope_tables(29, 16, "cpu")
    runs = [number for run in segments.runs for number in (run.start, run.count, run.length)]
    how = (1.0, MEAN, STD, torch.arange(4), 7, 2, 2, torch.float32, ops.PILLOW)
    tables = (*resize_axis(10, 28, torch.device("cpu")), *resize_axis(12, 28, torch.device("cpu")))
    packed = normal(5, 180)
    return {
        "rms_norm": ("rms_norm", (normal(5, 80), normal(80), 1e-6)),
        "rms_norm-strided": ("rms_norm", (normal(80, 5).t(), normal(80), 1e-6)),
        "add_rms_norm": ("add_rms_norm", (normal(5, 80), normal(5, 80, seed=1), normal(80), 1e-6)),
        "add_rms_norm-strided": ("add_rms_norm", (normal(80, 5).t(), normal(80, 5, seed=1).t(), normal(80), 1e-6)),
        "swiglu": ("swiglu", (normal(5, 90), normal(5, 90, seed=1), None, None)),
        "swiglu-halves": ("swiglu", (packed[:, :90], packed[:, 90:], packed[0, :90], packed[1, 90:])),
        "swiglu-strided": (
            "swiglu",
            (normal(90, 5).t(), normal(90, 5, seed=1).t(), normal(90, 2)[:, 0], normal(90, 2)[:, 1]),
        ),
        "add_rms_norm_backward": (
            "add_rms_norm_backward",
            (normal(5, 80), normal(5, 80, seed=1), normal(5, 80, seed=2), normal(80), 1e-6, True),
        ),
        "add_rms_norm_backward-strided": (
            "add_rms_norm_backward",
            (normal(80, 5).t(), None, normal(80, 5, seed=2).t(), normal(80, 2)[:, 0], 1e-6, True),
        ),
        "add_rms_norm_backward-frozen": (
            "add_rms_norm_backward",
            (normal(5, 80), None, normal(5, 80, seed=2), normal(80), 1e-6, False),
        ),
        "swiglu_backward": ("swiglu_backward", (normal(5, 90, seed=1), packed[:, :90], packed[:, 90:])),
        "rotary_attention": ("rotary_attention", (normal(2, 29, 96), cos, sin, runs, segments.table, 2)),
        "rotary_attention-strided": (
            "rotary_attention",
            (normal(96, 29, 2).permute(2, 1, 0), cos, sin, runs, segments.table, 2),
        ),
        "rotary_attention-whole": (
            "rotary_attention",
            (normal(2, 29, 96), cos, sin, [0, 1, 29], torch.tensor([[0, 29]], dtype=torch.int32), 2),
        ),
        "linear": ("linear", (normal(1, 80), normal(7, 80, seed=1), normal(7, seed=2))),
        "linear-strided": ("linear", (normal(80, 2)[:, :1].t(), normal(80, 7).t(), None)),
        "swiglu_linear": ("swiglu_linear", (normal(1, 80), normal(14, 80), normal(7), normal(7, seed=1))),
        "swiglu_linear-strided": ("swiglu_linear", (normal(80, 2)[:, :1].t(), normal(80, 14).t(), None, None)),
        "add_low_rank": ("add_low_rank", (normal(9, 40).bfloat16(), normal(9, 3), normal(3, 40), 0.5)),
        "add_low_rank-strided": (
            "add_low_rank",
            (normal(9, 80)[:, 7:40], normal(3, 9).t(), normal(33, 3, seed=1).t(), -2.0),
        ),
        "mixed_product": ("mixed_product", (normal(9, 40).bfloat16(), normal(40, 3), 0.5, False)),
        "mixed_product-turned": ("mixed_product", (normal(40, 9).bfloat16().t(), normal(3, 40).t(), -2.0, True)),
        "mrope": ("mrope", (normal(29, 128), cos, sin, 2, None, 29)),
        "mrope-slots": ("mrope", (normal(128, 29).t(), cos, sin, 2, torch.arange(29).flip(0) + 3, 40)),
        "decode_attention": ("decode_attention", decode_inputs()),
        "expand_prompts": ("expand_prompts", (*prompt_inputs(), None, 9, 3, 12, True)),
        "expand_prompts-mask": ("expand_prompts", (*prompt_inputs(), torch.ones(2, 1).bool(), 9, 3, 12, False)),
        "frames_to_patches": ("frames_to_patches", (noise(2, 1, 28, 28)[:, 0], 28, 28, *(None,) * 4, *how)),
        "frames_to_patches-resize": ("frames_to_patches", (noise(1, 1, 12, 10)[0], 28, 28, *tables, *how)),
        "frames_to_patches-float": ("frames_to_patches", (torch.rand(2, 3, 28, 28), 28, 28, *(None,) * 4, *how)),
    }


OP_CASES = op_cases()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", OP_CASES)
def test_an_operator_is_what_its_schema_and_fake_say(case, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    name, inputs = OP_CASES[case]
    checks = ["test_schema", "test_faketensor"]
    if backend == "reference":  # the same for both, and slow in the interpreter
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    with ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.qwen_batched, name).default, inputs, test_utils=checks)


def test_every_operator_is_checked():
    registered = {
        name.removeprefix("qwen_batched::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qwen_batched::")
    }
    assert registered == {name for name, _ in OP_CASES.values()}


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_without_values_go_through_every_operation(dtype, kind):
    segments = Segments.of((Run(0, 2, 12),), torch.device("cpu"))
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        table = torch.zeros(segments.table.shape, dtype=torch.int32)
        x, weight, qkv = (torch.zeros(*shape, dtype=dtype) for shape in ((2, 24, 80), (80,), (2, 24, 96)))
        for residual in (None, x):
            normed, stream = ops.add_rms_norm(x, residual, weight, 1e-6)
            assert normed.shape == stream.shape == x.shape
            assert normed.dtype == stream.dtype == dtype
        for bias in ((), (weight, weight)):
            out = ops.swiglu(x, x, *bias)
            assert (out.shape, out.dtype) == (x.shape, dtype)
        out = ops.rotary_attention(
            qkv, torch.zeros(24, 8), torch.zeros(24, 8), Segments(segments.runs, table), num_heads=2
        )
        assert (out.shape, out.dtype) == ((2, 24, 32), dtype)
        for rows in (1, 3):
            assert ops.linear(x[0, :rows], torch.zeros(7, 80, dtype=dtype)).shape == (rows, 7)
            assert ops.swiglu_linear(x[0, :rows], torch.zeros(14, 80, dtype=dtype)).shape == (rows, 7)
        out = ops.mrope(x[0], torch.zeros(24, 8), torch.zeros(24, 8), 1, torch.arange(24), 30)
        assert (out.shape, out.dtype) == ((30, 80), dtype)
        cache = torch.zeros(2, 2, 9, 1, 16, dtype=dtype)
        lengths, tickets = torch.zeros(2).long(), torch.zeros(2).int()
        out = ops.decode_attention(x[0, :2], torch.zeros(2, 8), torch.zeros(2, 8), *cache, lengths, tickets)
        assert (out.shape, out.dtype) == ((2, 48), dtype)
        prompts, grids = torch.zeros(2, 5).long(), torch.zeros(3, 2).long()
        assert ops.expand_prompts(prompts, grids, None, 9, 0, 12, True)[2].shape == (3, 2, 12)
        frames, tables = torch.zeros(2, 3, 30, 40, dtype=torch.uint8), tuple(torch.zeros(3) for _ in range(4))
        mean = std = torch.zeros(3, 1, 1)
        how = (1.0, mean, std, torch.zeros(6).long(), 14, 2, 2, dtype)
        patches = ops.frames_to_patches(frames, 56, 84, tables, *how, resample_backend=ops.PILLOW)
        assert (patches.shape, patches.dtype) == ((2, 24, 1176), dtype)
        assert patches.device.type == ("cpu" if kind == "fake" else "meta")


def everything(x, weight, qkv, cos, sin, segments, frames, tables, order):
    normed, stream = ops.add_rms_norm(x, None, weight, 1e-6)
    normed, stream = ops.add_rms_norm(normed, stream, weight, 1e-6)
    how = (1 / 255, MEAN.to(x.device), STD.to(x.device), order, 14, 2, 2, torch.float32)
    patches = ops.frames_to_patches(frames, 56, 56, tables, *how, resample_backend=ops.PILLOW)
    attended = ops.rotary_attention(qkv, cos, sin, segments, 2)
    gate, up = normed.chunk(2, dim=-1)
    gated = ops.swiglu(gate, up), ops.swiglu(gate, up, *weight.chunk(2))
    products = ops.linear(normed[:1], weight[None]), ops.swiglu_linear(normed[:1], normed[:4])
    turned = ops.mrope(qkv[0], cos, sin, 2)
    return normed, stream, *gated, *products, turned, attended, patches


def everything_inputs(device):
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device(device))
    tables = (*resize_axis(40, 56, torch.device(device)), *resize_axis(30, 56, torch.device(device)))
    return (
        normal(5, 80).to(device),
        normal(80, seed=1).to(device),
        normal(2, 29, 96, seed=2).to(device),
        *rope_tables(29, 16, device),
        segments,
        noise(2, 1, 30, 40)[:, 0].to(device),
        tables,
        torch.arange(4, device=device),
    )


@pytest.mark.parametrize("with_gradient", [False, True])
def test_every_operation_compiles_as_one_graph(device, with_gradient):
    inputs = everything_inputs(device)
    if with_gradient:
        for x in inputs[:3]:
            x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), everything(*inputs)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_equal_to(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
    if with_gradient:
        gradients = [torch.autograd.grad(sum(x.sum() for x in outs), inputs[:3]) for outs in (ours, expected)]
        for mine, theirs in zip(*gradients, strict=True):
            assert_equal_to(mine, theirs)


# --- gradients ---


def gradient_cases(device):
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device(device))
    cos, sin = rope_tables(29, 16, device)
    frames = torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(0)).to(device)
    slots = torch.arange(29, device=device).flip(0) + 3
    how = (1.0, MEAN.to(device), STD.to(device), torch.arange(4, device=device), 14, 2, 2, torch.float32)
    tables = (*resize_axis(40, 56, torch.device(device)), *resize_axis(30, 56, torch.device(device)))
    x, y, weight, qkv = (
        value.to(device) for value in (normal(5, 80), normal(5, 80, seed=1), normal(80, seed=2), normal(2, 29, 96))
    )
    return {
        "rms_norm": (
            lambda x, w: ops.add_rms_norm(x, None, w, 1e-6)[0],
            lambda x, w: reference.add_rms_norm(x, None, w, 1e-6)[0],
            (x, weight),
        ),
        "add_rms_norm": (
            lambda x, y, w: torch.cat(ops.add_rms_norm(x, y, w, 1e-6)),
            lambda x, y, w: torch.cat(reference.add_rms_norm(x, y, w, 1e-6)),
            (x, y, weight),
        ),
        "add_rms_norm-eps": (
            lambda x, y, w: ops.add_rms_norm(x, y, w, 0.3)[0],
            lambda x, y, w: reference.add_rms_norm(x, y, w, 0.3)[0],
            (x, y, weight),
        ),
        "add_rms_norm-stream": (
            lambda x, y: ops.add_rms_norm(x, y, weight, 1e-6)[1] ** 2,
            lambda x, y: reference.add_rms_norm(x, y, weight, 1e-6)[1] ** 2,
            (x, y),
        ),
        "swiglu": (ops.swiglu, reference.swiglu, (x, y)),
        "swiglu-biases": (ops.swiglu, reference.swiglu, (x, y, weight, 2 * weight)),
        "swiglu-halves": (ops.swiglu_linear, reference.swiglu_linear, (x, y[:4])),
        "swiglu-halves-biases": (ops.swiglu_linear, reference.swiglu_linear, (x, y[:4], weight[:2], weight[2:4])),
        "linear": (ops.linear, reference.linear, (x[:1], y, weight[:5])),
        "swiglu_linear": (ops.swiglu_linear, reference.swiglu_linear, (x[:1], y[:4], weight[:2], weight[2:4])),
        "mrope": (
            lambda qkv: ops.mrope(qkv, cos, sin, 2, slots, 40),
            lambda qkv: reference.mrope(qkv, cos, sin, 2, slots, 40),
            (qkv[0],),
        ),
        "rotary_attention": (
            lambda qkv: ops.rotary_attention(qkv, cos, sin, segments, 2),
            lambda qkv: reference.rotary_attention(qkv, cos, sin, segments.runs, 2),
            (qkv,),
        ),
        "frames_to_patches": (
            lambda frames: ops.frames_to_patches(frames, 56, 56, tables, *how, resample_backend=ops.PILLOW),
            lambda frames: reference.frames_to_patches(frames, 56, 56, *how, resample_backend=ops.PILLOW),
            (frames,),
        ),
    }


GRADIENT_CASES = list(gradient_cases("cpu"))
WITHOUT_BACKWARD = ("swiglu-biases", "linear", "frames_to_patches")


def wanted_inputs(inputs):
    """The inputs whose gradients are wanted: each alone, and all of them."""
    return [(index,) for index in range(len(inputs))] + [tuple(range(len(inputs)))]


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_equal_the_references_and_are_never_dropped(case, backend, device):
    if backend == "triton" and (case in WITHOUT_BACKWARD or (device == "cpu" and torch.cuda.is_available())):
        pytest.skip("not for this kernel, or not on this device")
    function, expected, inputs = gradient_cases(device)[case]
    with ops.use_backend(backend):
        for wanted in wanted_inputs(inputs):
            gradients = []
            for run in (function, expected):
                leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(inputs)]
                out = run(*leaves)
                assert out.requires_grad, f"detached from input {wanted}"
                probe = normal(*out.shape, seed=7).to(device)
                gradients.append(torch.autograd.grad((out * probe).sum(), [leaves[index] for index in wanted]))
            for ours, theirs in zip(*gradients, strict=True):
                assert_equal_to(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", [case for case in GRADIENT_CASES if case != "frames_to_patches"])
def test_second_derivatives_equal_the_references_and_are_never_dropped(case, backend, device):
    """As a penalty on gradients wants them."""
    if backend == "triton" and (case in WITHOUT_BACKWARD or (device == "cpu" and torch.cuda.is_available())):
        pytest.skip("not for this kernel, or not on this device")
    function, expected, inputs = gradient_cases(device)[case]
    seconds = []
    with ops.use_backend(backend), sdpa_kernel(SDPBackend.MATH):  # PyTorch's other attentions have none
        for run in (function, expected):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves)
            firsts = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
            penalty = sum(first.square().sum() for first in firsts)
            seconds.append(torch.autograd.grad(penalty, leaves))
    for ours, theirs in zip(*seconds, strict=True):
        assert_equal_to(ours, theirs)


def test_a_stream_that_wants_no_gradient_gets_none(where):
    """Where the final norm alone is trained."""
    x, weight = normal(5, 80, where=where), normal(80, where=where, seed=1).requires_grad_()
    with ops.use_backend("triton"):
        normed, stream = ops.add_rms_norm(x, x, weight, 1e-6)
    assert normed.requires_grad and not stream.requires_grad


@pytest.mark.parametrize("case", WITHOUT_BACKWARD)
def test_a_forced_triton_refuses_to_drop_a_gradient(case, device):
    function, _, inputs = gradient_cases(device)[case]
    with ops.use_backend("triton"):
        for wanted in wanted_inputs(inputs):
            leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(inputs)]
            with pytest.raises(RuntimeError, match=r"triton.*backward.*no_grad"):
                function(*leaves)


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_forward_mode_derivatives_equal_the_references_and_are_never_dropped(case, device):
    function, expected, inputs = gradient_cases(device)[case]
    if case == "frames_to_patches":
        pytest.skip("PyTorch's antialiased resize has no forward derivative")
    tangents = tuple(normal(*x.shape, seed=8).to(device) for x in inputs)
    try:
        _, theirs = torch.func.jvp(expected, inputs, tangents)
    except NotImplementedError:
        pytest.skip("PyTorch's attention has no forward derivative here")
    _, ours = torch.func.jvp(function, inputs, tangents)
    assert_equal_to(ours, theirs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        assert_equal_to(forward_ad.unpack_dual(function(*duals)).tangent, theirs)


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_a_forced_triton_refuses_to_drop_a_tangent(case, device):
    """Of each input alone, without grad mode too."""
    function, _, inputs = gradient_cases(device)[case]
    for index, x in enumerate(inputs):

        def of_one(x, index=index):
            return function(*inputs[:index], x, *inputs[index + 1 :])

        with ops.use_backend("triton"), torch.no_grad():
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"triton.*forward-mode"):
                of_one(forward_ad.make_dual(x, torch.ones_like(x)))
            with pytest.raises(RuntimeError, match=r"triton.*forward-mode"):
                torch.func.jvp(of_one, (x,), (torch.ones_like(x),))


def test_without_grad_mode_or_a_leaf_no_gradient_is_recorded(device):
    function, _, inputs = gradient_cases(device)["swiglu"]
    assert not function(*inputs).requires_grad
    with torch.no_grad():
        assert not function(*(x.clone().requires_grad_() for x in inputs)).requires_grad


# --- the choice of the backend ---


@pytest.fixture
def launched(monkeypatch):
    """Counts how often a Triton launcher ran."""
    count = []
    launch = launchers.swiglu
    monkeypatch.setattr(launchers, "swiglu", lambda *args: count.append(1) or launch(*args))
    return count


def test_auto_runs_kernels_on_a_gpu_and_the_reference_on_a_cpu(device, launched):
    x = normal(3, 90).to(device)
    ops.swiglu(x, x)
    assert len(launched) == (device == "cuda")


def test_the_reference_can_be_asked_for(device, launched):
    x = normal(3, 90).to(device)
    with ops.use_backend("reference"):
        ops.swiglu(x, x)
    assert not launched


def test_triton_can_be_asked_for(where, launched):
    x = normal(3, 90, where=where)
    with ops.use_backend("triton"):
        assert torch.equal(ops.swiglu(x, x), launchers.swiglu(x, x))
        with ops.use_backend("reference"):
            ops.swiglu(x, x)
    ops.swiglu(x, x)
    assert len(launched) == (3 if where[0] == "cuda" else 2)


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 1])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="backend must be one of"), ops.use_backend(name):
        pass


def test_the_backend_is_put_back_after_an_error(launched):
    with contextlib.suppress(KeyError), ops.use_backend("triton"):
        raise KeyError
    x = normal(3, 90)
    ops.swiglu(x, x)
    assert not launched


CALLS = {
    "rms_norm": lambda x: ops.add_rms_norm(x, None, x[0], 1e-6),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x, x[0], 1e-6),
    "swiglu": lambda x: ops.swiglu(x, x),
    "swiglu-biases": lambda x: ops.swiglu(x, x, x[0], x[1]),
    "rotary_attention": lambda x: ops.rotary_attention(
        x[None], torch.ones(2, 8).to(x.device), torch.ones(2, 8).to(x.device), _segments(x.device), 1
    ),
    "frames_to_patches": lambda x: ops.frames_to_patches(
        _frames(x), 28, 28, None, *_how(x), resample_backend=ops.PILLOW
    ),
}


def _frames(x):
    return torch.zeros(1, 3, 28, 28, dtype=x.dtype, device=x.device)


def _how(x):
    order = torch.zeros(1, dtype=torch.int64, device=x.device)
    return 1.0, MEAN.to(x.device), STD.to(x.device), order, 14, 2, 2, torch.float32


def _segments(device):
    return Segments.of((Run(0, 1, 2),), device)


@pytest.fixture
def forgetful(monkeypatch):
    """Nobody has asked yet what Triton runs on."""
    for remembered in (backend._obstacle, backend._log_fallback):
        remembered.cache_clear()
    yield
    for remembered in (backend._obstacle, backend._log_fallback):
        remembered.cache_clear()


@pytest.fixture
def without_triton(forgetful, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def without_interpreter(forgetful, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_triton_that_is_absent_is_an_error_at_the_call(name, device, without_triton):
    x = normal(2, 48).to(device)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*not installed"):
        CALLS[name](x)
    CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_triton_that_does_not_run_on_the_cpu_is_an_error_at_the_call(name, without_interpreter):
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*cpu"):
        CALLS[name](normal(2, 48))
    CALLS[name](normal(2, 48))


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_triton_refuses_float64_and_otherwise_the_reference_serves(name, device):
    x = normal(2, 48).double().to(device)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*float64"):
        CALLS[name](x)
    CALLS[name](x)


MIXED_CALLS = {
    "add_rms_norm": lambda x, y: ops.add_rms_norm(x, y, x[0], 1e-6),
    "swiglu": lambda x, y: ops.swiglu(x, y),
    "swiglu-biases": lambda x, y: ops.swiglu(x, y, x[0], y[0]),
}
MIXED_REFERENCES = {
    "add_rms_norm": lambda x, y: reference.add_rms_norm(x, y, x[0], 1e-6),
    "swiglu": lambda x, y: (reference.swiglu(x, y),),
    "swiglu-biases": lambda x, y: (reference.swiglu(x, y, x[0], y[0]),),
}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("name", MIXED_CALLS)
def test_a_forced_triton_refuses_mixed_dtypes_and_otherwise_the_reference_serves(name, dtypes, device):
    x, y = (normal(2, 48, seed=seed).to(device, dtype) for seed, dtype in enumerate(dtypes))
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*one dtype"):
        MIXED_CALLS[name](x, y)
    ours = MIXED_CALLS[name](x, y)
    ours = ours if isinstance(ours, tuple) else (ours,)
    for mine, theirs in zip(ours, MIXED_REFERENCES[name](x, y), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norms_weight_may_have_a_dtype_of_its_own(with_residual, device):
    x, y = (normal(3, 48, seed=seed).to(device, torch.float16) for seed in range(2))
    weight = normal(48, seed=2).to(device)
    residual = y if with_residual else None
    with ops.use_backend("triton"):
        ours = ops.add_rms_norm(x, residual, weight, 1e-6)
    for mine, theirs in zip(ours, reference.add_rms_norm(x, residual, weight, 1e-6), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)  # two units in the last place of float16


def test_a_forced_triton_refuses_to_resize_without_tables_and_otherwise_the_reference_serves(device):
    frames = noise(1, 1, 40, 30)[0].to(device)
    how = _how(frames)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*tables"):
        ops.frames_to_patches(frames, 28, 28, None, *how, resample_backend=ops.PILLOW)
    for library in (ops.PILLOW, ops.TORCHVISION):
        ours = ops.frames_to_patches(frames, 28, 28, None, *how, resample_backend=library)
        assert torch.equal(ours, reference.frames_to_patches(frames, 28, 28, *how, resample_backend=library))


def test_the_fallback_on_a_gpu_is_logged_once(without_triton, caplog):
    with caplog.at_level(logging.WARNING, logger="qwen_batched"):
        for _ in range(3):
            assert backend.triton_kernels(torch.device("cuda")) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Triton" in caplog.text


def test_a_cpu_has_nothing_to_log(without_triton, caplog):
    for call in CALLS.values():
        call(normal(2, 48))
    with ops.use_backend("reference"):
        assert backend.triton_kernels(torch.device("cuda")) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "cuda", "serves"),
    [((7, 5), "12.8", False), ((8, 0), "12.8", True), ((9, 0), "12.8", True), ((7, 5), None, True)],
    ids=str,
)
def test_kernels_run_on_gpus_that_triton_supports(capability, cuda, serves, without_interpreter, caplog, monkeypatch):
    """A build of PyTorch without CUDA is ROCm's, whose capabilities are other numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    gpu = torch.device("cuda")
    assert backend.triton_kernels(gpu) is (launchers if serves else None)
    assert len(caplog.records) == (0 if serves else 1)
    with ops.use_backend("triton"):
        if serves:
            assert backend.triton_kernels(gpu) is launchers
        else:
            with pytest.raises(RuntimeError, match=r"triton.*\(8, 0\).*\(7, 5\)"):
                backend.triton_kernels(gpu)


@pytest.mark.gpu
def test_operations_on_a_gpu_without_triton_equal_the_kernels(forgetful, monkeypatch):
    inputs = everything_inputs("cuda")
    with_kernels = everything(*inputs)
    backend._obstacle.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launchers, "swiglu", lambda *args: pytest.fail("a kernel ran"))
    for ours, theirs in zip(with_kernels, everything(*inputs), strict=True):
        assert_equal_to(ours, theirs, 1e-4)


def test_float64_keeps_its_precision(device):
    """`reference` computes in float64 there; a kernel that cannot must not be chosen."""
    x, y, weight = (normal(5, 90, seed=seed).double().to(device) for seed in (0, 1, 2))
    segments = Segments.of((Run(0, 1, 5),), torch.device(device))
    cos, sin = (table.double() for table in rope_tables(5, 30, device))
    qkv = torch.stack([x.repeat(1, 2)])
    ours = [
        ops.swiglu(x, y),
        ops.swiglu(x, y, weight[0], weight[1]),
        *ops.add_rms_norm(x, y, weight[0], 1e-6),
        *ops.add_rms_norm(x, None, weight[0], 1e-6),
        ops.rotary_attention(qkv, cos, sin, segments, 2),
    ]
    theirs = [
        reference.swiglu(x, y),
        reference.swiglu(x, y, weight[0], weight[1]),
        *reference.add_rms_norm(x, y, weight[0], 1e-6),
        *reference.add_rms_norm(x, None, weight[0], 1e-6),
        reference.rotary_attention(qkv, cos, sin, segments.runs, 2),
    ]
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float64
        assert_equal_to(mine, expected, 1e-12)


# --- large grids ---

MAX_GRID_Y = 65535  # of CUDA, and of a grid's third side; its first goes to 2**31 - 1
MANY = 70_000


def large_launches(device):
    """A launch of each kernel over more rows, windows or cells than the second side of a grid may have."""
    dtype = torch.float32
    x, qkv = torch.zeros(MANY, 4, device=device), torch.zeros(MANY, 1, 12, device=device)
    cos = sin = torch.zeros(1, 2, device=device)
    segments = Segments.of((Run(0, 1, 1),), torch.device(device))
    frames = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device).expand(MANY, -1, -1, -1)
    axis = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, 1, device=device)
    how = (1.0, MEAN.to(device), STD.to(device), torch.zeros(1, dtype=torch.int64, device=device), 1, 1, 1, dtype)
    return {
        "add_rms_norm": lambda: launchers.add_rms_norm(x, x, x[0], 1e-6)[0],
        "swiglu": lambda: launchers.swiglu(x, x),
        "rotary": lambda: rotary(qkv, cos, sin, 1),
        "rotary_attention": lambda: launchers.rotary_attention(qkv, cos, sin, segments.runs, segments.table, 1),
        "frames_to_patches": lambda: launchers.frames_to_patches(frames, axis, axis, 1, *how),
    }


LARGE_LAUNCHES = list(large_launches("cpu"))


class Recorder:
    """Stands for a kernel and remembers the grids it was to be launched on."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize("name", LARGE_LAUNCHES)
def test_what_grows_with_the_input_is_the_first_side_of_a_grid(name, monkeypatch):
    module = importlib.import_module(f"qwen_batched.ops.triton.{name}")
    kernels = [key for key, value in vars(module).items() if isinstance(value, KernelInterface)]
    recorder = Recorder()
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, recorder)
    large_launches("cpu")[name]()
    assert len(recorder.grids) == (2 if name == "frames_to_patches" else 1)
    for grid in recorder.grids:
        assert grid[0] > MAX_GRID_Y
        assert all(side == 1 for side in grid[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE_LAUNCHES)
def test_kernels_run_on_large_grids(name):
    """Every row is the same; memory that was not written is NaN."""
    out = large_launches("cuda")[name]()
    assert out.shape[0] == MANY
    assert out.isfinite().all()
    assert (out == out[:1]).all()
