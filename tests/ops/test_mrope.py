"""mrope: the reference equals its formula, the kernel the reference."""

import pytest
import torch

from qwen_batched import ops
from qwen_batched.ops import reference
from tests.ops.support import (
    assert_kernel_is_right,
    assert_no_worse_than_bfloat16,
    exact_normal,
    kernels_of,
    normal,
    plain_rotation,
    precision,
    rope_tables,
    rotation_formula,
)
from tests.support import assert_equal_to

kernels = kernels_of("mrope")

pytestmark = pytest.mark.usefixtures("poisoned")


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
    qkv = exact_normal(5, heads + 2 * key_heads, size, dtype=dtype)
    angles = exact_normal(5, size // 2, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = ops.mrope(qkv.flatten(1), cos, sin, key_heads)
    assert (ours.dtype, ours.shape) == (dtype, (5, (heads + 2 * key_heads) * size))
    turned, values = ours.view_as(qkv).split([heads + key_heads, key_heads], dim=1)
    assert_equal_to(turned, rotation_formula(qkv[:, :-key_heads], cos[:, None], sin[:, None]), tolerance)
    assert torch.equal(values, qkv[:, -key_heads:])


@precision
def test_an_inverse_rotation_undoes_a_rotation(dtype, tolerance):
    qkv, angles = exact_normal(5, 48, dtype=dtype), exact_normal(5, 4, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert_equal_to(ops.mrope(ops.mrope(qkv, cos, sin, 2), cos, sin, 2, inverse=True), qkv, tolerance)


def test_mrope_puts_tokens_into_their_rows_and_zeros_elsewhere():
    qkv, slots = exact_normal(3, 24), torch.tensor([4, 0, 1])
    cos, sin = exact_normal(3, 4, seed=1).cos(), exact_normal(3, 4, seed=1).sin()
    placed = ops.mrope(qkv, cos, sin, 1, slots, 6)
    assert placed.shape == (6, 24)
    assert torch.equal(placed[slots], ops.mrope(qkv, cos, sin, 1))
    assert not placed[[2, 3, 5]].any()


def test_mrope_in_bfloat16_is_as_exact_as_the_plain_expression():
    qkv = exact_normal(18, 8, 16, dtype=torch.bfloat16)
    angles = exact_normal(18, 8, seed=2)
    cos, sin = angles.cos().float(), angles.sin().float()
    x = qkv[:, :6]
    ours = ops.mrope(qkv.flatten(1), cos, sin, 2).view_as(qkv)[:, :6]
    first, second = x.chunk(2, dim=-1)
    c, s = cos.bfloat16()[:, None], sin.bfloat16()[:, None]
    plain = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    assert_no_worse_than_bfloat16(ours, plain, rotation_formula(x, cos[:, None], sin[:, None]))


HEADS = [(1, 1, 2), (4, 2, 16), (6, 2, 40), (3, 1, 80), (16, 2, 128), (2, 2, 6)]  # queries, keys, size


def check_mrope(qkv, size, kv_heads, slots=None, rows=None):
    cos, sin = rope_tables(len(qkv), size, qkv.device)
    ours = kernels.mrope(qkv, cos, sin, kv_heads, slots, len(qkv) if slots is None else rows)
    exact = reference.mrope(qkv.double(), cos.double(), sin.double(), kv_heads, slots, rows)
    heads = qkv.unflatten(-1, (-1, size))
    plain = torch.cat([plain_rotation(heads[:, :-kv_heads], cos, sin), heads[:, -kv_heads:]], dim=1).flatten(1)
    if slots is not None:
        plain = plain.new_zeros(rows, plain.shape[1]).index_copy(0, slots, plain)
    assert_kernel_is_right(ours, exact, plain)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_mrope_equals_the_reference(tokens, heads, kv_heads, size, where):
    check_mrope(normal(tokens, (heads + 2 * kv_heads) * size, where=where), size, kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_the_kernel_puts_tokens_into_their_rows_and_zeros_elsewhere(heads, kv_heads, size, where):
    qkv = normal(5, (heads + 2 * kv_heads) * size, where=where)
    check_mrope(qkv, size, kv_heads, torch.tensor([8, 0, 3, 2, 1], device=where[0]), rows=9)


def test_mrope_takes_inputs_of_any_strides(where):
    check_mrope(normal(96, 5, where=where).t(), 16, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mrope_equals_the_reference_at_the_real_shape(dtype):
    check_mrope(normal(1025, 2560, where=("cuda", dtype)), 128, 2)
