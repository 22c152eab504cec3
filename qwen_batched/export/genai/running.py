"""A written folder, run by onnxruntime-genai, as a function whose results are compared with the live model's."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen_batched.export.genai.parts import STEPS
from qwen_batched.export.telemetry import without_telemetry

Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


def open_folder(folder: Path, prompts: Sequence[str]) -> Run:
    """The folder as a function of the arguments of `call`: its processor reads frames and prompts, its model runs them.

    `prompts` are that with images and that without, as strings.
    The function raises `RuntimeError` where prompts are read as other tokens, or the runtime fails.
    """
    with without_telemetry():
        import onnxruntime_genai as runtime

        model = runtime.Model(str(folder))
    processor = model.create_multimodal_processor()

    def logits(prompt: str, images: Any, ids: list[int]) -> Tensor:
        """Of the prompt's last token, and of those that are fed behind it, float32 (STEPS + 1, vocabulary)."""
        inputs = processor(prompt, images=images)
        if (found := inputs["input_ids"].as_numpy()[0].tolist()) != ids[:-STEPS]:
            raise RuntimeError(f"onnxruntime-genai reads a prompt of {len(ids) - STEPS} tokens as {len(found)} others")
        parameters = runtime.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 1)
        generator = runtime.Generator(model, parameters)
        generator.set_inputs(inputs)
        rows = [generator.get_logits()]
        for token in ids[-STEPS:]:
            generator.append_tokens([token])
            rows.append(generator.get_logits())
        return torch.from_numpy(np.concatenate([row.reshape(1, -1) for row in rows]))

    def run(arguments: Mapping[str, Tensor]) -> list[Tensor]:
        with_images, without = (arguments[name][0].tolist() for name in ("input_ids", "text_ids"))
        images = runtime.Images.open_bytes(*map(_png, arguments["frames"][0]))
        return [logits(prompts[0], images, with_images), logits(prompts[1], None, without)]

    return run


def _png(frame: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()
