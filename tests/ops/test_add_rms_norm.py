"""add_rms_norm: the reference equals its formula, the kernels and their gradient the reference."""

import math

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
    precision,
)
from tests.support import assert_equal_to

kernels = kernels_of("add_rms_norm")

pytestmark = pytest.mark.usefixtures("poisoned")


def rms_norm_formula(x, weight, eps):
    rows = x.double().reshape(-1, x.shape[-1])
    normalised = [row / math.sqrt(sum(value**2 for value in row.tolist()) / len(row) + eps) for row in rows]
    return torch.stack(normalised).view(x.shape) * weight.double()


@precision
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 80), (1, 33)])
def test_add_rms_norm_equals_its_formula(shape, with_residual, dtype, tolerance):
    # Small values, so that eps counts.
    update = 1e-3 * exact_normal(*shape, dtype=dtype)
    residual = 1e-3 * exact_normal(*shape, dtype=dtype, seed=1) if with_residual else None
    weight = exact_normal(shape[-1], dtype=dtype, seed=2)
    normalised, stream = ops.add_rms_norm(update, residual, weight, eps=1e-5)
    expected_stream = update.double() if residual is None else update.double() + residual.double()
    assert normalised.dtype == stream.dtype == dtype
    assert_equal_to(stream, expected_stream, tolerance)
    assert_equal_to(normalised, rms_norm_formula(expected_stream, weight, 1e-5), tolerance)


def test_add_rms_norm_in_bfloat16_is_as_exact_as_the_plain_expression():
    update, residual = (30 * exact_normal(64, 80, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = exact_normal(80, dtype=torch.bfloat16, seed=2)
    normalised, stream = ops.add_rms_norm(update, residual, weight, eps=1e-6)
    plain_stream = update + residual
    plain = plain_stream * torch.rsqrt(plain_stream.square().mean(-1, keepdim=True) + 1e-6) * weight
    exact_stream = update.double() + residual.double()
    assert_no_worse_than_bfloat16(stream, plain_stream, exact_stream)
    assert_no_worse_than_bfloat16(normalised, plain, rms_norm_formula(exact_stream, weight, 1e-6))


NORM_SHAPES = [(1, 1), (3, 7), (2, 3, 80), (1, 33), (5, 127), (2, 1280), (3, 2048), (2, 2049), (1, 3584), (0, 80)]
LARGE_NORM_SHAPES = [(768, 1280), (16384, 1280), (1025, 80)]


def check_add_rms_norm(update, residual, weight, eps=1e-6):
    normed, stream = kernels.add_rms_norm(update, residual, weight, eps)
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
    kernels.add_rms_norm(*inputs, 1e-6)
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
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
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
    ours = kernels.add_rms_norm_backward(grad, grad_stream if with_stream else None, stream, weight, eps)
    spec = reference.add_rms_norm_backward(grad, grad_stream if with_stream else None, stream, weight, eps)
    for found in (ours, spec):
        for mine, right, rounded in zip(found, exact, plain, strict=True):
            assert_kernel_is_right(mine, right, rounded)
    for module in (kernels, reference):
        arguments = (grad, grad_stream if with_stream else None, stream, weight, eps)
        both, alone = (module.add_rms_norm_backward(*arguments, wanted) for wanted in (True, False))
        assert torch.equal(both[0], alone[0]) and alone[1].shape == (0,)


def test_a_stream_that_wants_no_gradient_gets_none(where):
    """Where the final norm alone is trained."""
    x, weight = normal(5, 80, where=where), normal(80, where=where, seed=1).requires_grad_()
    with ops.use_backend("triton"):
        normed, stream = ops.add_rms_norm(x, x, weight, 1e-6)
    assert normed.requires_grad and not stream.requires_grad


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
