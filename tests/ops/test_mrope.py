"""mrope: the reference equals its formula, the kernel the reference."""

import pytest
import torch

from qwen_batched import ops
from qwen_batched.model.parts.ropes import sectioned
from qwen_batched.ops import reference
from tests.ops.support import (
    assert_kernel_is_right,
    assert_no_worse_than_bfloat16,
    exact_normal,
    kernels_of,
    normal,
    plain_norm,
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
    axis_of = sectioned(sections)
    cos, sin = ops.mrope_tables(position_ids, inv_freq, torch.tensor(axis_of))
    assert cos.dtype == sin.dtype == dtype
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
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 2), (4, 2, 16), (3, 1, 6)])
def test_mrope_with_norms_equals_its_formula(heads, key_heads, size, dtype, tolerance):
    qkv = 1e-2 * exact_normal(5, heads + 2 * key_heads, size, dtype=dtype)  # small, so that eps counts
    angles = exact_normal(5, size // 2, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q_norm, k_norm = (exact_normal(size, dtype=dtype, seed=seed) for seed in (3, 4))
    ours = ops.mrope(qkv.flatten(1), cos, sin, key_heads, None, None, q_norm, k_norm, 1e-5).view_as(qkv)
    for start, count, weight in ((0, heads, q_norm), (heads, key_heads, k_norm)):
        part = qkv[:, start : start + count]
        scales = [[(sum(x**2 for x in head) / size + 1e-5) ** -0.5 for head in heads] for heads in part.tolist()]
        normed = part.double() * torch.tensor(scales, dtype=torch.float64)[..., None] * weight.double()
        expected = rotation_formula(normed, cos[:, None], sin[:, None])
        assert_equal_to(ours[:, start : start + count], expected, tolerance)
    assert torch.equal(ours[:, -key_heads:], qkv[:, -key_heads:])


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
norms = pytest.mark.parametrize("with_norms", [True, False])


def norms_of(with_norms, size, where):
    """Weights and eps."""
    return (*(normal(size, where=where, seed=seed) for seed in (7, 8)), 1e-6) if with_norms else (None, None, 0.0)


def plain_mrope(qkv, cos, sin, kv_heads, slots, rows, q_norm, k_norm, eps):
    """In the dtype of `qkv` throughout."""
    heads = qkv.unflatten(-1, (-1, 2 * cos.shape[-1]))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = plain_norm(q, q_norm, None, eps), plain_norm(k, k_norm, None, eps)
    plain = torch.cat([plain_rotation(torch.cat((q, k), dim=1), cos, sin), v], dim=1).flatten(1)
    return plain if slots is None else plain.new_zeros(rows, plain.shape[1]).index_copy(0, slots, plain)


def check_mrope(qkv, size, kv_heads, slots=None, rows=None, with_norms=False):
    cos, sin = rope_tables(len(qkv), size, qkv.device)
    rest = (kv_heads, slots, len(qkv) if slots is None else rows)
    *weights, eps = norms_of(with_norms, size, (qkv.device, qkv.dtype))
    ours = kernels.mrope(qkv, cos, sin, *rest, *weights, eps)
    wide = [x if x is None else x.double() for x in weights]
    exact = reference.mrope(qkv.double(), cos.double(), sin.double(), *rest, *wide, eps)
    assert_kernel_is_right(ours, exact, plain_mrope(qkv, cos, sin, *rest, *weights, eps))


def check_mrope_backward(tokens, heads, kv_heads, size, where, with_slots, with_norms):
    width, rows = (heads + 2 * kv_heads) * size, tokens + 3 if with_slots else tokens
    qkv, grad = normal(tokens, width, where=where), normal(rows, width, where=where, seed=1)
    slots = torch.arange(tokens, device=where[0]).flip(0) + 2 if with_slots else None
    cos, sin = rope_tables(tokens, size, where[0])
    *weights, eps = norms_of(with_norms, size, where)

    def autograds(dtype, rotation):
        leaves = [x.to(dtype).requires_grad_() for x in (qkv, *(weights if with_norms else ()))]
        tables = (cos.to(dtype), sin.to(dtype)) if dtype == torch.float64 else (cos, sin)
        out = rotation(leaves[0], *tables, kv_heads, slots, rows, *(leaves[1:] or weights), eps)
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    exact, plain = autograds(torch.float64, reference.mrope), autograds(where[1], plain_mrope)
    for module in (kernels, reference):
        arguments = (grad, qkv if with_norms else None, cos, sin, kv_heads, slots, *weights, eps)
        found, alone = (module.mrope_backward(*arguments, wanted and with_norms) for wanted in (True, False))
        assert found[1].shape == found[2].shape == ((size,) if with_norms else (0,))
        for mine, right, rounded in zip(found, exact, plain, strict=False):
            assert_kernel_is_right(mine, right, rounded)
        assert torch.equal(found[0], alone[0]) and alone[1].shape == alone[2].shape == (0,)


@norms
@pytest.mark.parametrize("with_slots", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS[1:])  # a single pair's is 0 but for eps
def test_the_gradient_of_mrope_equals_autograds(heads, kv_heads, size, with_slots, with_norms, where):
    check_mrope_backward(7, heads, kv_heads, size, where, with_slots, with_norms)


@norms
def test_the_gradient_of_mrope_is_right_where_programs_have_several_tokens(with_norms, where, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    check_mrope_backward(8, 5, 2, 24, where, True, with_norms)


@pytest.mark.gpu
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 8), (16, 2)])
def test_the_gradient_of_mrope_equals_autograds_at_real_shapes(heads, kv_heads, dtype, with_norms):
    check_mrope_backward(2901, heads, kv_heads, 128, ("cuda", dtype), True, with_norms)


@norms
@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_mrope_equals_the_reference(tokens, heads, kv_heads, size, with_norms, where):
    check_mrope(normal(tokens, (heads + 2 * kv_heads) * size, where=where), size, kv_heads, with_norms=with_norms)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_the_kernel_puts_tokens_into_their_rows_and_zeros_elsewhere(heads, kv_heads, size, where):
    qkv = normal(5, (heads + 2 * kv_heads) * size, where=where)
    check_mrope(qkv, size, kv_heads, torch.tensor([8, 0, 3, 2, 1], device=where[0]), rows=9)


def test_mrope_takes_inputs_of_any_strides(where):
    check_mrope(normal(96, 5, where=where).t(), 16, 1)


@pytest.mark.gpu
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (16, 8), (32, 8)])
def test_mrope_equals_the_reference_at_real_shapes(heads, kv_heads, dtype, with_norms):
    qkv = normal(1025, (heads + 2 * kv_heads) * 128, where=("cuda", dtype))
    check_mrope(qkv, 128, kv_heads, with_norms=with_norms)
