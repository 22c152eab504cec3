"""The resize rule is transformers' own, and a vision plan says exactly what transformers' window index says."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.model import geometry
from qwen_batched.model.geometry import IMAGE, WINDOWS, make_vision_plan, resize_axis, smart_resize, split_into_passes
from tests.support import assert_equal_to

if Version(transformers.__version__).release >= (5,):
    # The other module of this name needs torchvision.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize
else:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as their_smart_resize

CPU = torch.device("cpu")
VISION = FAMILY.config.vision
DEFAULT_LIMITS = (56 * 56, 28 * 28 * 1280)

sides = st.integers(28, 3000)
# (patch size, merge, window size): the published one first; windows of one cell; windows that are no whole cells.
GEOMETRIES = [(14, 2, 112), (14, 2, 56), (14, 2, 28), (14, 2, 140), (14, 2, 100), (16, 2, 112), (7, 3, 63), (14, 1, 56)]
geometries = st.sampled_from(GEOMETRIES)
cells = st.integers(1, 25)


def config_of(patch_size, merge, window_size):
    sizes = {"patch_size": patch_size, "spatial_merge_size": merge, "window_size": window_size}
    return replace(VISION, hidden_size=48, num_heads=3, **sizes)


def transformers_size(height, width, factor, min_pixels, max_pixels):
    sides = their_smart_resize(height, width, factor, min_pixels, max_pixels)
    # transformers 4.51 shrinks very long images to nothing; later ones stop at one cell.
    return tuple(max(factor, side) for side in sides)


# --- resize rule ---


@settings(max_examples=500, deadline=None)
@given(
    height=sides,
    width=sides,
    factor=st.sampled_from([28, 16, 27]),
    limits=st.sampled_from(
        [DEFAULT_LIMITS, (784, 12845056), (256 * 784, 1280 * 784), (100352, 100352), (784, 784), (5_000_000, 6_000_000)]
    ),
)
def test_smart_resize_equals_transformers(height, width, factor, limits):
    assert smart_resize(height, width, factor, *limits) == transformers_size(height, width, factor, *limits)


@settings(max_examples=100, deadline=None)
@given(short=st.integers(28, 60), ratio=st.floats(1, 200), tall=st.booleans())
def test_smart_resize_of_long_images_equals_transformers(short, ratio, tall):
    size = (int(short * ratio), short) if tall else (short, int(short * ratio))
    for limits in (DEFAULT_LIMITS, (784, 28 * 28 * 16)):
        assert smart_resize(*size, 28, *limits) == transformers_size(*size, 28, *limits)


@pytest.mark.parametrize(
    ("side", "factor", "rounded"),
    [(336, 32, 320), (720, 32, 704), (70, 28, 56), (98, 28, 112), (126, 28, 112), (154, 28, 168), (350, 28, 336)],
)
def test_trap11_halves_round_to_even(side, factor, rounded):
    assert smart_resize(side, side, factor, 1, 10**9) == (rounded, rounded)


@pytest.mark.parametrize("factor", [28, 32])
def test_trap11_every_half_rounds_as_in_transformers(factor):
    halves = [factor * k + factor // 2 for k in range(1, 100)]
    for height in halves:
        for width in (factor * 7, height, halves[-1]):
            ours = smart_resize(height, width, factor, *DEFAULT_LIMITS)
            assert ours == their_smart_resize(height, width, factor, *DEFAULT_LIMITS)


@settings(max_examples=100, deadline=None)
@given(short=st.integers(28, 700), ratio=st.floats(1, 10), low=st.integers(1, 100), high=st.integers(500, 2000))
def test_resized_images_are_whole_cells_within_the_limits(short, ratio, low, high):
    resized = smart_resize(short, int(short * ratio), 28, 784 * low, 784 * high)
    assert all(side > 0 and side % 28 == 0 for side in resized)
    assert 784 * low <= math.prod(resized) <= 784 * high


@pytest.mark.parametrize("size", [(27, 100), (100, 27), (0, 28), (28, 28 * 200 + 1), (28 * 200 + 1, 28)])
def test_sizes_that_cannot_be_resized_raise(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]}"):
        smart_resize(*size, 28, *DEFAULT_LIMITS)


@pytest.mark.parametrize("size", [(28, 28 * 200), (28 * 200, 28), (28, 28)])
def test_the_most_extreme_sizes_are_resized_as_in_transformers(size):
    assert smart_resize(*size, 28, *DEFAULT_LIMITS) == their_smart_resize(*size, 28, *DEFAULT_LIMITS)


# --- vision plan ---


def segments(plan, cell_patches):
    """Each window's cells, raster indices in the order in which the plan has them."""
    for run in plan.segments[WINDOWS].runs:
        for start in range(run.start, run.stop, run.length):
            assert start % cell_patches == 0 and run.length % cell_patches == 0
            yield plan.window_order[start // cell_patches : (start + run.length) // cell_patches].tolist()


@settings(max_examples=30, deadline=None)
@given(h=cells, w=cells, geometry=geometries)
def test_window_order_is_a_permutation_and_raster_order_its_inverse(h, w, geometry):
    plan = make_vision_plan(config_of(*geometry), h, w, CPU)
    raster = torch.arange(h * w)
    assert plan.raster_order.shape == (h, w)
    assert plan.window_order.dtype == plan.raster_order.dtype == torch.int64
    assert torch.equal(plan.window_order.sort().values, raster)
    assert torch.equal(plan.window_order[plan.raster_order.flatten()], raster)
    assert torch.equal(plan.raster_order.flatten()[plan.window_order], raster)


@settings(max_examples=30, deadline=None)
@given(h=cells, w=cells, geometry=geometries)
def test_at_most_four_runs_tile_the_tokens(h, w, geometry):
    config = config_of(*geometry)
    plan = make_vision_plan(config, h, w, CPU)
    patches = h * w * config.cell_patches
    assert 1 <= len(plan.segments[WINDOWS].runs) <= 4
    starts = [run.start for run in plan.segments[WINDOWS].runs]
    assert starts == [0, *(run.stop for run in plan.segments[WINDOWS].runs[:-1])]
    assert plan.segments[WINDOWS].runs[-1].stop == patches
    assert [(run.start, run.count, run.length) for run in plan.segments[IMAGE].runs] == [(0, 1, patches)]


@settings(max_examples=30, deadline=None)
@given(h=cells, w=cells, geometry=geometries)
def test_trap01_every_segment_is_one_window_partial_ones_included(h, w, geometry):
    config = config_of(*geometry)
    side = geometry[2] // geometry[1] // geometry[0]
    expected = {
        tuple(row * w + column for row in range(top, min(top + side, h)) for column in range(left, min(left + side, w)))
        for top in range(0, h, side)
        for left in range(0, w, side)
    }
    found = [tuple(cells) for cells in segments(make_vision_plan(config, h, w, CPU), config.cell_patches)]
    assert len(found) == len(expected)
    assert set(found) == expected


@pytest.mark.parametrize(
    ("h", "w", "lengths"),
    [(8, 8, [64]), (4, 4, [64]), (4, 12, [64]), (8, 9, [64, 16]), (9, 8, [64, 16]), (9, 11, [64, 48, 16, 12])],
)
def test_trap02_grids_divisible_by_four_cells_have_no_empty_window(h, w, lengths):
    runs = make_vision_plan(VISION, h, w, CPU).segments[WINDOWS].runs
    assert [run.length for run in runs] == lengths
    assert all(run.count > 0 for run in runs)


@settings(max_examples=20, deadline=None)
@given(h=cells, w=cells, geometry=geometries)
def test_trap02_windows_are_those_of_transformers(h, w, geometry):
    vision_utils = pytest.importorskip("transformers.vision_utils", reason="this transformers has it elsewhere")
    patch_size, merge, window_size = geometry
    grid = torch.tensor([[1, h * merge, w * merge]])
    order, bounds = vision_utils.get_vision_window_index(grid, merge, window_size, patch_size)
    patches = (bounds // merge**2).tolist()
    theirs = {tuple(order[start:stop].tolist()) for start, stop in itertools.pairwise(patches)}
    plan = make_vision_plan(config_of(*geometry), h, w, CPU)
    assert {tuple(cells) for cells in segments(plan, merge**2)} == theirs


@settings(max_examples=20, deadline=None)
@given(h=cells, w=cells, geometry=geometries, theta=st.sampled_from([10000.0, 500.0]))
def test_trap03_rotary_tables_follow_the_patches_into_their_windows(h, w, geometry, theta):
    patch_size, merge, window_size = geometry
    config = replace(config_of(patch_size, merge, window_size), rope_theta=theta)
    plan = make_vision_plan(config, h, w, CPU)
    rows, columns = [], []
    for cell in plan.window_order.tolist():
        for inner in range(merge**2):
            rows.append(cell // w * merge + inner // merge)
            columns.append(cell % w * merge + inner % merge)
    frequencies = [theta ** -(2 * index / 8) for index in range(4)]  # heads of 16: 8 for rows, 8 for columns
    angles = torch.tensor(
        [[x * f for x in place for f in frequencies] for place in zip(rows, columns, strict=True)], dtype=torch.float64
    )
    assert plan.cos.dtype == plan.sin.dtype == torch.float32
    assert plan.cos.shape == plan.sin.shape == (h * w * merge**2, 8)
    # An angle of up to 100 is a float32 with an error of 4e-6, and so is its cosine.
    torch.testing.assert_close(plan.cos.double(), angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sin.double(), angles.sin(), atol=1e-5, rtol=0)


def test_a_plan_made_under_another_default_device_or_dtype_is_the_same():
    expected = make_vision_plan(VISION, 5, 6, CPU)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            plan = make_vision_plan(VISION, 5, 6, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("window_order", "raster_order", "cos", "sin"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name


def test_a_plan_stands_on_the_device_asked_for(device):
    plan = make_vision_plan(VISION, 5, 6, torch.device(device))
    for name in ("window_order", "raster_order", "cos", "sin"):
        assert getattr(plan, name).device.type == device


# --- resize tables ---


def keys_weights(source, target):
    """(target, source) float64: Keys' cubic with a = -0.5, widened by the reduction, normalised at the borders."""
    stretch = max(source / target, 1.0)
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target
    x = ((torch.arange(source) + 0.5 - centres[:, None]) / stretch).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)


def as_matrix(starts, weights, source):
    """(target, source): what a table does."""
    taps, target = weights.shape
    matrix = torch.zeros(target, source, dtype=torch.float64, device=weights.device)
    pixels = starts.long() + torch.arange(taps, device=weights.device)[:, None]
    return matrix.scatter_add_(1, pixels.t(), weights.double().t())


resized_sides = st.integers(1, 90)


@settings(max_examples=40, deadline=None)
@given(source=resized_sides, target=resized_sides)
def test_a_resize_table_is_pytorchs_antialiased_bicubic_resize(source, target):
    starts, weights = resize_axis(source, target, CPU)
    taps = weights.shape[0]
    assert (starts.dtype, starts.shape) == (torch.int32, (target,))
    assert (weights.dtype, weights.shape[1]) == (torch.float32, target)
    assert weights.is_contiguous()
    assert 1 <= taps <= min(source, 4 * max(1, math.ceil(source / target)) + 1)
    assert starts.min() >= 0
    assert starts.max() + taps <= source
    matrix = as_matrix(starts, weights, source)
    pixels = torch.rand(1, 1, 3, source, generator=torch.Generator().manual_seed(0))
    theirs = F.interpolate(pixels, size=(3, target), mode="bicubic", antialias=True, align_corners=False)
    assert_equal_to(pixels[0, 0].double() @ matrix.t(), theirs[0, 0], 1e-6)
    columns = F.interpolate(pixels.mT, size=(target, 3), mode="bicubic", antialias=True, align_corners=False)
    assert_equal_to(pixels[0, 0].double() @ matrix.t(), columns[0, 0].mT, 1e-6)
    assert_equal_to(matrix, keys_weights(source, target), 1e-5)


@pytest.mark.parametrize(
    ("source", "target"), [(480, 448), (640, 476), (53, 28), (28, 84), (3840, 224), (1, 28), (7, 7)]
)
def test_a_resize_table_is_right_at_camera_sizes(source, target, device):
    starts, weights = resize_axis(source, target, torch.device(device))
    assert starts.device.type == weights.device.type == device
    matrix = as_matrix(starts, weights, source)
    pixels = torch.rand(1, 1, 3, source, generator=torch.Generator().manual_seed(0)).to(device)
    theirs = F.interpolate(pixels, size=(3, target), mode="bicubic", antialias=True, align_corners=False)
    assert_equal_to(pixels[0, 0].double() @ matrix.t(), theirs[0, 0], 1e-6)
    # PyTorch computes positions in float32: one of up to `source` is off by up to 2**-24 of it.
    assert_equal_to(matrix, keys_weights(source, target), max(1e-5, source * 2**-23))


# --- passes ---


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 400)), min_size=1, max_size=4),
    chunk_size=st.none() | st.integers(1, 60),
    limit=st.sampled_from([1, 100, 1000, 10**6]),
)
def test_passes_hold_every_image_once_in_order_and_are_bounded(sizes, chunk_size, limit):
    counts, patches = zip(*sizes, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "PATCHES_PER_PASS", limit)
        passes = split_into_passes(counts, patches, chunk_size)
    images = [
        [(size, image) for size, part in rows.items() for image in range(part.start, part.stop)] for rows in passes
    ]
    assert [image for rows in images for image in rows] == [
        (size, image) for size, count in enumerate(counts) for image in range(count)
    ]
    assert all(images)
    if chunk_size is not None:
        assert max(map(len, images)) <= chunk_size
        assert len(images) == -(-sum(counts) // chunk_size)
        assert max(map(len, images)) - min(map(len, images)) <= 1
        return
    total = sum(count * each for count, each in sizes)
    number = -(-total // limit)
    assert len(images) <= number
    assert all(sum(patches[size] for size, _ in rows) < total / number + max(patches) for rows in images)


def test_no_images_make_no_pass():
    assert split_into_passes([], [], None) == []
    assert split_into_passes([0, 0], [4, 8], 3) == []
