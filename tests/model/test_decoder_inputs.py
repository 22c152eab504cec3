"""Room for more tokens changes no result, costs little, and is of few sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched.model import pipeline
from qwen_batched.model.decoder_inputs import PACKED_TOKEN_STEPS, TOKEN_STEPS, round_up, rows_of
from tests.sisters import FACTORS, Sister
from tests.support import assert_equal_to


@pytest.fixture(params=list(FACTORS), scope="module")
def sister(request, tmp_path_factory):
    return Sister(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")


@given(count=st.integers(1, 100_000))
def test_sizes_grow_by_little(count):
    for steps in (TOKEN_STEPS, PACKED_TOKEN_STEPS):
        rounded = round_up(count, steps)
        assert rounded >= count and rounded % 16 == 0 and round_up(rounded, steps) == rounded
        assert rounded - count < max(16, count / steps)


@given(length=st.integers(241, 10_000), batch=st.integers(1, 64))
def test_sequences_of_one_length_grow_by_at_most_seven_percent(length, batch):
    assert length <= rows_of(batch, length, False) <= 1.07 * length
    assert rows_of(batch, length, True) >= length


def test_sizes_are_few():
    """Of one sample, for texts up to 200 words beside 1 to 4 cameras."""
    assert len({rows_of(1, length, False) for length in range(20, 1000)}) <= 52


@given(
    texts=st.lists(st.sampled_from(["a", "Pick up the red block.", "", "open " * 30]), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    logits=st.sampled_from([None, "last", "all", 3]),
    norm=st.sampled_from(["post", "pre"]),
    data=st.data(),
)
@settings(max_examples=8, deadline=None)
def test_every_output_is_that_without_the_room(sister, texts, side, logits, norm, data):
    model = sister.models[side]
    images, mask = sister.photos(len(texts), 2, 2, 1), None
    if data.draw(st.booleans()):
        drawn = data.draw(st.lists(st.booleans(), min_size=2 * len(texts), max_size=2 * len(texts)))
        mask = torch.tensor(drawn).view(-1, 2)
    targets = data.draw(st.sampled_from([None, ["yes, of course"] * len(texts)]))
    request = model.processor.request(images, texts, mask, targets=targets, resize=None)
    batch, network = model.processor.batch(request, torch.float32), model._network
    wanted = pipeline.Wanted((0, 1, 2), norm, logits, keys_values=(0, 1))
    with torch.no_grad():
        want = pipeline.run(network, batch, wanted)
        features, inputs = pipeline.encode(network.visual, batch, wanted)
        inputs = inputs.rounded_up().padded()
        decoded = pipeline.decode(network.decoder, network.head, wanted, inputs)
        assert all(x.isfinite().all() for x in decoded.hidden_states)
        found = pipeline.output(batch, features, decoded.cut(batch.attention_mask.shape[1], wanted))
    assert inputs.length % 16 == 0
    own = batch.attention_mask
    for ours, theirs in zip(found.hidden_states, want.hidden_states, strict=True):
        assert_equal_to(ours, theirs), "zeros on padding too"
    for ours, theirs in zip(found.keys_values, want.keys_values, strict=True):
        assert all(map(lambda x, y: assert_equal_to(x[own], y[own]) is None, ours, theirs))
    if logits == "all":
        assert_equal_to(found.logits[own], want.logits[own])
    elif logits is not None:
        shown = own[:, -3:] if logits == 3 else torch.ones_like(own[:, 0])
        assert found.logits.shape == want.logits.shape
        assert_equal_to(found.logits[shown], want.logits[shown])
    if targets is not None:
        assert_equal_to(found.loss, want.loss)
