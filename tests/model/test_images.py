"""Frames become the pixels that transformers' image processors make of them.

Distances are in raw pixel values, 0 to 255: the normalisation is undone first.
"""

import json
import shutil
import types

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from qwen_batched import QwenBatchedVL, TensorProcessor
from qwen_batched.runtime import host_copies
from qwen_batched.runtime.lru_cache import LRUCache
from tests.support import SIZES, assert_equal_to, noise, photo, photos

RELEASE = Version(transformers.__version__).release
if RELEASE >= (5,):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as PilProcessor
else:
    from transformers import Qwen2VLImageProcessor as PilProcessor

# The issue's: Pillow and torchvision compute the same sums in other arithmetic, so that a value close to a half may
# round to the other side.
FURTHEST_APART = 1
PIL_SHARE_APART = 0.02
TORCHVISION_SHARE_APART = 1e-4
# Normalised values are up to 2.7 large, and float32.
EXACT = 1e-6

# Of typical cameras, and small ones: enlarged, reduced, and one side of each; halves of the resize rule.
CAMERA_SIZES = [
    *((240, 320), (320, 240), (256, 256), (480, 640), (640, 480), (720, 1280), (1280, 720), (300, 300), (30, 45)),
    *((50, 40), (97, 31), (70, 154), (126, 98)),
]
EXACT_SIZES = [
    *(((240, 320), (224, 224)), ((240, 320), (448, 448)), ((320, 240), (224, 224)), ((320, 240), (252, 448))),
    *(((200, 100), (140, 28)), ((60, 200), (112, 112)), ((200, 60), (112, 112)), ((56, 84), (56, 112))),
    *(((84, 56), (112, 56)), ((480, 640), (224, 280)), ((320, 240), (336, 280))),
    *(((640, 480), (560, 448)), ((640, 480), (588, 448))),
]


@pytest.fixture(scope="module")
def processor(checkpoint):
    return TensorProcessor.from_pretrained(checkpoint, resample_backend="pillow")


@pytest.fixture(scope="module")
def pil_processor(checkpoint):
    return PilProcessor.from_pretrained(checkpoint)


def frame_of(content, height, width):
    return photo(height, width) if content == "photo" else noise(1, 1, height, width)[0, 0]


def in_transformers_order(pixel_values, raster_order):
    """Patches (..., P, X) in window order to transformers' order: cell by cell in raster order."""
    order = raster_order[0].flatten()  # the cameras are of one size
    patches = pixel_values.unflatten(-2, (len(order), -1)).index_select(-3, order)
    return patches.flatten(-3, -2)


def raw(patches, image):
    """Normalised patches (..., 3 * 2 * 14 * 14) as raw values."""
    values = patches.double().cpu().unflatten(-1, (3, -1))
    std, mean = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (image.image_std, image.image_mean))
    return (values * std + mean) * 255


def raw_frames(patches, h, w):
    """Raw patches (h * w * 4, 3, 2 * 14 * 14) in transformers' order as a frame (3, 28 h, 28 w)."""
    patches = patches.reshape(h, w, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * 28, w * 28)


def processed(processor, frames, **options):
    """Raw frame (3, H, W) that the model sees of one frame (3, H, W)."""
    batch = processor(frames[None, None], None, **options)
    patches = in_transformers_order(batch["pixel_values"], batch["raster_order"])[0, 0]
    return raw_frames(raw(patches, processor.image), *batch["raster_order"].shape[1:])


def pillow(frame, height, width):
    image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pillow_of_floats(frame, height, width):
    """Pillow's bicubic of float32 values, which it never rounds."""
    channels = [Image.fromarray(channel.float().numpy()) for channel in frame]
    resized = [np.array(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized))


def assert_apart_at_most(ours, theirs, share):
    """Fails where values are more than 1 apart, or more than `share` of them are apart at all."""
    assert ours.shape == theirs.shape
    apart = (ours.double().cpu() - theirs.double().cpu()).abs()
    furthest, differing = float(apart.max()), float((apart > 0.5).double().mean())
    assert furthest < FURTHEST_APART + 0.01, f"{furthest} apart, {differing:.2%} of values differ"
    assert differing <= share, f"{differing:.2%} of values differ"


# --- uint8 frames ---


@pytest.mark.parametrize("content", ["photo", "noise"])
@pytest.mark.parametrize("size", CAMERA_SIZES, ids=str)
def test_trap10_uint8_frames_are_resized_as_by_transformers_pil_processor(processor, pil_processor, size, content):
    frame = frame_of(content, *size)
    batch = processor(frame[None, None], None)
    theirs = pil_processor(images=[frame.permute(1, 2, 0).numpy()], return_tensors="pt")
    ours = in_transformers_order(batch["pixel_values"], batch["raster_order"])[0, 0]
    _, h, w = batch["raster_order"].shape
    assert theirs["image_grid_thw"].tolist() == [[1, 2 * h, 2 * w]]
    image = processor.image
    assert_apart_at_most(raw(ours, image), raw(theirs["pixel_values"], image), PIL_SHARE_APART)


