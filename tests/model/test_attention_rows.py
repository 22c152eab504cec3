"""Padding is not computed: tokens go through the decoder back to back, and only attention sees rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_batched.model.attention import AttentionRows, unpad
from qwen_batched.model.decoder_inputs import PACKED_TOKEN_STEPS, round_up
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
    counts = [int(out.attention_mask.sum()), sum(int(model(None, [text]).attention_mask.sum()) for text in TEXTS)]
    if device == "cuda":  # without gradients a few tokens more let other texts share a graph
        counts[1] = round_up(counts[1], PACKED_TOKEN_STEPS)
    assert seen[:2] == counts and seen[0] < out.attention_mask.numel()


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


class Sorts(TorchDispatchMode):
    """Counts what finds the padding."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "sort" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["call", "processor", "generate"])
@pytest.mark.parametrize(("texts", "is_padded"), [(["pick it up", "pick it up"], False), (["pick it up", "go"], True)])
def test_where_the_host_knows_that_nothing_is_padding_none_is_looked_for(model, texts, is_padded, way):
    images = photos(2, 1, 56, 84).to(model.device)
    batch = model.processor(images, texts, device=model.device)
    with torch.no_grad(), Sorts() as sorts:
        if way == "generate":
            model.generate(images, texts, max_new_tokens=1, cuda_graph=False)
        else:
            model(**batch) if way == "processor" else model(images, texts, cuda_graph=False)
    # A batch that is on the device already may have been changed there.
    assert bool(sorts.count) == (is_padded or (way == "processor" and model.device.type == "cuda"))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_decoder_gives_the_same_to_the_last_bit_where_padding_is_not_looked_for(model, with_gradients):
    batch = model.processor(None, ["pick it up", "pick it up"], device=model.device)
    embeds = model.model.embed_tokens(batch["input_ids"]).detach()
    arguments = batch["rope_positions"].transpose(0, 1), batch["attention_mask"], (0, 1, -1)
    found = []
    with torch.set_grad_enabled(with_gradients):
        for is_padded in (False, True):
            leaf = embeds.clone().requires_grad_(with_gradients)
            out = model.model(leaf, *arguments, is_padded=is_padded)
            found.append(
                [*out, *(torch.autograd.grad(sum(x.square().sum() for x in out), leaf) if leaf.requires_grad else ())]
            )
    assert all(map(torch.equal, *found))


def test_what_the_decoder_returns_is_the_callers_to_write_to(model):
    """Though nothing was padding, and the tokens stand where they stood."""
    batch = model.processor(None, ["pick it up"], device=model.device)
    leaf = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    arguments = batch["rope_positions"].transpose(0, 1), batch["attention_mask"], (0, 1, 2, -1), "pre"
    grads = []
    for writes in (False, True):
        out = model.model(leaf, *arguments, is_padded=False)
        if writes:
            with torch.no_grad():
                _ = [each.zero_() for each in out[:-1]]
        grads.append(torch.autograd.grad(out[-1].square().sum(), leaf)[0])
    assert torch.equal(*grads)


def test_padding_that_is_said_not_to_be_there_is_refused(load):
    model = load(device="cpu")
    batch = model.processor(None, TEXTS)
    embeds, positions = model.model.embed_tokens(batch["input_ids"]), batch["rope_positions"].transpose(0, 1)
    with pytest.raises(ValueError, match="padding at the end of rows only"):
        model.model(embeds, positions, batch["attention_mask"], is_padded=False)
