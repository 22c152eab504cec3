"""What a folder holds, in words and numbers: manifest.json, and the tokenizers beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from qwen_batched.arguments import dtype_name
from qwen_batched.export.engine import device_kind
from qwen_batched.export.manifest_reading import FORMAT
from qwen_batched.export.request import GENAI, ExportRequest, has_decoder
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

VERSIONS = ("qwen_batched", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")
LAYOUT = (
    "S: length of the sequence. T_img: image tokens of an image, grid[0] * grid[1]. P: index of its first token: "
    "input_ids are image_token_id at [P, P + T_img); several images are several such windows, in order. image_embeds "
    "(B, S, D): zeros but for the features, row-major, at these windows; deep_embeds (B, L, S, D) likewise, where "
    "there are deep features. attention_mask (B, S): 0 on padding, on either side. Rope positions are worked out in "
    "decoder and call from input_ids and the fixed grid; cached_decoder takes them as position_ids (3, B, T)."
)


def manifest(
    model: QwenBatchedVL,
    request: ExportRequest,
    arguments: Mapping[str, Mapping[str, Any]],
    prompt: list[int | str] | None,
) -> dict[str, Any]:
    """What manifest.json says, but for the measured deviations."""
    config, parameter = model.processor.config, model.visual.patch_embed.proj.weight
    prompts = model.processor.prompts
    return {
        "format": FORMAT,
        "target": request.target,
        "parts": list(request.parts),
        "arguments": dict(arguments),  # of each part, in their order
        "model": model.name_or_path,
        "model_type": config.model_type,
        "weights_sha256": weights_hash(model, request.parts),
        "dtype": dtype_name(parameter.dtype),
        "frames": {"source": request.source, "resized": request.size, "dtype": request.dtype_name},
        "resample": "pillow" if parameter.device.type == "cpu" and request.dtype_name == "uint8" else "pytorch",
        "cameras": request.cameras,
        "batch": request.batch,
        "sequence": request.sequence,
        "grid": list(request.grid),
        "layout": None if request.target == GENAI else LAYOUT,
        "image_token_id": config.image_token_id,
        "vocabulary_size": model.model.embed_tokens.num_embeddings,
        "pad_token_id": prompts.pad_token_id,
        "eos_token_ids": list(model.generation_config.eos_token_ids),
        "repetition_penalty": model.generation_config.repetition_penalty,
        "prompt": prompt,
        "renumbered": {str(ours): theirs for ours, theirs in prompts.vocabulary.renumbered.items()},
        "opset": request.opset if request.target != "engine" else None,
        "provider": "CPUExecutionProvider" if request.target != "engine" else None,
        "device": device_kind(parameter.device),
        "device_type": parameter.device.type,
        "versions": {name: found for name in VERSIONS if (found := _version(name)) is not None},
    }


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes manifest.json."""
    (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_companions(folder: Path, content: Mapping[str, Any], model: QwenBatchedVL) -> None:
    """Writes what C++ reads, and the tokenizers: the checkpoint's, and one to which control tokens are text."""
    if content["target"] == "engine":
        _write_settings(folder / "runner.txt", content, model)
    if content["prompt"] is not None:
        prompts = model.processor.prompts
        prompts.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        prompts.vocabulary.save(folder / "text_tokenizer.json")


def _write_settings(path: Path, content: Mapping[str, Any], model: QwenBatchedVL) -> None:
    """What examples/cpp reads: a name and its numbers in each line, but for the device, which has a name."""
    decoder = model.model.config
    settings = {
        name: content[name]
        for name in (
            *("format", "image_token_id", "vocabulary_size", "batch", "grid"),
            *("eos_token_ids", "repetition_penalty"),
        )
    }
    frames = content["frames"]
    settings["frames"] = (content["cameras"], *frames["source"])
    settings["frame_bits"] = 8 * getattr(torch, frames["dtype"]).itemsize  # 8 is uint8, more is floating
    settings["cache"] = (decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim)
    settings["cuda"] = int(content["device_type"] == "cuda")
    settings["torch"] = Version(content["versions"]["torch"]).release
    settings["device"] = [content["device"]]
    lines = (f"{name} {' '.join(map(str, x if isinstance(x, Sequence) else [x]))}" for name, x in settings.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def weights_hash(model: QwenBatchedVL, parts: Sequence[str]) -> str:
    """SHA-256 of the parameters that the parts hold, names, shapes and dtypes included."""
    digest, module = hashlib.sha256(), model if has_decoder(parts) else model.visual
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None
