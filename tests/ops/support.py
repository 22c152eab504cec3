"""Inputs of operations, formulas written out plainly, and when results are right."""

import importlib
import importlib.util
import math

import pytest
import torch

from tests.support import FLOAT32_TOLERANCE, assert_equal_to, relative_error

# A kernel may round in other places than the plain bfloat16 expression, but must not be much worse than it.
BFLOAT16_ALLOWANCE = 2.0
# Of a handful of values the plain expression may round all luckily; one rounding to bfloat16 is up to 2**-8.
FEW, FEW_BFLOAT16 = 100, 2**-8


def normal(*shape, where=("cpu", torch.float32), seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(*where)


def exact_normal(*shape, dtype=torch.float64, seed=0):
    """Drawn in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


# Float64 sums of a few thousand terms in another order.
FLOAT64_TOLERANCE = 1e-12
PRECISIONS = [(torch.float64, FLOAT64_TOLERANCE), (torch.float32, FLOAT32_TOLERANCE)]
precision = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])


def assert_no_worse_than_bfloat16(ours, plain, exact):
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= BFLOAT16_ALLOWANCE * relative_error(plain, exact)


def rotation_formula(x, cos, sin):
    """Turns (x[j], x[j + E / 2]) as one complex number by the angle of frequency j."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention_formula(query, keys, values):
    """One query (E,) over keys and values (S, E)."""
    scores = keys.double() @ query.double() / math.sqrt(len(query))
    weights = torch.exp(scores - scores.max())
    return weights / weights.sum() @ values.double()


def causal_attention_formula(q, k, v, visible=None):
    batch, length, heads, size = q.shape
    shared = heads // k.shape[2]  # query heads that share one key head
    out = torch.empty(batch, length, heads * size, dtype=torch.float64)
    for sample in range(batch):
        for head in range(heads):
            for token in range(length):
                seen = slice(0, token + 1) if visible is None else visible[sample].nonzero()[:, 0]
                keys, values = (x[sample, seen, head // shared] for x in (k, v))
                out[sample, token, head * size : (head + 1) * size] = attention_formula(
                    q[sample, token, head], keys, values
                )
    return out


def plain_norm(x, weight, bias, eps):
    """RMSNorm, or LayerNorm with a bias, in the dtype of `x` throughout."""
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return normed if bias is None else normed + bias


def plain_rotation(x, cos, sin):
    """In the dtype of `x`, operation by operation."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


class WithoutTriton:
    """In place of a module of kernels."""

    def __getattr__(self, name):
        pytest.skip("needs Triton")


def kernels_of(name):
    """The module `qwen_batched.ops.triton.<name>`; the reference is tested without Triton too."""
    has_triton = importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"qwen_batched.ops.triton.{name}") if has_triton else WithoutTriton()
