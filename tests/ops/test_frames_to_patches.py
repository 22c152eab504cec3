"""frames_to_patches: the reference equals its formula, the kernels the reference."""

import pytest
import torch

from qwen_batched import ops
from qwen_batched.model.geometry import resize_axis
from qwen_batched.ops import reference
from qwen_batched.ops.resize import resize
from tests.ops.support import kernels_of, precision
from tests.support import FLOAT32_TOLERANCE, assert_equal_to, noise

kernels = kernels_of("frames_to_patches")

pytestmark = pytest.mark.usefixtures("poisoned")


def patchify_formula(pixels, scale, mean, std, window_order, patch_size, merge, repeat):
    cell_size, cells_in_row = patch_size * merge, pixels.shape[-1] // (patch_size * merge)
    pixels = (pixels.double() * scale - mean.double()) / std.double()
    images = []
    for image in pixels:
        patches = []
        for cell in window_order.tolist():
            top, left = cell // cells_in_row * cell_size, cell % cells_in_row * cell_size
            for y in range(top, top + cell_size, patch_size):
                for x in range(left, left + cell_size, patch_size):
                    patch = image[:, y : y + patch_size, x : x + patch_size]
                    patches.append(torch.stack([patch] * repeat, dim=1).reshape(-1))
        images.append(torch.stack(patches))
    return torch.stack(images)


def patchify_inputs(images, h, w, patch_size, merge, dtype):
    generator = torch.Generator().manual_seed(0)
    side = patch_size * merge
    pixels = torch.rand(images, 3, h * side, w * side, dtype=torch.float64, generator=generator).to(dtype)
    mean, std = torch.tensor([0.5, 0.4, 0.3], dtype=dtype), torch.tensor([0.3, 0.2, 0.1], dtype=dtype)
    window_order = torch.randperm(h * w, generator=generator)
    return 200 * pixels, 1 / 255, mean.view(3, 1, 1), std.view(3, 1, 1), window_order, patch_size, merge


@precision
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 3), (3, 2), (5, 4)])
@pytest.mark.parametrize(("patch_size", "merge", "repeat"), [(14, 2, 2), (3, 3, 1), (5, 1, 3)])
def test_patchify_equals_its_formula(h, w, patch_size, merge, repeat, dtype, tolerance):
    inputs = patchify_inputs(2, h, w, patch_size, merge, dtype)
    out = reference.patchify(*inputs, repeat)
    assert out.shape == (2, h * w * merge**2, 3 * repeat * patch_size**2)
    assert_equal_to(out, patchify_formula(*inputs, repeat), tolerance)


# Sums of the same products in another order: values within about 1e-6 of a half may round to the other side. A small
# frame may have one such value; a still image shows it twice.
SHARE_APART, FEW_APART = 1e-4, 4


# (height, width) before and after: up, down, both, one axis alone, from next to nothing. Few rows: each is a program.
RESIZES = [
    *(((5, 7), (14, 28)), ((11, 27), (14, 42)), ((33, 13), (14, 28)), ((14, 20), (14, 42))),
    *(((20, 14), (42, 14)), ((1, 5), (14, 14))),
]
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)


def frames_of(before, dtype, device, images=2):
    frames = noise(images, 1, *before)[:, 0]
    return (frames if dtype == torch.uint8 else (frames / 255).to(dtype)).to(device)


def patches_of(frames, after, dtype, patch_size=14, merge=2, repeat=2):
    device = frames.device
    cells = after[0] * after[1] // (patch_size * merge) ** 2
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(3)).to(device)
    scale = 1 / 255 if frames.dtype == torch.uint8 else 1.0
    how = (scale, MEAN.to(device), STD.to(device), order, patch_size, merge, repeat)
    tables = None
    if frames.shape[-2:] != after:
        tables = [table for axis in (-1, -2) for table in resize_axis(frames.shape[axis], after[axis], device)]
    ours = kernels.frames_to_patches(frames, *after, tables, *how, dtype, ops.PILLOW)
    pixels = frames.float()
    if frames.shape[-2:] != after:
        # Rounded once, as on a GPU; of uint8 frames on a CPU `reference.resize` rounds after each axis.
        pixels = resize(pixels, *after, ops.PILLOW)
        pixels = pixels.round().clamp(0, 255) if frames.dtype == torch.uint8 else pixels
    return ours, reference.patchify(pixels, *how).to(dtype)


