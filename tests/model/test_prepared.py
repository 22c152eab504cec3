"""A prepared batch: loaders may move, cut, join and store it; what does not fit is refused or spoils its sample."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from accelerate.utils.operations import concatenate, find_batch_size, send_to_device, slice_tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qwen_batched.inputs import checks as inputs
from qwen_batched.inputs import prepared
from qwen_batched.inputs.prepared import HostFacts
from tests.support import assert_equal_to, noise, own_tokens, photos

SETTINGS = settings(max_examples=8, deadline=None)
TEXTS = ["Pick up the red block.", "Go.", "把杯子放在桌子上。", "open the drawer, then close it again"]
TARGETS = ["left", "up and down", "", "stop"]
MASK = torch.tensor([[True, False], [True, True], [False, False], [True, True]])


def tensors_of(batch):
    return [leaf for leaf in tree_leaves({k: v for k, v in batch.items() if k != "prepared"})]


def prepare(model, mixed=False, masked=True, targets=True, device=None):
    images = photos(4, 2, 84, 113)
    images = [images[:, 0], images[:, 1, :, :60]] if mixed else images
    mask = MASK if masked else None
    return model.processor(images, TEXTS, mask, targets=TARGETS if targets else None, device=device)


def assert_rows_equal(ours, theirs, rows):
    """Row i of `ours` is row rows[i] of `theirs`."""
    for i, row in enumerate(rows):
        mine = own_tokens(ours.last_hidden_state, ours.attention_mask, i)
        assert_equal_to(mine, own_tokens(theirs.last_hidden_state, theirs.attention_mask, row))


@st.composite
def arguments(draw):
    batch, cameras = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    sizes = [(draw(st.integers(28, 90)), draw(st.integers(28, 90))) for _ in range(max(cameras, 1))]
    images = None
    if cameras and draw(st.booleans()):
        images = [noise(batch, 1, *size)[:, 0] for size in sizes]
    elif cameras:
        images = noise(batch, cameras, *sizes[0])
    mask = None
    if cameras and draw(st.booleans()):
        rows = st.lists(st.booleans(), min_size=cameras, max_size=cameras)
        mask = torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))
    texts = [draw(st.sampled_from(TEXTS)) for _ in range(batch)]
    return images, texts, mask, draw(st.sampled_from([None, TARGETS[:batch]]))


@given(arguments=arguments())
@example(arguments=([noise(1, 1, 28, 28)[:, 0] for _ in range(2)], TEXTS[:1], None, None))
@SETTINGS
def test_trap35_every_tensor_has_the_batch_first_and_memory_of_its_own(model, arguments):
    images, texts, mask, targets = arguments
    given_tensors = [x for x in tree_leaves([images, mask]) if isinstance(x, Tensor)]
    first = model.processor(images, texts, mask, targets=targets)
    second = model.processor(images, texts, mask, targets=targets)
    everything = [*tensors_of(first), *tensors_of(second)]
    for tensor in everything:
        assert tensor.shape[0] == len(texts)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    memory = [tensor.untyped_storage().data_ptr() for tensor in (*everything, *given_tensors)]
    assert len(set(memory)) == len(memory)


@given(data=st.data(), mixed=st.booleans(), masked=st.booleans(), targets=st.booleans())
@SETTINGS
def test_trap35_rows_of_a_batch_are_the_batch_of_those_rows(model, data, mixed, masked, targets):
    batch = prepare(model, mixed, masked, targets)
    whole = model(**batch)
    start = data.draw(st.integers(0, 3))
    stop = data.draw(st.integers(start + 1, 4))
    assert find_batch_size(batch) == 4
    for rows in (
        slice_tensors(batch, slice(start, stop)),  # as accelerate's dispatcher cuts
        {k: [p[start:stop] for p in v] if isinstance(v, list) else v[start:stop] for k, v in batch.items()},
        {k: v[start:stop] if isinstance(v, Tensor) else v for k, v in batch.items()} if not mixed else batch,
    ):
        out = model(**rows)
        assert_rows_equal(out, whole, range(4) if rows is batch else range(start, stop))


@pytest.mark.parametrize("mixed", [False, True])
def test_trap35_joined_batches_are_the_batch_of_all_rows(model, mixed):
    batch = prepare(model, mixed)
    joined = concatenate([batch, batch])
    out = model(**joined)
    assert_rows_equal(out, model(**batch), [0, 1, 2, 3, 0, 1, 2, 3])
    assert_equal_to(out.loss, model(**batch).loss)


def through_torch_save(batch):
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "pickle, as from a loader's worker": lambda batch: pickle.loads(pickle.dumps(batch)),
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
    "accelerate's send_to_device": lambda batch: send_to_device(batch, torch.device("cpu")),
    "a comprehension": lambda batch: {
        k: [x.to("cpu") for x in v] if isinstance(v, list) else v.to("cpu") for k, v in batch.items()
    },
    "Trainer's": lambda batch: type(batch)({k: type(v)(v) if isinstance(v, dict) else v for k, v in batch.items()}),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_was_moved_or_stored_gives_the_same_bits(model, way, mixed):
    batch = prepare(model, mixed)
    out, again = model(**batch), model(**WAYS[way](batch))
    assert torch.equal(again.last_hidden_state, out.last_hidden_state)
    assert torch.equal(again.loss, out.loss)


def test_a_batch_does_not_change_with_what_it_was_made_from(model):
    images, mask = photos(4, 2, 84, 113), MASK.clone()
    batch = model.processor(images, TEXTS, mask)
    expected = model(**batch).last_hidden_state
    images.zero_(), mask.logical_not_()
    assert torch.equal(model(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("sizes", [[(84, 113)] * 2, [(84, 113), (84, 112)], [(84, 113), (56, 90)], [(60, 60)]])
def test_a_list_of_cameras_gives_a_list_of_features_whatever_the_sizes(model, sizes, as_list):
    images = [photos(2, 1, *size, seed=i)[:, 0].to(model.device) for i, size in enumerate(sizes)]
    if not as_list:
        if len(set(sizes)) > 1:
            images = images[:1] * 2
        images = torch.stack(images, dim=1)
    alone = [model.encode_images(x[:, None])[:, 0] for x in (images if as_list else images.unbind(1))]
    kind = list if as_list else Tensor
    features = model.encode_images(images)
    assert isinstance(features, kind)
    with torch.no_grad():
        outputs = [
            features,
            model.encode_images(images, chunk_size=1),
            model(images, TEXTS[:2]).image_features,
            model(**model.processor(images, TEXTS[:2])).image_features,
        ]
    for output in outputs:
        assert isinstance(output, kind)
        for ours, theirs in zip(output if as_list else output.unbind(1), alone, strict=True):
            assert_equal_to(ours, theirs)
    blocks = model.encode_images(images, layers=(0, -1))
    assert len(blocks) == 2 and all(isinstance(block, kind) for block in blocks)


# --- what does not fit ---


def damages(model):
    """Changes to sample 1 of a batch by name: what the host says of them, and how they are made."""
    rows = model.config.text.vocab_size

    def at(name, value):
        def change(batch):
            own = batch["attention_mask"][1].nonzero()[:, 0]
            batch[name][1][..., own[len(own) // 2]] = value

        return change

    def flip(name):
        return lambda batch: batch[name][1].copy_(batch[name][1].flip(-1))

    def image_token(batch):
        text = (batch["attention_mask"][1] & (batch["feature_index"][1] < 0)).nonzero()[:, 0]
        batch["input_ids"][1, text[1]] = model.config.image_token_id

    def forget(batch):
        batch["attention_mask"][1] = False

    return {
        "an id above the embedding": ("input_ids", at("input_ids", rows)),
        "a huge id": ("input_ids", at("input_ids", 2**62)),
        "a negative id": ("input_ids", at("input_ids", -1)),
        "one image token too many": ("image tokens", image_token),
        "a feature that is not there": ("feature_index", at("feature_index", 10**6)),
        "another feature": ("feature_index", at("feature_index", 0)),
        "a feature below -1": ("feature_index", at("feature_index", -7)),
        "another camera": ("camera_ids", at("camera_ids", 5)),
        "other positions": ("rope_positions", at("rope_positions", 10**9)),
        "a flipped mask": ("", flip("attention_mask")),
        "no token": ("token", forget),
        "another camera mask": ("image tokens", lambda batch: batch["camera_present"][1].logical_not_()),
        "a label above the embedding": ("labels", at("labels", rows)),
        "a negative label": ("labels", at("labels", -1)),
    }


NAMES = [
    *("an id above the embedding", "a huge id", "a negative id", "one image token too many"),
    *("a feature that is not there", "another feature", "a feature below -1", "another camera", "other positions"),
    *("a flipped mask", "no token", "another camera mask", "a label above the embedding", "a negative label"),
]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_host_can_see_is_refused(model, name, mixed):
    batch = prepare(model, mixed)  # on the host, wherever the model is
    expected = model(**batch).last_hidden_state
    message, change = damages(model)[name]
    damaged = copy.deepcopy(batch)
    change(damaged)
    with pytest.raises(ValueError, match=f"{message}.*sample 1"):
        model(**damaged)
    assert torch.equal(model(**batch).last_hidden_state, expected)


def blind(monkeypatch):
    for module in (inputs, prepared):
        monkeypatch.setattr(module, "can_read", lambda *tensors: False)


@pytest.mark.parametrize(("mixed", "forgotten"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", NAMES)
def test_trap38_what_only_the_device_knows_spoils_its_own_sample(model, monkeypatch, name, mixed, forgotten):
    """On a CPU the same code runs, told that it cannot read values."""
    blind(monkeypatch)
    batch = prepare(model, mixed, device=model.device)
    if forgotten:
        batch["prepared"] = HostFacts()
    expected = model(**batch)
    assert expected.last_hidden_state.isfinite().all()
    damages(model)[name][1](batch)
    out = model(**batch)
    if "label" not in name:
        assert out.last_hidden_state[1][out.attention_mask[1]].isnan().all()
    for sample in (0, 2, 3):
        ours = own_tokens(out.last_hidden_state, out.attention_mask, sample)
        assert torch.equal(ours, own_tokens(expected.last_hidden_state, expected.attention_mask, sample))
    assert out.loss.isnan()


def test_trap38_tokens_beyond_the_hosts_count_spoil_their_own_sample(model, monkeypatch):
    blind(monkeypatch)
    batch = prepare(model, device=model.device)
    expected = model(**batch)
    batch["prepared"].tokens -= 3
    out = model(**batch)
    assert out.last_hidden_state[3].isnan().any()
    for sample in range(3):
        ours = own_tokens(out.last_hidden_state, out.attention_mask, sample)
        assert_equal_to(ours, own_tokens(expected.last_hidden_state, expected.attention_mask, sample))


def test_a_batch_without_its_pixels_is_refused(model):
    batch = prepare(model)
    for names in (["pixel_values"], ["raster_order"], ["pixel_values", "raster_order", "camera_present"]):
        with pytest.raises(ValueError, match=r"image tokens|pixel_values|must hold"):
            model(**{name: value for name, value in batch.items() if name not in names})


def test_a_batch_of_an_earlier_release_is_refused_with_a_sentence(model):
    batch = prepare(model, masked=False, targets=False)
    old = {name: value for name, value in batch.items() if name != "prepared"}
    old["position_ids"] = old.pop("rope_positions").transpose(0, 1)
    old |= {"token_index": torch.arange(9), "raster_order": torch.zeros(2, 3, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="earlier release"):
        model(**old)


def test_unknown_entries_are_refused_by_name(model):
    with pytest.raises(TypeError, match="something"):
        model(**prepare(model), something=3)


def not_plain(x):
    """The same values in forms that kernels do not take, by name."""
    forms = {"sparse": x.to_sparse(), "meta": x.to("meta")}
    if x.ndim > 1:
        forms["nested"] = torch.nested.nested_tensor(list(x))
    return forms


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "feature_index", "labels", "pixel_values"])
@pytest.mark.parametrize("form", ["sparse", "meta", "nested"])
def test_tensors_without_plain_values_are_refused(model, name, form):
    batch = prepare(model)
    batch[name] = not_plain(batch[name])[form]
    with pytest.raises(ValueError, match=f"{name} must be a dense tensor"):
        model(**batch)


@pytest.mark.parametrize("form", ["sparse", "meta", "nested"])
def test_frames_and_masks_without_plain_values_are_refused(model, form):
    images = photos(2, 2, 56, 84)
    with pytest.raises(ValueError, match="images must be a dense tensor"):
        model(not_plain(images)[form], TEXTS[:2])
    with pytest.raises(ValueError, match=r"images\[1\] must be a dense tensor"):
        model([images[:, 0], not_plain(images[:, 1])[form]], TEXTS[:2])
    with pytest.raises(ValueError, match="camera_mask must be a dense tensor"):
        model(images, TEXTS[:2], not_plain(torch.ones(2, 2, dtype=torch.bool))[form])


# --- options of the processor ---


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", None, float]
)
def test_a_dtype_that_pixels_cannot_have_is_refused(model, dtype):
    with pytest.raises((TypeError, ValueError), match="dtype"):
        model.processor(photos(1, 1, 56, 84), ["a"], dtype=dtype)


@pytest.mark.parametrize("tokens", [float("nan"), -5, True, 2.5, "3", None, np.float64(3)])
def test_room_for_new_tokens_is_an_int(model, tokens):
    with pytest.raises((TypeError, ValueError), match="max_new_tokens"):
        model.processor(None, ["a"], max_new_tokens=tokens)


@pytest.mark.parametrize("size", [(28 * 10**5, 28 * 10**5), (28 * 2**70, 28), (28, 28 * 10**5000), (2**31, 28)])
def test_sizes_that_ask_for_terabytes_are_refused_by_arithmetic(model, size):
    with pytest.raises(ValueError, match=r"2\*\*31 pixels|multiples of 28"):
        model.encode_images(photos(1, 1, 56, 84), resize=size)


@pytest.mark.parametrize("values", [(0, 255), (-1, 1), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_floating_frames_on_the_host_outside_of_their_range_are_refused(model, values, dtype):
    images = torch.empty(2, 2, 3, 56, 84).uniform_(*values).to(dtype)
    for frames in (images, list(images.unbind(1))):
        with pytest.raises(ValueError, match=r"floating images must be in 0\.\.1"):
            model(frames, TEXTS[:2])
    absent = torch.tensor([[True, False], [True, False]])
    images[:, 0] = 0.5
    assert model(images, TEXTS[:2], absent).last_hidden_state.isfinite().all()


def test_floating_frames_may_overshoot_as_bicubic_does_and_hold_values_that_are_not_finite(model):
    images = torch.rand(2, 1, 3, 56, 84)
    images[0, 0, 0, 0, :2] = torch.tensor([-0.4, 1.4])
    images[1, 0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    out = model(images, TEXTS[:2])
    assert out.last_hidden_state[0].isfinite().all()


# --- attributes of the processor ---


def test_a_changed_attribute_of_the_processor_takes_effect(load):
    from dataclasses import replace

    changed, images = load(), photos(1, 1, 84, 113)
    before = changed.encode_images(images)
    changed.processor.image = replace(changed.processor.image, image_mean=(0.5,) * 3, image_std=(0.25, 0.5, 0.5))
    fresh = load()
    fresh.processor.image = changed.processor.image
    assert torch.equal(changed.encode_images(images), fresh.encode_images(images))
    assert not torch.equal(changed.encode_images(images), before)
    with pytest.raises(ValueError, match="padding_side"):
        changed.processor.padding_side = "middle"
