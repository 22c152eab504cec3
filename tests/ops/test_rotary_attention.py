"""rotary_attention: the reference equals its formula, the kernels the reference."""

import dataclasses
import math

import pytest
import torch

from qwen_batched import ops
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.model.geometry import IMAGE, WINDOWS, make_vision_plan
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run, Segments
from tests.ops.support import (
    assert_kernel_is_right,
    assert_no_worse_than_bfloat16,
    attention_formula,
    exact_normal,
    kernels_of,
    normal,
    precision,
    rope_tables,
    rotation_formula,
)
from tests.support import assert_equal_to

kernels = kernels_of("rotary_attention")

pytestmark = pytest.mark.usefixtures("poisoned")


def segment_attention_formula(qkv, cos, sin, runs, num_heads):
    images, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = width // num_heads
    out = torch.full((images, tokens, width), math.nan, dtype=torch.float64)
    for image in range(images):
        for head in range(num_heads):
            columns = slice(head * size, (head + 1) * size)
            q, k, v = (qkv[image, :, part * width : (part + 1) * width][:, columns] for part in range(3))
            q, k = rotation_formula(q, cos, sin), rotation_formula(k, cos, sin)
            for run in runs:
                for start in range(run.start, run.start + run.count * run.length, run.length):
                    segment = slice(start, start + run.length)
                    for token in range(run.length):
                        out[image, start + token, columns] = attention_formula(q[start + token], k[segment], v[segment])
    return out


# Runs as windows make them: several equal ones, then others of other lengths; lengths of 1; the whole image.
RUNS = [
    (Run(0, 1, 1),),
    (Run(0, 1, 12),),
    (Run(0, 3, 4),),
    (Run(0, 2, 4), Run(8, 1, 7)),
    (Run(0, 2, 6), Run(12, 2, 3), Run(18, 2, 2), Run(22, 1, 1)),
]


def attention_inputs(runs, images=2, num_heads=3, size=8, dtype=torch.float64):
    tokens = runs[-1].stop
    angles = exact_normal(tokens, size // 2, seed=1)
    # Queries and keys large enough that attention is far from uniform.
    return (
        2 * exact_normal(images, tokens, 3 * num_heads * size, dtype=dtype),
        angles.cos(),
        angles.sin(),
        runs,
        num_heads,
    )


@precision
@pytest.mark.parametrize("runs", RUNS, ids=[f"{len(runs)}-runs-{runs[-1].stop}-tokens" for runs in RUNS])
@pytest.mark.parametrize(("images", "num_heads", "size"), [(1, 1, 4), (2, 3, 8), (1, 2, 80)])
def test_rotary_attention_equals_its_formula_in_every_segment(runs, images, num_heads, size, dtype, tolerance):
    qkv, cos, sin, *rest = attention_inputs(runs, images, num_heads, size, dtype)
    cos, sin = cos.to(dtype), sin.to(dtype)
    out = ops.rotary_attention(qkv, cos, sin, Segments.of(rest[0], qkv.device), rest[1])
    assert out.dtype == dtype
    assert_equal_to(out, segment_attention_formula(qkv, cos, sin, *rest), tolerance)


def test_rotary_attention_in_bfloat16_is_as_exact_as_the_plain_expression():
    qkv, cos, sin, runs, num_heads = attention_inputs(RUNS[3], dtype=torch.bfloat16)
    cos, sin = cos.float(), sin.float()
    ours = ops.rotary_attention(qkv, cos, sin, Segments.of(runs, qkv.device), num_heads)
    plain = plain_attention(qkv, cos, sin, runs, num_heads)
    assert_no_worse_than_bfloat16(ours, plain, segment_attention_formula(qkv, cos, sin, runs, num_heads))


HEADS = [(1, 16), (3, 40), (2, 64), (1, 72), (2, 80), (1, 128)]


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
    assert_kernel_is_right(kernels.rotary(qkv, cos, sin, num_heads), exact.flatten(-2), plain.flatten(-2))


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
    ours = kernels.rotary_attention(qkv, cos, sin, segments, num_heads)
    exact = reference.rotary_attention(qkv.double(), cos.double(), sin.double(), segments, num_heads)
    assert_kernel_is_right(ours, exact, plain_attention(qkv, cos, sin, segments.runs, num_heads))


def check_windows(grid, num_heads, size, where, images=1, whole_image=False, **config):
    """The windows of an image of `grid` merged cells, in its own order and with its own rotary tables."""
    config = dataclasses.replace(FAMILY.config.vision, hidden_size=num_heads * size, num_heads=num_heads, **config)
    plan = make_vision_plan(config, *grid, torch.device(where[0]))
    # Queries and keys large enough that attention is far from uniform.
    qkv = normal(images, plan.segments[IMAGE].tokens, 3 * num_heads * size, where=where, scale=1.5)
    check_attention(qkv, plan.cos, plan.sin, plan.segments[IMAGE] if whole_image else plan.segments[WINDOWS], num_heads)
    return plan


@pytest.mark.parametrize(
    "grid",
    [(1, 1), (3, 3), (5, 7), (4, 8), *(pytest.param(grid, marks=pytest.mark.gpu) for grid in [(9, 11), (17, 23)])],
    ids=str,
)
def test_trap01_window_attention_equals_the_reference_with_partial_edges(grid, where):
    heads, images = (1, 1) if where[0] == "cpu" else (16, 2)
    check_windows(grid, heads, 80, where, images)


@pytest.mark.parametrize(("num_heads", "size"), [*HEADS, (1, 4), (1, 20), (1, 24), (1, 96), (1, 100), (2, 112)])
def test_trap09_window_attention_equals_the_reference_at_any_head_size(num_heads, size, where):
    check_windows((5, 3), num_heads, size, where)


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [28, 56, 84])
def test_trap06_window_attention_equals_the_reference_at_other_window_sizes(window_size, where):
    check_windows((5, 3), 1, 40, where, window_size=window_size)


