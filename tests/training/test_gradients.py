"""Gradients equal those of transformers' Qwen2.5-VL, run one sample at a time; no sample's reach another's frames."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from tests.support import FLOAT32_TOLERANCE, assert_equal_to, noise, photos
from tests.training.gradients import (
    assert_gradients_equal,
    gradients,
    photos_as_floats,
    probe_loss,
    published_parameters,
    reference_pixels,
    reference_probe_loss,
)

TEXTS = ["Pick up the red block.", "", "Open the top drawer, then close the bottom drawer.\n"]
# Only 224 x 224 has full windows everywhere (trap 01).
SIZES = [(28, 28), (56, 308), (140, 140), (224, 224), (252, 252), (252, 308), (280, 280), (364, 364), (476, 644)]
PARTS = {
    "the patch embedding": "visual.patch_embed.proj.weight",
    "vision qkv": "attn.qkv.weight",
    "vision MLP": "visual.blocks.0.mlp.gate_proj.weight",
    "vision norms": "visual.blocks.0.norm1.weight",
    "the merger": "visual.merger.mlp.0.weight",
    "token embeddings": "model.embed_tokens.weight",
    "decoder qkv": "self_attn.k_proj.weight",
    "decoder MLP": "model.layers.0.mlp.up_proj.weight",
    "decoder norms": "input_layernorm.weight",
    "pixels": "frames.0",
}


@pytest.fixture(scope="module")
def models(load, device):
    """Our model by padding side, with gradients. Read only."""
    return {side: load(device=device, padding_side=side) for side in ("left", "right")}


def on(images, device):
    if images is None:
        return None
    return images.to(device) if isinstance(images, torch.Tensor) else [frames.to(device) for frames in images]


def assert_equal_to_transformers(models, reference, images, texts, camera_mask=None, template="chat", layers=(-1,)):
    """Compares the gradient of every parameter and of the frames, for each of `models`."""
    frames = photos_as_floats(on(images, reference.device))
    loss = reference_probe_loss(reference, frames, texts, camera_mask, template, layers)
    expected = gradients(loss, published_parameters(reference), frames)
    for model in models:
        out = model(frames, texts, camera_mask, layers=layers, template=template, resize=None)
        needed = PARTS.values() if images is not None else [PARTS["token embeddings"], PARTS["decoder qkv"]]
        assert_gradients_equal(gradients(probe_loss(out), model.named_parameters(), frames), expected, needed=needed)


def test_the_yardsticks_pixels_are_transformers_own(reference):
    frame = photos(1, 1, 84, 140)[0, 0]
    expected = reference.processor_inputs([frame], "")["pixel_values"]
    assert_equal_to(reference_pixels(reference, [frame.to(reference.device) / 255]), expected)


# --- equal to transformers ---


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_trap27_gradients_equal_transformers_at_every_size(models, reference, size):
    assert_equal_to_transformers([models["left"]], reference, photos(1, 1, *size), TEXTS[:1])


@pytest.mark.slow
def test_trap27_gradients_equal_transformers_for_several_cameras_and_padding(models, reference):
    assert_equal_to_transformers(models.values(), reference, photos(3, 2, 84, 140), TEXTS)


def test_trap27_gradients_equal_transformers_on_noise_with_partial_windows(models, reference):
    assert_equal_to_transformers(models.values(), reference, noise(2, 1, 140, 252), TEXTS[:2])


@pytest.mark.slow
def test_trap27_gradients_equal_transformers_for_cameras_of_mixed_sizes(models, reference):
    sizes = [(140, 196), (84, 84), (28, 56), (84, 84)]
    images = [photos(2, 1, *size, seed=camera)[:, 0] for camera, size in enumerate(sizes)]
    assert_equal_to_transformers(models.values(), reference, images, TEXTS[:2])


@pytest.mark.parametrize("template", ["plain", "{images}{text} <|im_end|>\n"])
def test_trap27_gradients_equal_transformers_in_other_templates(models, reference, template):
    assert_equal_to_transformers(models.values(), reference, photos(2, 2, 56, 84), TEXTS[:2], template=template)


def test_trap27_gradients_equal_transformers_for_text_alone(models, reference):
    """Those of the vision transformer are None, as there."""
    assert_equal_to_transformers(models.values(), reference, None, TEXTS)


MASKS = {
    "some cameras missing": [[True, False, True], [False, True, True], [True, True, True]],
    "all cameras missing for one sample": [[True, True, False], [False] * 3, [True, False, False]],
}


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "mixed sizes"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_trap20_gradients_equal_transformers_with_cameras_missing(models, reference, mask, mixed):
    images = photos(3, 3, 84, 140)
    images = [images[:, 0], images[:, 1, :, :56], images[:, 2]] if mixed else images
    assert_equal_to_transformers(models.values(), reference, images, TEXTS, torch.tensor(mask))


def test_trap20_with_all_cameras_of_all_samples_missing_gradients_are_those_of_text_alone(models):
    """The vision transformer has run: its gradients are zero, not None, and not NaN."""
    for model in models.values():
        frames = photos_as_floats(photos(3, 2, 56, 84).to(model.device))
        masked = model(frames, TEXTS, torch.zeros(3, 2, dtype=torch.bool))
        found = gradients(probe_loss(masked), model.named_parameters(), frames)
        alone = gradients(probe_loss(model(None, TEXTS)), model.named_parameters())
        for name, gradient in found.items():
            if name.startswith(("visual.", "frames.")):
                assert bool((gradient == 0).all()), name
            else:
                assert_equal_to(gradient, alone[name])


def test_trap28_gradients_equal_transformers_where_the_loss_takes_every_layer(models, reference):
    """Embeddings with the features in their place are an output and the decoder's input: nothing may overwrite them."""
    images, layers = photos(2, 2, 84, 140), (0, 1, 2, 3, -1)
    assert_equal_to_transformers(models.values(), reference, images, TEXTS[:2], layers=layers)


