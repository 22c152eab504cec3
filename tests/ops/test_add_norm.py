"""add_norm: the reference equals its formula, the kernels and their gradient the reference."""

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
    plain_norm,
    precision,
)
from tests.support import assert_equal_to

kernels = kernels_of("add_norm")

pytestmark = pytest.mark.usefixtures("poisoned")


def norm_formula(x, weight, bias, eps):
    out = []
    for row in x.double().reshape(-1, x.shape[-1]):
        row = row if bias is None else row - sum(row.tolist()) / len(row)
        out.append(row / math.sqrt(sum(value**2 for value in row.tolist()) / len(row) + eps))
    normed = torch.stack(out).view(x.shape) * weight.double()
    return normed if bias is None else normed + bias.double()


@precision
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 80), (1, 33)])
def test_add_norm_equals_its_formula(shape, with_residual, with_bias, dtype, tolerance):
    # Small values, so that eps counts.
    update = 1e-3 * exact_normal(*shape, dtype=dtype)
    residual = 1e-3 * exact_normal(*shape, dtype=dtype, seed=1) if with_residual else None
    weight = exact_normal(shape[-1], dtype=dtype, seed=2)
    bias = exact_normal(shape[-1], dtype=dtype, seed=3) if with_bias else None
    normalised, stream = ops.add_norm(update, residual, weight, bias, eps=1e-5)
    expected_stream = update.double() if residual is None else update.double() + residual.double()
    assert normalised.dtype == stream.dtype == dtype
    assert_equal_to(stream, expected_stream, tolerance)
    assert_equal_to(normalised, norm_formula(expected_stream, weight, bias, 1e-5), tolerance)


