"""Which of two batches a call holds: one that this package's processor prepared, or one of transformers' processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.inputs.batch import Batch
from qwen_batched.inputs.prepared import EARLIER_NAMES, MARKER, check_prepared, restore
from qwen_batched.inputs.transformers_batch import TransformersBatch, read_transformers_batch

# What shapes a batch when it is made, and so cannot come with one, with the values that say nothing.
SHAPING = {
    "camera_mask": None,
    "targets": None,
    "template": "chat",
    "system": None,
    "resize": "hf",
}


def read_batch(
    batch: Mapping[str, Any], config: QwenVLConfig, device: torch.device, images: object, texts: object, **shaping: Any
) -> Batch | TransformersBatch:
    """The batch of a call, checked as far as the host can see it.

    Raises `TypeError` or `ValueError`, before any work, where it comes with images, texts or with what shapes a batch
    when it is made (`SHAPING`), or is not one of this model.
    """
    is_ours = MARKER in batch or bool(EARLIER_NAMES & batch.keys())
    if is_ours:
        check_prepared(batch.keys())
    if images is not None or texts is not None:
        raise ValueError(f"give either images and texts or a batch, got both: {sorted(batch)}")
    if any(value != SHAPING[name] for name, value in shaping.items()):
        *others, last = SHAPING
        raise ValueError(f"{', '.join(others)} and {last} shape a batch when the processor makes it, not later")
    return restore(batch, config, device) if is_ours else read_transformers_batch(batch, config, device)
