"""Methods that code for transformers' models calls give what transformers' do."""

import pytest
import torch
import transformers
from packaging.version import Version

from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.support import assert_equal_to, photo

IS_5 = Version(transformers.__version__).release >= (5,)
TEXTS = ["Pick up the red block.", "Go.", "open the drawer, then close it again"]


@pytest.fixture(params=["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def loaded(request, sisters):
    return sisters(request.param)


def batch_of(loaded, counts=(2, 0, 1), padding="left"):
    """A padded batch as transformers' processor makes it, of images of several sizes, and each sample's own inputs."""
    sizes = iter([(3, 4), (2, 2), (3, 4)])
    rows = []
    for count, text in zip(counts, TEXTS, strict=True):
        frames = [photo(*(side * loaded.factor for side in next(sizes)), index=i) for i in range(count)]
        rows.append(loaded.reference.processor_inputs(frames, text))
    length = max(row["input_ids"].shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        own = row["input_ids"].shape[1]
        place = slice(length - own, None) if padding == "left" else slice(0, own)
        ids[i, place], mask[i, place] = row["input_ids"][0].cpu(), 1
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    grids = [row["image_grid_thw"] for row in rows if "image_grid_thw" in row]
    device = loaded.device
    return ids.to(device), mask.to(device), torch.cat(pixels).to(device), torch.cat(grids).to(device)


def theirs_of(loaded):
    """The module of transformers that has the method."""
    model = loaded.reference.model
    return model if hasattr(model, "get_rope_index") else model.model


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rope_positions_are_those_of_transformers(loaded, padding):
    ids, mask, _, grids = batch_of(loaded, padding=padding)
    types = (ids == loaded.model.config.image_token_id).int()
    options = {"mm_token_type_ids": types} if IS_5 else {}
    expected, deltas = theirs_of(loaded).get_rope_index(ids, image_grid_thw=grids, attention_mask=mask, **options)
    calls = [
        loaded.model.get_rope_index(ids, image_grid_thw=grids, attention_mask=mask),
        loaded.model.get_rope_index(ids, types, grids, attention_mask=mask),
        loaded.model.get_rope_index(ids, grids, None, attention_mask=mask),
    ]
    own = mask.bool()
    for found, found_deltas in calls:
        assert torch.equal(found[:, own], expected[:, own]) and torch.equal(found_deltas, deltas.to(found_deltas))


def test_rope_positions_without_padding_or_images(loaded):
    ids = torch.arange(7)[None]
    found, deltas = loaded.model.get_rope_index(ids)
    assert torch.equal(found, torch.arange(7).expand(3, 1, 7)) and deltas.tolist() == [[0]]


def test_rope_positions_of_what_does_not_fit_are_refused(loaded):
    ids, mask, _, grids = batch_of(loaded)
    model = loaded.model
    with pytest.raises(ValueError, match="videos"):
        model.get_rope_index(ids, video_grid_thw=grids)
    with pytest.raises(ValueError, match="videos"):
        model.get_rope_index(ids, mm_token_type_ids=torch.full_like(ids, 2), image_grid_thw=grids)
    with pytest.raises(ValueError, match="more images"):
        model.get_rope_index(ids, image_grid_thw=grids[:1], attention_mask=mask)
    with pytest.raises(ValueError, match="1 images more"):
        model.get_rope_index(ids, image_grid_thw=torch.cat((grids, grids[:1])), attention_mask=mask)
    with pytest.raises(ValueError, match="image tokens"):
        model.get_rope_index(ids, image_grid_thw=grids + torch.tensor([0, 2, 0], device=grids.device))
    with pytest.raises(ValueError, match="attention_mask"):
        model.get_rope_index(ids, image_grid_thw=grids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="multiples"):
        model.get_rope_index(ids, image_grid_thw=grids + 1)


def test_image_features_are_those_of_transformers(loaded):
    _, _, pixels, grids = batch_of(loaded)
    model = loaded.reference.model
    if not hasattr(model, "get_image_features"):
        pytest.skip("transformers has the method since 4.52")
    with torch.no_grad():
        ours, theirs = (each.get_image_features(pixels, grids) for each in (loaded.model, model))
    has_deep = loaded.model.config.vision.deepstack_visual_indexes is not None
    if IS_5:
        pairs = list(zip(ours.pooler_output, theirs.pooler_output, strict=True))
        if has_deep:
            for own, other in zip(ours.deepstack_features, theirs.deepstack_features, strict=True):
                whole = isinstance(other, torch.Tensor)  # of all images, in earlier releases
                pairs += [(torch.cat(own), other)] if whole else zip(own, other, strict=True)
    elif has_deep:
        pairs = [*zip(ours[0], theirs[0], strict=True), *zip(ours[1], theirs[1], strict=True)]
    else:
        pairs = list(zip(ours, theirs, strict=True))
    assert len(pairs) >= len(grids)
    for own, other in pairs:
        assert_equal_to(own, other)


def test_image_features_have_gradients(loaded):
    _, _, pixels, grids = batch_of(loaded)
    pixels.requires_grad_(True)
    found = loaded.model.get_image_features(pixels, grids)
    images = found.pooler_output if IS_5 else found if isinstance(found[0], torch.Tensor) else found[0]
    sum(image.square().sum() for image in images).backward()
    assert bool((pixels.grad != 0).any(dim=1).all())


def test_patches_that_do_not_fit_their_grids_are_refused(loaded):
    _, _, pixels, grids = batch_of(loaded)
    with pytest.raises(ValueError, match="pixel_values"):
        loaded.model.get_image_features(pixels[1:], grids)
    with pytest.raises(ValueError, match="image_grid_thw"):
        loaded.model.get_image_features(pixels, grids[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_numbers_of_parameters_are_those_of_transformers(preset, tied, tmp_path):
    from qwen_batched import QwenBatchedVL
    from tests.sisters import skip_without

    skip_without(preset)
    write_checkpoint(tmp_path, preset, tied=tied)
    ours = QwenBatchedVL.from_pretrained(tmp_path, device="cpu")
    reference = TransformersReference.from_pretrained(tmp_path, device="cpu")
    theirs = reference.model.requires_grad_(True)
    for options in ({}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    ours.visual.requires_grad_(False)
    reference.visual.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)


def test_parts_and_flags_have_transformers_names(model):
    assert model.language_model is model.get_decoder() is model.base_model is model.model
    assert model.can_generate() and type(model).can_generate()
    assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    assert model.main_input_name == "input_ids" and model.warnings_issued == {}
    inputs = model.prepare_inputs_for_generation(torch.zeros(1, 2), attention_mask=None, use_cache=True)
    assert set(inputs) == {"input_ids", "use_cache"}
