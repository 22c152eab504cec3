"""extend_attention: the reference equals its formula, the kernel the reference, and the cache stays as it is."""

import pytest
import torch

from qwen_batched.ops import reference
from tests.ops.support import (
    assert_kernel_is_right,
    exact_normal,
    kernels_of,
    normal,
    plain_norm,
    plain_rotation,
    precision,
    rope_tables,
)
from tests.support import assert_equal_to

kernels = kernels_of("extend_attention")

pytestmark = pytest.mark.usefixtures("poisoned")
HEADS = [(1, 1, 2, False), (4, 2, 16, True), (6, 2, 40, False), (16, 2, 128, True)]  # queries, keys, size, norms


def case(lengths, capacity, tokens, heads, kv_heads, size, where, scale=1.0):
    batch = len(lengths)
    qkv = normal(batch * tokens, (heads + 2 * kv_heads) * size, where=where, scale=scale)
    keys, values = (normal(batch, capacity, kv_heads, size, where=where, seed=seed) for seed in (1, 2))
    return qkv, *rope_tables(batch * tokens, size, where[0]), keys, values, torch.tensor(lengths, device=where[0])


def formula(qkv, cos, sin, keys, values, lengths, causal, visible, q_norm=None, k_norm=None, eps=0.0):
    """One sample, head and query after the other."""
    batch, capacity, kv_heads, size = keys.shape
    heads = qkv.unflatten(-1, (-1, size))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = plain_norm(q, q_norm, None, eps), plain_norm(k, k_norm, None, eps)
    q, k = plain_rotation(q, cos, sin), plain_rotation(k, cos, sin)
    q, k, v = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
    tokens, group = q.shape[1], q.shape[2] // kv_heads
    out = torch.zeros_like(q)
    for b in range(batch):
        length = int(lengths[b])
        for t in range(tokens):
            new = [j for j in range(tokens) if (j <= t or not causal)]
            old = list(range(length))
            if visible is not None:
                new = [j for j in new if visible[b, t, capacity + j]]
                old = [j for j in old if visible[b, t, j]]
            if not new + old:
                continue
            seen_k, seen_v = torch.cat((keys[b, old], k[b, new])), torch.cat((values[b, old], v[b, new]))
            for head in range(q.shape[2]):
                scores = (seen_k[:, head // group] @ q[b, t, head]) * size**-0.5
                out[b, t, head] = scores.softmax(0) @ seen_v[:, head // group]
    return out.flatten(0, 1).flatten(1)


def masks(lengths, capacity, tokens, device):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.rand(len(lengths), tokens, capacity + tokens, generator=generator) < 0.6
    drawn[0, 0] = False  # sees nothing
    return [None, drawn.to(device)]


@precision
@pytest.mark.parametrize("causal", [True, False])
def test_extend_attention_equals_its_formula(causal, dtype, tolerance):
    lengths, capacity, tokens = [0, 4, 6], 6, 3
    qkv = exact_normal(9, 8 * 16, dtype=dtype)
    cos, sin = exact_normal(9, 8, seed=1).cos().to(dtype), exact_normal(9, 8, seed=1).sin().to(dtype)
    keys, values = (exact_normal(3, capacity, 2, 16, dtype=dtype, seed=seed) for seed in (2, 3))
    for visible in masks(lengths, capacity, tokens, "cpu"):
        arguments = qkv, cos, sin, keys, values, torch.tensor(lengths)
        ours = reference.extend_attention(*arguments, None, causal, visible)
        assert_equal_to(ours, formula(*arguments, causal, visible), tolerance)
        if visible is not None:
            assert not ours[0].any()


def check(arguments, causal, visible, with_norms=False):
    qkv, cos, sin, keys, values, lengths = arguments
    size, where = keys.shape[-1], (qkv.device, qkv.dtype)
    norms = [normal(size, where=where, seed=seed) for seed in (7, 8)] if with_norms else [None, None]
    wide = [x if x is None else x.double() for x in (qkv, cos, sin, keys, values, *norms)]
    before = keys.clone(), values.clone()
    exact = reference.extend_attention(*wide[:5], lengths, None, causal, visible, *wide[5:], 1e-6)
    plain = reference.extend_attention(*arguments, None, causal, visible, *norms, 1e-6)
    tickets = torch.zeros(len(qkv) * qkv.shape[1] // size, dtype=torch.int32, device=qkv.device)
    ours = kernels.extend_attention(*arguments, tickets, causal, visible, *norms, 1e-6)
    assert_kernel_is_right(ours, exact, plain)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1]) and not tickets.any()


@pytest.mark.parametrize(("heads", "kv_heads", "size", "with_norms"), HEADS)
@pytest.mark.parametrize(("lengths", "tokens"), [([0], 1), ([1, 4, 0], 3), ([64, 65], 9), ([3], 70)], ids=str)
def test_extend_attention_equals_the_reference(lengths, tokens, heads, kv_heads, size, with_norms, where):
    arguments = case(lengths, max(lengths) + 1, tokens, heads, kv_heads, size, where)
    for causal, visible in zip((True, False), masks(lengths, max(lengths) + 1, tokens, where[0]), strict=True):
        check(arguments, causal, visible, with_norms)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_extend_attention_is_right_however_the_prompt_is_split(parts, where, monkeypatch):
    monkeypatch.setattr(kernels, "_parts", lambda programs, capacity: parts)
    lengths = [0, 70, 299]
    arguments = case(lengths, 300, 4, 4, 2, 16, where)
    for causal, visible in zip((True, False), masks(lengths, 300, 4, where[0]), strict=True):
        check(arguments, causal, visible)


def test_extend_attention_does_not_read_past_a_samples_tokens(where):
    qkv, cos, sin, keys, values, lengths = case([2, 70], 90, 3, 4, 2, 16, where)
    dirty = keys.clone(), values.clone()
    for sample, length in enumerate(lengths.tolist()):
        for cache in dirty:
            cache[sample, length:] = torch.nan
    tickets = torch.zeros(24, dtype=torch.int32, device=where[0])
    outs = [kernels.extend_attention(qkv, cos, sin, *x, lengths, tickets) for x in ((keys, values), dirty)]
    assert torch.equal(*outs)


def test_extend_attention_is_right_where_one_score_towers_over_all_others(where):
    check(case([5, 130], 200, 3, 4, 2, 16, where, scale=50.0), True, None)


def test_a_sample_that_is_not_finite_stays_alone(where):
    qkv, cos, sin, keys, values, lengths = case([5, 30], 40, 3, 4, 2, 16, where)
    tickets = torch.zeros(24, dtype=torch.int32, device=where[0])
    clean = kernels.extend_attention(qkv, cos, sin, keys, values, lengths, tickets)
    qkv[:3] = torch.nan
    ours = kernels.extend_attention(qkv, cos, sin, keys, values, lengths, tickets)
    assert ours[:3].isnan().all() and torch.equal(ours[3:], clean[3:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "capacity", "tokens"), [(1, 241, 8), (16, 512, 50), (1, 9000, 1), (2, 300, 130)])
@pytest.mark.parametrize(("heads", "kv_heads", "with_norms"), [(16, 2, False), (32, 8, True)])
def test_extend_attention_equals_the_reference_at_real_shapes(
    batch, capacity, tokens, heads, kv_heads, with_norms, dtype
):
    lengths = torch.randint(0, capacity, (batch,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [*lengths[1:], capacity]
    arguments = case(lengths, capacity, tokens, heads, kv_heads, 128, ("cuda", dtype))
    for causal, visible in zip((True, False), masks(lengths, capacity, tokens, "cuda"), strict=True):
        for _ in range(2):
            check(arguments, causal, visible, with_norms)
