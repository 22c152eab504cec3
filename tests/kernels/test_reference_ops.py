"""Every operation of kernels/reference.py equals its formula, written out here plainly and computed in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from qwen_batched import ops
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run, Segments
from tests.support import FLOAT32_TOLERANCE, assert_equal_to, noise, photo, relative_error

# Float64 sums of a few thousand terms in another order.
FLOAT64_TOLERANCE = 1e-12
PRECISIONS = [(torch.float64, FLOAT64_TOLERANCE), (torch.float32, FLOAT32_TOLERANCE)]
# A kernel may round in other places than the plain bfloat16 expression, but must not be much worse than it.
BFLOAT16_ALLOWANCE = 2.0

precision = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_no_worse_than_bfloat16(ours, plain, exact):
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= BFLOAT16_ALLOWANCE * relative_error(plain, exact)


# --- formulas ---


def rms_norm_formula(x, weight, eps):
    rows = x.double().reshape(-1, x.shape[-1])
    normalised = [row / math.sqrt(sum(value**2 for value in row.tolist()) / len(row) + eps) for row in rows]
    return torch.stack(normalised).view(x.shape) * weight.double()


def swiglu_formula(gate, up):
    gate = gate.double()
    return gate / (1 + torch.exp(-gate)) * up.double()


def rotation_formula(x, cos, sin):
    """Turns (x[j], x[j + E / 2]) as one complex number by the angle of frequency j."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention_formula(query, keys, values):
    """One query (E,) over keys and values (S, E)."""
    scores = keys.double() @ query.double() / math.sqrt(len(query))
    weights = torch.exp(scores - scores.max())
    return weights / weights.sum() @ values.double()


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


def causal_attention_formula(q, k, v, visible=None):
    batch, length, heads, size = q.shape
    shared = heads // k.shape[2]  # query heads that share one key head
    out = torch.empty(batch, length, heads * size, dtype=torch.float64)
    for sample in range(batch):
        for head in range(heads):
            for token in range(length):
                seen = slice(0, token + 1) if visible is None else visible[sample].nonzero()[:, 0]
                keys, values = (x[sample, seen, head // shared] for x in (k, v))
                out[sample, token, head * size : (head + 1) * size] = attention_formula(
                    q[sample, token, head], keys, values
                )
    return out


def bicubic_weights(before, after):
    """(after, before) float64: Keys' cubic with a = -0.5, widened by the reduction, normalised at the borders."""
    step = before / after
    width = max(step, 1.0)
    weights = torch.zeros(after, before, dtype=torch.float64)
    for place in range(after):
        centre = (place + 0.5) * step
        for pixel in range(max(0, int(centre - 2 * width + 0.5)), min(before, int(centre + 2 * width + 0.5))):
            x = abs((pixel + 0.5 - centre) / width)
            if x < 1:
                weights[place, pixel] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[place, pixel] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum(dim=1, keepdim=True)


def resize_formula(pixels, height, width):
    rows, columns = bicubic_weights(pixels.shape[-2], height), bicubic_weights(pixels.shape[-1], width)
    return rows @ pixels.double() @ columns.T


def patchify_formula(pixels, scale, mean, std, window_order, patch_size, merge, repeat):
    cell_size, cells_in_row = patch_size * merge, pixels.shape[-1] // (patch_size * merge)
    pixels = (pixels.double() * scale - mean.double()) / std.double()
    images = []
    for image in pixels:
        patches = []
        for cell in window_order.tolist():
            top, left = cell // cells_in_row * cell_size, cell % cells_in_row * cell_size
            for y in range(top, top + cell_size, patch_size):
                for x in range(left, left + cell_size, patch_size):
                    patch = image[:, y : y + patch_size, x : x + patch_size]
                    patches.append(torch.stack([patch] * repeat, dim=1).reshape(-1))
        images.append(torch.stack(patches))
    return torch.stack(images)


# --- norm and MLP ---


@precision
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 80), (1, 33)])
def test_add_rms_norm_equals_its_formula(shape, with_residual, dtype, tolerance):
    # Small values, so that eps counts.
    update = 1e-3 * normal(*shape, dtype=dtype)
    residual = 1e-3 * normal(*shape, dtype=dtype, seed=1) if with_residual else None
    weight = normal(shape[-1], dtype=dtype, seed=2)
    normalised, stream = ops.add_rms_norm(update, residual, weight, eps=1e-5)
    expected_stream = update.double() if residual is None else update.double() + residual.double()
    assert normalised.dtype == stream.dtype == dtype
    assert_equal_to(stream, expected_stream, tolerance)
    assert_equal_to(normalised, rms_norm_formula(expected_stream, weight, 1e-5), tolerance)


