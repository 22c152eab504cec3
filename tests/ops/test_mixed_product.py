"""mixed_product: the kernel equals the reference."""

import itertools

import pytest
import torch

from tests.ops.support import kernels_of, normal
from tests.support import assert_equal_to

kernels = kernels_of("mixed_product")

pytestmark = pytest.mark.usefixtures("poisoned")


MIXED_SHAPES = [(1, 1, 1), (5, 3, 7), (64, 64, 16), (65, 300, 17), (130, 65, 70), (0, 4, 9), (4, 0, 9)]


def check_mixed_product(rows, inner, rank, device, dtype):
    """Matrices as they lie, turned round, and columns of wider ones."""
    where, wide = (device, dtype), (device, torch.float32)
    xs = [
        normal(rows, inner, where=where),
        normal(inner, rows, where=where, seed=1).t(),
        normal(rows, inner + 3, where=where, seed=2)[:, 3:],
    ]
    ys = [normal(inner, rank, where=wide, seed=3), normal(rank, inner + 1, where=wide, seed=4)[:, 1:].t()]
    for x, y in itertools.product(xs, ys):
        exact = 0.3 * x.double() @ y.double()
        for turned in (False, True):
            found = kernels.mixed_product(x, y, 0.3, turned)
            assert found.dtype == torch.float32 and found.is_contiguous()
            expected = exact.t() if turned else exact
            assert found.shape == expected.shape
            if expected.numel():
                assert_equal_to(found, expected, 2e-6)


@pytest.mark.parametrize("shape", MIXED_SHAPES, ids=str)
def test_mixed_product_equals_the_reference(shape, where):
    check_mixed_product(*shape, where[0], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2784, 11008, 16), (2784, 2048, 48), (256, 2784, 16), (33, 9001, 130)], ids=str)
def test_mixed_product_at_real_shapes(shape, dtype):
    check_mixed_product(*shape, "cuda", dtype)
