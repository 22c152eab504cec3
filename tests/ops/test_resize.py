"""resize: transformers' processors' pixels on a CPU, rounded once on a GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from qwen_batched import ops
from qwen_batched.ops.resize import resize
from tests.ops.support import precision
from tests.support import assert_equal_to, noise, photo, relative_error


def bicubic_weights(before, after):
    """(after, before) float64: Keys' cubic with a = -0.5, widened by the reduction, normalised at the borders."""
    step = before / after
    width = max(step, 1.0)
    weights = torch.zeros(after, before, dtype=torch.float64)
    for place in range(after):
        centre = (place + 0.5) * step
        for pixel in range(max(0, int(centre - 2 * width + 0.5)), min(before, int(centre + 2 * width + 0.5))):
            x = abs((pixel + 0.5 - centre) / width)
            if x < 1:
                weights[place, pixel] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[place, pixel] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum(dim=1, keepdim=True)


def resize_formula(pixels, height, width):
    rows, columns = bicubic_weights(pixels.shape[-2], height), bicubic_weights(pixels.shape[-1], width)
    return rows @ pixels.double() @ columns.T


RESIZES = [
    *(((28, 28), (56, 56)), ((37, 53), (28, 84)), ((90, 31), (28, 56)), ((64, 64), (28, 28)), ((50, 40), (51, 41))),
    *(((50, 40), (51, 60)), ((64, 50), (31, 50)), ((64, 50), (31, 40)), ((64, 50), (54, 45)), ((1, 5), (3, 2))),
    *(((30, 40), (30, 80)), ((40, 30), (80, 30))),
]


@precision
@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
def test_resize_of_floating_frames_equals_its_formula(before, after, dtype, tolerance):
    frames = torch.rand(2, 3, *before, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = resize(frames, *after, ops.PILLOW)
    assert out.dtype == dtype
    assert_equal_to(out, resize_formula(frames, *after), tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resize_of_half_precision_frames_computes_in_float32(dtype):
    frames = torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = resize(frames, 28, 84, ops.PILLOW)
    assert out.dtype == torch.float32
    assert_equal_to(out, resize_formula(frames, 28, 84))


@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
@pytest.mark.parametrize("content", ["photo", "noise"])
def test_resize_of_uint8_frames_on_the_cpu_is_pillows(before, after, content):
    frame = photo(*before) if content == "photo" else noise(1, 1, *before)[0, 0]
    out = resize(frame[None], *after, ops.PILLOW)
    pillow = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(after[::-1], Image.Resampling.BICUBIC)
    apart = (out[0] - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)).abs()
    assert out.dtype == torch.float32
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= 0.02


@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
@pytest.mark.parametrize("content", ["photo", "noise"])
def test_resize_of_uint8_frames_on_the_cpu_is_torchvisions_where_that_is_chosen(before, after, content):
    """torchvision calls PyTorch's kernel, whose sums are integers: equal to the last bit, in any layout."""
    frames = torch.stack([photo(*before)] * 2) if content == "photo" else noise(1, 2, *before)[0]
    expected = F.interpolate(frames, after, mode="bicubic", antialias=True)
    assert expected.dtype == torch.uint8
    turned = frames.transpose(2, 3).contiguous().transpose(2, 3)
    for laid_out in (frames, frames.contiguous(memory_format=torch.channels_last), turned):
        out = resize(laid_out, *after, ops.TORCHVISION)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected.float())
    assert relative_error(out, resize(frames, *after, ops.PILLOW)) < 0.1


def test_an_unknown_library_is_refused():
    for unknown in ("pil", "", None, 1):
        with pytest.raises(ValueError, match="resample_backend must be one of"):
            resize(noise(1, 2, 30, 40)[0], 28, 56, unknown)


@pytest.mark.gpu
@pytest.mark.parametrize(("before", "after"), RESIZES, ids=str)
@pytest.mark.parametrize("library", [ops.PILLOW, ops.TORCHVISION])
def test_resize_of_uint8_frames_on_a_gpu_rounds_once(before, after, library):
    frames = noise(1, 2, *before)[0]
    out = resize(frames.cuda(), *after, library)
    expected = resize_formula(frames, *after).round().clamp(0, 255)
    apart = (out.cpu() - expected).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_resize_to_the_same_size_changes_nothing(dtype):
    frames = noise(1, 2, 28, 56)[0].to(dtype)
    assert torch.equal(
        resize(frames, 28, 56, ops.PILLOW), frames.to(torch.float64 if dtype == torch.float64 else torch.float32)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_resize_leaves_the_frames_as_they_were(dtype):
    frames = noise(1, 2, 37, 53)[0].to(dtype)
    before = frames.clone()
    resize(frames, 28, 84, ops.PILLOW).zero_()
    assert torch.equal(frames, before)
