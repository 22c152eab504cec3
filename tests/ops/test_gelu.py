"""gelu, quick_gelu, gelu_linear: the reference equals its formula, the kernels and their gradient the reference."""

import math

import pytest
import torch
from torch import nn

from qwen_batched import ops
from qwen_batched.linear.apply import apply_gelu_linear
from qwen_batched.ops import reference
from tests.ops.support import assert_kernel_is_right, exact_normal, kernels_of, normal, precision
from tests.support import assert_equal_to

kernels = kernels_of("quick_gelu")

pytestmark = pytest.mark.usefixtures("poisoned")

FORMULAS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}
forms = pytest.mark.parametrize("form", FORMULAS)
SHAPES = [(1,), (5, 90), (2, 3, 33), (3, 2048), (2049,), (0, 90)]


@precision
@forms
def test_a_gelu_equals_its_formula(form, dtype, tolerance):
    x = 3 * exact_normal(5, 33, dtype=dtype)
    expected = torch.tensor([FORMULAS[form](value) for value in x.flatten().tolist()], dtype=torch.float64)
    out = ops.gelu(x, form)
    assert out.dtype == dtype
    assert_equal_to(out, expected.view(x.shape), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quick_gelu_equals_the_reference(shape, where):
    check_quick_gelu(normal(*shape, where=where, scale=3), normal(*shape, where=where, seed=1))


def test_quick_gelu_takes_inputs_of_any_strides(where):
    check_quick_gelu(normal(80, 6, where=where).t(), normal(6, 160, where=where)[:, ::2])


def test_quick_gelu_is_right_where_an_exponential_overflows(where):
    check_quick_gelu(torch.tensor([-200.0, -60.0, 60.0, 200.0]).to(*where), torch.ones(4).to(*where))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_equals_the_reference_at_a_real_shape(dtype):
    where = ("cuda", dtype)
    check_quick_gelu(normal(16384, 5120, where=where), normal(16384, 5120, where=where, seed=1))


def check_quick_gelu(x, grad):
    assert_kernel_is_right(kernels.quick_gelu(x), reference.quick_gelu(x.double()), x * torch.sigmoid(1.702 * x))

    def autograds(dtype):
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(leaf * torch.sigmoid(1.702 * leaf), leaf, grad.to(dtype))[0]

    exact, plain = autograds(torch.float64), autograds(x.dtype)
    for module in (kernels, reference):
        assert_kernel_is_right(module.quick_gelu_backward(grad, x).contiguous(), exact, plain)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 8, 6), (5, 8, 6), (64, 128, 256), (3, 0, 5), (0, 8, 6)])
@forms
def test_gelu_linear_equals_the_reference(form, rows, inner, outer, with_bias, device):
    where = (device, torch.float32)
    x, weight = normal(rows, inner, where=where), normal(outer, inner, where=where, seed=1)
    bias = normal(outer, where=where, seed=2) if with_bias else None
    wide = [None if x is None else x.double() for x in (x, weight, bias)]
    assert_equal_to(ops.gelu_linear(x, weight, bias, (), form), reference.gelu_linear(*wide, (), form), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(16384, 1024, 4096), (256, 1152, 4304), (196, 1280, 5120)])
@forms
def test_gelu_linear_is_right_at_real_shapes(form, rows, inner, outer, dtype):
    where = ("cuda", dtype)
    x, weight = normal(rows, inner, where=where), normal(outer, inner, where=where, seed=1, scale=inner**-0.5)
    bias = normal(outer, where=where, seed=2)
    ours = ops.gelu_linear(x, weight, bias, (), form)
    exact = reference.gelu_linear(x.double(), weight.double(), bias.double(), (), form)
    plain = reference.gelu(torch.nn.functional.linear(x, weight, bias), form)

    def error(found):
        return float((found.double() - exact).norm() / exact.norm())

    assert ours.dtype == dtype
    assert error(ours) <= (1e-5 if dtype == torch.float32 else 1.02 * error(plain))


@forms
def test_gelu_linear_with_autocast_gives_what_the_layer_gives(form, device):
    layer, x = nn.Linear(64, 48).to(device), normal(9, 64).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16), torch.no_grad():
        ours, theirs = apply_gelu_linear(layer, x, form), reference.gelu(layer(x), form)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@forms
def test_a_hooked_layer_is_called(form, device):
    layer, x, calls = nn.Linear(8, 6).to(device), normal(5, 8).to(device), []
    layer.register_forward_hook(lambda *arguments: calls.append(arguments))
    with torch.no_grad():
        assert_equal_to(apply_gelu_linear(layer, x, form), reference.gelu(layer(x), form), 1e-6)
    assert len(calls) == 2