def test_trap28_every_output_may_be_in_the_loss_and_be_gone_through_again(models):
    model = models["left"]
    frames = photos_as_floats(photos(2, 2, 56, 84).to(model.device))
    before = frames.detach().clone()
    out = model(frames, TEXTS[:2], targets=["a", "b"], layers=(0, -1), logits="all", resize=None)
    parts = [*out.hidden_states, out.image_features, out.logits]
    loss = out.loss + sum(part.square().mean() for part in parts)
    wanted = [frames, *model.parameters()]
    first, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    for ours, theirs in zip(again, first, strict=True):
        assert_equal_to(ours, theirs)
    assert torch.equal(frames, before)


def test_trap27_gradients_equal_transformers_after_graphs_were_captured_and_weights_packed(load, reference, device):
    """Where there is a GPU: the third call without gradients is a replay."""
    model, images = load(device=device), photos(2, 2, 56, 84).to(device)
    with torch.no_grad():
        for _ in range(3):
            model(images / 255, TEXTS[:2], resize=None)
    assert len(model._calls.decoder) == (device == "cuda")
    assert_equal_to_transformers([model], reference, images, TEXTS[:2])


# --- the way to the pixels ---


@pytest.mark.slow
@pytest.mark.parametrize("size", [(240, 320), (256, 256), (61, 90)])
def test_gradients_go_through_the_resize(models, reference, size):
    frames = photos_as_floats(photos(1, 2, *size).to(reference.device))
    model = models["left"]
    h, w = model(frames, TEXTS[:1]).image_features.shape[2:4]
    resized = F.interpolate(frames[0], size=(28 * h, 28 * w), mode="bicubic", antialias=True, align_corners=False)
    expected = gradients(
        reference_probe_loss(reference, resized[None], TEXTS[:1]), published_parameters(reference), frames
    )
    ours = gradients(probe_loss(model(frames, TEXTS[:1])), model.named_parameters(), frames)
    assert_gradients_equal(ours, expected, needed=["frames.0"])


@pytest.mark.parametrize("resize", ["hf", (56, 28), None])
def test_gradients_of_frames_to_patches_are_those_of_finite_differences(model, resize):
    size = (28, 56) if resize is None else (30, 61)
    frames = photos(1, 1, *size).to(model.device).double().div(255).requires_grad_()

    def pixels(frames):
        return model.processor(frames, None, resize=resize, dtype=torch.float64)["pixel_values"]

    assert torch.autograd.gradcheck(pixels, frames, fast_mode=True, nondet_tol=1e-7)


def test_gradients_go_through_a_batch_that_was_prepared_elsewhere(models):
    model = models["left"]
    frames = photos_as_floats(photos(2, 2, 61, 90).to(model.device))
    mask = torch.tensor([[True, False], [True, True]])
    direct = model(frames, TEXTS[:2], mask)
    prepared = model(**model.processor(frames, TEXTS[:2], mask))
    named = dict(model.named_parameters())
    ours, theirs = (gradients(probe_loss(out), named, frames) for out in (prepared, direct))
    assert_gradients_equal(ours, theirs, FLOAT32_TOLERANCE)


# --- nothing is detached, nothing is poisoned ---


def outputs_of(model, frames):
    """Everything that depends on frames, by name."""
    out = model(frames, TEXTS[:2], targets=["a", ""], layers=(0, 2, -1), logits="all", norm="pre")
    batch = model.processor(frames, TEXTS[:2])
    features = model.visual(batch["pixel_values"], batch["raster_order"])
    embeds = model.model.embed_tokens(batch["input_ids"]) + features.mean()
    decoded = model.model(embeds, batch["rope_positions"].transpose(0, 1), batch["attention_mask"])
    return {
        **{f"hidden state {index}": x for index, x in enumerate(out.hidden_states)},
        "features": out.image_features,
        "logits": out.logits,
        "loss": out.loss,
        "last logits": model(frames, TEXTS[:2], logits="last").logits,
        "encoded": model.encode_images(frames),
        "vision block 0": model.encode_images(frames, layers=(0,))[0],
        "the vision transformer alone": features,
        "the decoder alone": decoded[0],
    }


