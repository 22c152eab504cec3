"""Inputs of kernels, and when their results are right."""

import torch

from tests.support import FLOAT32_TOLERANCE, assert_equal_to, relative_error

# A kernel may round in other places than the plain bfloat16 expression, but must not be much worse than it.
BFLOAT16_ALLOWANCE = 2.0
# Of a handful of values the plain expression may round all luckily; one rounding to bfloat16 is up to 2**-8.
FEW, FEW_BFLOAT16 = 100, 2**-8


def normal(*shape, where=("cpu", torch.float32), seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(*where)


def assert_kernel_is_right(ours, exact, plain):
    """float32 within rounding of `exact`; bfloat16 no worse than twice the `plain` bfloat16 expression."""
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    if ours.numel() == 0:
        return
    if ours.dtype == torch.float32:
        assert_equal_to(ours, exact, FLOAT32_TOLERANCE)
        return
    assert ours.dtype == plain.dtype == torch.bfloat16
    allowed = BFLOAT16_ALLOWANCE * relative_error(plain, exact)
    allowed = max(allowed, FEW_BFLOAT16) if ours.numel() < FEW else allowed
    assert relative_error(ours, exact) <= allowed


def rope_tables(tokens, size, device):
    angles = 3 * normal(tokens, size // 2, seed=9)
    return angles.cos().to(device), angles.sin().to(device)