def assert_same_patches(ours, expected, frames, resized):
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    if not (resized and frames.dtype == torch.uint8):
        # bfloat16 values are roundings of float32 ones that are equal to 1e-6, so that few fall apart.
        assert_equal_to(ours, expected, FLOAT32_TOLERANCE if ours.dtype == torch.float32 else 2e-4)
        return
    step = 1 / 255 / STD.min()
    apart = (ours.float() - expected.float()).abs()
    # A value that only rounds to the next bfloat16 is not a step of a pixel.
    assert (apart > step / 8).sum() <= max(FEW_APART, SHARE_APART * ours.numel())
    assert apart.max() <= 1.1 * step


@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
def test_frames_to_patches_with_resize_equals_the_reference(before, after, frame_dtype, where):
    frames = frames_of(before, frame_dtype, where[0], images=1 if where[0] == "cpu" else 2)
    assert_same_patches(*patches_of(frames, after, where[1], patch_size=7), frames, resized=True)


@pytest.mark.slow
@pytest.mark.parametrize("frame_dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_frames_to_patches_takes_half_precision_frames(frame_dtype, where):
    if where[0] == "cpu" and frame_dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")
    frames = frames_of((11, 27), frame_dtype, where[0])
    assert_same_patches(*patches_of(frames, (14, 42), where[1], patch_size=7), frames, resized=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "frame_dtype", "limit"),
    [
        *(((34, 3), (2, 4), torch.uint8, 0), ((34, 3), (2, 4), torch.float32, None)),
        *(((6, 34), (8, 2), torch.uint8, 0), ((6, 34), (8, 2), torch.uint8, 1000)),
    ],
    ids=str,
)
def test_many_taps_are_right_in_a_loop_and_unrolled(before, after, frame_dtype, limit, where, monkeypatch):
    """A side of 34 shrunk to 2 takes 34 taps, more than are unrolled; the other side takes few."""
    few, many = sorted(resize_axis(*side, torch.device("cpu"))[1].shape[0] for side in zip(before, after, strict=True))
    assert few <= kernels.MAX_UNROLLED_TAPS < many
    if limit is not None:
        monkeypatch.setattr(kernels, "MAX_UNROLLED_TAPS", limit)
    frames = frames_of(before, frame_dtype, where[0], images=1)
    assert_same_patches(*patches_of(frames, after, where[1], patch_size=2, merge=1), frames, resized=True)


@pytest.mark.gpu
@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("before", "after", "images"),
    [
        ((480, 640), (448, 448), 24),
        ((480, 640), (476, 644), 24),
        ((240, 320), (252, 308), 24),
        ((2160, 3840), (224, 224), 2),
    ],
    ids=str,
)
def test_frames_to_patches_equals_the_reference_at_camera_sizes(before, after, images, frame_dtype):
    frames = frames_of(before, frame_dtype, "cuda", images=images)
    assert_same_patches(*patches_of(frames, after, torch.float32), frames, resized=True)


@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(28, 28), (56, 84), (140, 28)], ids=str)
def test_frames_to_patches_without_resize_equals_the_reference(size, frame_dtype, where):
    frames = frames_of(size, frame_dtype, where[0])
    assert_same_patches(*patches_of(frames, size, where[1]), frames, resized=False)


