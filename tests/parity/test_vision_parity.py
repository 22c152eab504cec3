"""The vision tower computes what transformers' does, at every size, for every configuration it takes."""

import json
import shutil

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_batched import QwenBatchedVL
from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedVisionTransformer
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.support import SIZES, assert_equal_to, noise, photos, relative_error

RELEASE = Version(transformers.__version__).release
LAYERS = (1, 3, -1)
MIN_PIXELS = 28 * 28
# A wrong index moves features by 1e-2 and more.
NOTICEABLE = 1e-3

FRAMES = {"photo": photos, "noise": noise}
contents = pytest.mark.parametrize("content", FRAMES)


def reference_outputs(reference, frame, blocks):
    """Of one frame (3, H, W), by one run of transformers: features (h, w, D) and blocks' outputs (rows, columns, C)."""
    inputs = reference.processor_inputs([frame], "")
    grid, merge, seen = inputs["image_grid_thw"], reference.visual.spatial_merge_size, {}
    hooks = [
        reference.visual.blocks[block].register_forward_hook(lambda *args, block=block: seen.update({block: args[-1]}))
        for block in set(blocks)
    ]
    try:
        features = reference.run(**inputs).image_features[0]
    finally:
        for hook in hooks:
            hook.remove()
    rows, columns = grid[0, 1:].tolist()
    outputs = [reference.raster_patches(seen[block], grid)[0] for block in blocks]
    return features.unflatten(0, (rows // merge, columns // merge)), outputs


def assert_vision_equals_transformers(model, reference, frames, layers=LAYERS):
    """Features and block outputs of every image of (B, V, 3, H, W) or a list of (B, 3, H_i, W_i)."""
    on_device = frames.to(model.device) if isinstance(frames, torch.Tensor) else [x.to(model.device) for x in frames]
    features = model.encode_images(on_device)
    blocks = model.encode_images(on_device, layers=layers)
    depth = len(reference.visual.blocks)
    for camera in range(frames.shape[1] if isinstance(frames, torch.Tensor) else len(frames)):
        of_camera = (lambda x, v=camera: x[:, v]) if isinstance(frames, torch.Tensor) else (lambda x, v=camera: x[v])
        for sample, frame in enumerate(of_camera(frames)):
            expected, theirs = reference_outputs(reference, frame, [layer % depth for layer in layers])
            assert_equal_to(of_camera(features)[sample], expected)
            for ours, their in zip(blocks, theirs, strict=True):
                assert_equal_to(of_camera(ours)[sample], their)


# --- sizes ---


# The largest on a GPU alone: on a CPU it takes ten seconds, and the whole model is compared at it.
@pytest.mark.parametrize("size", [*SIZES[:-1], pytest.param(SIZES[-1], marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("content", ["noise", pytest.param("photo", marks=pytest.mark.gpu)])
def test_trap01_partial_windows_equal_transformers(model, reference, size, content):
    assert_vision_equals_transformers(model, reference, FRAMES[content](1, 1, *size))


@pytest.mark.parametrize("size", [(112, 112), (112, 448), (448, 112), (224, 252), (336, 112)], ids=str)
def test_trap02_grids_divisible_by_four_cells_equal_transformers(model, reference, size):
    assert_vision_equals_transformers(model, reference, photos(1, 1, *size))


@pytest.mark.parametrize("size", [(252, 308), (308, 252), (140, 392), (392, 140), (28, 280), (280, 28)], ids=str)
def test_trap03_portrait_and_landscape_equal_transformers(model, reference, size):
    assert_vision_equals_transformers(model, reference, photos(1, 1, *size))


@settings(max_examples=8, deadline=None)
@given(
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    batch=st.integers(1, 2),
    cameras=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_any_grid_equals_transformers(model, reference, h, w, batch, cameras, seed):
    frames = noise(batch, cameras, 28 * h, 28 * w, seed)
    assert_vision_equals_transformers(model, reference, frames, layers=(0, -1))


@contents
@pytest.mark.parametrize(("batch", "cameras"), [(2, 3), (1, 8)])
def test_every_camera_of_every_sample_equals_transformers(model, reference, batch, cameras, content):
    assert_vision_equals_transformers(model, reference, FRAMES[content](batch, cameras, 140, 252))


@pytest.mark.slow
@contents
def test_cameras_of_other_sizes_equal_transformers(model, reference, content):
    sizes = [(252, 308), (140, 140), (28, 56), (252, 308), (308, 252)]
    frames = [FRAMES[content](2, 1, *size, seed)[:, 0] for seed, size in enumerate(sizes)]
    assert_vision_equals_transformers(model, reference, frames)


def test_features_are_row_major_and_of_the_shapes_promised(model):
    frames = photos(2, 3, 252, 308).to(model.device)
    features = model.encode_images(frames)
    blocks = model.encode_images(frames, layers=LAYERS)
    assert features.shape == (2, 3, 9, 11, model.config.text.hidden_size)
    assert [block.shape for block in blocks] == [(2, 3, 18, 22, model.config.vision.hidden_size)] * len(LAYERS)
    uneven = [frames[:, 0], frames[:, 1, :, :140, :140]]
    assert [x.shape[:3] for x in model.encode_images(uneven)] == [(2, 9, 11), (2, 5, 5)]
    for block in model.encode_images(uneven, layers=LAYERS):
        assert [x.shape[:3] for x in block] == [(2, 18, 22), (2, 10, 10)]


@pytest.mark.parametrize("layers", [(0,), (5, 0, 3), (-1, -6), (2, 2)], ids=str)
def test_block_outputs_come_in_the_order_asked_for(model, reference, layers):
    assert_vision_equals_transformers(model, reference, photos(1, 2, 140, 168), layers=layers)


def test_a_changed_pixel_shows_at_its_own_place(model):
    frames = photos(1, 1, 252, 308).to(model.device)
    changed = frames.clone()
    changed[..., 28 * 2 + 3, 28 * 7 + 5] ^= 255
    # Block 0 sees windows alone: nothing else than the changed patch's window moves.
    before, after = (model.encode_images(x, layers=(0,))[0][0, 0] for x in (frames, changed))
    moved = ((after - before).abs().amax(-1) > NOTICEABLE).nonzero()
    assert moved.min(dim=0).values.tolist() == [0, 8]
    assert moved.max(dim=0).values.tolist() == [7, 15]
    place = (after - before).norm(dim=-1).flatten().argmax().item()
    assert divmod(place, 22) == (4, 14)


# --- patch embedding ---


def test_trap04_both_temporal_slices_of_the_patch_embedding_count(model, reference):
    weight = model.visual.patch_embed.proj.weight.detach()
    assert relative_error(weight[:, :, 0], weight[:, :, 1]) > 0.5, "the slices are alike, and this test blind"
    generator = torch.Generator().manual_seed(0)
    # Not a still image: the two slices of each patch differ.
    patches = torch.randn(12, 3 * 2 * 14 * 14, generator=generator).to(model.device)
    assert_equal_to(model.visual.patch_embed(patches), reference.visual.patch_embed(patches).detach())


def test_trap04_patches_reach_the_tower_in_transformers_order(model, reference):
    frames = noise(1, 1, 252, 308).to(model.device)
    batch = model.processor(frames, None)
    cells = batch["pixel_values"][0, 0].unflatten(0, (99, 4))
    inputs = reference.processor_inputs([frames[0, 0]], "")
    ours = cells[batch["raster_order"][0].flatten()].flatten(0, 1)
    # Float32 roundings of the same few operations.
    assert (ours - inputs["pixel_values"]).abs().max() <= 1e-6


def test_trap08_the_patch_embedding_is_conv3d_as_a_matrix_product(model):
    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    embed = model.visual.patch_embed
    patches = torch.randn(12, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)).to(model.device)
    with Operators() as operators:
        ours = embed(patches)
    assert not any("conv" in name for name in operators.names), operators.names
    convolved = torch.nn.functional.conv3d(patches.view(12, 3, 2, 14, 14), embed.proj.weight)
    assert_equal_to(ours, convolved.flatten(1))


# --- images apart from each other ---


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 2)], ids=str)
def test_trap05_cameras_never_see_each_other(model, place):
    frames = photos(2, 3, 140, 252).to(model.device)
    changed = frames.clone()
    changed[place] = noise(1, 1, 140, 252)[0, 0].to(model.device)
    before = [model.encode_images(frames), *model.encode_images(frames, layers=LAYERS)]
    after = [model.encode_images(changed), *model.encode_images(changed, layers=LAYERS)]
    for old, new in zip(before, after, strict=True):
        assert relative_error(new[place], old[place]) > NOTICEABLE
        new[place] = old[place]
        for image, unchanged in zip(new.flatten(0, 1), old.flatten(0, 1), strict=True):
            assert_equal_to(image, unchanged)


def test_trap05_cameras_of_other_sizes_never_see_each_other(model):
    frames = [photos(2, 1, *size)[:, 0].to(model.device) for size in ((140, 252), (252, 140), (140, 252))]
    changed = [frames[0], 255 - frames[1], frames[2]]
    before, after = model.encode_images(frames), model.encode_images(changed)
    assert_equal_to(after[0], before[0])
    assert relative_error(after[1], before[1]) > NOTICEABLE
    assert_equal_to(after[2], before[2])


# --- memory ---


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out

    @property
    def largest(self):
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, LAYERS], ids=["features", "blocks"])
def test_memory_grows_linearly_with_images_and_no_tensor_is_tokens_by_tokens(model, layers):
    largest = {}
    for images in (2, 8):
        frames = photos(images // 2, 2, 308, 252).to(model.device)
        model.encode_images(frames, layers=layers)  # plans are made once
        with Allocations() as allocations:
            model.encode_images(frames, layers=layers)
        tokens = 22 * 18
        for shape in allocations.shapes:
            assert sum(side in (tokens, tokens * images) for side in shape) <= 1, f"a tensor of shape {shape}"
        largest[images] = allocations.largest
    assert largest[8] <= 4 * largest[2]


# --- what the checkpoint's configuration says ---

CONFIGURATIONS = {
    "window of one cell": {"window_size": 28},
    "window of 2 cells": {"window_size": 56},
    "window of 3 cells": {"window_size": 84},
    "window of 5.36 cells": {"window_size": 150},
    "window larger than the image": {"window_size": 560},
    "patches of 16": {"patch_size": 16, "window_size": 128},
    "patches of 10": {"patch_size": 10, "window_size": 100},
    "cells of 3 x 3 patches": {"spatial_merge_size": 3, "patch_size": 7, "window_size": 84},
    "cells of one patch": {"spatial_merge_size": 1, "patch_size": 14, "window_size": 56},
    "temporal patches of 3": {"temporal_patch_size": 3},
    "temporal patches of 1": {"temporal_patch_size": 1},
    "whole image in every block": {"fullatt_block_indexes": [0, 1, 2, 3, 4, 5]},
    "whole image in the first and last": {"fullatt_block_indexes": [0, 5]},
    "whole image in no block": {"fullatt_block_indexes": []},
    "one block": {"depth": 1, "fullatt_block_indexes": [0]},
    "one head": {"hidden_size": 16, "num_heads": 1},
}


@pytest.fixture(scope="module")
def of_config(tmp_path_factory):
    """Writes a checkpoint; returns our model and transformers' of it."""

    def load(fields=(), **options):
        image = {"min_pixels": 28 * 28}
        folder = tmp_path_factory.mktemp("config")
        return of_folder(write_checkpoint(folder, "tiny", image=image, vision=dict(fields) or None, **options))

    return load


def of_folder(folder):
    model = QwenBatchedVL.from_pretrained(folder, device="cpu").requires_grad_(False)
    return model, TransformersReference.from_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_trap06_vision_configurations_equal_transformers(of_config, name):
    model, reference = of_config(CONFIGURATIONS[name])
    side = model.config.vision.cell_size
    layers = (0, -1)
    for grid in ((4, 9), (7, 5)):
        frames = photos(1, 1, side * grid[0], side * grid[1])
        assert_vision_equals_transformers(model, reference, frames, layers)


@pytest.mark.parametrize("fields", [{"window_size": 56}, {"fullatt_block_indexes": [2]}], ids=str)
def test_trap06_the_configuration_changes_the_features_of_the_same_weights(model, of_config, fields):
    frames = photos(1, 1, 140, 252).to(model.device)
    other, _ = of_config(fields)
    assert relative_error(other.encode_images(frames.cpu()), model.encode_images(frames)) > NOTICEABLE


@pytest.mark.parametrize(
    "fields",
    [{"rms_norm_eps": 0.1}, {"rope_theta": 100.0}, {"mrope_section": [4, 2, 2]}, {"rms_norm_eps": 1e-3}],
    ids=str,
)
def test_trap06_decoder_configurations_equal_transformers(model, of_config, fields):
    frames = photos(1, 2, 56, 140)
    ours, reference = of_config(text=fields)
    hidden = ours(frames, ["Pick up the red block."]).last_hidden_state
    theirs = reference.run(**reference.processor_inputs(list(frames[0]), "Pick up the red block."))
    assert_equal_to(hidden, theirs.hidden_states[-1])
    default = model(frames.to(model.device), ["Pick up the red block."]).last_hidden_state
    assert relative_error(hidden, default) > NOTICEABLE


@pytest.mark.parametrize("tokens_per_second", [1, 2, 25])
def test_trap06_tokens_per_second_concerns_no_still_image_as_in_transformers(of_config, tokens_per_second):
    ours, reference = of_config({"tokens_per_second": tokens_per_second})
    frames = photos(1, 2, 56, 140)
    theirs = reference.run(**reference.processor_inputs(list(frames[0]), "Pick up."))
    out = ours(frames, ["Pick up."])
    assert torch.equal(out.position_ids, theirs.position_ids)
    assert_equal_to(out.last_hidden_state, theirs.hidden_states[-1])


def with_vision_fields(checkpoint, folder, fields):
    """A copy of the checkpoint with these fields in config.json's vision_config."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(RELEASE < (5,), reason="this transformers has a constant in its place")
@pytest.mark.parametrize("rope_type", ["axial", "default"])
def test_trap06_the_rope_theta_of_the_vision_tower_is_read_as_by_transformers(checkpoint, tmp_path, rope_type):
    fields = {"rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0}}
    model, reference = of_folder(with_vision_fields(checkpoint, tmp_path, fields))
    frames = photos(1, 1, 140, 252)
    assert_vision_equals_transformers(model, reference, frames)
    plain = QwenBatchedVL.from_pretrained(checkpoint, device="cpu").requires_grad_(False).encode_images(frames)
    assert relative_error(model.encode_images(frames), plain) > NOTICEABLE


@pytest.mark.parametrize("width", [1, 7, 91, 427])
def test_trap07_mlp_widths_that_are_no_multiples_of_eight_equal_transformers(of_config, width):
    model, reference = of_config({"intermediate_size": width})
    assert_vision_equals_transformers(model, reference, photos(1, 1, 140, 168))


@pytest.mark.parametrize(("heads", "size"), [(2, 80), (5, 16), (1, 64), (3, 4), (3, 20), (2, 96), (2, 128)], ids=str)
def test_trap09_heads_of_every_size_equal_transformers(of_config, heads, size):
    model, reference = of_config({"hidden_size": heads * size, "num_heads": heads})
    assert model.config.vision.head_dim == size
    assert_vision_equals_transformers(model, reference, photos(1, 1, 140, 168))


def test_the_vision_transformer_alone_equals_the_whole_models(checkpoint, model):
    alone = BatchedVisionTransformer.from_pretrained(checkpoint, device=str(model.device)).requires_grad_(False)
    batch = model.processor(photos(2, 2, 140, 252).to(model.device), None)
    assert_equal_to(alone(**batch), model.visual(**batch))
