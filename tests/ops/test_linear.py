"""linear and swiglu_linear of a single row: the kernels equal the reference."""

import pytest
import torch

from qwen_batched import ops
from qwen_batched.ops import reference
from tests.ops.support import assert_kernel_is_right, kernels_of, normal

kernels = kernels_of("linear")

pytestmark = pytest.mark.usefixtures("poisoned")


PRODUCTS = [(1, 1), (7, 3), (80, 40), (33, 90), (2048, 24), (1100, 9)]  # inner, outer


@pytest.mark.parametrize(("inner", "outer"), PRODUCTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_one_row_times_weights_equals_the_reference(inner, outer, with_bias, where):
    x, weight = normal(1, inner, where=where), normal(outer, inner, where=where, seed=1)
    bias = normal(outer, where=where, seed=2) if with_bias else None
    exact = reference.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_kernel_is_right(kernels.linear(x, weight, bias), exact, reference.linear(x, weight, bias))


@pytest.mark.parametrize(("inner", "outer"), PRODUCTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_one_row_through_a_gated_product_equals_the_reference(inner, outer, with_bias, where):
    x, weight = normal(1, inner, where=where), normal(2 * outer, inner, where=where, seed=1, scale=inner**-0.5)
    biases = [normal(outer, where=where, seed=seed) if with_bias else None for seed in (2, 3)]
    exact = reference.swiglu_linear(x.double(), weight.double(), *(b.double() if with_bias else None for b in biases))
    ours = kernels.swiglu_linear(x, weight, *biases)
    assert_kernel_is_right(ours, exact, reference.swiglu_linear(x, weight, *biases))


def test_one_row_takes_inputs_of_any_strides(where):
    x, weight = normal(40, 2, where=where)[:, :1].t(), normal(40, 6, where=where, seed=1).t()
    exact = reference.linear(x.double(), weight.double())
    assert_kernel_is_right(kernels.linear(x, weight), exact, reference.linear(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(2048, 2560), (11008, 2048), (2048, 22016)])
def test_one_row_equals_the_reference_at_real_shapes(inner, outer, dtype):
    where = ("cuda", dtype)
    x, weight = normal(1, inner, where=where), normal(outer, inner, where=where, seed=1, scale=0.02)
    exact = reference.linear(x.double(), weight.double())
    assert_kernel_is_right(kernels.linear(x, weight), exact, reference.linear(x, weight))
    exact = reference.swiglu_linear(x.double(), weight.double())
    assert_kernel_is_right(kernels.swiglu_linear(x, weight, None, None), exact, reference.swiglu_linear(x, weight))


@pytest.mark.parametrize(
    ("weight", "bias"), [((6, 16), None), ((6, 8), (3,)), ((6, 8), (12,))], ids=["inner", "short bias", "long bias"]
)
def test_one_row_that_does_not_fit_is_refused(weight, bias, where):
    """The kernel walks the weight in steps of the row's width, and would take what it finds."""
    x, weight = normal(1, 8, where=where), normal(*weight, where=where)
    bias = None if bias is None else normal(*bias, where=where)
    with pytest.raises(RuntimeError):
        ops.linear(x, weight, bias)
