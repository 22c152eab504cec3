"""causal_attention: the reference equals its formula."""

import math

import pytest
import torch

from qwen_batched import ops
from qwen_batched.ops import reference
from tests.ops.support import assert_no_worse_than_bfloat16, causal_attention_formula, exact_normal, precision
from tests.support import assert_equal_to


@precision
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 2), (4, 2, 16), (3, 1, 8), (3, 3, 10)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_attention_equals_its_formula(heads, key_heads, size, length, dtype, tolerance):
    q = 2 * exact_normal(2, length, heads, size, dtype=dtype)
    k, v = (2 * exact_normal(2, length, key_heads, size, dtype=dtype, seed=seed) for seed in (1, 2))
    out = ops.causal_attention(q, k, v)
    assert out.dtype == dtype
    assert_equal_to(out, causal_attention_formula(q, k, v), tolerance)


@precision
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("length", [1, 3])
def test_attention_to_visible_keys_equals_its_formula(heads, key_heads, length, dtype, tolerance):
    visible = torch.tensor([[True, False, True, True, False], [False, False, False, False, True], [True] * 5])
    q = 2 * exact_normal(3, length, heads, 8, dtype=dtype)
    k, v = (2 * exact_normal(3, 5, key_heads, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    out = reference.causal_attention(q, k, v, visible)
    assert_equal_to(out, causal_attention_formula(q, k, v, visible), tolerance)


@pytest.mark.parametrize("with_visible", [True, False])
def test_causal_attention_in_bfloat16_is_as_exact_as_the_plain_expression(with_visible):
    q = exact_normal(2, 9, 4, 16, dtype=torch.bfloat16)
    k, v = (exact_normal(2, 9, 2, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    visible = torch.tensor([[True] * 6 + [False] * 3, [True] * 9]) if with_visible else None
    ours = reference.causal_attention(q, k, v, visible)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    scores = q_ @ k_.transpose(-1, -2) / math.sqrt(16)
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if visible is None else visible[:, None, None]
    plain = (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v_).transpose(1, 2).flatten(2)
    assert_no_worse_than_bfloat16(ours, plain, causal_attention_formula(q, k, v, visible))
