"""What a call holds: images and texts, a batch that this package's processor prepared, or one of transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import Batch
from qwen_batched.inputs.prepared import EARLIER_NAMES, MARKER, check_prepared, restore
from qwen_batched.inputs.request import Request
from qwen_batched.inputs.transformers_batch import TransformersBatch, read_transformers_batch

# What shapes a batch when it is made, and so cannot come with one, with the values that say nothing.
SHAPING = {
    "camera_mask": None,
    "targets": None,
    "template": "chat",
    "system": None,
    "resize": "hf",
}
BESIDE_TEXTS = {"inputs_embeds", "image_features"}  # what comes with texts too


class Processor(Protocol):
    """What makes a request of images and texts: see `TensorProcessor`."""

    def request(self, images: object, texts: object, camera_mask: object, **options: Any) -> Request: ...


def read_call(
    processor: Processor,
    config: QwenVLConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    images: object,
    texts: object,
    batch: Mapping[str, Any],
    camera_mask: Tensor | None = None,
    targets: object = None,
    max_new_tokens: int = 0,
    images_first: bool = False,
    **layout: Any,
) -> Request | Batch | TransformersBatch:
    """A call, checked as far as the host can see it. What is None in `batch` was not given.

    `dtype` is what embeddings and image features must have, None for any; `layout` the processor's `template`,
    `resize` and `system`, `images_first` as of `TensorProcessor.request`. Raises `TypeError` or `ValueError` before any
    work.
    """
    batch = {name: value for name, value in batch.items() if value is not None}
    if batch.keys() - BESIDE_TEXTS or (batch and texts is None):
        shaping = {"camera_mask": camera_mask, "targets": targets, **layout}
        return read_batch(batch, config, device, dtype, images, texts, **shaping)
    checks.check_given("texts", texts, "a list of str")
    embeds, options = batch.pop("inputs_embeds", None), {"max_new_tokens": max_new_tokens, **layout}
    if batch:
        options |= {**batch, "dtype": dtype}
    if images_first and embeds is None:
        options["images_first"] = True
    request = processor.request(images, texts, camera_mask, targets=targets, device=device, **options)
    if embeds is None:
        return request
    shape = (len(request.prompts.ids), request.prompts.length)
    checks.check_embeds("inputs_embeds", embeds, shape, config.text.hidden_size, dtype)
    checks.check_device("inputs_embeds", embeds, device)
    return replace(request, inputs_embeds=embeds)


def read_batch(
    batch: Mapping[str, Any],
    config: QwenVLConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    images: object,
    texts: object,
    **shaping: Any,
) -> Batch | TransformersBatch:
    """The batch of a call, as `read_call` reads it.

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
    read = restore if is_ours else read_transformers_batch
    return read(batch, config, device, dtype)
