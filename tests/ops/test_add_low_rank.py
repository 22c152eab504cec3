"""add_low_rank: the kernel equals the reference."""

import pytest
import torch

from tests.ops.support import kernels_of, normal
from tests.support import relative_error

kernels = kernels_of("add_low_rank")

pytestmark = pytest.mark.usefixtures("poisoned")


LOW_RANK_SHAPES = [(1, 1, 1), (5, 3, 7), (64, 16, 128), (65, 17, 129), (70, 130, 40), (0, 4, 9), (9, 4, 0)]


def check_add_low_rank(rows, rank, width, dtype, device, gap=3):
    """Into columns of a wider tensor, from columns of a wider one, by a matrix turned round; the rest stays."""
    whole = normal(rows, width + 2 * gap, where=(device, dtype))
    low = normal(rows, rank + gap, where=(device, torch.float32), seed=1)[:, gap:]
    factor = normal(width, rank, where=(device, torch.float32), seed=2).t()
    before, out = whole.clone(), whole[:, gap : gap + width]
    exact = out.double() + 0.3 * low.double() @ factor.double()
    plain = (out.float() + 0.3 * (low @ factor)).to(dtype)
    kernels.add_low_rank(out, low, factor, 0.3)
    if rows * width:
        tolerance = 1e-6 if dtype == torch.float32 else 1.001 * relative_error(plain, exact) + 1e-5
        assert relative_error(out, exact) <= tolerance
    assert torch.equal(whole[:, :gap], before[:, :gap]) and torch.equal(
        whole[:, gap + width :], before[:, gap + width :]
    )


@pytest.mark.parametrize("shape", LOW_RANK_SHAPES, ids=str)
def test_add_low_rank_equals_the_reference(shape, where):
    device, dtype = where
    check_add_low_rank(*shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2784, 16, 11008), (2784, 48, 2048), (333, 300, 3420)], ids=str)
def test_add_low_rank_at_real_shapes(shape, dtype):
    check_add_low_rank(*shape, dtype, "cuda", gap=8)
