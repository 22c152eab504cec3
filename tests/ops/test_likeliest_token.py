"""likeliest_token: the kernel equals the reference, to the last token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_batched import ops
from qwen_batched.ops import reference
from tests.ops.support import kernels_of, normal

kernels = kernels_of("likeliest_token")

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_same(logits, forbidden=None):
    ours, expected = kernels.likeliest_token(logits, forbidden), reference.likeliest_token(logits, forbidden)
    assert torch.equal(ours[1], expected[1])
    finite = expected[1]
    assert torch.equal(ours[0][finite], expected[0][finite])
    assert ((ours[0] >= 0) & (ours[0] < logits.shape[1])).all()


@pytest.mark.parametrize("width", [1, 70, 1024, 1025, 3000])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("mask", ["none", "one", "each"])
def test_the_likeliest_token_is_the_references(rows, width, mask, where):
    logits = normal(rows, width, where=where)
    forbidden = None if mask == "none" else normal(1 if mask == "one" else rows, width, where=where, seed=1) > 0.5
    assert_same(logits, forbidden)


def test_of_equal_logits_the_first_is_chosen(where):
    logits = torch.zeros(2, 2100, dtype=where[1], device=where[0])
    logits[0, 1500:] = logits[1, 7::500] = 1
    tokens, _ = kernels.likeliest_token(logits, None)
    assert tokens.tolist() == [1500, 7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1023, 1030, 2099])
def test_a_logit_that_is_not_finite_is_told_and_the_token_is_of_the_vocabulary(bad, place, where):
    logits = normal(3, 2100, where=where)
    logits[1, place] = bad
    assert_same(logits)
    assert kernels.likeliest_token(logits, None)[1].tolist() == [True, False, True]
    assert_same(torch.full_like(logits, bad))


def test_a_forbidden_logit_that_is_not_finite_is_told_too(where):
    logits, forbidden = normal(1, 40, where=where), torch.zeros(1, 40, dtype=torch.bool, device=where[0])
    logits[0, 3], forbidden[0, 3] = float("nan"), True
    assert not kernels.likeliest_token(logits, forbidden)[1].item()


def test_large_logits_are_finite(where):
    logits = torch.full((1, 2100), torch.finfo(where[1]).max, dtype=where[1], device=where[0])
    assert_same(logits)
    assert kernels.likeliest_token(logits, None)[1].item()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.data())
def test_ties_and_masks_of_any_form(values, data):
    logits = torch.tensor([values], dtype=torch.float32)
    forbidden = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))])
    tokens, is_finite = ops.likeliest_token(logits, forbidden)
    allowed = [value if not ban else float("-inf") for value, ban in zip(values, forbidden[0].tolist(), strict=True)]
    assert tokens.item() == allowed.index(max(allowed))
    assert is_finite.item()
