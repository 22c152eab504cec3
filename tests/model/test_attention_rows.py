"""Padding is not computed: tokens go through the decoder back to back, and only attention sees rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched.model.attention import AttentionRows, unpad
from tests.support import assert_equal_to, photos

TEXTS = ["Pick up the red block.", "a", "open the top drawer\n" * 6]


@st.composite
def masks(draw):
    """Any mask (B, S), padding wherever it likes, and a number of tokens that holds all real ones."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    mask = torch.tensor(draw(rows))
    return mask, draw(st.integers(max(1, int(mask.sum())), batch * length))


@given(case=masks())
@settings(max_examples=50, deadline=None)
def test_every_token_has_a_slot_of_its_own_in_its_samples_row(case):
    mask, tokens = case
    length = mask.shape[1]
    places, rows = unpad(mask, tokens)
    assert places.shape == (tokens,)
    assert len(set(places.tolist())) == tokens
    assert set(mask.flatten().nonzero()[:, 0].tolist()) <= set(places.tolist()), "no real token is left out"
    slots = torch.arange(mask.numel()) if rows.slots is None else rows.slots
    assert len(set(slots.tolist())) == tokens
    assert torch.equal(slots // length, places // length), "a token stays in its sample"
    for sample, row in enumerate(mask):
        own = [
            slot % length
            for place, slot in zip(places.tolist(), slots.tolist(), strict=True)
            if place // length == sample and mask.flatten()[place]
        ]
        assert own == list(range(int(row.sum()))), "real tokens stand first, in their order"


@given(case=masks())
@settings(max_examples=15, deadline=None)
def test_rows_give_back_the_tokens_that_filled_them(case):
    mask, tokens = case
    _, rows = unpad(mask, tokens)
    x = torch.randn(tokens, 2, 3, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(tokens) if rows.slots is None else rows.slots
    filled = x.new_zeros(mask.numel(), 2, 3).index_copy(0, slots, x).view(*mask.shape, 2, 3)
    assert torch.equal(rows.take(filled), x)


def test_rows_that_tokens_fill_are_not_copied():
    x = torch.randn(2, 3, 4)
    assert AttentionRows(2, 3).take(x).data_ptr() == x.data_ptr()


def block_inputs(model):
    """How many rows each call of the first block's MLP got."""
    seen = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen, hook


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_computed(load, device, side):
    model = load(device=device, padding_side=side)
    seen, hook = block_inputs(model)
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    out = model(photos(3, 2, 56, 84).to(device), TEXTS, camera_mask=mask)
    model.generate(None, TEXTS, max_new_tokens=1)
    hook.remove()
    assert seen[0] == int(out.attention_mask.sum()) < out.attention_mask.numel()
    assert seen[1] == sum(int(model(None, [text]).attention_mask.sum()) for text in TEXTS)


def test_a_prepared_batch_leaves_padding_out_too(model):
    seen, hook = block_inputs(model)
    batch = model.processor(None, TEXTS, device=model.device)
    out = model(**batch)
    hook.remove()
    assert seen == [int(out.attention_mask.sum())]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_decoder_alone_gives_the_same_with_padding_and_without(load, device, side):
    model = load(device=device, padding_side=side).requires_grad_(False)
    batch = model.processor(None, TEXTS, device=torch.device(device))
    embeds = model.model.embed_tokens(batch["input_ids"])
    arguments = embeds, batch["rope_positions"].transpose(0, 1), batch["attention_mask"], (0, 1, -1)
    mask = batch["attention_mask"]
    for ours, theirs in zip(
        model.model(*arguments, tokens=batch["prepared"].tokens), model.model(*arguments), strict=True
    ):
        assert_equal_to(ours[mask], theirs[mask])
        assert ours.isfinite().all()


@pytest.mark.parametrize("tokens", [0, -1, 10**4, 6.0, True, torch.tensor(6), [1, 2]])
def test_a_count_of_tokens_that_does_not_fit_is_refused(model, tokens):
    batch = model.processor(None, TEXTS, device=model.device)
    embeds = model.model.embed_tokens(batch["input_ids"])
    with pytest.raises((TypeError, ValueError), match="tokens"):
        model.model(embeds, batch["rope_positions"].transpose(0, 1), batch["attention_mask"], tokens=tokens)
