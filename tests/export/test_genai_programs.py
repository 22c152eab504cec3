"""The programs of a `genai` folder compute what the live model computes, with the runtime's arguments."""

import pytest
import torch

from qwen_batched.export.genai.programs import EmbeddingProgram, PatchesProgram, TextProgram, width
from qwen_batched.export.programs import detached
from tests.sisters import FACTORS
from tests.support import assert_equal_to, photos

presets = pytest.mark.parametrize("preset", ["tiny", "qwen3-vl-tiny"])


@presets
@pytest.mark.parametrize("images", [1, 3])
def test_patches_in_transformers_order_give_the_live_features(live, sisters, preset, images):
    """Images of 5 x 6 merged cells, which have cut windows where there are windows."""
    model, factor = live(preset), FACTORS[preset]
    frames = photos(1, images, 5 * factor, 6 * factor)
    patches = sisters(preset).reference.processor_inputs(list(frames[0]), "a")["pixel_values"]
    features = PatchesProgram(detached(model), (5, 6))(patches)
    expected = model.encode_images(frames, resize=None, deepstack=width(model) > model.model.config.hidden_size)
    if width(model) > model.model.config.hidden_size:
        expected = torch.cat((expected.main, *expected.deep), dim=-1)
    assert_equal_to(features, expected.flatten(0, 3))


@presets
def test_image_tokens_without_features_are_text(live, preset):
    """As those that were generated, for which the runtime passes no features."""
    model = live(preset)
    program, image, deep = EmbeddingProgram(detached(model)), model.processor.config.image_token_id, width(model)
    ids = torch.tensor([[3, image, image, 4], [image, 5, image, 6]])
    text = model.model.embed_tokens(ids)
    for count in (0, 1, 3, 4):
        features = torch.randn(count, deep)
        embeds = program(ids, features)
        is_placed = (ids == image) & ((ids == image).flatten().cumsum(0).view_as(ids) <= count)
        assert torch.equal(embeds[is_placed], features)
        assert torch.equal(embeds[~is_placed][:, : text.shape[-1]], text[~is_placed])
        assert not embeds[~is_placed][:, text.shape[-1] :].any()


@presets
def test_tokens_behind_a_cache_get_the_live_logits(live, preset):
    """A prompt with two images, then tokens behind it, one or several at once."""
    model, factor = live(preset), FACTORS[preset]
    frames, own, text = photos(1, 2, 2 * factor, 3 * factor), detached(model), model.model.config
    expected = model(frames, ["Pick up the red block."], resize=None, logits="all")
    features = model.encode_images(frames, resize=None, deepstack=width(model) > text.hidden_size)
    if width(model) > text.hidden_size:
        features = torch.cat((features.main, *features.deep), dim=-1)
    embeds = EmbeddingProgram(own)(expected.input_ids, features.flatten(0, 3))
    length, program = embeds.shape[1], TextProgram(own)
    past = [torch.zeros(1, text.num_key_value_heads, 0, text.head_dim)] * (2 * text.num_hidden_layers)
    start = 0
    for end in (length - 4, length - 1, length):
        mask, positions = torch.ones(1, end, dtype=torch.int64), expected.position_ids[..., start:end]
        logits, *past = program(embeds[:, start:end], mask, positions, *past)
        assert logits.shape[1] == 1 and past[0].shape[2] == end
        assert_equal_to(logits[:, 0], expected.logits[:, end - 1])
        start = end
