"""`python -m qwen_batched.extraction.picture`: a picture of an episode's feature maps, frame after frame.

Exit code 0; 2 where there is nothing to draw, with the reason in a line on standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen_batched.extraction.reading import FeatureDataset
from qwen_batched.extraction.request import IMAGE_FEATURES
from qwen_batched.pictures import colour_maps

WIDTH, LINE, MARGIN, COLUMNS = 192, 18, 6, 8  # pixels of a map, of a text and between; maps in a row


def draw_episode(data: FeatureDataset, episode: int | str, camera: str, count: int = 32) -> Image.Image:
    """Maps of `count` frames at most, evenly over an episode, with one set of colours.

    Raises `ValueError` where the episode or camera is not there, or the features have no maps.
    """
    if camera not in data.cameras:
        raise ValueError(f"camera must be one of {', '.join(data.cameras)}, got {camera}")
    frames = data.frames_of(episode)
    chosen = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    items = [data[int(index)] for index in chosen]
    if items[0].get(IMAGE_FEATURES) is None or items[0][IMAGE_FEATURES][0].ndim != 3:
        raise ValueError(f"{data.folder} must have image_features that are not pooled")
    maps = colour_maps([item[IMAGE_FEATURES][data.cameras.index(camera)].float() for item in items])
    height = max(1, round(WIDTH * maps[0].height / maps[0].width))
    columns = min(COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    size = MARGIN + columns * (WIDTH + MARGIN), MARGIN + rows * (height + LINE + MARGIN)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for place, (item, colours) in enumerate(zip(items, maps, strict=True)):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (WIDTH + MARGIN), MARGIN + row * (height + LINE + MARGIN)
        draw.text((left, top), f"frame {item['frame']}", "black", font)
        picture.paste(colours.resize((WIDTH, height), Image.Resampling.NEAREST), (left, top + LINE))
    return picture


def main(arguments: list[str] | None = None) -> int:
    """Draws, and writes the picture."""
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.extraction.picture", description=__doc__)
    parser.error = lambda message: parser.exit(2, f"picture: {message}\n")
    add = parser.add_argument
    add("out", metavar="OUT", help="of python -m qwen_batched.extract")
    add("picture", metavar="PICTURE", help="the file to write, such as features.png")
    add("--episode", help="the first by default")
    add("--camera", help="the first by default")
    add("--frames", type=int, default=32, metavar="N", help="most of them")
    options = parser.parse_args(arguments)
    try:
        if options.frames < 1:
            raise ValueError(f"frames must be at least 1, got {options.frames}")
        data = FeatureDataset(options.out)
        episode = data.episodes[0] if options.episode is None else options.episode
        episode = next((name for name in data.episodes if str(name) == str(episode)), episode)
        draw_episode(data, episode, options.camera or data.cameras[0], options.frames).save(Path(options.picture))
    except (OSError, ValueError) as error:
        print(f"picture: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
