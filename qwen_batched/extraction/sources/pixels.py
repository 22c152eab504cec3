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
            return _rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's formats raise what they like for damaged files
        return Damage(name, " ".join(str(error).split()) or type(error).__name__)


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Raises `ValueError` for values without a known range, which Pillow would cut at 255."""
    if image.mode.startswith("I;16"):  # as Pillow reads colours of 16 bits
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"must have 8 or 16 bits, got {'32-bit integers' if image.mode == 'I' else 'floating numbers'}"
        )
    return np.asarray(image.convert("RGB"))
