"""What is asked for comes back in that order and in one type, and nothing else is computed (trap 22)."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_unflatten

from qwen_batched.outputs import GenerateOutput, VLOutput
from tests.support import assert_equal_to, photos, relative_error

DEPTH = 4  # decoder blocks of the preset "tiny"
VISION_DEPTH = 6
TEXTS = ["Pick up the red block.", "a"]


@pytest.fixture(scope="module")
def images(model):
    return photos(2, 2, 84, 140).to(model.device)


@pytest.fixture(scope="module")
def every_layer(model, images):
    return model(images, TEXTS, layers=list(range(DEPTH + 1))).hidden_states


@pytest.fixture(scope="module")
def before_norm(model, images):
    return model(images, TEXTS, layers=[DEPTH], norm="pre").last_hidden_state


@contextmanager
def counting(modules):
    """How often each module runs, by its index."""
    runs = dict.fromkeys(range(len(modules)), 0)

    def count(index):
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    hooks = [module.register_forward_hook(count(index)) for index, module in enumerate(modules)]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


# --- which layers ---


@given(layers=st.lists(st.integers(-DEPTH - 1, DEPTH), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_trap22_layers_come_in_the_order_asked_for(model, images, every_layer, layers):
    out = model(images, TEXTS, layers=layers)
    assert len(out.hidden_states) == len(layers)
    for layer, hidden in zip(layers, out.hidden_states, strict=True):
        assert torch.equal(hidden, every_layer[layer])
    assert out.last_hidden_state is out.hidden_states[-1]


def test_trap22_layers_differ_from_their_neighbours(every_layer, before_norm):
    """What the test above relies on: an index that is off by one would show."""
    for layer, after in zip(every_layer, [*every_layer[1:], before_norm], strict=True):
        assert relative_error(layer, after) > 0.1


def test_trap22_layer_0_is_the_input_embeddings(model, images, every_layer):
    out = model(images, TEXTS)
    text = out.attention_mask & ~out.image_mask
    assert torch.equal(every_layer[0][text], model.model.embed_tokens(out.input_ids)[text])
    for i in range(2):
        assert_equal_to(every_layer[0][i][out.image_mask[i]], out.image_features[i].flatten(0, 2))
        for camera in range(2):
            own = every_layer[0][i][out.camera_ids[i] == camera]
            assert_equal_to(own, out.image_features[i, camera].flatten(0, 1))


def test_trap22_the_final_norm_is_on_the_last_layer_only(model, images, every_layer, before_norm):
    post = model(images, TEXTS, layers=(0, 1, 2, 3, 4, -1))
    pre = model(images, TEXTS, layers=(0, 1, 2, 3, 4, -1), norm="pre")
    for layer in range(DEPTH):
        assert torch.equal(pre.hidden_states[layer], every_layer[layer])
        assert torch.equal(post.hidden_states[layer], every_layer[layer])
    for layer in (4, 5):
        assert torch.equal(pre.hidden_states[layer], before_norm)
        assert torch.equal(post.hidden_states[layer], every_layer[-1])
    with torch.no_grad():
        assert_equal_to(model.model.norm(before_norm)[0], every_layer[-1])


def test_trap22_a_truncated_model_counts_layers_to_its_own_end(load, device, images, every_layer):
    model = load(num_layers=2, device=device).requires_grad_(False)
    assert len(model.model.layers) == 2
    pre = model(images, TEXTS, layers=(0, 1, 2, -1, -2, -3), norm="pre").hidden_states
    for ours, layer in zip(pre, (0, 1, 2, 2, 1, 0), strict=True):
        assert torch.equal(ours, every_layer[layer])
    post = model(images, TEXTS, layers=(2, 1, -1)).hidden_states
    assert torch.equal(post[1], every_layer[1])
    for hidden in (post[0], post[2]):
        assert torch.equal(hidden, model.model.norm(every_layer[2])[0])
    for layer in (3, -4):
        with pytest.raises(ValueError, match="layers"):
            model(images, TEXTS, layers=(layer,))


# --- what is run ---


@pytest.mark.parametrize(
    ("layers", "blocks"), [((0,), 0), ((1,), 1), ((2, 0), 2), ((-2, 1), 3), ((3, 3), 3), ((4,), 4), ((0, -1), 4)]
)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_trap22_blocks_above_the_highest_layer_are_not_run(model, images, layers, blocks, norm):
    with counting(model.model.layers) as runs, counting([model.model.norm]) as norms:
        model(images, TEXTS, layers=layers, norm=norm)
    assert list(runs.values()) == [1] * blocks + [0] * (DEPTH - blocks)
    assert norms[0] <= int(blocks == DEPTH)


def test_logits_run_every_block_once_whatever_the_layers(model, images):
    with counting(model.model.layers) as runs:
        out = model(images, TEXTS, layers=(1,), logits="last")
    assert list(runs.values()) == [1] * DEPTH
    assert len(out.hidden_states) == 1


def test_text_alone_runs_no_vision_block_and_one_call_runs_each_once(model, images):
    with counting(model.visual.blocks) as runs:
        model(None, TEXTS)
        assert sum(runs.values()) == 0
        model(images, TEXTS)
    assert list(runs.values()) == [1] * VISION_DEPTH


def test_encoding_images_runs_no_decoder_block_and_no_later_vision_block(model, images):
    with counting(model.visual.blocks) as blocks, counting([model.visual.merger, *model.model.layers]) as others:
        model.encode_images(images, layers=(3, 1))
    assert list(blocks.values()) == [1, 1, 1, 1, 0, 0]
    assert sum(others.values()) == 0


# --- one type ---

CALLS = {
    "default": ({}, True),
    "text only": ({}, False),
    "one layer": ({"layers": (0,)}, True),
    "last logits": ({"logits": "last"}, True),
    "all logits": ({"logits": "all", "norm": "pre", "layers": [0, 1, 2]}, True),
    "text only with logits": ({"logits": "all"}, False),
    "masked": ({"camera_mask": torch.tensor([[True, False], [False, False]])}, True),
    "targets": ({"targets": ["left", ""]}, True),
    "text only with targets": ({"targets": ["left", ""], "layers": (0, 1), "logits": "last"}, False),
}


@pytest.mark.parametrize(("options", "with_images"), CALLS.values(), ids=CALLS.keys())
def test_one_return_type_and_none_for_what_was_not_asked_for(model, images, options, with_images):
    out = model(images if with_images else None, TEXTS, **options)
    assert type(out) is VLOutput
    names = {field.name for field in dataclasses.fields(out)}
    assert names == {
        "hidden_states",
        "attention_mask",
        "image_mask",
        "camera_ids",
        "position_ids",
        "input_ids",
        "image_features",
        "keys_values",
        "logits",
        "loss",
    }
    batch, length = out.input_ids.shape
    width, vocabulary = model.config.text.hidden_size, model.config.text.vocab_size
    assert type(out.hidden_states) is list
    assert [hidden.shape for hidden in out.hidden_states] == [(2, length, width)] * len(options.get("layers", (-1,)))
    assert out.last_hidden_state is out.hidden_states[-1]
    assert out.attention_mask.dtype == out.image_mask.dtype == torch.bool
    assert out.camera_ids.shape == out.image_mask.shape == out.attention_mask.shape == (batch, length)
    assert out.position_ids.shape == (3, batch, length)
    for ids in (out.camera_ids, out.position_ids, out.input_ids):
        assert not ids.dtype.is_floating_point
    expected = {None: None, "last": (2, vocabulary), "all": (2, length, vocabulary)}[options.get("logits")]
    assert (out.logits if expected is None else tuple(out.logits.shape)) == expected
    assert out.loss is None if "targets" not in options else out.loss.shape == ()
    if with_images:
        assert out.image_features.shape == (2, 2, 3, 5, width)
    else:
        assert out.image_features is None
        assert not out.image_mask.any()
        assert bool((out.camera_ids == -1).all())


def test_image_features_are_a_list_when_cameras_differ_in_size(model, images):
    mixed = [images[:, 0], images[:, 1, :, :56]]
    width = model.config.text.hidden_size
    for features in (model(mixed, TEXTS).image_features, model.encode_images(mixed)):
        assert type(features) is list
        assert [tuple(camera.shape) for camera in features] == [(2, 3, 5, width), (2, 2, 5, width)]


def test_image_features_are_what_encode_images_returns(model, images):
    mask = torch.tensor([[True, False], [True, True]])
    for camera_mask in (None, mask):
        out = model(images, TEXTS, camera_mask=camera_mask)
        assert torch.equal(out.image_features, model.encode_images(images, camera_mask=camera_mask))


# --- logits ---


@pytest.mark.parametrize("options", [{}, {"norm": "pre"}, {"layers": (0,)}, {"layers": (1, -1), "norm": "pre"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_final_norm_whatever_layers_and_norm(model, right_padded_model, images, side, options):
    model = model if side == "left" else right_padded_model
    expected = model(images, TEXTS)
    expected_logits = model.logits(expected.last_hidden_state)
    everything = model(images, TEXTS, logits="all", **options)
    last = model(images, TEXTS, logits="last", **options)
    for i in range(2):
        own = expected.attention_mask[i]
        assert_equal_to(everything.logits[i][own], expected_logits[i][own])
        assert_equal_to(last.logits[i], expected_logits[i][own][-1])
    without = model(images, TEXTS, **options)
    assert len(without.hidden_states) == len(last.hidden_states) == len(options.get("layers", (-1,)))
    assert all(map(torch.equal, without.hidden_states, last.hidden_states))
    assert all(map(torch.equal, without.hidden_states, everything.hidden_states))


def test_logits_of_a_model_without_head_are_refused_before_any_work(load, device, images):
    model = load(lm_head=False, device=device).requires_grad_(False)
    with counting(model.visual.blocks) as runs:
        for logits in ("last", "all"):
            with pytest.raises(ValueError, match="lm_head"):
                model(images, TEXTS, logits=logits)
        with pytest.raises(ValueError, match="lm_head"):
            model.logits(torch.zeros(1, model.config.text.hidden_size, device=device))
        with pytest.raises(ValueError, match="lm_head"):
            model.generate(images, TEXTS)
    assert sum(runs.values()) == 0
    assert model(images, TEXTS).logits is None


def test_generate_returns_one_type(model, images):
    for frames in (images, None):
        out = model.generate(frames, TEXTS, max_new_tokens=2)
        assert type(out) is GenerateOutput
        assert all(isinstance(text, str) for text in out.texts)
        assert [ids.ndim for ids in out.token_ids] == [1, 1]
        assert set(out.finish_reasons) <= {"eos", "length"}
        assert len(out.texts) == len(out.token_ids) == len(out.finish_reasons) == 2


def test_an_output_is_a_container_to_pytorch(model, images):
    """Where FSDP2 looks for the tensors that gradients come from."""
    out = model(images, TEXTS)
    leaves, structure = tree_flatten(out)
    assert any(leaf is out.last_hidden_state for leaf in leaves)
    again = tree_unflatten(leaves, structure)
    assert type(again) is VLOutput
    assert again.hidden_states[0] is out.last_hidden_state
    tensors = [field.name for field in dataclasses.fields(out) if field.name != "hidden_states"]
    assert all(getattr(again, name) is getattr(out, name) for name in tensors)


def test_an_output_reads_like_transformers_own(model, images):
    out = model(images, TEXTS, logits="last")
    assert out["logits"] is out.logits is out[0]
    assert "loss" not in out and out.loss is None
    trained = model(images, TEXTS, targets=["one", "two"])
    assert trained["loss"] is trained.loss is trained[0]
    assert list(trained.keys())[:2] == ["loss", "hidden_states"]