@pytest.mark.parametrize("content", ["photo", "noise"])
@pytest.mark.parametrize(("before", "after"), EXACT_SIZES, ids=str)
def test_trap10_uint8_frames_are_resized_to_an_exact_size_as_by_pillow(processor, before, after, content):
    frame = frame_of(content, *before)
    assert_apart_at_most(processed(processor, frame, resize=after), pillow(frame, *after), PIL_SHARE_APART)


def test_trap10_resized_uint8_frames_are_whole_numbers_within_their_range(processor):
    values = processed(processor, frame_of("noise", 90, 100), resize=(112, 140))
    assert (values - values.round()).abs().max() < 1e-3
    assert values.round().min() == 0 and values.round().max() == 255


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] * size[1] < 300_000], ids=str)
def test_trap04_pixels_have_transformers_patch_order(processor, pil_processor, size):
    frame = frame_of("noise", *size)
    batch = processor(frame[None, None], None)
    theirs = pil_processor(images=[frame.permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
    ours = in_transformers_order(batch["pixel_values"], batch["raster_order"])[0, 0]
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= EXACT
    first, second = ours.view(-1, 3, 2, 14, 14).unbind(2)
    assert torch.equal(first, second), "a still image is repeated over time"


def test_each_camera_and_sample_keeps_its_own_pixels(processor):
    frames = photos(2, 3, 90, 120)
    batch = processor(frames, None)
    for sample in range(2):
        for camera in range(3):
            alone = processor(frames[sample, camera][None, None], None)["pixel_values"][0, 0]
            assert (batch["pixel_values"][sample, camera] - alone).abs().max() <= EXACT


def test_cameras_of_other_sizes_keep_their_own_pixels(processor):
    frames = [photos(2, 1, 90, 120)[:, 0], photos(2, 1, 56, 200)[:, 0], photos(2, 1, 90, 120, seed=3)[:, 0]]
    batch = processor(frames, None)
    for camera in range(3):
        alone = processor(frames[camera][:, None], None)
        assert torch.equal(batch["raster_order"][camera], alone["raster_order"])
        assert (batch["pixel_values"][camera] - alone["pixel_values"][:, 0]).abs().max() <= EXACT


def test_cameras_of_other_sizes_resized_to_one_size_stay_a_list(processor):
    frames = [photos(2, 1, 90, 120)[:, 0], photos(2, 1, 56, 200)[:, 0]]
    batch = processor(frames, None, resize=(84, 112))
    assert [pixels.shape[:2] for pixels in batch["pixel_values"]] == [(2, 48)] * 2
    for camera in range(2):
        alone = processor(frames[camera][:, None], None, resize=(84, 112))["pixel_values"][:, 0]
        assert (batch["pixel_values"][camera] - alone).abs().max() <= EXACT


# --- float frames ---


@pytest.mark.parametrize("content", ["photo", "noise"])
@pytest.mark.parametrize(("before", "after"), EXACT_SIZES, ids=str)
def test_float_frames_are_resized_without_rounding(processor, before, after, content):
    frame = frame_of(content, *before) / 255
    ours, exact = processed(processor, frame, resize=after), pillow_of_floats(frame, *after) * 255
    assert_apart_at_most(ours, exact, share=0)
    # torch places its cubics in float32: at pixel 640 to 2**-15 of a pixel, which noise then shows.
    if max(*before, *after) < 512:
        assert_equal_to(ours, exact)
    assert (ours - ours.round()).abs().max() > 0.4, "rounded"


def test_trap13_float_frames_are_not_rescaled_again(processor):
    frames = noise(2, 2, 56, 84)
    whole = processor(frames, None)["pixel_values"]
    fractions = processor(frames / 255, None)["pixel_values"]
    assert (whole - fractions).abs().max() <= EXACT


def test_trap13_the_dtype_alone_decides_whatever_the_values(processor):
    # Black but for one value: a guess from the values would take either for the other.
    dark = torch.zeros(1, 1, 3, 56, 56, dtype=torch.uint8)
    dark[..., 0, 0] = 1
    assert processor(dark, None)["pixel_values"].max() < processor(dark.float(), None)["pixel_values"].max()
    bright = raw(processor(dark.float() * 1.4, None)["pixel_values"], processor.image)
    assert_equal_to(bright.max(), torch.tensor(1.4 * 255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resize", [None, (84, 56)])
def test_half_precision_frames_are_computed_in_float32(processor, dtype, resize):
    frames = (noise(1, 2, 56, 84) / 255).to(dtype)
    ours = processor(frames, None, resize=resize)["pixel_values"]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, processor(frames.float(), None, resize=resize)["pixel_values"])


@pytest.mark.parametrize("resize", [None, (84, 56)])
def test_float64_frames_equal_float32_frames(processor, resize):
    frames = noise(1, 2, 56, 84).double() / 255
    ours = processor(frames, None, resize=resize)["pixel_values"]
    assert ours.dtype == torch.float32
    assert_equal_to(ours, processor(frames.float(), None, resize=resize)["pixel_values"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_come_rounded_once_in_the_dtype_asked_for(processor, dtype):
    frames = noise(1, 2, 56, 84)
    exact = processor(frames, None)["pixel_values"]
    assert torch.equal(processor(frames, None, dtype=dtype)["pixel_values"], exact.to(dtype))


# --- layout of the frames in memory ---


def same_values_otherwise_laid_out(dtype):
    frames = (noise(2, 2, 90, 120) / (1 if dtype == torch.uint8 else 255)).to(dtype)
    spread = torch.zeros(2, 2, 3, 90, 240, dtype=dtype)
    spread[..., ::2] = frames
    padded = torch.zeros(2, 2, 4, 100, 130, dtype=dtype)
    padded[:, :, 1:, 5:95, 7:127] = frames
    channels_last = frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    cameras_first = frames.transpose(0, 1).contiguous().transpose(0, 1)
    return frames, {
        "every second column": spread[..., ::2],
        "a crop": padded[:, :, 1:, 5:95, 7:127],
        "channels last in memory": channels_last,
        "cameras first in memory": cameras_first,
    }


@pytest.mark.parametrize("resize", ["hf", (56, 84)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_frames_may_be_views(processor, resize, dtype):
    frames, views = same_values_otherwise_laid_out(dtype)
    expected = processor(frames, None, resize=resize)["pixel_values"]
    for name, view in views.items():
        assert not view.is_contiguous(), name
        assert_equal_to(processor(view, None, resize=resize)["pixel_values"], expected)


@pytest.mark.parametrize("resize", ["hf", (56, 84)])
def test_expanded_frames_are_as_good_as_copies(processor, resize):
    frames = noise(1, 1, 90, 120).expand(2, 3, -1, -1, -1)
    expanded = processor(frames, None, resize=resize)["pixel_values"]
    assert_equal_to(expanded, processor(frames.contiguous(), None, resize=resize)["pixel_values"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("resize", ["hf", None, (56, 84)])
def test_frames_stay_as_they_were(processor, dtype, resize):
    frames = noise(2, 2, 84, 112)
    frames = frames if dtype == torch.uint8 else (frames / 255).to(dtype)
    before = frames.clone()
    batch = processor(frames, None, resize=resize)
    batch["pixel_values"].zero_()
    batch["raster_order"].zero_()
    assert torch.equal(frames, before)
    # Nor does the batch share memory with what the next call uses.
    assert processor(frames, None, resize=resize)["raster_order"].max() > 0


# --- sizes ---


def preprocessors():
    limits = {"min_pixels": None, "max_pixels": None}
    low, high = 28 * 28 * 20, 28 * 28 * 60
    edges = {"shortest_edge": low, "longest_edge": high}
    return {
        "pixels": {"min_pixels": low, "max_pixels": high},
        "edges": {**limits, "size": edges},
        "both alike": {"min_pixels": low, "max_pixels": high, "size": edges},
        "both at odds": {"min_pixels": 28 * 28 * 5, "max_pixels": 28 * 28 * 30, "size": edges},
        "min_pixels and longest_edge": {"min_pixels": 28 * 28 * 5, "max_pixels": None, "size": edges},
        "neither": limits,
    }


def with_preprocessor(checkpoint, folder, fields):
    """A copy of the checkpoint, weights aside, whose preprocessor_config.json has these fields; None: has not."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def grid_of(batch):
    return tuple(batch["raster_order"].shape[1:])


def their_grid(pil_processor, frame):
    grid = pil_processor(images=[frame.permute(1, 2, 0).numpy()], return_tensors="pt")["image_grid_thw"]
    return tuple((grid[0, 1:] // 2).tolist())


@pytest.mark.parametrize("name", preprocessors())
def test_trap12_limits_of_either_spelling_are_honoured_as_by_transformers(checkpoint, tmp_path, name):
    fields = preprocessors()[name]
    ours = TensorProcessor.from_pretrained(with_preprocessor(checkpoint, tmp_path / "ours", fields))
    if RELEASE < (5,) and "size" in fields:
        # transformers 4 overwrites `size` with its default, and honours the other spelling alone.
        edges = {"min_pixels": fields["size"]["shortest_edge"], "max_pixels": fields["size"]["longest_edge"]}
        fields = edges | {key: value for key, value in fields.items() if value is not None and key != "size"}
    theirs = PilProcessor.from_pretrained(with_preprocessor(checkpoint, tmp_path / "theirs", fields))
    grids = []
    for size in [(30, 40), (56, 56), (140, 140), (200, 280), (480, 640), (1100, 1300)]:
        frame = noise(1, 1, *size)[0, 0]
        grids.append(grid_of(ours(frame[None, None], None)))
        assert grids[-1] == their_grid(theirs, frame), size
    # Both limits were reached, but where the file says nothing.
    assert name == "neither" or (grids[0] != (1, 1) and grids[-1] != (39, 46))


@pytest.mark.parametrize("option", ["min_pixels", "max_pixels"])
def test_trap12_arguments_override_the_checkpoint(checkpoint, tmp_path, option):
    limit = {"min_pixels": 28 * 28 * 40, "max_pixels": 28 * 28 * 12}[option]
    folder = with_preprocessor(checkpoint, tmp_path, {option: limit})
    theirs = PilProcessor.from_pretrained(folder)
    frame = noise(1, 1, 120, 170)[0, 0]
    plain = grid_of(TensorProcessor.from_pretrained(checkpoint)(frame[None, None], None))
    overridden = grid_of(TensorProcessor.from_pretrained(checkpoint, **{option: limit})(frame[None, None], None))
    assert overridden == their_grid(theirs, frame) != plain
    model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu", **{option: limit})
    assert tuple(model.encode_images(frame[None, None]).shape[2:4]) == overridden


def test_an_exact_size_needs_not_obey_the_limits(checkpoint):
    processor = TensorProcessor.from_pretrained(checkpoint, min_pixels=56 * 56, max_pixels=112 * 112)
    assert grid_of(processor(noise(1, 1, 56, 56), None, resize=(28, 28))) == (1, 1)
    assert grid_of(processor(noise(1, 1, 56, 56), None, resize=(140, 168))) == (5, 6)
    assert grid_of(processor(noise(1, 1, 140, 168), None, resize=None)) == (5, 6)


def test_frames_of_the_right_size_are_taken_as_they_are(processor):
    frame = frame_of("noise", 84, 140)
    for resize in (None, "hf", (84, 140)):
        assert (processed(processor, frame, resize=resize) - frame).abs().max() < 1e-3


# --- channels last ---


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2, 56, 84, 3), (1, 2, 3, 56, 3), (1, 2, 3, 3, 3)])
def test_trap13_channels_last_raises(processor, shape, dtype):
    frames = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match="channels"):
        processor(frames, None)
    with pytest.raises(ValueError, match="channels"):
        processor([frames[:, 0]], None)


# --- on a GPU, against the processor that transformers uses there ---


def torchvision_pixels(checkpoint, frame, **options):
    pytest.importorskip("torchvision")
    name = "Qwen2VLImageProcessor" if PilProcessor.__name__.endswith("Pil") else "Qwen2VLImageProcessorFast"
    theirs = getattr(transformers, name).from_pretrained(checkpoint)
    return theirs(images=[frame], return_tensors="pt", **options)["pixel_values"]


@pytest.mark.gpu
@pytest.mark.parametrize("floating", [False, True], ids=["uint8", "float"])
@pytest.mark.parametrize("content", ["photo", "noise"])
@pytest.mark.parametrize("size", CAMERA_SIZES, ids=str)
def test_trap10_frames_on_a_gpu_are_resized_as_by_transformers_there(checkpoint, processor, size, content, floating):
    frame = frame_of(content, *size).cuda()
    frame = frame / 255 if floating else frame
    theirs = torchvision_pixels(checkpoint, frame, **({"do_rescale": False} if floating else {}))
    batch = processor(frame[None, None], None)
    ours = in_transformers_order(batch["pixel_values"], batch["raster_order"])[0, 0]
    assert ours.is_cuda
    image = processor.image
    assert_apart_at_most(raw(ours, image), raw(theirs, image), TORCHVISION_SHARE_APART)


def test_each_stream_has_its_own_copies_and_a_capture_takes_any(monkeypatch):
    made, cache, key = [], LRUCache(8), ("text", torch.device("cuda"))

    def copy_on(stream, capturing=False):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        return host_copies.cached_h2d(cache, key, lambda: made.append(stream) or len(made))

    assert [copy_on(7), copy_on(7), copy_on(8), copy_on(7)] == [1, 1, 2, 1]
    assert copy_on(9, capturing=True) == 1
    assert made == [7, 8]
