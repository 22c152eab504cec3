"""The files by which onnxruntime-genai runs the graphs: its own config, the image processor's, the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_batched import ops
from qwen_batched.export.genai.programs import width
from qwen_batched.export.onnx_files import SUFFIX
from qwen_batched.export.request import ExportRequest
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

PROCESSOR_FILE = "processor_config.json"


def write_config_files(folder: Path, model: QwenBatchedVL, request: ExportRequest) -> None:
    """Writes all of them beside the graphs. The weights in `model` are not looked at."""
    for name, content in (
        ("genai_config.json", genai_config(model)),
        (PROCESSOR_FILE, processor_config(model, request)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    prompts = model.processor.prompts
    prompts.tokenizer.save_pretrained(folder)
    if prompts.chat_template is not None:  # which may be the processor's, not the tokenizer's
        (folder / "chat_template.jinja").write_text(prompts.chat_template, encoding="utf-8")


def genai_config(model: QwenBatchedVL) -> dict[str, Any]:
    """What genai_config.json says. Generation is greedy, with the checkpoint's repetition penalty and end tokens."""
    config, text, generation = model.processor.config, model.model.config, model.generation_config
    past = {f"past_{x}_names": f"past_key_values.%d.{x}" for x in ("key", "value")}
    present = {f"present_{x}_names": f"present.%d.{x}" for x in ("key", "value")}
    decoder = {
        "filename": f"text{SUFFIX}",
        "session_options": {"provider_options": []},
        "hidden_size": width(model),  # of embeddings and features, which are this wide
        "head_size": text.head_dim,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "inputs": {name: name for name in ("inputs_embeds", "attention_mask", "position_ids")} | past,
        "outputs": {"logits": "logits"} | present,
    }
    embedding = {
        "filename": f"embedding{SUFFIX}",
        "inputs": {name: name for name in ("input_ids", "image_features")},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    vision = {
        "filename": f"vision{SUFFIX}",
        "config_filename": PROCESSOR_FILE,
        "spatial_merge_size": config.vision.spatial_merge_size,
        "patch_size": config.vision.patch_size,
        "inputs": {name: name for name in ("pixel_values", "image_grid_thw")},
        "outputs": {"image_features": "image_features"},
    }
    return {
        "model": {
            "type": model.family.genai_type,
            "vocab_size": text.vocab_size,
            "context_length": text.max_position_embeddings,
            "pad_token_id": pad_token_id(model),
            "eos_token_id": list(generation.eos_token_ids),
            "image_token_id": config.image_token_id,
            "video_token_id": model.config.video_token_id,
            "vision_start_token_id": model.config.vision_start_token_id,
            "decoder": decoder,
            "embedding": embedding,
            "vision": vision,
        },
        "search": {
            "do_sample": False,
            "max_length": text.max_position_embeddings,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": generation.repetition_penalty,
        },
    }


def pad_token_id(model: QwenBatchedVL) -> int:
    """A token that prompts do not hold: the runtime masks each pad token in a prompt, wherever it stands."""
    prompts = model.processor.prompts
    default = prompts.vocabulary.control_ids.get(model.family.prompt.default_pad)
    return prompts.pad_token_id if default is None else default


def processor_config(model: QwenBatchedVL, request: ExportRequest) -> dict[str, Any]:
    """Steps from an image file to patches. An image of any size is resized to the one size that was exported."""
    vision, image = model.processor.config.vision, model.processor.image
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    steps = [
        ("DecodeImage", {"color_space": "RGB"}),
        *(("Resize", attributes) for attributes in _resizes(request)),
        ("Rescale", {"rescale_factor": image.rescale_factor}),
        ("Normalize", {"mean": list(image.image_mean), "std": list(image.image_std)}),
        ("PatchImage", sizes | {"temporal_patch_size": vision.temporal_patch_size}),
    ]
    transforms = [{"operation": {"name": kind, "type": kind, "attrs": attributes}} for kind, attributes in steps]
    return {"processor": {"name": "image_processor", "transforms": transforms}}


def _resizes(request: ExportRequest) -> list[dict[str, Any]]:
    """Sizes one after the other: two where the live resize begins with the rows, as the runtime's never does."""
    sizes = [request.size]
    if [dim for dim, _ in ops.pillow_matrices(request.source, request.size)] == [-2, -1]:
        sizes.insert(0, (request.size[0], request.source[1]))
    fixed = {"keep_aspect_ratio": 0, "interpolation": "CUBIC"}
    return [{"height": height, "width": width, **fixed} for height, width in sizes]
