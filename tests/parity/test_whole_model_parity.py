"""Promise 1: every output equals transformers' Qwen2.5-VL, run one sample at a time on the same folder.

Frames here have a size that the model takes as it is, so that what is compared is the model and not one resize against
another; `test_frames_of_any_size...` covers the way there.
"""

from contextlib import contextmanager

import pytest
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.ops.resize import resize
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.support import SIZES, assert_equal_to, noise, own_tokens, photos

MIN_PIXELS = 28 * 28
LAYERS = (0, 1, 2, 3, 4, -1)
RAGGED_TEXTS = [
    "",
    "Pick up the red block.\n\nThen:\n  - open the drawer \n",
    "把红色的积木放在盘子上。",
    "🤖 naïve café 🦾👩‍🔬",
    "move the gripper to the left of the robot arm, " * 30,
]
TEMPLATES = [
    "chat",
    "plain",
    "{images}{text}",
    "What? {text}\nLook:{images}",
    "<|im_start|>user\n{images} {text} <|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="session")
def both_paddings(model, right_padded_model):
    return {"left": model, "right": right_padded_model}


# --- what is compared ---


def reference_run(reference, frames, text, template="chat"):
    """Transformers on one sample: its inputs, its outputs, and what goes into the final norm."""
    inputs = reference.processor_inputs([frame.cpu() for frame in frames], text, template)
    with input_of(reference.decoder.norm) as seen:
        output = reference.run(**inputs)
    return inputs, output, seen[0]


@contextmanager
def input_of(module):
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def cameras_of(images):
    """Frames (B, V, 3, H, W) or V times (B, 3, H, W) as one list of (B, 3, H, W) per camera."""
    if images is None:
        return []
    return list(images.unbind(1)) if isinstance(images, torch.Tensor) else images


def to(images, device):
    if images is None:
        return None
    return images.to(device) if isinstance(images, torch.Tensor) else [frames.to(device) for frames in images]


def assert_equals_transformers(models, reference, images, texts, camera_mask=None, template="chat", layers=LAYERS):
    """Compares every output of the contract, for each of `models` (by padding side)."""
    cameras = cameras_of(images)
    mask = torch.ones(len(texts), len(cameras), dtype=torch.bool) if camera_mask is None else camera_mask
    present = [[camera for camera in range(len(cameras)) if mask[i, camera]] for i in range(len(texts))]
    expected = [
        reference_run(reference, [cameras[camera][i] for camera in present[i]], text, template)
        for i, text in enumerate(texts)
    ]
    longest = max(inputs["input_ids"].shape[1] for inputs, _, _ in expected)
    for side, model in models.items():
        options = {"camera_mask": camera_mask, "template": template}
        frames = to(images, model.device)
        out = model(frames, texts, layers=layers, logits="all", **options)
        pre = model(frames, texts, norm="pre", logits="last", **options)
        assert out.input_ids.shape == (len(texts), longest)
        for i, sample in enumerate(expected):
            assert_sample_equals(model, side, out, pre, i, sample, present[i], layers)
            assert_features_equal(out, i, sample[1], present[i], len(cameras))


def assert_sample_equals(model, side, out, pre, i, sample, present, layers):
    inputs, expected, before_norm = sample
    ids = inputs["input_ids"][0]
    own = out.attention_mask[i]
    slots = torch.arange(len(own))
    assert own.tolist() == (slots < len(ids) if side == "right" else slots >= len(own) - len(ids)).tolist()
    assert torch.equal(out.input_ids[i][own], ids)
    assert out.position_ids.dtype == torch.int64
    assert torch.equal(out.position_ids[:, i][:, own], expected.position_ids[:, 0])

    is_image = ids == model.config.image_token_id
    assert torch.equal(out.image_mask[i][own], is_image)
    cells = [len(features) for features in expected.image_features]
    cameras = torch.tensor(present).repeat_interleave(torch.tensor(cells)) if present else torch.tensor([])
    assert out.camera_ids[i][own][is_image].tolist() == cameras.tolist()
    assert not out.image_mask[i][~own].any()
    assert bool((out.camera_ids[i][~out.image_mask[i]] == -1).all())

    assert len(out.hidden_states) == len(layers)
    for layer, hidden in zip(layers, out.hidden_states, strict=True):
        assert_equal_to(own_tokens(hidden, out.attention_mask, i), expected.hidden_states[layer][0])
        assert hidden.isfinite().all()
    assert out.last_hidden_state is out.hidden_states[-1]
    assert_equal_to(own_tokens(pre.last_hidden_state, pre.attention_mask, i), before_norm[0])
    assert_equal_to(own_tokens(out.logits, out.attention_mask, i), expected.logits[0])
    assert_equal_to(pre.logits[i], expected.logits[0, -1])


def assert_features_equal(out, i, expected, present, n_cameras):
    if n_cameras == 0:
        assert out.image_features is None
        return
    for camera in range(n_cameras):
        of_camera = (
            out.image_features[camera][i] if isinstance(out.image_features, list) else out.image_features[i, camera]
        )
        if camera in present:
            assert_equal_to(of_camera.flatten(0, 1), expected.image_features[present.index(camera)])
        else:
            assert bool((of_camera == 0).all())


# --- sizes, cameras, texts, templates ---


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_trap01_every_output_equals_transformers_at_every_size(model, reference, size):
    assert_equals_transformers({"left": model}, reference, photos(1, 1, *size), ["Pick up the red block."])


@pytest.mark.parametrize(("cameras", "size"), [(1, (140, 140)), (2, (252, 308)), (3, (140, 196)), (8, (56, 84))])
def test_every_output_equals_transformers_for_every_number_of_cameras(both_paddings, reference, cameras, size):
    images = photos(3, cameras, *size, seed=cameras)
    texts = ["Pick up the red block.", "", "Open the top drawer, then close the bottom drawer."]
    assert_equals_transformers(both_paddings, reference, images, texts)


@pytest.mark.slow
def test_every_output_equals_transformers_on_noise_with_partial_windows(both_paddings, reference):
    assert_equals_transformers(both_paddings, reference, noise(2, 2, 252, 308), ["a", "the robot's arm"])


@pytest.mark.slow
def test_every_output_equals_transformers_for_text_only(both_paddings, reference):
    assert_equals_transformers(both_paddings, reference, None, RAGGED_TEXTS)


def test_every_output_equals_transformers_for_cameras_of_mixed_sizes(both_paddings, reference):
    sizes = [(252, 308), (140, 140), (56, 84), (140, 140)]
    images = [photos(2, 1, *size, seed=camera)[:, 0] for camera, size in enumerate(sizes)]
    assert_equals_transformers(both_paddings, reference, images, ["What is the robot doing?", "Describe."])


@pytest.mark.slow
def test_trap18_every_output_equals_transformers_for_ragged_texts(both_paddings, reference):
    assert_equals_transformers(both_paddings, reference, photos(len(RAGGED_TEXTS), 2, 84, 140), RAGGED_TEXTS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("cameras", [0, 1, 3])
def test_every_output_equals_transformers_for_every_template(both_paddings, reference, template, cameras):
    images = photos(3, cameras, 56, 140) if cameras else None
    texts = ["Pick up the red block.", " spaces around ", "\nlines\n\n"]
    assert_equals_transformers(both_paddings, reference, images, texts, template=template)


def test_frames_of_any_size_are_seen_at_the_size_that_transformers_chooses(model, reference):
    """240 x 320 and 256 x 256 become 252 x 308 and 252 x 252; float frames are resized without rounding."""
    images = [photos(2, 1, 240, 320)[:, 0], photos(2, 1, 256, 256, seed=2)[:, 0]]
    grids = [reference.processor_inputs([frames[0]], "")["image_grid_thw"][0, 1:] for frames in images]
    sizes = [tuple((14 * grid).tolist()) for grid in grids]
    assert sizes == [(252, 308), (252, 252)]
    resized = [
        resize(to(images, model.device)[camera], *size, model.processor.resample_backend).to(torch.uint8)
        for camera, size in enumerate(sizes)
    ]
    out = model(to(images, model.device), ["a", "Pick up"])
    for i, text in enumerate(["a", "Pick up"]):
        _, expected, _ = reference_run(reference, [frames[i] for frames in resized], text)
        assert_equal_to(own_tokens(out.last_hidden_state, out.attention_mask, i), expected.hidden_states[-1][0])


def test_float_frames_equal_uint8_frames_over_255(model):
    images = photos(2, 2, 140, 196).to(model.device)
    out, from_float = model(images, ["a", "bc"]), model(images.float() / 255, ["a", "bc"])
    assert_equal_to(from_float.last_hidden_state, out.last_hidden_state)


# --- camera masks ---

MASKS = {
    "some cameras missing": [[True, False, True], [False, True, True], [True, True, True], [False, False, True]],
    "all cameras missing for one sample": [[True] * 3, [False] * 3, [True, False, False], [True] * 3],
    "all cameras missing for all": [[False] * 3] * 4,
}
MASKED_TEXTS = ["Pick up the red block.", "", "a much longer text that makes the others padded", "b"]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_trap21_a_masked_camera_is_as_good_as_none(both_paddings, reference, mask):
    images = photos(4, 3, 84, 140)
    assert_equals_transformers(both_paddings, reference, images, MASKED_TEXTS, camera_mask=torch.tensor(mask))


@pytest.mark.parametrize("template", ["plain", "{images}{text}"])
def test_a_masked_camera_is_as_good_as_none_in_other_templates(both_paddings, reference, template):
    mask = torch.tensor(MASKS["some cameras missing"])
    assert_equals_transformers(
        both_paddings, reference, photos(4, 3, 84, 140), MASKED_TEXTS, camera_mask=mask, template=template
    )


def test_a_masked_camera_is_as_good_as_none_among_mixed_sizes(both_paddings, reference):
    images = [photos(4, 1, *size, seed=size[0])[:, 0] for size in [(84, 140), (140, 140), (56, 28)]]
    mask = torch.tensor(MASKS["all cameras missing for one sample"]) & torch.tensor(MASKS["some cameras missing"])
    assert_equals_transformers(both_paddings, reference, images, MASKED_TEXTS, camera_mask=mask)


def test_a_masked_sample_equals_a_call_with_only_its_present_cameras(both_paddings):
    images, mask = photos(2, 3, 84, 140), torch.tensor([[True, False, True], [False, True, False]])
    for model in both_paddings.values():
        out = model(images.to(model.device), ["a", "Pick up"], camera_mask=mask, layers=LAYERS)
        for i, text in enumerate(["a", "Pick up"]):
            alone = model(images[i : i + 1, mask[i]].to(model.device), [text], layers=LAYERS)
            for ours, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
                assert_equal_to(own_tokens(ours, out.attention_mask, i), theirs[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "mixed sizes"])
def test_absent_pixels_change_no_output_bit(model, value, mixed):
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    texts = ["a", "Pick up the cup", ""]
    images = photos(3, 2, 140, 100).to(model.device).float() / 255
    clean = [images[:, 0], images[:, 1, :, :56]] if mixed else images
    poisoned = images.masked_fill(~mask[:, :, None, None, None].to(model.device), value)
    poisoned = [poisoned[:, 0], poisoned[:, 1, :, :56]] if mixed else poisoned
    expected = model(clean, texts, camera_mask=mask, layers=LAYERS, logits="all")
    out = model(poisoned, texts, camera_mask=mask, layers=LAYERS, logits="all")
    pairs = [*zip(out.hidden_states, expected.hidden_states, strict=True), (out.logits, expected.logits)]
    pairs += zip(out.image_features, expected.image_features, strict=True)  # samples, or cameras of mixed sizes
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


# --- shapes of model ---


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_trap22_a_truncated_model_ends_with_the_final_norm_at_its_last_block(load, reference, device, kept):
    model = load(num_layers=kept, device=device).requires_grad_(False)
    images, texts = photos(2, 2, 84, 140), ["a", "Pick up the red block."]
    out = model(images.to(device), texts, layers=(-1, 0, kept), logits="all")
    pre = model(images.to(device), texts, layers=(-1,), norm="pre")
    for i, text in enumerate(texts):
        _, expected, before_norm = reference_run(reference, images[i], text)
        # transformers applies its norm to the last state only, which then is not what the block gave.
        block = before_norm if kept == 4 else expected.hidden_states[kept]
        with torch.no_grad():
            normed = reference.decoder.norm(block)
            logits = reference.model.lm_head(normed)
        for state in (out.hidden_states[0], out.hidden_states[2]):
            assert_equal_to(own_tokens(state, out.attention_mask, i), normed[0])
        assert_equal_to(own_tokens(out.hidden_states[1], out.attention_mask, i), expected.hidden_states[0][0])
        assert_equal_to(own_tokens(pre.last_hidden_state, pre.attention_mask, i), block[0])
        assert_equal_to(own_tokens(out.logits, out.attention_mask, i), logits[0])


VARIANTS = {
    "untied": {"tied": False},
    "7 query heads to 1, untied": {
        "tied": False,
        "text": {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
    },
    "14 query heads to 2": {"text": {"hidden_size": 224, "num_attention_heads": 14, "num_key_value_heads": 2}},
    "as many key heads as query heads": {"text": {"num_key_value_heads": 4}},
    "other rope and windows": {
        "text": {"rope_theta": 5000.0, "mrope_section": [4, 1, 3], "rms_norm_eps": 1e-2},
        "vision": {"window_size": 56, "fullatt_block_indexes": [0, 3, 5]},
    },
    "real head sizes": {"preset": "small"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_trap06_the_config_decides_the_shape_of_the_model(tmp_path, device, options):
    folder = write_checkpoint(tmp_path / "checkpoint", **options, image={"min_pixels": MIN_PIXELS})
    model = QwenBatchedVL.from_pretrained(folder, device=device).requires_grad_(False)
    reference = TransformersReference.from_pretrained(folder, device=device)
    assert_equals_transformers({"left": model}, reference, photos(2, 1, 140, 196), ["a", "Pick up the cup."])


def test_sharded_and_nested_checkpoints_equal_transformers(tmp_path, reference, device):
    folder = write_checkpoint(
        tmp_path / "checkpoint", key_layout="nested", config_layout="nested", shards=3, image={"min_pixels": MIN_PIXELS}
    )
    model = QwenBatchedVL.from_pretrained(folder, device=device).requires_grad_(False)
    # The same seed has the same values in every layout.
    assert_equals_transformers({"left": model}, reference, photos(2, 1, 140, 196), ["a", "Pick up the cup."])


# --- bfloat16 ---


@pytest.mark.slow
def test_bfloat16_deviates_no_more_than_transformers_bfloat16_does(tmp_path, device):
    """The checkpoint is stored in bfloat16, as the published ones: all deviation is arithmetic, none is the weights'.

    Squared errors and squared norms are summed over all tokens of all samples before the one ratio is taken: rounding
    is random, and the ratio for a single sample scatters by 4% (one standard deviation), that of 24 by less than 1%.
    """
    folder = write_checkpoint(tmp_path / "checkpoint", dtype=torch.bfloat16, image={"min_pixels": MIN_PIXELS})
    model = QwenBatchedVL.from_pretrained(folder, device=device).requires_grad_(False)
    assert model.dtype == torch.bfloat16
    exact = TransformersReference.from_pretrained(folder, torch.float32, device)
    rounded = TransformersReference.from_pretrained(folder, torch.bfloat16, device)
    ours, theirs, norm = 0.0, 0.0, 0.0
    for seed, size in enumerate(BFLOAT16_SIZES):
        images = photos(4, 2, *size, seed=8 * seed)
        texts = [f"{seed} pick up", "", "open the top drawer " * 8, "What is the robot doing in this picture?"]
        out = model(images.to(device), texts)
        for i, text in enumerate(texts):
            inputs = exact.processor_inputs(list(images[i]), text)
            expected = exact.run(**inputs).hidden_states[-1][0].double()
            ours += float((own_tokens(out.last_hidden_state, out.attention_mask, i) - expected).square().sum())
            theirs += float((rounded.run(**inputs).hidden_states[-1][0] - expected).square().sum())
            norm += float(expected.square().sum())
    assert 1e-4 < theirs / norm < 0.25, "the yardstick itself is out of order"
    assert (ours / theirs) ** 0.5 <= 1.05, f"{(ours / norm) ** 0.5:.4f} against {(theirs / norm) ** 0.5:.4f}"


BFLOAT16_SIZES = [(28, 28), (56, 308), (140, 140), (224, 224), (252, 252), (252, 308)]
