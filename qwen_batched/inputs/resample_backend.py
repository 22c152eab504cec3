"""Which of transformers' two CPU image processors uint8 frames on a CPU equal: Pillow's or torchvision's.

In: what the user chose, and the class that the checkpoint names. Out: the backend, decided once for a processor.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers.utils import is_torchvision_available

from qwen_batched import ops


def resolve_resample_backend(
    chosen: str | None, image_processor_type: str | None, published: str, release: str = transformers.__version__
) -> str:
    """`chosen`, or where that is None what transformers' AutoImageProcessor would use on this machine.

    That hangs on the class that the checkpoint's image processor config names (None: none), on the one that the
    family's `published` checkpoints name, and on transformers' `release`. torchvision is looked for but never imported,
    as there: an installation that cannot be imported counts. Raises `ValueError` where `chosen` is unknown.
    """
    if chosen is not None:
        ops.check_resample_backend(chosen)
        return chosen
    takes_torchvision = is_torchvision_available() and _prefers_torchvision(image_processor_type, published, release)
    return ops.TORCHVISION if takes_torchvision else ops.PILLOW


def _prefers_torchvision(image_processor_type: str | None, published: str, release: str) -> bool:
    """The default of `use_fast`, since 5.4 of `backend`, by the release (`models/auto/image_processing_auto.py`)."""
    numbers, name = Version(release).release, image_processor_type or ""
    if numbers >= (5, 4):
        return True
    if numbers >= (5,):
        return name != ""
    return name.endswith("Fast") or (numbers >= (4, 54) and name == published)