def test_add_rms_norm_changes_none_of_its_inputs():
    inputs = [normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2)]
    before = [x.clone() for x in inputs]
    ops.add_rms_norm(*inputs, eps=1e-6)
    assert all(map(torch.equal, inputs, before))


def test_add_rms_norm_in_bfloat16_is_as_exact_as_the_plain_expression():
    update, residual = (30 * normal(64, 80, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = normal(80, dtype=torch.bfloat16, seed=2)
    normalised, stream = ops.add_rms_norm(update, residual, weight, eps=1e-6)
    plain_stream = update + residual
    plain = plain_stream * torch.rsqrt(plain_stream.square().mean(-1, keepdim=True) + 1e-6) * weight
    exact_stream = update.double() + residual.double()
    assert_no_worse_than_bfloat16(stream, plain_stream, exact_stream)
    assert_no_worse_than_bfloat16(normalised, plain, rms_norm_formula(exact_stream, weight, 1e-6))


@precision
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 90), (5, 33)])
def test_swiglu_equals_its_formula(shape, dtype, tolerance):
    gate, up = 3 * normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    out = ops.swiglu(gate, up)
    assert out.dtype == dtype
    assert_equal_to(out, swiglu_formula(gate, up), tolerance)


def test_swiglu_in_bfloat16_is_as_exact_as_the_plain_expression():
    gate, up = (3 * normal(64, 90, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    plain = gate / (1 + torch.exp(-gate)) * up
    assert_no_worse_than_bfloat16(ops.swiglu(gate, up), plain, swiglu_formula(gate, up))


# --- attention of the vision tower ---

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
    angles = normal(tokens, size // 2, seed=1)
    # Queries and keys large enough that attention is far from uniform.
    return 2 * normal(images, tokens, 3 * num_heads * size, dtype=dtype), angles.cos(), angles.sin(), runs, num_heads


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
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    first, second = cos.bfloat16(), sin.bfloat16()
    q, k = (
        x * torch.cat([first, first], -1)
        + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * torch.cat([second, second], -1)
        for x in (q, k)
    )
    parts = []
    for run in runs:
        for start in range(run.start, run.stop, run.length):
            segment = slice(start, start + run.length)
            scores = q[:, :, segment] @ k[:, :, segment].transpose(-1, -2) / math.sqrt(q.shape[-1])
            parts.append(scores.softmax(-1) @ v[:, :, segment])
    plain = torch.cat(parts, dim=2).transpose(1, 2).flatten(2)
    assert_no_worse_than_bfloat16(ours, plain, segment_attention_formula(qkv, cos, sin, runs, num_heads))


# --- attention of the decoder ---


@precision
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 2), (4, 2, 16), (3, 1, 8), (3, 3, 10)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_attention_equals_its_formula(heads, key_heads, size, length, dtype, tolerance):
    q = 2 * normal(2, length, heads, size, dtype=dtype)
    k, v = (2 * normal(2, length, key_heads, size, dtype=dtype, seed=seed) for seed in (1, 2))
    out = ops.causal_attention(q, k, v)
    assert out.dtype == dtype
    assert_equal_to(out, causal_attention_formula(q, k, v), tolerance)


@precision
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("length", [1, 3])
def test_attention_to_visible_keys_equals_its_formula(heads, key_heads, length, dtype, tolerance):
    visible = torch.tensor([[True, False, True, True, False], [False, False, False, False, True], [True] * 5])
    q = 2 * normal(3, length, heads, 8, dtype=dtype)
    k, v = (2 * normal(3, 5, key_heads, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    out = reference.causal_attention(q, k, v, visible)
    assert_equal_to(out, causal_attention_formula(q, k, v, visible), tolerance)


@pytest.mark.parametrize("with_visible", [True, False])
def test_causal_attention_in_bfloat16_is_as_exact_as_the_plain_expression(with_visible):
    q = normal(2, 9, 4, 16, dtype=torch.bfloat16)
    k, v = (normal(2, 9, 2, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    visible = torch.tensor([[True] * 6 + [False] * 3, [True] * 9]) if with_visible else None
    ours = reference.causal_attention(q, k, v, visible)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    scores = q_ @ k_.transpose(-1, -2) / math.sqrt(16)
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if visible is None else visible[:, None, None]
    plain = (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v_).transpose(1, 2).flatten(2)
    assert_no_worse_than_bfloat16(ours, plain, causal_attention_formula(q, k, v, visible))


# --- rope of the decoder ---


@precision
@pytest.mark.parametrize("sections", [(1, 1, 1), (2, 3, 3), (16, 24, 24), (3, 0, 2)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5)])
def test_mrope_tables_equal_their_formula(sections, batch, length, dtype, tolerance):
    # In float32 an angle is exact to its 24 bits, its cosine to that part of the angle: positions are small there.
    limit = 100_000 if dtype == torch.float64 else 16
    generator = torch.Generator().manual_seed(0)
    position_ids = torch.randint(0, limit, (3, batch, length), generator=generator)
    inv_freq = torch.rand(sum(sections), dtype=torch.float64, generator=generator).to(dtype)
    cos, sin = ops.mrope_tables(position_ids, inv_freq, sections)
    assert cos.dtype == sin.dtype == dtype
    axis_of = [axis for axis, count in enumerate(sections) for _ in range(count)]
    angles = torch.stack(
        [position_ids[axis].double() * inv_freq[index].double() for index, axis in enumerate(axis_of)], dim=-1
    )
    assert_equal_to(cos, angles.cos(), tolerance)
    assert_equal_to(sin, angles.sin(), tolerance)


@precision
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 2), (4, 2, 16), (3, 1, 6)])
def test_mrope_equals_its_formula(heads, key_heads, size, dtype, tolerance):
    qkv = normal(5, heads + 2 * key_heads, size, dtype=dtype)
    angles = normal(5, size // 2, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = ops.mrope(qkv.flatten(1), cos, sin, key_heads)
    assert (ours.dtype, ours.shape) == (dtype, (5, (heads + 2 * key_heads) * size))
    turned, values = ours.view_as(qkv).split([heads + key_heads, key_heads], dim=1)
    assert_equal_to(turned, rotation_formula(qkv[:, :-key_heads], cos[:, None], sin[:, None]), tolerance)
    assert torch.equal(values, qkv[:, -key_heads:])


def test_mrope_puts_tokens_into_their_rows_and_zeros_elsewhere():
    qkv, slots = normal(3, 24), torch.tensor([4, 0, 1])
    cos, sin = normal(3, 4, seed=1).cos(), normal(3, 4, seed=1).sin()
    placed = ops.mrope(qkv, cos, sin, 1, slots, 6)
    assert placed.shape == (6, 24)
    assert torch.equal(placed[slots], ops.mrope(qkv, cos, sin, 1))
    assert not placed[[2, 3, 5]].any()


def test_mrope_in_bfloat16_is_as_exact_as_the_plain_expression():
    qkv = normal(18, 8, 16, dtype=torch.bfloat16)
    angles = normal(18, 8, seed=2)
    cos, sin = angles.cos().float(), angles.sin().float()
    x = qkv[:, :6]
    ours = ops.mrope(qkv.flatten(1), cos, sin, 2).view_as(qkv)[:, :6]
    first, second = x.chunk(2, dim=-1)
    c, s = cos.bfloat16()[:, None], sin.bfloat16()[:, None]
    plain = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    assert_no_worse_than_bfloat16(ours, plain, rotation_formula(x, cos[:, None], sin[:, None]))


# --- decoding ---


@precision
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 2), (4, 2, 16), (3, 1, 6)])
def test_decode_attention_equals_its_formula(heads, key_heads, size, dtype, tolerance):
    lengths = [0, 4, 6]
    qkv = normal(3, (heads + 2 * key_heads) * size, dtype=dtype)
    cos, sin = normal(3, size // 2, seed=1).cos().to(dtype), normal(3, size // 2, seed=1).sin().to(dtype)
    before = [normal(3, 7, key_heads, size, dtype=dtype, seed=seed) for seed in (2, 3)]
    keys, values = (cache.clone() for cache in before)
    ours = reference.decode_attention(qkv, cos, sin, keys, values, torch.tensor(lengths))
    q, k, v = reference.mrope(qkv, cos, sin, key_heads).view(3, -1, size).split([heads, key_heads, key_heads], dim=1)
    for sample, length in enumerate(lengths):
        for cache, old, new in ((keys, before[0], k), (values, before[1], v)):
            assert torch.equal(cache[sample, length], new[sample])
            others = [slot for slot in range(7) if slot != length]
            assert torch.equal(cache[sample, others], old[sample, others]), "older tokens stay"
        seen = (keys[sample : sample + 1, : length + 1], values[sample : sample + 1, : length + 1])
        everything = torch.ones(1, length + 1, dtype=torch.bool)
        expected = causal_attention_formula(q[sample : sample + 1, None], *seen, everything)
        assert_equal_to(ours[sample : sample + 1], expected[:, 0], tolerance)


# --- images ---

RESIZES = [
    ((28, 28), (56, 56)),
    ((37, 53), (28, 84)),
    ((90, 31), (28, 56)),
    ((64, 64), (28, 28)),
    ((50, 40), (51, 41)),
    ((50, 40), (51, 60)),
    ((64, 50), (31, 50)),
    ((64, 50), (31, 40)),
    ((64, 50), (54, 45)),
    ((1, 5), (3, 2)),
    ((30, 40), (30, 80)),
    ((40, 30), (80, 30)),
]


@precision
@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
def test_resize_of_floating_frames_equals_its_formula(before, after, dtype, tolerance):
    frames = torch.rand(2, 3, *before, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = reference.resize(frames, *after, ops.PILLOW)
    assert out.dtype == dtype
    assert_equal_to(out, resize_formula(frames, *after), tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resize_of_half_precision_frames_computes_in_float32(dtype):
    frames = torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = reference.resize(frames, 28, 84, ops.PILLOW)
    assert out.dtype == torch.float32
    assert_equal_to(out, resize_formula(frames, 28, 84))


@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
@pytest.mark.parametrize("content", ["photo", "noise"])
def test_resize_of_uint8_frames_on_the_cpu_is_pillows(before, after, content):
    frame = photo(*before) if content == "photo" else noise(1, 1, *before)[0, 0]
    out = reference.resize(frame[None], *after, ops.PILLOW)
    pillow = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(after[::-1], Image.Resampling.BICUBIC)
    apart = (out[0] - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)).abs()
    assert out.dtype == torch.float32
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= 0.02


@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
@pytest.mark.parametrize("content", ["photo", "noise"])
def test_resize_of_uint8_frames_on_the_cpu_is_torchvisions_where_that_is_chosen(before, after, content):
    """torchvision calls PyTorch's kernel, whose sums are integers: equal to the last bit, in any layout."""
    frames = torch.stack([photo(*before)] * 2) if content == "photo" else noise(1, 2, *before)[0]
    expected = F.interpolate(frames, after, mode="bicubic", antialias=True)
    assert expected.dtype == torch.uint8
    turned = frames.transpose(2, 3).contiguous().transpose(2, 3)
    for laid_out in (frames, frames.contiguous(memory_format=torch.channels_last), turned):
        out = reference.resize(laid_out, *after, ops.TORCHVISION)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected.float())
    assert relative_error(out, reference.resize(frames, *after, ops.PILLOW)) < 0.1


def test_an_unknown_library_is_refused():
    for unknown in ("pil", "", None, 1):
        with pytest.raises(ValueError, match="resample_backend must be one of"):
            reference.resize(noise(1, 2, 30, 40)[0], 28, 56, unknown)


@pytest.mark.gpu
@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
@pytest.mark.parametrize("library", [ops.PILLOW, ops.TORCHVISION])
def test_resize_of_uint8_frames_on_a_gpu_rounds_once(before, after, library):
    frames = noise(1, 2, *before)[0]
    out = reference.resize(frames.cuda(), *after, library)
    expected = resize_formula(frames, *after).round().clamp(0, 255)
    apart = (out.cpu() - expected).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_resize_to_the_same_size_changes_nothing(dtype):
    frames = noise(1, 2, 28, 56)[0].to(dtype)
    assert torch.equal(
        reference.resize(frames, 28, 56, ops.PILLOW),
        frames.to(torch.float64 if dtype == torch.float64 else torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_resize_leaves_the_frames_as_they_were(dtype):
    frames = noise(1, 2, 37, 53)[0].to(dtype)
    before = frames.clone()
    reference.resize(frames, 28, 84, ops.PILLOW).zero_()
    assert torch.equal(frames, before)


def patchify_inputs(images, h, w, patch_size, merge, dtype):
    generator = torch.Generator().manual_seed(0)
    side = patch_size * merge
    pixels = torch.rand(images, 3, h * side, w * side, dtype=torch.float64, generator=generator).to(dtype)
    mean, std = torch.tensor([0.5, 0.4, 0.3], dtype=dtype), torch.tensor([0.3, 0.2, 0.1], dtype=dtype)
    window_order = torch.randperm(h * w, generator=generator)
    return 200 * pixels, 1 / 255, mean.view(3, 1, 1), std.view(3, 1, 1), window_order, patch_size, merge


@precision
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 3), (3, 2), (5, 4)])
@pytest.mark.parametrize(("patch_size", "merge", "repeat"), [(14, 2, 2), (3, 3, 1), (5, 1, 3)])
def test_patchify_equals_its_formula(h, w, patch_size, merge, repeat, dtype, tolerance):
    inputs = patchify_inputs(2, h, w, patch_size, merge, dtype)
    out = reference.patchify(*inputs, repeat)
    assert out.shape == (2, h * w * merge**2, 3 * repeat * patch_size**2)
    assert_equal_to(out, patchify_formula(*inputs, repeat), tolerance)
