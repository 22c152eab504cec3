"""Promise 2: a sample does not feel its batch. Also gradients, padding, and the batch as a data loader prepares it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched import QwenBatchedVL
from qwen_batched.runtime.lru_cache import LRUCache
from tests.support import assert_equal_to, noise, own_tokens, photos

SETTINGS = settings(max_examples=10, deadline=None)
LAYERS = (0, 2, -1)
TEXTS = ["Pick up the red block.", "", "把杯子放在桌子上。\n" * 4, "🤖 a"]

sides = st.integers(28, 150)
texts = st.one_of(st.sampled_from(["", "a", "open the drawer\n" * 12]), st.text(max_size=30))


@st.composite
def batches(draw):
    """Frames, texts and a camera mask of a batch: cameras of one size or of several, any sides from 28 up."""
    batch, cameras = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    mixed = draw(st.booleans())
    sizes = [(draw(sides), draw(sides)) for _ in range(cameras)]
    seed = draw(st.integers(0, 1000))
    if cameras == 0:
        images = None
    elif mixed:
        images = [noise(batch, 1, *size, seed=seed + camera)[:, 0] for camera, size in enumerate(sizes)]
    else:
        images = noise(batch, cameras, *sizes[0], seed=seed)
    mask = None
    if cameras and draw(st.booleans()):
        row = st.lists(st.booleans(), min_size=cameras, max_size=cameras)
        mask = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    return images, draw(st.lists(texts, min_size=batch, max_size=batch)), mask


def on(images, device):
    if images is None:
        return None
    return images.to(device) if isinstance(images, torch.Tensor) else [frames.to(device) for frames in images]


def samples(images, indices):
    if images is None:
        return None
    return images[indices] if isinstance(images, torch.Tensor) else [frames[indices] for frames in images]


def run(model, images, texts, mask=None, **options):
    return model(on(images, model.device), texts, camera_mask=mask, layers=LAYERS, logits="last", **options)


def features_of(out, sample):
    if out.image_features is None:
        return []
    return [camera[sample] for camera in cameras_of(out.image_features)]


def cameras_of(features):
    return features.unbind(1) if isinstance(features, torch.Tensor) else features


def assert_sample_equals(ours, i, theirs, j):
    """Sample `i` of one output is sample `j` of the other, in everything but the padding."""
    mine, other = ours.attention_mask[i], theirs.attention_mask[j]
    for name in ("input_ids", "image_mask", "camera_ids"):
        assert torch.equal(getattr(ours, name)[i][mine], getattr(theirs, name)[j][other]), name
    assert torch.equal(ours.position_ids[:, i][:, mine], theirs.position_ids[:, j][:, other])
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_equal_to(a[i][mine], b[j][other])
    assert_equal_to(ours.logits[i], theirs.logits[j])
    for a, b in zip(features_of(ours, i), features_of(theirs, j), strict=True):
        assert_equal_to(a, b)


def assert_identical(ours, theirs):
    """Bit for bit the same output."""
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    for name in ("attention_mask", "image_mask", "camera_ids", "position_ids", "input_ids"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.logits is None) == (theirs.logits is None)
    assert ours.logits is None or torch.equal(ours.logits, theirs.logits)
    assert (ours.image_features is None) == (theirs.image_features is None)
    if ours.image_features is not None:
        assert isinstance(ours.image_features, torch.Tensor) == isinstance(theirs.image_features, torch.Tensor)
        assert all(map(torch.equal, cameras_of(ours.image_features), cameras_of(theirs.image_features)))


@pytest.fixture(scope="module")
def either_padding(model, right_padded_model):
    return [model, right_padded_model]


# --- trap 19: independence ---


@given(batch=batches())
@SETTINGS
def test_trap19_sample_alone_equals_sample_in_batch(either_padding, batch):
    images, texts, mask = batch
    for model in either_padding:
        together = run(model, images, texts, mask)
        for i, text in enumerate(texts):
            alone = run(model, samples(images, [i]), [text], None if mask is None else mask[[i]])
            assert_sample_equals(together, i, alone, 0)


@given(batch=batches(), data=st.data())
@SETTINGS
def test_trap19_permuting_samples_permutes_outputs(either_padding, batch, data):
    images, texts, mask = batch
    order = data.draw(st.permutations(range(len(texts))))
    for model in either_padding:
        out = run(model, images, texts, mask)
        moved = run(model, samples(images, order), [texts[i] for i in order], None if mask is None else mask[order])
        assert moved.attention_mask.tolist() == out.attention_mask[order].tolist()
        for j, i in enumerate(order):
            assert_sample_equals(moved, j, out, i)


def test_trap19_the_padding_side_changes_no_sample(model, right_padded_model):
    left, right = (run(ours, photos(4, 2, 84, 140), TEXTS) for ours in (model, right_padded_model))
    assert not torch.equal(left.attention_mask, right.attention_mask)
    for i in range(4):
        assert_sample_equals(left, i, right, i)


def changed(images, mask, what):
    """Another neighbour 1: its frames, or its mask, or its text; samples 0 and 2 stay."""
    frames = images.float() / 255
    texts = ["Pick up the red block.", "a", "close the drawer"]
    if what == "image":
        frames[1] = 1 - frames[1]
    elif what == "mask":
        mask = mask.clone()
        mask[1] = ~mask[1]
    elif what == "longer text":
        texts[1] = "a much longer text, " * 20
    elif what == "control tokens":
        texts[1] = "<|vision_start|><|image_pad|><|im_end|>"
    elif what != "nothing":
        frames[1] = float(what)
    return frames, texts, mask


@pytest.mark.parametrize("what", ["image", "mask", "longer text", "control tokens", "nan", "inf", "-inf", "1.4"])
def test_trap19_a_neighbour_changes_nothing(either_padding, what):
    images, mask = photos(3, 2, 84, 140), torch.tensor([[True, True], [True, False], [False, True]])
    for model in either_padding:
        before, after = (run(model, *changed(images, mask, how)) for how in ("nothing", what))
        for i in (0, 2):
            assert_sample_equals(after, i, before, i)
        own = [own_tokens(out.last_hidden_state, out.attention_mask, 1) for out in (before, after)]
        assert own[0].shape != own[1].shape or not torch.equal(*own), "the change did not reach the neighbour itself"


# --- trap 20: padding ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_trap20_padding_has_finite_states_and_finite_gradients(load, device, side):
    """The loss takes in every slot, padding too: NaN times zero in a backward pass would be NaN."""
    model = load(device=device, padding_side=side)
    frames = (photos(4, 2, 56, 84).to(device).float() / 255).requires_grad_()
    mask = torch.tensor([[True, True], [False, False], [True, False], [False, True]])
    out = model(frames, ["a" * 80, "", "b", "Pick up"], camera_mask=mask, layers=range_of(model), logits="all")
    assert not out.attention_mask.all()
    loss = sum(hidden.float().square().mean() for hidden in out.hidden_states) + out.logits.square().mean()
    loss.backward()
    assert all(hidden.isfinite().all() for hidden in out.hidden_states)
    assert out.logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert frames.grad.isfinite().all()
    assert bool((frames.grad[~mask] == 0).all())


@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "mixed sizes"])
def test_trap20_nan_in_absent_frames_reaches_no_gradient(load, device, mixed):
    """Zeroing what an absent camera made is not enough: its NaN times a zero gradient would be in every weight."""
    model = load(device=device)
    mask = torch.tensor([[True, False], [False, True]], device=device)
    frames = photos(2, 2, 60, 84).to(device).float() / 255
    frames = frames.masked_fill(~mask[:, :, None, None, None], float("nan")).requires_grad_()
    images = [frames[:, 0], frames[:, 1, :, :, :56]] if mixed else frames
    out = model(images, ["a", "Pick up"], camera_mask=mask)
    out.last_hidden_state.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert frames.grad.isfinite().all()
    assert bool((frames.grad[~mask] == 0).all())
    assert bool((frames.grad[mask].flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_trap20_a_row_of_nothing_but_padding_is_finite_and_disturbs_nobody(load, device, side):
    """The processor makes no such row; the decoder may be given one."""
    model = load(device=device, padding_side=side)
    batch = model.processor(None, ["Pick up", "no", "a"], template="plain", device=torch.device(device))
    mask = batch["attention_mask"]
    mask[1] = False
    positions = batch["rope_positions"].transpose(0, 1)
    hidden = model.model(model.model.embed_tokens(batch["input_ids"]), positions, mask, layers=LAYERS)
    outputs = [*hidden, model.logits(hidden[-1])]
    assert all(output.isfinite().all() for output in outputs)
    for i, text in ((0, "Pick up"), (2, "a")):
        alone = model(None, [text], template="plain", layers=LAYERS)
        for ours, theirs in zip(hidden, alone.hidden_states, strict=True):
            assert_equal_to(own_tokens(ours, mask, i).detach(), theirs[0].detach())
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in model.model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_trap20_a_prompt_without_tokens_is_refused(model):
    """There is no last token to go on from. Never an IndexError, never tokens made up from padding."""
    for texts in ([""], ["", "a"]):
        with pytest.raises(ValueError, match="token"):
            model.generate(None, texts, template="plain", max_new_tokens=1)
        with pytest.raises(ValueError, match="token"):
            model(None, texts, template="plain", logits="last")
    assert model(None, ["a"], template="plain").last_hidden_state.isfinite().all()


def range_of(model):
    return list(range(model.config.text.num_hidden_layers + 1))


# --- trap 21: shapes at the edge ---


@pytest.mark.parametrize("size", [(28, 28), (29, 31), (113, 127), (127, 113), (28, 199), (211, 37)])
def test_trap21_prime_sizes_and_one_sample_equal_themselves_in_a_batch(either_padding, size):
    images = photos(3, 2, *size)
    for model in either_padding:
        together = run(model, images, TEXTS[:3])
        for i in range(3):
            assert_sample_equals(together, i, run(model, images[[i]], TEXTS[i : i + 1]), 0)


def test_trap21_one_sample_with_eight_cameras_equals_itself_in_a_batch(model):
    images = photos(2, 8, 56, 84)
    together = run(model, images, TEXTS[:2])
    assert together.camera_ids.max() == 7
    assert together.image_features.shape[:4] == (2, 8, 2, 3)
    for i in range(2):
        assert_sample_equals(together, i, run(model, images[[i]], TEXTS[i : i + 1]), 0)


def test_trap21_cameras_given_as_a_list_of_one_size_equal_the_tensor(model):
    images, mask = photos(2, 3, 84, 140), torch.tensor([[True, False, True], [True, True, True]])
    for camera_mask in (None, mask):
        as_list = run(model, list(images.unbind(1)), TEXTS[:2], camera_mask)
        as_tensor = run(model, images, TEXTS[:2], camera_mask)
        assert isinstance(as_list.image_features, list)
        assert_identical(as_list, replace(as_tensor, image_features=list(as_tensor.image_features.unbind(1))))


def test_trap21_a_sample_without_cameras_equals_text_alone(either_padding):
    images, mask = photos(2, 2, 84, 140), torch.tensor([[False, False], [True, True]])
    for model in either_padding:
        masked, alone = run(model, images, ["a", "Pick up"], mask), model(None, ["a"], layers=LAYERS)
        for ours, theirs in zip(masked.hidden_states, alone.hidden_states, strict=True):
            assert_equal_to(own_tokens(ours, masked.attention_mask, 0), theirs[0])
        assert not masked.image_mask[0].any()


# --- the batch of a data loader ---


def loader_inputs():
    images, mask = photos(4, 2, 113, 140), torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    mixed = [images[:, 0], images[:, 1, :, :60, :84]]
    return {
        "one size": (images, TEXTS, None),
        "float frames": (images.float() / 255, TEXTS, None),
        "mixed sizes": (mixed, TEXTS, None),
        "masked": (images, TEXTS, mask),
        "masked, mixed sizes": (mixed, TEXTS, mask),
        "text only": (None, TEXTS, None),
    }


OPTIONS = {"default": {}, "plain": {"template": "plain"}, "resize": {"resize": (84, 112)}}


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        *((inputs, "default") for inputs in loader_inputs()),
        *(("mixed sizes", "plain"), ("masked", "plain"), ("text only", "plain")),
        *(("float frames", "resize"), ("masked, mixed sizes", "resize")),
    ],
)
def test_a_prepared_batch_gives_the_same_bits(either_padding, inputs, options):
    (images, texts, mask), options = loader_inputs()[inputs], OPTIONS[options]
    if images is None:
        texts = [text or "." for text in texts]  # "plain" would leave no token of an empty text
    for model in either_padding:
        frames = on(images, model.device)
        device = {} if images is not None else {"device": model.device}
        batch = model.processor(frames, texts, mask, **options, **device)
        expected = model(frames, texts, mask, layers=LAYERS, logits="all", **options)
        assert_identical(model(**batch, layers=LAYERS, logits="all"), expected)


@pytest.mark.parametrize("inputs", loader_inputs().values(), ids=loader_inputs().keys())
def test_a_batch_prepared_in_a_data_loader_worker_on_the_host_gives_the_same_result(model, inputs):
    images, texts, mask = inputs
    batch = model.processor(images, texts, mask)
    expected = run(model, images, texts, mask)
    out = model(**batch, layers=LAYERS, logits="last")
    if model.device.type == "cpu":
        assert_identical(out, expected)
    else:  # the host resizes as Pillow does, the GPU as torchvision does
        assert torch.equal(out.input_ids, expected.input_ids)
        assert torch.equal(out.position_ids, expected.position_ids)


def test_a_bfloat16_model_takes_a_prepared_batch_in_float32_bit_for_bit(load, device):
    model = load(device=device, dtype=torch.bfloat16).requires_grad_(False)
    images = photos(2, 2, 113, 140).to(device)
    batch = model.processor(images, TEXTS[:2])
    assert batch["pixel_values"].dtype == torch.float32
    assert_identical(model(**batch, layers=LAYERS), model(images, TEXTS[:2], layers=LAYERS))


@pytest.mark.parametrize("inputs", loader_inputs().values(), ids=loader_inputs().keys())
def test_a_batch_holds_tensors_on_the_frames_device_and_the_hosts_counts(device, model, inputs):
    images, texts, mask = inputs
    where = {} if images is not None else {"device": device}
    batch = model.processor(on(images, device), texts, mask, **where)
    counts = batch.pop("prepared")
    assert counts.tokens == batch["attention_mask"].sum() and counts.answer_tokens is None
    for name, value in batch.items():
        tensors = value if isinstance(value, list) else [value]
        assert tensors and all(isinstance(tensor, torch.Tensor) for tensor in tensors), name
        assert all(tensor.device.type == device for tensor in tensors), name


def test_a_prepared_batch_and_frames_together_are_refused(model):
    images = photos(1, 1, 56, 56).to(model.device)
    batch = model.processor(images, ["a"])
    with pytest.raises(ValueError, match="either"):
        model(images, ["a"], **batch)


# --- gradients ---


# --- no state between calls ---


def test_the_same_call_twice_gives_the_same_bits_whatever_came_between(either_padding):
    images = photos(3, 2, 113, 140)
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    for model in either_padding:
        first = run(model, images, TEXTS[:3], mask)
        run(model, photos(2, 1, 140, 113), TEXTS[2:])
        run(model, None, TEXTS)
        model.generate(None, ["a"], max_new_tokens=2)
        with pytest.raises(ValueError, match="texts"):
            model(images.to(model.device), TEXTS)
        with torch.inference_mode():
            run(model, photos(1, 2, 29, 61), ["c"])
        assert_identical(run(model, images, TEXTS[:3], mask), first)


def test_trap29_tables_made_under_inference_mode_serve_training(load, device):
    model = load(device=device)
    images = photos(2, 2, 113, 140).to(device)
    with torch.inference_mode():
        expected = model(images, TEXTS[:2]).last_hidden_state.clone()
    out = model(images, TEXTS[:2]).last_hidden_state
    # Training runs on the references, inference on the kernels where there is a GPU.
    assert_equal_to(out, expected)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_state_dict_stays_that_of_the_checkpoint_after_calls(load, device):
    model = load(device=device)
    before = set(model.state_dict())
    run(model, photos(1, 2, 113, 140), ["a"])
    assert set(model.state_dict()) == before
    assert not list(model.buffers())


def test_caches_are_bounded(load, checkpoint, monkeypatch):
    """What a call leaves behind does not grow with the number of different texts, sizes and masks seen."""
    caches = []
    init = LRUCache.__init__

    def small(self, max_size, *bounds):
        assert 0 < max_size <= 2**16
        init(self, 3, *bounds)
        caches.append(self)

    monkeypatch.setattr(LRUCache, "__init__", small)
    model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu").requires_grad_(False)
    monkeypatch.undo()
    reference_model = load().requires_grad_(False)
    assert len(caches) >= 4
    for call in range(6):
        images = noise(2, 2, 28 + 28 * call, 56, seed=call)
        mask = torch.tensor([[bool(call & 1), True], [True, bool(call & 2)]])
        out = run(model, images, [f"text {call}", "b" * call], mask, template=f"{{images}} {call} {{text}}")
        expected = run(
            reference_model, images, [f"text {call}", "b" * call], mask, template=f"{{images}} {call} {{text}}"
        )
        assert_identical(out, expected)
    assert all(len(values) <= 3 for cache in caches for values in vars(cache).values() if hasattr(values, "__len__"))
