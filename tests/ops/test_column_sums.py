"""column_sums: the kernel equals PyTorch's sum over rows."""

import pytest
import torch

from qwen_batched.ops.column_sums import column_sums
from tests.ops.support import assert_kernel_is_right, kernels_of, normal

kernels = kernels_of("column_sums")

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x, dtype):
    assert_kernel_is_right(kernels.column_sums(x, dtype), x.double().sum(0), x.to(torch.bfloat16).sum(0))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 32), (256, 33), (257, 5), (4097, 3)])
def test_column_sums_equal_pytorchs(rows, columns, where):
    check(normal(rows, columns, where=where), where[1])


def test_columns_of_a_wider_tensor_and_a_transposed_one(where):
    check(normal(9, 40, where=where)[:, 3:36], where[1])
    check(normal(40, 9, where=where).t(), where[1])


def test_parts_are_summed_in_float32(where):
    check(normal(300, 70, where=(where[0], torch.float32)), where[1])


def test_what_kernels_do_not_take_is_pytorchs(device):
    for x in (normal(0, 3), normal(4, 3, where=("cpu", torch.float64)), normal(4, 3).requires_grad_()):
        x = x.to(device)
        assert torch.equal(column_sums(x), x.sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 3840), (1440, 2560), (65537, 1280), (512, 2048)], ids=str)
def test_column_sums_at_real_shapes(shape, dtype):
    x = normal(*shape, where=("cuda", dtype))
    ours, exact = column_sums(x), x.double().sum(0)
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= 1.5 * (x.sum(0) - exact).norm() + 1e-6 * exact.norm()
