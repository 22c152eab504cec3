"""An image file or its bytes -> RGB pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qwen_batched.extraction.sources.source import Damage, Frame

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def read_image(image: Path | bytes | None, name: str) -> Frame:
    """Pixels of an image as it is meant to be seen, its EXIF orientation applied; `Damage` where it cannot be read."""
    if image is None:
        return Damage(name, "has no image")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    # Pillow's formats raise what they like for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        return Damage(name, " ".join(str(error).split()) or type(error).__name__)
