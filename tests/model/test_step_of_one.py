"""A step of one sample leaves its norms to the products behind them, where nobody looks at the norms."""

import pytest
import torch
from torch import nn

from qwen_batched import ops
from qwen_batched.linear import fused
from qwen_batched.linear.fused import FusedLinear, Operands
from qwen_batched.linear.packed import PackedParameters
from qwen_batched.model.attention import KVCache
from qwen_batched.model.parts.norms import AddRMSNorm
from qwen_batched.runtime.backend import reads_ahead
from tests.support import assert_equal_to

TOKENS = 3


@pytest.fixture
def packed(monkeypatch):
    """Products as where weights are packed, on a GPU; a list of the norms that they do."""

    def operands(self, owner, linears):
        if any(linear is None for linear in linears):
            return None
        weights, biases, _ = zip(*linears, strict=True)
        return Operands(torch.cat(weights), torch.cat(biases) if self.has_bias else None, (), None)

    norms, run = [], ops.norm_linear

    def noted(update, residual, norm, *rest):
        norms.append(norm)
        return run(update, residual, norm, *rest)

    monkeypatch.setattr(FusedLinear, "_operands", operands)
    monkeypatch.setattr(ops, "norm_linear", noted)
    return norms


@torch.no_grad()
def steps(decoder, samples=1):
    """Last hidden states of a few tokens, one after the other."""
    text = decoder.config
    sizes = text.num_hidden_layers, samples, TOKENS + 1, text.num_key_value_heads, text.head_dim
    cache = KVCache(*sizes, torch.empty(0))
    torch.manual_seed(0)
    embeds = torch.randn(TOKENS, samples, text.hidden_size)
    places = [torch.full((3, samples), place) for place in range(TOKENS)]
    return torch.stack([decoder.step(x, place, cache) for x, place in zip(embeds, places, strict=True)])


@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_norms_go_into_the_products_behind_them(sisters, preset, request):
    decoder = sisters(preset).model.language_model
    if next(decoder.parameters()).is_cuda:
        pytest.skip("pretended on a CPU")
    expected = steps(decoder)
    norms = request.getfixturevalue("packed")
    assert_equal_to(steps(decoder), expected)
    blocks = [(block.input_layernorm, block.post_attention_layernorm) for block in decoder.layers]
    assert [id(norm) for norm in norms] == [id(norm.weight) for norm in sum(blocks, ())] * TOKENS


def test_more_samples_call_their_norms(load, packed):
    assert steps(load().language_model, samples=2).isfinite().all()
    assert packed == []


@pytest.mark.parametrize("where", ["norm", "attention", "mlp", "q_proj", "gate_proj"])
def test_a_hook_is_called_where_it_is(load, packed, where):
    decoder = load().language_model
    expected, block, calls = steps(decoder), decoder.layers[0], []
    in_all = len(packed)
    hooked = {
        "norm": block.input_layernorm,
        "attention": block.self_attn,
        "mlp": block.mlp,
        "q_proj": block.self_attn.q_proj,
        "gate_proj": block.mlp.gate_proj,
    }[where]
    hooked.register_forward_hook(lambda *given: calls.append(given))
    assert_equal_to(steps(decoder), expected)
    assert len(calls) == TOKENS
    alone = where not in ("attention", "mlp")  # else the block calls both norms
    assert len(packed) == 2 * in_all - TOKENS * (1 if alone else 2)


def test_other_norms_and_layers_are_called(load, packed):
    decoder = load().language_model
    first, second = decoder.layers[:2]
    norm = AddRMSNorm(decoder.config.hidden_size, first.input_layernorm.eps, unit_offset=True)
    with torch.no_grad():
        norm.weight.copy_(first.input_layernorm.weight - 1)
    expected = steps(decoder)
    in_all = len(packed)
    first.input_layernorm = norm
    second.mlp = Doubled(second.mlp)
    assert not torch.allclose(steps(decoder), expected)
    second.mlp = second.mlp.inner
    packed.clear()
    assert_equal_to(steps(decoder), expected)
    assert len(packed) == in_all - TOKENS


@pytest.mark.parametrize("is_packed", [True, False])
def test_weights_that_are_joined_for_the_call_are_not_read_ahead(load, monkeypatch, is_packed):
    class OnGPU(nn.Parameter):
        is_cuda = True

    def resolved(layer):
        return OnGPU(layer.weight), None if layer.bias is None else OnGPU(layer.bias), ()

    def noting(run):
        def noted(*given):
            seen.append(reads_ahead())
            return run(*given)

        return noted

    seen = []
    for name in ("norm_linear", "linear", "swiglu_linear"):
        monkeypatch.setattr(ops, name, noting(getattr(ops, name)))
    monkeypatch.setattr(fused, "resolve_linear", resolved)
    if is_packed:
        monkeypatch.setattr(PackedParameters, "tensor", PackedParameters.joined)
    block = load().language_model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    x, norm = torch.ones(1, attention._qkv.in_features), (block.input_layernorm.weight, 1e-6)
    with torch.no_grad(), ops.reading_ahead():
        attention._qkv(attention, x)
        attention._qkv.behind_norm(attention, x, None, *norm)
        mlp._gate_up.swiglu(mlp, x)
        mlp._gate_up.behind_norm(mlp, x, None, *norm, is_gated=True)
        assert reads_ahead()
    assert seen == [is_packed] * 4


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)