@pytest.mark.parametrize(("patch_size", "merge"), [(14, 1), (7, 3), (16, 2), (28, 1)])
def test_trap06_window_attention_equals_the_reference_at_other_patch_sizes(patch_size, merge, where):
    check_windows((5, 4), 2, 40, where, patch_size=patch_size, spatial_merge_size=merge)


@pytest.mark.slow
@pytest.mark.parametrize(("window_size", "num_heads", "size"), [(140, 1, 40), (168, 2, 40), (224, 1, 80)])
def test_windows_longer_than_a_tile_equal_the_reference(window_size, num_heads, size, where):
    plan = check_windows((6, 9), num_heads, size, where, window_size=window_size)
    assert max(run.length for run in plan.segments[WINDOWS].runs) > 64


@pytest.mark.parametrize(
    ("grid", "num_heads", "size"),
    [*(((1, 1), *head) for head in HEADS), *(((5, 3), *head) for head in [(3, 40), (2, 80), (1, 160)])],
    ids=str,
)
def test_whole_image_attention_equals_the_reference(grid, num_heads, size, where):
    check_windows(grid, num_heads, size, where, whole_image=True)


@pytest.mark.slow
def test_whole_image_attention_of_several_images_equals_the_reference(where):
    check_windows((5, 3), 2, 80, where, images=2, whole_image=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [132, 160])
def test_window_attention_equals_the_reference_beyond_the_largest_head(size, where):
    check_windows((5, 3), 1, size, where)


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
    check_attention(normal(1, segments.tokens, 3 * 2 * 80, where=where, scale=1.5), cos, sin, segments, num_heads=2)


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
    out = kernels.rotary_attention(qkv, cos, sin, segments, 2)
    assert out.shape == (0, length, 32)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_attention_that_is_uniform_or_nearly_hard_equals_the_reference(scale, where):
    segments = Segments.of((Run(0, 2, 12),), torch.device(where[0]))
    cos, sin = rope_tables(24, 16, where[0])
    qkv = normal(1, 24, 96, where=where)
    qkv[..., :64] *= scale
    check_attention(qkv, cos, sin, segments, num_heads=2)


@pytest.mark.slow
def test_trap05_a_window_sees_no_other_window_or_image(where):
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device(where[0]))
    cos, sin = rope_tables(29, 16, where[0])
    qkv = normal(3, 29, 96, where=where)
    before = kernels.rotary_attention(qkv, cos, sin, segments, 2)
    qkv[1, 12:24] = math.inf
    after = kernels.rotary_attention(qkv, cos, sin, segments, 2)
    others = torch.ones(3, 29, dtype=torch.bool)
    others[1, 12:24] = False
    assert torch.equal(before[others], after[others])
