"""norm_linear: the kernel equals the reference, and more rows or other tensors go by other operations."""

import pytest
import torch

from qwen_batched import ops
from qwen_batched.ops import reference
from tests.ops.support import assert_kernel_is_right, kernels_of, normal

kernels = kernels_of("norm_linear")

pytestmark = pytest.mark.usefixtures("poisoned")

# Inner and outer sizes: rows of weights for part of a program, for one each, and for programs that take several.
PRODUCTS = [(1, 1), (7, 3), (80, 40), (33, 90), (1100, 9)]


def inputs(inner, outer, with_residual, with_bias, is_gated, where):
    rows = 2 * outer if is_gated else outer
    return (
        normal(1, inner, where=where),
        normal(1, inner, where=where, seed=1) if with_residual else None,
        1 + normal(inner, where=where, seed=2, scale=0.1),
        1e-6,
        normal(rows, inner, where=where, seed=3, scale=inner**-0.5),
        normal(rows, where=where, seed=4) if with_bias else None,
        is_gated,
    )


def wide(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def assert_equals_the_reference(given, where):
    ours, expected, exact = (
        kernels.norm_linear(*given),
        reference.norm_linear(*given),
        reference.norm_linear(*wide(given)),
    )
    assert torch.equal(ours[1], expected[1])
    assert_kernel_is_right(ours[0], exact[0], expected[0])


@pytest.mark.parametrize(("inner", "outer"), PRODUCTS)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("kind", ["plain", "bias", "gated"])
def test_one_row_behind_a_norm_equals_the_reference(inner, outer, with_residual, kind, where):
    assert_equals_the_reference(inputs(inner, outer, with_residual, kind == "bias", kind == "gated", where), where)


def test_one_row_behind_a_norm_takes_inputs_of_any_strides(where):
    update, residual, _, eps, _, bias, is_gated = inputs(40, 6, True, True, False, where)
    strided = normal(40, 2, where=where)[:, 0], eps, normal(40, 6, where=where, seed=3).t()
    given = (update.t().contiguous().t(), residual.expand(1, 40), *strided, bias, is_gated)
    assert_equals_the_reference(given, where)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer", "kind"), [(2048, 2560, "bias"), (2048, 4096, ""), (2048, 11008, "gated")])
def test_one_row_behind_a_norm_equals_the_reference_at_real_shapes(inner, outer, kind, dtype):
    where = ("cuda", dtype)
    assert_equals_the_reference(inputs(inner, outer, True, kind == "bias", kind == "gated", where), where)


@pytest.mark.parametrize("kind", ["rows", "batch", "wide", "gated with a bias", "another dtype", "no residual"])
def test_what_the_kernel_does_not_take_goes_by_other_operations(kind, where):
    inner = 2056 if kind == "wide" else 24
    is_gated = kind == "gated with a bias"
    update, residual, norm, eps, weight, bias, _ = inputs(inner, 5, kind != "no residual", True, is_gated, where)
    if kind == "rows":
        update, residual = update.repeat(3, 1), residual.repeat(3, 1)
    if kind == "batch":
        update, residual = update[None], residual[None]
    if kind == "another dtype":
        norm = norm.double()
    given = (update, residual, norm, eps, weight, bias, is_gated)
    ours, expected = ops.norm_linear(*given), reference.norm_linear(*given)
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_gradients_go_through_a_norm_and_the_layer_behind_it(where):
    given = inputs(24, 5, True, True, False, ("cpu", torch.float64))
    wanted = [value.requires_grad_() for value in given if isinstance(value, torch.Tensor)]
    ours = torch.autograd.grad(sum(x.sin().sum() for x in ops.norm_linear(*given)), wanted)
    expected = torch.autograd.grad(sum(x.sin().sum() for x in reference.norm_linear(*given)), wanted)
    torch.testing.assert_close(ours, expected)
