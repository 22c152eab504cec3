"""The decoder's Triton kernels equal their references: rope, decoding from a cache, products of a single row."""

import pytest
import torch

from qwen_batched import ops
from qwen_batched.ops import reference
from tests.kernels.support import assert_kernel_is_right, normal, rope_tables

launchers = pytest.importorskip("qwen_batched.ops.triton.launchers", reason="needs Triton")
module = pytest.importorskip("qwen_batched.ops.triton.decode_attention")

pytestmark = pytest.mark.usefixtures("poisoned")

HEADS = [(1, 1, 2), (4, 2, 16), (6, 2, 40), (3, 1, 80), (16, 2, 128), (2, 2, 6)]  # queries, keys, size


# --- mrope ---


def plain_rotation(x, cos, sin):
    """In the dtype of `x`, operation by operation."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def check_mrope(qkv, size, kv_heads, slots=None, rows=None):
    cos, sin = rope_tables(len(qkv), size, qkv.device)
    ours = launchers.mrope(qkv, cos, sin, kv_heads, slots, len(qkv) if slots is None else rows)
    exact = reference.mrope(qkv.double(), cos.double(), sin.double(), kv_heads, slots, rows)
    heads = qkv.unflatten(-1, (-1, size))
    plain = torch.cat([plain_rotation(heads[:, :-kv_heads], cos, sin), heads[:, -kv_heads:]], dim=1).flatten(1)
    if slots is not None:
        plain = plain.new_zeros(rows, plain.shape[1]).index_copy(0, slots, plain)
    assert_kernel_is_right(ours, exact, plain)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_mrope_equals_the_reference(tokens, heads, kv_heads, size, where):
    check_mrope(normal(tokens, (heads + 2 * kv_heads) * size, where=where), size, kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_mrope_puts_tokens_into_their_rows_and_zeros_elsewhere(heads, kv_heads, size, where):
    qkv = normal(5, (heads + 2 * kv_heads) * size, where=where)
    check_mrope(qkv, size, kv_heads, torch.tensor([8, 0, 3, 2, 1], device=where[0]), rows=9)


def test_mrope_takes_inputs_of_any_strides(where):
    check_mrope(normal(96, 5, where=where).t(), 16, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mrope_equals_the_reference_at_the_real_shape(dtype):
    check_mrope(normal(1025, 2560, where=("cuda", dtype)), 128, 2)


# --- decode_attention ---


def decode_case(lengths, capacity, heads, kv_heads, size, where, scale=1.0):
    batch = len(lengths)
    qkv = normal(batch, (heads + 2 * kv_heads) * size, where=where, scale=scale)
    keys, values = (normal(batch, capacity, kv_heads, size, where=where, seed=seed) for seed in (1, 2))
    return qkv, *rope_tables(batch, size, where[0]), keys, values, torch.tensor(lengths, device=where[0])


def plain_decoding(qkv, cos, sin, keys, values, lengths):
    batch, capacity, kv_heads, size = keys.shape
    heads = qkv.unflatten(-1, (-1, size))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    samples = torch.arange(batch, device=qkv.device)
    keys[samples, lengths], values[samples, lengths] = plain_rotation(k, cos, sin), v
    q = plain_rotation(q, cos, sin)
    keys, values = (x.transpose(1, 2).repeat_interleave(q.shape[1] // kv_heads, dim=1) for x in (keys, values))
    scores = (q[:, :, None] @ keys.transpose(-1, -2)) * size**-0.5
    unseen = torch.arange(capacity, device=qkv.device) > lengths[:, None]
    return (scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values).flatten(1)


def check_decoding(qkv, cos, sin, keys, values, lengths):
    caches = [tuple(x.clone() for x in (keys, values)) for _ in range(3)]
    tickets = torch.zeros(keys.shape[0] * keys.shape[2], dtype=torch.int32, device=qkv.device)
    wide = [x.double() for x in (qkv, cos, sin)]
    exact_cache = [x.double() for x in caches[0]]
    exact = reference.decode_attention(*wide, *exact_cache, lengths)
    plain = plain_decoding(qkv, cos, sin, *caches[1], lengths)
    ours = launchers.decode_attention(qkv, cos, sin, *caches[2], lengths, tickets)
    assert_kernel_is_right(ours, exact, plain)
    for mine, theirs, rounded in zip(caches[2], exact_cache, caches[1], strict=True):
        assert_kernel_is_right(mine, theirs, rounded)
    older = torch.arange(keys.shape[1], device=qkv.device) != lengths[:, None]
    assert all(torch.equal(mine[older], x[older]) for mine, x in zip(caches[2], (keys, values), strict=True))
    assert not tickets.any()


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("lengths", [[0], [1, 4, 0], [63, 64, 65], [149, 3]], ids=str)
def test_decode_attention_equals_the_reference(lengths, heads, kv_heads, size, where):
    check_decoding(*decode_case(lengths, max(lengths) + 1, heads, kv_heads, size, where))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_decode_attention_is_right_however_the_context_is_split(parts, where, monkeypatch):
    monkeypatch.setattr(module, "_parts", lambda heads, capacity: parts)
    check_decoding(*decode_case([0, 1, 70, 200, 299], 300, 4, 2, 16, where))


def test_decode_attention_does_not_read_past_a_samples_tokens(where):
    qkv, cos, sin, keys, values, lengths = decode_case([2, 70], 90, 4, 2, 16, where)
    clean, dirty = [(keys.clone(), values.clone()) for _ in range(2)]
    for sample, length in enumerate(lengths.tolist()):
        for cache in dirty:
            cache[sample, length + 1 :] = torch.nan
    tickets = torch.zeros(4, dtype=torch.int32, device=where[0])
    outs = [launchers.decode_attention(qkv, cos, sin, *cache, lengths, tickets) for cache in (clean, dirty)]
    assert torch.equal(*outs)


def test_decode_attention_is_right_where_one_score_towers_over_all_others(where):
    check_decoding(*decode_case([5, 130], 200, 4, 2, 16, where, scale=50.0))


def test_one_sample_decodes_as_it_does_among_others(where):
    qkv, cos, sin, keys, values, lengths = decode_case([7, 100, 20], 128, 4, 2, 16, where)
    tickets = torch.zeros(6, dtype=torch.int32, device=where[0])
    together = launchers.decode_attention(qkv, cos, sin, keys.clone(), values.clone(), lengths, tickets)
    for sample in range(3):
        one = (x[sample : sample + 1] for x in (qkv, cos, sin, keys.clone(), values.clone(), lengths))
        alone = launchers.decode_attention(*one, tickets[:2])
        assert torch.equal(alone[0], together[sample])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "capacity"), [(1, 430), (16, 512), (1, 9000)])
def test_decode_attention_equals_the_reference_at_real_shapes(batch, capacity, dtype):
    lengths = torch.randint(0, capacity, (batch,), generator=torch.Generator().manual_seed(0)).tolist()
    case = decode_case([*lengths[1:], capacity - 1], capacity, 16, 2, 128, ("cuda", dtype))
    for _ in range(3):
        check_decoding(*case)


# --- linear, swiglu_linear ---

PRODUCTS = [(1, 1), (7, 3), (80, 40), (33, 90), (2048, 24), (1100, 9)]  # inner, outer


@pytest.mark.parametrize(("inner", "outer"), PRODUCTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_one_row_times_weights_equals_the_reference(inner, outer, with_bias, where):
    x, weight = normal(1, inner, where=where), normal(outer, inner, where=where, seed=1)
    bias = normal(outer, where=where, seed=2) if with_bias else None
    exact = reference.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_kernel_is_right(launchers.linear(x, weight, bias), exact, reference.linear(x, weight, bias))


@pytest.mark.parametrize(("inner", "outer"), PRODUCTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_one_row_through_a_gated_product_equals_the_reference(inner, outer, with_bias, where):
    x, weight = normal(1, inner, where=where), normal(2 * outer, inner, where=where, seed=1, scale=inner**-0.5)
    biases = [normal(outer, where=where, seed=seed) if with_bias else None for seed in (2, 3)]
    exact = reference.swiglu_linear(x.double(), weight.double(), *(b.double() if with_bias else None for b in biases))
    ours = launchers.swiglu_linear(x, weight, *biases)
    assert_kernel_is_right(ours, exact, reference.swiglu_linear(x, weight, *biases))


def test_one_row_takes_inputs_of_any_strides(where):
    x, weight = normal(40, 2, where=where)[:, :1].t(), normal(40, 6, where=where, seed=1).t()
    exact = reference.linear(x.double(), weight.double())
    assert_kernel_is_right(launchers.linear(x, weight), exact, reference.linear(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(2048, 2560), (11008, 2048), (2048, 22016)])
def test_one_row_equals_the_reference_at_real_shapes(inner, outer, dtype):
    where = ("cuda", dtype)
    x, weight = normal(1, inner, where=where), normal(outer, inner, where=where, seed=1, scale=0.02)
    exact = reference.linear(x.double(), weight.double())
    assert_kernel_is_right(launchers.linear(x, weight), exact, reference.linear(x, weight))
    exact = reference.swiglu_linear(x.double(), weight.double())
    assert_kernel_is_right(launchers.swiglu_linear(x, weight, None, None), exact, reference.swiglu_linear(x, weight))


# --- what the operations leave to others ---


@pytest.mark.parametrize(
    ("weight", "bias"), [((6, 16), None), ((6, 8), (3,)), ((6, 8), (12,))], ids=["inner", "short bias", "long bias"]
)
def test_one_row_that_does_not_fit_is_refused(weight, bias, where):
    """The kernel walks the weight in steps of the row's width, and would take what it finds."""
    x, weight = normal(1, 8, where=where), normal(*weight, where=where)
    bias = None if bias is None else normal(*bias, where=where)
    with pytest.raises(RuntimeError):
        ops.linear(x, weight, bias)


def test_a_full_cache_loses_nothing(where):
    """What does not fit is not written into the next sample's place."""
    qkv, cos, sin, keys, values, lengths = decode_case([3, 1], 3, 2, 1, 16, where)
    keys_before, values_before = keys.clone(), values.clone()
    launchers.decode_attention(qkv, cos, sin, keys, values, lengths, torch.zeros(2, dtype=torch.int32, device=where[0]))
    keys_before[1, 1], values_before[1, 1] = keys[1, 1], values[1, 1]
    assert torch.equal(keys, keys_before) and torch.equal(values, values_before)