@pytest.mark.slow
@pytest.mark.parametrize("what", ["frames", "the first parameter"])
def test_no_output_is_detached_from_what_wants_a_gradient(load, device, what):
    """Called before without gradients, so that whatever is cached or captured then must not serve now."""
    model = load(device=device).requires_grad_(False)
    frames = photos(2, 2, 56, 84).to(device).float() / 255
    with torch.no_grad():
        for _ in range(3):
            outputs_of(model, frames)
    source = model.visual.patch_embed.proj.weight if what == "the first parameter" else frames
    source.requires_grad_()
    for name, output in outputs_of(model, frames).items():
        assert output.requires_grad, name
        (gradient,) = torch.autograd.grad(output.square().mean(), source, retain_graph=True)
        assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0, name


@pytest.mark.parametrize(
    ("value", "side", "mixed", "checkpointing"),
    [
        (float("nan"), "left", False, False),
        (float("nan"), "right", True, True),
        (float("inf"), "left", True, False),
        (float("inf"), "right", False, True),
    ],
)
def test_a_frame_that_is_not_finite_reaches_no_other_samples_gradients(load, device, value, side, mixed, checkpointing):
    model = load(device=device, padding_side=side)
    if checkpointing:
        model.gradient_checkpointing_enable()
    mask = torch.tensor([[True, True], [True, True], [False, True], [False, False]])
    texts, targets = [*TEXTS, "a"], ["to the left", "b", "", "open it"]

    def run(bad):
        frames = photos(4, 2, 61, 84).to(device).float() / 255
        frames[1, 0] = value if bad else frames[1, 0]
        frames = [frames[:, 0], frames[:, 1, :, :, :60]] if mixed else frames
        frames = [x.requires_grad_() for x in frames] if mixed else frames.requires_grad_()
        out = model(frames, texts, mask, targets=targets)
        loss = out.loss + probe_loss(out)
        found = torch.autograd.grad(loss, frames if mixed else [frames])
        return out, found

    (clean, expected), (spoilt, found) = run(bad=False), run(bad=True)
    for sample in (0, 2, 3):
        own = clean.attention_mask[sample]
        assert_equal_to(spoilt.last_hidden_state[sample][own], clean.last_hidden_state[sample][own])
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal_to(ours[sample], theirs[sample])
    assert not spoilt.last_hidden_state[1].isfinite().all()
    assert not found[0][1].isfinite().all(), "the loss did not notice"


# --- state of earlier calls, and of other processes ---


@pytest.mark.parametrize("images", [photos(2, 2, 56, 84), None], ids=["images", "text only"])
def test_trap29_training_on_answers_works_after_calls_in_inference_mode(load, images):
    def loss_of(model):
        return model(images, TEXTS[:2], targets=["to the left", ""]).loss

    used, fresh = load(), load()
    with torch.inference_mode():
        loss_of(used)
    ours, theirs = (gradients(loss_of(model), model.named_parameters()) for model in (used, fresh))
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        assert expected is None or torch.equal(ours[name], expected), name


@contextlib.contextmanager
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("prepared", [False, True])
def test_trap30_a_call_without_images_runs_the_vision_transformer_for_other_processes(models, prepared):
    """FSDP and ZeRO-3 gather its weights in all processes or in none; DDP waits for every gradient."""
    model = models["right"]

    def call():
        return model(**model.processor(None, TEXTS, device=model.device)) if prepared else model(None, TEXTS)

    alone = call()
    ran = []
    handles = [block.register_forward_hook(lambda module, args, out: ran.append(module)) for block in model.blocks]
    try:
        with process_group():
            out = call()
    finally:
        for handle in handles:
            handle.remove()
    assert ran == model.blocks
    assert out.image_features is None
    assert torch.equal(out.last_hidden_state, alone.last_hidden_state)
    expected = gradients(probe_loss(alone), model.named_parameters())
    for name, gradient in gradients(probe_loss(out), model.named_parameters()).items():
        if name.startswith("visual."):
            assert gradient is not None and bool((gradient == 0).all()), name
        else:
            assert_equal_to(gradient, expected[name])


def test_trap30_processes_make_the_same_number_of_passes_whatever_images_they_have(models, monkeypatch):
    monkeypatch.setattr("qwen_batched.model.geometry.PATCHES_PER_PASS", 16)
    model, calls = models["right"], []
    handle = model.visual.blocks[0].register_forward_hook(lambda module, args, out: calls.append(module))
    images = photos(3, 2, 56, 84).to(model.device)
    several = model.encode_images(images)
    assert len(calls) > 1
    calls.clear()
    with process_group():
        one = model.encode_images(images)
    handle.remove()
    assert len(calls) == 1
    assert_equal_to(one, several)
