"""swiglu: the reference equals its formula, the kernels and their gradient the reference."""

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

kernels = kernels_of("swiglu")

pytestmark = pytest.mark.usefixtures("poisoned")


def swiglu_formula(gate, up):
    gate = gate.double()
    return gate / (1 + torch.exp(-gate)) * up.double()


@precision
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 90), (5, 33)])
def test_swiglu_equals_its_formula(shape, dtype, tolerance):
    gate, up = 3 * exact_normal(*shape, dtype=dtype), exact_normal(*shape, dtype=dtype, seed=1)
    out = ops.swiglu(gate, up)
    assert out.dtype == dtype
    assert_equal_to(out, swiglu_formula(gate, up), tolerance)


def test_swiglu_in_bfloat16_is_as_exact_as_the_plain_expression():
    gate, up = (3 * exact_normal(64, 90, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    plain = gate / (1 + torch.exp(-gate)) * up
    assert_no_worse_than_bfloat16(ops.swiglu(gate, up), plain, swiglu_formula(gate, up))


SWIGLU_SHAPES = [(1, 1), (5, 90), (2, 3, 33), (7,), (3, 2048), (2, 3420), (2, 3456), (1, 5000), (0, 90), (2, 0, 3)]


def check_swiglu(gate, up, gate_bias=None, up_bias=None):
    ours = kernels.swiglu(gate, up, gate_bias, up_bias)
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

    for found in (kernels.swiglu_backward(grad, gate, up), reference.swiglu_backward(grad, gate, up)):
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
    kernels.swiglu(*inputs)
    assert all(map(torch.equal, inputs, before))


def test_swiglu_stays_finite_far_from_zero(where):
    gate = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4]]).to(*where)
    ones = torch.ones_like(gate)
    assert_equal_to(kernels.swiglu(gate, ones), reference.swiglu(gate.double(), ones.double()), 2**-8)
    # The same, all of it from the bias.
    assert_equal_to(
        kernels.swiglu(torch.zeros_like(gate), ones, gate[0], ones[0]),
        2 * reference.swiglu(gate.double(), ones.double()),
        2**-8,
    )