@pytest.mark.parametrize("with_bias", [True, False])
def test_add_norm_in_bfloat16_is_as_exact_as_the_plain_expression(with_bias):
    update, residual = (30 * exact_normal(64, 80, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight, bias = (exact_normal(80, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    bias = bias if with_bias else None
    normalised, stream = ops.add_norm(update, residual, weight, bias, eps=1e-6)
    plain_stream = update + residual
    exact_stream = update.double() + residual.double()
    assert_no_worse_than_bfloat16(stream, plain_stream, exact_stream)
    plain = plain_norm(plain_stream, weight, bias, 1e-6)
    assert_no_worse_than_bfloat16(normalised, plain, norm_formula(exact_stream, weight, bias, 1e-6))


NORM_SHAPES = [(1, 1), (3, 7), (2, 3, 80), (1, 33), (5, 127), (2, 1280), (3, 2048), (2, 2049), (1, 3584), (0, 80)]
LARGE_NORM_SHAPES = [(768, 1280), (16384, 1280), (1025, 80), (16384, 1024), (196, 4096)]
norms = pytest.mark.parametrize("with_bias", [True, False], ids=["layer_norm", "rms_norm"])


def bias_of(with_bias, dim, where):
    return normal(dim, where=where, seed=5) if with_bias else None


def check_add_norm(update, residual, weight, bias=None, eps=1e-6):
    normed, stream = kernels.add_norm(update, residual, weight, bias, eps)
    wide = [None if x is None else x.double() for x in (update, residual, weight, bias)]
    exact_normed, exact_stream = reference.add_norm(*wide, eps)
    plain_stream = update if residual is None else update + residual
    assert_kernel_is_right(stream, exact_stream, plain_stream)
    assert_kernel_is_right(normed, exact_normed, plain_norm(plain_stream, weight, bias, eps))


@norms
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_add_norm_equals_the_reference(shape, with_residual, with_bias, where):
    residual = normal(*shape, where=where, seed=1) if with_residual else None
    weight = normal(shape[-1], where=where, seed=2)
    check_add_norm(normal(*shape, where=where), residual, weight, bias_of(with_bias, shape[-1], where))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE_NORM_SHAPES, ids=str)
@norms
def test_add_norm_equals_the_reference_at_real_shapes(shape, dtype, with_bias):
    where = ("cuda", dtype)
    update, residual = (normal(*shape, where=where, seed=seed) for seed in (0, 1))
    check_add_norm(update, residual, normal(shape[-1], where=where, seed=2), bias_of(with_bias, shape[-1], where))


def test_a_layer_norm_is_exact_where_the_mean_is_far_above_the_deviation(where):
    """The mean of squares less the square of the mean would have lost all digits."""
    check_add_norm(normal(5, 80, where=where) + 50, None, *(normal(80, where=where, seed=seed) for seed in (2, 3)))


@norms
def test_add_norm_counts_eps(with_bias, where):
    # Mean squares of 1e-6, against an eps of 1e-5.
    update, residual = (normal(5, 80, where=where, seed=seed, scale=1e-3) for seed in (0, 1))
    check_add_norm(update, residual, normal(80, where=where, seed=2), bias_of(with_bias, 80, where), eps=1e-5)


@pytest.mark.parametrize("with_residual", [True, False])
def test_add_norm_takes_inputs_of_any_strides(where, with_residual):
    update = normal(80, 6, where=where).t()
    residual = normal(6, 160, where=where, seed=1)[:, ::2] if with_residual else None
    weight, bias = normal(80, 2, where=where, seed=2).unbind(1)
    check_add_norm(update, residual, weight, bias)


def test_add_norm_changes_none_of_its_inputs(where):
    inputs = [normal(*shape, where=where, seed=seed) for seed, shape in enumerate([(3, 80), (3, 80), (80,), (80,)])]
    before = [x.clone() for x in inputs]
    kernels.add_norm(*inputs, 1e-6)
    assert all(map(torch.equal, inputs, before))


@norms
@pytest.mark.parametrize("with_stream", [True, False])
@pytest.mark.parametrize("shape", NORM_SHAPES[1:], ids=str)  # a single value's is 0 but for eps
def test_the_gradient_of_add_norm_equals_autograds(shape, with_stream, with_bias, where):
    check_add_norm_backward(shape, with_stream, where, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8192, 1280), (2901, 2048)], ids=str)
@norms
def test_the_gradient_of_add_norm_equals_autograds_at_real_shapes(shape, dtype, with_bias):
    check_add_norm_backward(shape, True, ("cuda", dtype), with_bias)


@norms
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_the_gradient_of_add_norm_is_right_where_programs_have_several_rows(rows, with_bias, where, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    check_add_norm_backward((rows, 16), True, where, with_bias)


@norms
def test_the_gradient_of_add_norm_counts_eps(with_bias, where):
    check_add_norm_backward((3, 33), True, where, with_bias, eps=0.3)


def check_add_norm_backward(shape, with_stream, where, with_bias, eps=1e-6):
    stream, grad = normal(*shape, where=where, scale=3), normal(*shape, where=where, seed=1)
    grad_stream = normal(*shape, where=where, seed=2) if with_stream else torch.zeros(shape).to(*where)
    weights = [normal(shape[-1], where=where, seed=3), *([bias_of(True, shape[-1], where)] if with_bias else [])]
    grad_stream_or_none = grad_stream if with_stream else None

    def autograds(dtype, norm):
        leaves = [x.to(dtype).requires_grad_() for x in (stream, *weights)]
        normed = norm(*leaves, *([] if with_bias else [None]), eps)
        return torch.autograd.grad((normed, leaves[0] * 1), leaves, (grad.to(dtype), grad_stream.to(dtype)))

    exact = autograds(torch.float64, lambda x, *rest: reference.add_norm(x, None, *rest)[0])
    plain = autograds(where[1], plain_norm)
    for module in (kernels, reference):
        arguments = (grad, grad_stream_or_none, stream, weights[0], weights[1] if with_bias else None, eps)
        found, alone = (module.add_norm_backward(*arguments, wanted) for wanted in (True, False))
        assert found[2].shape == ((shape[-1],) if with_bias else (0,))
        for mine, right, rounded in zip(found, exact, plain, strict=False):
            assert_kernel_is_right(mine, right, rounded)
        assert torch.equal(found[0], alone[0]) and alone[1].shape == alone[2].shape == (0,)


def test_a_stream_that_wants_no_gradient_gets_none(where):
    """Where the final norm alone is trained."""
    x, weight = normal(5, 80, where=where), normal(80, where=where, seed=1).requires_grad_()
    with ops.use_backend("triton"):
        normed, stream = ops.add_norm(x, x, weight, None, 1e-6)
    assert normed.requires_grad and not stream.requires_grad


@norms
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norms_weight_may_have_a_dtype_of_its_own(with_residual, with_bias, device):
    x, y = (normal(3, 48, seed=seed).to(device, torch.float16) for seed in range(2))
    weights = normal(48, seed=2).to(device), normal(48, seed=3).to(device) if with_bias else None
    residual = y if with_residual else None
    with ops.use_backend("triton"):
        ours = ops.add_norm(x, residual, *weights, 1e-6)
    for mine, theirs in zip(ours, reference.add_norm(x, residual, *weights, 1e-6), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)  # two units in the last place of float16