@pytest.mark.parametrize(("patch_size", "merge", "repeat"), [(3, 3, 1), (5, 1, 3), (16, 2, 2), (2, 1, 1), (7, 4, 2)])
@pytest.mark.parametrize(("frame_dtype", "resized"), [(torch.uint8, True), (torch.float32, False)])
def test_trap06_frames_to_patches_equals_the_reference_at_other_patch_sizes(
    patch_size, merge, repeat, frame_dtype, resized, where
):
    side = patch_size * merge
    after = (2 * side, 3 * side)
    frames = frames_of((5, 7) if resized else after, frame_dtype, where[0], images=1 if resized else 2)
    assert_same_patches(*patches_of(frames, after, where[1], patch_size, merge, repeat), frames, resized)


@pytest.mark.slow
@pytest.mark.parametrize(("after", "frame_dtype"), [((2, 4), torch.uint8), ((4, 2), torch.float32)], ids=str)
def test_frames_to_patches_takes_frames_of_any_strides(after, frame_dtype, where):
    frames = frames_of((8, 2), frame_dtype, where[0], images=1)
    for view in (
        frames[:, :, ::2],
        frames.flip(1).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)[:, :, :4],
        frames[:, :, :4].contiguous(memory_format=torch.channels_last),
        frames[:1, :, :4].expand(3, -1, -1, -1),
    ):
        assert not view.is_contiguous()
        assert_same_patches(*patches_of(view, after, where[1], patch_size=2, merge=1), view, resized=after != (4, 2))


@pytest.mark.parametrize("after", [(28, 56), (56, 56)], ids=str)
@pytest.mark.parametrize("frame_dtype", [torch.uint8, torch.float32])
def test_frames_to_patches_of_no_frames_is_empty(after, frame_dtype, where):
    frames = frames_of((56, 56), frame_dtype, where[0])[:0]
    ours, expected = patches_of(frames, after, where[1])
    assert ours.shape == expected.shape == (0, after[0] * after[1] // 196, 1176)


@pytest.mark.slow
def test_trap10_only_uint8_frames_are_rounded_and_clamped(where):
    """Bicubic overshoots at a hard edge; floating frames keep that."""
    edge = torch.zeros(1, 3, 14, 14, dtype=torch.uint8)
    edge[..., 7:] = 255
    patches = {}
    for frames in (edge.to(where[0]), (edge / 255).to(where[0])):
        patches[frames.dtype], expected = patches_of(frames, (28, 28), where[1])
        assert_same_patches(patches[frames.dtype], expected, frames, resized=True)
    assert patches[torch.float32].max() > patches[torch.uint8].max() + 0.1
    assert patches[torch.float32].min() < patches[torch.uint8].min() - 0.1


def test_halves_round_to_even(where):
    """Means of two neighbours, by a table of weights that is exact."""
    frames = torch.arange(28 * 28, dtype=torch.float32).remainder(256).byte().view(1, 1, 28, 28).repeat(1, 3, 1, 1)
    frames[..., 1::2] = frames[..., 0::2] + (frames[..., 0::2] < 255).byte()
    frames = frames.to(where[0])
    device = frames.device
    identity = torch.arange(28, dtype=torch.int32, device=device), torch.ones(1, 28, device=device)
    starts = torch.arange(0, 28, 2, dtype=torch.int32, device=device).repeat_interleave(2)
    halves = starts, torch.full((2, 28), 0.5, device=device)
    order = torch.zeros(1, dtype=torch.int64, device=device)
    how = (1.0, torch.zeros(3, 1, 1, device=device), torch.ones(3, 1, 1, device=device), order, 28, 1, 1)
    ours = kernels.frames_to_patches(frames, 28, 28, (*halves, *identity), *how, torch.float32, ops.PILLOW)
    pairs = frames.float().unflatten(-1, (14, 2)).mean(-1)
    assert torch.equal(ours.view(3, 28, 28), pairs.round().repeat_interleave(2, dim=-1)[0])
