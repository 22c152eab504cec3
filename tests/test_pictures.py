"""The picture of feature maps: what is drawn where, and what is refused before anything is drawn."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwen_batched.pictures import LINE, MARGIN, PANEL, draw_feature_maps
from tests.support import photo, photos

EXAMPLE = Path(__file__).resolve().parents[1] / "example.py"
WIDTH = 3 * MARGIN + 2 * PANEL[0]


def maps_like(images, h=4, w=6, width=32, seed=0):
    return torch.randn(*images.shape[:2], h, w, width, generator=torch.Generator().manual_seed(seed))


def cell_colour(picture, row, column, h, w, top=MARGIN + LINE, height=PANEL[1]):
    """The colour in the middle of a cell of a map that fills the panel's width."""
    x = 2 * MARGIN + PANEL[0] + (column + 0.5) * PANEL[0] / w
    return picture.getpixel((int(x), int(top + (row + 0.5) * height / h)))


def test_each_camera_has_a_row_with_its_frame_and_its_map():
    images = photos(2, 3, 336, 448)
    picture = draw_feature_maps(images, maps_like(images), sample=1, caption="one\ntwo")
    assert picture.mode == "RGB"
    assert picture.size == (WIDTH, 2 * MARGIN + 3 * (336 + LINE + MARGIN) + 3 * LINE)
    for camera in range(3):
        top = MARGIN + LINE + camera * (336 + LINE + MARGIN)
        drawn = picture.crop((MARGIN, top, MARGIN + 448, top + 336))
        assert drawn.tobytes() == images[1, camera].permute(1, 2, 0).contiguous().numpy().tobytes()


def test_cells_with_the_same_feature_have_the_same_colour_in_all_cameras():
    features = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    kinds = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [1, 0]]])  # (V, h, w)
    picture = draw_feature_maps(torch.zeros(1, 2, 3, 336, 448), features[kinds][None])
    colours = {}
    for camera in range(2):
        top = MARGIN + LINE + camera * (336 + LINE + MARGIN)
        for row in range(2):
            for column in range(2):
                colour = cell_colour(picture, row, column, 2, 2, top)
                assert colours.setdefault(int(kinds[camera, row, column]), colour) == colour
    assert len(set(colours.values())) == 4


def test_cameras_of_different_sizes_and_every_dtype_are_drawn():
    images = [photo(336, 448)[None], photo(100, 50)[None].float() / 255]
    features = [maps_like(images[0][:, None])[:, 0].bfloat16(), maps_like(images[1][:, None], 3, 2)[:, 0].half()]
    picture = draw_feature_maps(images, features)
    assert picture.size == (WIDTH, 2 * MARGIN + 2 * (336 + LINE + MARGIN) + LINE)


def test_an_absent_camera_is_black_and_changes_no_other_colour():
    images = photos(1, 2, 336, 448)
    features = maps_like(images)
    features[:, 1] = 0
    alone = draw_feature_maps(images[:, :1], features[:, :1])
    both = draw_feature_maps(images, features)
    assert cell_colour(both, 1, 1, 4, 6) == cell_colour(alone, 1, 1, 4, 6) != (0, 0, 0)
    assert cell_colour(both, 1, 1, 4, 6, top=2 * (MARGIN + LINE) + 336) == (0, 0, 0)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 2), (2, 1)])
def test_a_map_of_few_cells_is_drawn(h, w):
    images = photos(1, 1, 56, 56)
    draw_feature_maps(images, maps_like(images, h, w))


def test_the_picture_is_the_same_every_time_and_leaves_random_numbers_and_gradients_alone():
    images = photos(1, 1, 56, 56)
    features = maps_like(images).requires_grad_()
    before = torch.get_rng_state()
    first = draw_feature_maps(images, features)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert draw_feature_maps(images, features).tobytes() == first.tobytes()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"images": None}, TypeError, "images must be"),
        ({"images": torch.zeros(2, 2, 56, 56, 3, dtype=torch.uint8)}, ValueError, "channels"),
        ({"images": torch.full((2, 2, 3, 56, 56), 255.0)}, ValueError, "0..1"),
        ({"features": None}, TypeError, "features must be"),
        ({"features": torch.zeros(2, 2, 4, 8)}, ValueError, "floating"),
        ({"features": torch.zeros(2, 2, 4, 4, 8, dtype=torch.int64)}, ValueError, "floating"),
        ({"features": torch.zeros(2, 2, 0, 4, 8)}, ValueError, "floating"),
        ({"features": torch.zeros(2, 3, 4, 4, 8)}, ValueError, "2 samples and 2 cameras"),
        ({"features": torch.zeros(1, 2, 4, 4, 8)}, ValueError, "2 samples and 2 cameras"),
        ({"features": [torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 4, 9)]}, ValueError, "one width"),
        ({"features": []}, ValueError, "features must"),
        ({"features": torch.full((2, 2, 4, 4, 8), float("nan"))}, ValueError, "finite"),
        ({"sample": 2}, ValueError, "sample must be below 2"),
        ({"sample": -1}, ValueError, "sample"),
        ({"caption": 3}, TypeError, "caption"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(change, error, message, monkeypatch):
    images = photos(2, 2, 56, 56)
    monkeypatch.setattr(Image, "new", None)
    with pytest.raises(error, match=message):
        draw_feature_maps(**{"images": images, "features": maps_like(images), **change})


def test_the_example_writes_a_picture_of_any_model(checkpoint, tmp_path, monkeypatch, capsys):
    frames = [tmp_path / "front.png", tmp_path / "wrist.png"]
    for path, size in zip(frames, [(84, 56), (56, 56)], strict=True):
        Image.new("RGB", size, "red").save(path)
    picture = tmp_path / "features.png"
    options = ["--model", str(checkpoint), "--images", *map(str, frames), "--device", "cpu", "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert Image.open(picture).width == WIDTH
    assert "image_features[1]" in capsys.readouterr().out
