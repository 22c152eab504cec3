"""decode_attention: the reference equals its formula, the kernel the reference."""

import pytest
import torch

from qwen_batched.ops import reference
from tests.ops.support import (
    assert_kernel_is_right,
    causal_attention_formula,
    exact_normal,
    kernels_of,
    normal,
    plain_norm,
    plain_rotation,
    precision,
    rope_tables,
)
from tests.support import assert_equal_to

kernels = kernels_of("decode_attention")

pytestmark = pytest.mark.usefixtures("poisoned")


@precision
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 2), (4, 2, 16), (3, 1, 6)])
def test_decode_attention_equals_its_formula(heads, key_heads, size, dtype, tolerance):
    lengths = [0, 4, 6]
    qkv = exact_normal(3, (heads + 2 * key_heads) * size, dtype=dtype)
    cos, sin = exact_normal(3, size // 2, seed=1).cos().to(dtype), exact_normal(3, size // 2, seed=1).sin().to(dtype)
    before = [exact_normal(3, 7, key_heads, size, dtype=dtype, seed=seed) for seed in (2, 3)]
    keys, values = (cache.clone() for cache in before)
    ours = reference.decode_attention(qkv, cos, sin, keys, values, torch.tensor(lengths))
    q, k, v = reference.mrope(qkv, cos, sin, key_heads).view(3, -1, size).split([heads, key_heads, key_heads], dim=1)
    for sample, length in enumerate(lengths):
        for cache, old, new in ((keys, before[0], k), (values, before[1], v)):
            assert torch.equal(cache[sample, length], new[sample])
            others = [slot for slot in range(7) if slot != length]
            assert torch.equal(cache[sample, others], old[sample, others]), "older tokens stay"
        seen = (keys[sample : sample + 1, : length + 1], values[sample : sample + 1, : length + 1])
        everything = torch.ones(1, length + 1, dtype=torch.bool)
        expected = causal_attention_formula(q[sample : sample + 1, None], *seen, everything)
        assert_equal_to(ours[sample : sample + 1], expected[:, 0], tolerance)


HEADS = [(1, 1, 2), (4, 2, 16), (6, 2, 40), (3, 1, 80), (16, 2, 128), (2, 2, 6)]  # queries, keys, size


def decode_case(lengths, capacity, heads, kv_heads, size, where, scale=1.0):
    batch = len(lengths)
    qkv = normal(batch, (heads + 2 * kv_heads) * size, where=where, scale=scale)
    keys, values = (normal(batch, capacity, kv_heads, size, where=where, seed=seed) for seed in (1, 2))
    return qkv, *rope_tables(batch, size, where[0]), keys, values, torch.tensor(lengths, device=where[0])


def plain_decoding(qkv, cos, sin, keys, values, lengths, q_norm=None, k_norm=None, eps=0.0):
    batch, capacity, kv_heads, size = keys.shape
    heads = qkv.unflatten(-1, (-1, size))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = plain_norm(q, q_norm, None, eps), plain_norm(k, k_norm, None, eps)
    samples = torch.arange(batch, device=qkv.device)
    keys[samples, lengths], values[samples, lengths] = plain_rotation(k, cos, sin), v
    q = plain_rotation(q, cos, sin)
    keys, values = (x.transpose(1, 2).repeat_interleave(q.shape[1] // kv_heads, dim=1) for x in (keys, values))
    scores = (q[:, :, None] @ keys.transpose(-1, -2)) * size**-0.5
    unseen = torch.arange(capacity, device=qkv.device) > lengths[:, None]
    return (scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values).flatten(1)


def check_decoding(qkv, cos, sin, keys, values, lengths, with_norms=False):
    size, where = keys.shape[-1], (qkv.device, qkv.dtype)
    norms = [normal(size, where=where, seed=seed) for seed in (7, 8)] if with_norms else [None, None]
    caches = [tuple(x.clone() for x in (keys, values)) for _ in range(3)]
    tickets = torch.zeros(keys.shape[0] * keys.shape[2], dtype=torch.int32, device=qkv.device)
    wide = [x.double() for x in (qkv, cos, sin)]
    exact_cache = [x.double() for x in caches[0]]
    exact = reference.decode_attention(
        *wide, *exact_cache, lengths, None, *(x if x is None else x.double() for x in norms), 1e-6
    )
    plain = plain_decoding(qkv, cos, sin, *caches[1], lengths, *norms, 1e-6)
    ours = kernels.decode_attention(qkv, cos, sin, *caches[2], lengths, tickets, *norms, 1e-6)
    assert_kernel_is_right(ours, exact, plain)
    for mine, theirs, rounded in zip(caches[2], exact_cache, caches[1], strict=True):
        assert_kernel_is_right(mine, theirs, rounded)
    older = torch.arange(keys.shape[1], device=qkv.device) != lengths[:, None]
    assert all(torch.equal(mine[older], x[older]) for mine, x in zip(caches[2], (keys, values), strict=True))
    assert not tickets.any()


@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("lengths", [[0], [1, 4, 0], [63, 64, 65], [149, 3]], ids=str)
def test_decode_attention_equals_the_reference(lengths, heads, kv_heads, size, with_norms, where):
    check_decoding(*decode_case(lengths, max(lengths) + 1, heads, kv_heads, size, where), with_norms)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_decode_attention_is_right_however_the_context_is_split(parts, where, monkeypatch):
    monkeypatch.setattr(kernels, "_parts", lambda heads, capacity: parts)
    check_decoding(*decode_case([0, 70, 299], 300, 4, 2, 16, where))


@pytest.mark.slow
def test_decode_attention_does_not_read_past_a_samples_tokens(where):
    qkv, cos, sin, keys, values, lengths = decode_case([2, 70], 90, 4, 2, 16, where)
    clean, dirty = [(keys.clone(), values.clone()) for _ in range(2)]
    for sample, length in enumerate(lengths.tolist()):
        for cache in dirty:
            cache[sample, length + 1 :] = torch.nan
    tickets = torch.zeros(4, dtype=torch.int32, device=where[0])
    outs = [kernels.decode_attention(qkv, cos, sin, *cache, lengths, tickets) for cache in (clean, dirty)]
    assert torch.equal(*outs)


def test_decode_attention_is_right_where_one_score_towers_over_all_others(where):
    check_decoding(*decode_case([5, 130], 200, 4, 2, 16, where, scale=50.0))


@pytest.mark.slow
def test_one_sample_decodes_as_it_does_among_others(where):
    qkv, cos, sin, keys, values, lengths = decode_case([7, 100, 20], 128, 4, 2, 16, where)
    tickets = torch.zeros(6, dtype=torch.int32, device=where[0])
    together = kernels.decode_attention(qkv, cos, sin, keys.clone(), values.clone(), lengths, tickets)
    for sample in range(3):
        one = (x[sample : sample + 1] for x in (qkv, cos, sin, keys.clone(), values.clone(), lengths))
        alone = kernels.decode_attention(*one, tickets[:2])
        assert torch.equal(alone[0], together[sample])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "capacity"), [(1, 430), (16, 512), (1, 9000)])
@pytest.mark.parametrize(("heads", "kv_heads", "with_norms"), [(16, 2, False), (32, 8, True)])
def test_decode_attention_equals_the_reference_at_real_shapes(batch, capacity, heads, kv_heads, with_norms, dtype):
    lengths = torch.randint(0, capacity, (batch,), generator=torch.Generator().manual_seed(0)).tolist()
    case = decode_case([*lengths[1:], capacity - 1], capacity, heads, kv_heads, 128, ("cuda", dtype))
    for _ in range(3):
        check_decoding(*case, with_norms)


def test_a_full_cache_loses_nothing(where):
    """What does not fit is not written into the next sample's place."""
    qkv, cos, sin, keys, values, lengths = decode_case([3, 1], 3, 2, 1, 16, where)
    keys_before, values_before = keys.clone(), values.clone()
    kernels.decode_attention(qkv, cos, sin, keys, values, lengths, torch.zeros(2, dtype=torch.int32, device=where[0]))
    keys_before[1, 1], values_before[1, 1] = keys[1, 1], values[1, 1]
    assert torch.equal(keys, keys_before) and torch.equal(values, values_before)
