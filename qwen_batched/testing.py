"""In: a preset's name, a seed and single fields to change.
Out: a checkpoint folder in the hub's layout of Qwen2.5-VL, random weights and a working tokenizer included.

The folders load in transformers, so every promise can be tested against it without a download. They are also the
demo's default: `default_checkpoint()` writes a small one once per user.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Config = dict[str, Any]
Shape = tuple[int, ...]

KEY_LAYOUTS = ("published", "nested")
CONFIG_LAYOUTS = ("flat", "nested")

# To be raised whenever write_checkpoint(preset="small") writes something else than before.
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Preset:
    """What `write_checkpoint` starts from. `text` and `vision` hold config.json's own field names."""

    text: Config
    vision: Config
    tied: bool
    special_token_start: int
    shards: int = 1


_PUBLISHED_VISION: Config = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}

PRESETS: dict[str, Preset] = {
    # Merciless rather than pretty: odd MLP widths, an odd number of vision heads, a full-attention block that is not
    # the last one and a windowed block that is, more embedding rows than tokens, ids far from the published ones.
    "tiny": Preset(
        text={
            "hidden_size": 64,
            "intermediate_size": 150,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 600,
            "max_position_embeddings": 4096,
            "mrope_section": [2, 3, 3],
        },
        vision={
            "depth": 6,
            "hidden_size": 80,
            "intermediate_size": 90,
            "num_heads": 5,
            "fullatt_block_indexes": [1, 4],
        },
        tied=True,
        special_token_start=500,
    ),
    # Real head sizes (80 and 128) and real mrope sections at a size that two CPU cores run in seconds.
    "small": Preset(
        text={
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 32768,
            "mrope_section": [16, 24, 24],
        },
        vision={
            "depth": 6,
            "hidden_size": 320,
            "intermediate_size": 854,
            "num_heads": 4,
            "fullatt_block_indexes": [2, 5],
        },
        tied=True,
        special_token_start=432,  # no gap: what the random model generates are real tokens
    ),
    "3b": Preset(
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "max_window_layers": 70,
            "mrope_section": [16, 24, 24],
        },
        vision=_PUBLISHED_VISION,
        tied=True,
        special_token_start=151643,
        shards=2,
    ),
    "7b": Preset(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "mrope_section": [16, 24, 24],
        },
        vision=_PUBLISHED_VISION,
        tied=False,
        special_token_start=151643,
        shards=5,
    ),
}

# Fields that all published checkpoints share.
_TEXT_DEFAULTS: Config = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 70,
}
_VISION_DEFAULTS: Config = {
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
}
_IMAGE_DEFAULTS: Config = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
_IMAGE_EXTRA_FIELDS = (
    "size",
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "rescale_factor",
    "resample",
)
_GENERATION_EXTRA_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "max_length")

# Qwen's added tokens in the order of their ids; from <tool_call> on they are not "special", so decoding keeps them.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED_TOKENS = (
    *SPECIAL_TOKENS,
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

# The template text of the published Qwen2.5-VL checkpoints.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(
    folder: str | Path,
    preset: str = "tiny",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    key_layout: str = "published",
    config_layout: str = "flat",
    shards: int | None = None,
    tied: bool | None = None,
    text: Config | None = None,
    vision: Config | None = None,
    image: Config | None = None,
    generation: Config | None = None,
    special_token_start: int | None = None,
) -> Path:
    """Writes a checkpoint folder with random weights that transformers loads.

    The weights depend on `seed` and on the shapes only: another dtype, key layout, config layout or number of shards
    stores the same values (rounded to `dtype`).

    Args:
        folder: Created where needed; must be empty.
        preset: A key of `PRESETS`. "3b" and "7b" have the published shapes and token ids.
        seed: Seeds every tensor, together with its published name.
        dtype: The floating dtype of every tensor.
        key_layout: "published" (`visual.*`, `model.*`) or "nested" (`model.visual.*`, `model.language_model.*`).
        config_layout: "flat" (text fields at the top, `rope_scaling`) or "nested" (`text_config`, `rope_parameters`).
        shards: How many weight files at most; None: the preset's own. A tensor larger than a share makes it fewer.
        tied: Whether the head is the embedding and has no key; None: the preset's own.
        text: Fields to change in the text config.
        vision: Fields to change in the vision config; `out_hidden_size` follows the text's `hidden_size` by itself.
        image: Fields to change in preprocessor_config.json; None as a value leaves the field out.
        generation: Fields to change in generation_config.json; None as a value leaves the field out.
        special_token_start: The id of <|endoftext|>, which the other added tokens follow; None: the preset's own.

    Returns:
        The folder.

    Raises:
        ValueError: For a name or field that is not known, sizes that contradict each other, or a folder in use.
    """
    _check_known(preset, PRESETS, "preset")
    _check_known(key_layout, KEY_LAYOUTS, "key_layout")
    _check_known(config_layout, CONFIG_LAYOUTS, "config_layout")
    if not dtype.is_floating_point:
        raise ValueError(f"expected a floating dtype, got {dtype}")
    chosen = PRESETS[preset]
    shards = chosen.shards if shards is None else shards
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    tied = chosen.tied if tied is None else tied
    start = chosen.special_token_start if special_token_start is None else special_token_start
    text_config = _overridden(_TEXT_DEFAULTS | chosen.text, text, "text")
    vision_defaults = _VISION_DEFAULTS | {"out_hidden_size": text_config["hidden_size"]} | chosen.vision
    vision_config = _overridden(vision_defaults, vision, "vision")
    _check_sizes(text_config, vision_config, start)
    token_ids = {token: start + index for index, token in enumerate(ADDED_TOKENS)}
    image_config = _overridden(_image_defaults(vision_config), image, "image", _IMAGE_EXTRA_FIELDS)
    generation_config = _overridden(_generation_defaults(token_ids), generation, "generation", _GENERATION_EXTRA_FIELDS)
    config_of_layout = _flat_config if config_layout == "flat" else _nested_config
    shapes = tensor_shapes(text_config, vision_config, tied)

    folder = _empty_folder(folder)
    _write_json(folder / "config.json", config_of_layout(text_config, vision_config, token_ids, tied, dtype))
    _write_json(folder / "preprocessor_config.json", _without_none(image_config))
    _write_json(folder / "generation_config.json", _without_none(generation_config))
    _write_tokenizer(folder, token_ids)
    _write_weights(folder, shapes, seed, dtype, key_layout, shards)
    return folder


def default_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder of the embedded "small" checkpoint, which is written on the first call only.

    Args:
        cache_dir: Where it is kept; None: `qwen_batched` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    """
    parent = _user_cache() if cache_dir is None else Path(cache_dir)
    folder = parent / f"small-format{_FORMAT_VERSION}"
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed into it, so that nobody ever reads half a checkpoint.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        write_checkpoint(unfinished, "small").rename(folder)
    except OSError:
        # Another process was faster: its folder holds the same bytes.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen_batched"


# --- arguments ---


def _check_known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(known))}")


def _overridden(base: Config, changes: Config | None, what: str, extra_fields: Collection[str] = ()) -> Config:
    for field in changes or {}:
        _check_known(field, {*base, *extra_fields}, f"{what} field")
    return base | (changes or {})


def _without_none(config: Config) -> Config:
    return {field: value for field, value in config.items() if value is not None}


def _check_sizes(text: Config, vision: Config, special_token_start: int) -> None:
    for what, width, heads in (
        ("text", text["hidden_size"], text["num_attention_heads"]),
        ("vision", vision["hidden_size"], vision["num_heads"]),
    ):
        if width % heads:
            raise ValueError(f"{what} hidden_size {width} does not divide by its {heads} heads")
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        raise ValueError(
            f"{text['num_attention_heads']} attention heads do not divide by "
            f"{text['num_key_value_heads']} key/value heads"
        )
    head_size = text["hidden_size"] // text["num_attention_heads"]
    if 2 * sum(text["mrope_section"]) != head_size:
        raise ValueError(f"mrope_section {text['mrope_section']} must sum to half the head size, {head_size} / 2")
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise ValueError(
            f"vision out_hidden_size {vision['out_hidden_size']} must equal text hidden_size {text['hidden_size']}"
        )
    last = text["vocab_size"] - len(ADDED_TOKENS)
    if not _BPE_VOCAB_SIZE <= special_token_start <= last:
        raise ValueError(
            f"special_token_start must leave room for {_BPE_VOCAB_SIZE} tokens below and {len(ADDED_TOKENS)} above it: "
            f"expected {_BPE_VOCAB_SIZE} to {last} in a vocabulary of {text['vocab_size']}, got {special_token_start}"
        )


def _empty_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        # Old shards beside new ones would load as a mixture.
        raise ValueError(f"expected an empty folder, got {folder} with files in it")
    return folder


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- configs ---


def _image_defaults(vision: Config) -> Config:
    return _IMAGE_DEFAULTS | {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }


def _generation_defaults(token_ids: Mapping[str, int]) -> Config:
    return {
        "bos_token_id": token_ids["<|endoftext|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": [token_ids["<|im_end|>"], token_ids["<|endoftext|>"]],
        "do_sample": False,
    }


def _common_config(token_ids: Mapping[str, int], tied: bool) -> Config:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "vision_token_id": token_ids["<|vision_pad|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "tie_word_embeddings": tied,
    }


def _text_token_ids(token_ids: Mapping[str, int]) -> Config:
    return {"bos_token_id": token_ids["<|endoftext|>"], "eos_token_id": token_ids["<|im_end|>"]}


def _flat_config(text: Config, vision: Config, token_ids: Mapping[str, int], tied: bool, dtype: torch.dtype) -> Config:
    """As the published checkpoints have it: text fields at the top, rope in two places, older vision names."""
    text_fields = {field: value for field, value in text.items() if field != "mrope_section"}
    vision_fields = {field: value for field, value in vision.items() if field != "in_channels"}
    return {
        **_common_config(token_ids, tied),
        **_text_token_ids(token_ids),
        **text_fields,
        "rope_scaling": {"type": "mrope", "mrope_section": text["mrope_section"]},
        "torch_dtype": _dtype_name(dtype),
        "vision_config": {
            **vision_fields,
            "in_chans": vision["in_channels"],
            "spatial_patch_size": vision["patch_size"],
        },
    }


def _nested_config(
    text: Config, vision: Config, token_ids: Mapping[str, int], tied: bool, dtype: torch.dtype
) -> Config:
    """As transformers 5 saves it: `text_config` and `vision_config`, all of rope in `rope_parameters`."""
    text_fields = {field: value for field, value in text.items() if field not in ("mrope_section", "rope_theta")}
    rope_parameters = {
        "rope_type": "default",
        "rope_theta": text["rope_theta"],
        "mrope_section": text["mrope_section"],
    }
    return {
        **_common_config(token_ids, tied),
        "dtype": _dtype_name(dtype),
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **_text_token_ids(token_ids),
            **text_fields,
            "rope_parameters": rope_parameters,
            "dtype": _dtype_name(dtype),
        },
        "vision_config": {"model_type": "qwen2_5_vl_vision", **vision, "dtype": _dtype_name(dtype)},
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- weights ---


def tensor_shapes(text: Config, vision: Config, tied: bool) -> dict[str, Shape]:
    """Returns the shape of every tensor of a checkpoint by its published name."""
    shapes = _vision_shapes(vision) | _text_shapes(text)
    if not tied:
        shapes["lm_head.weight"] = (text["vocab_size"], text["hidden_size"])
    return shapes


def _vision_shapes(vision: Config) -> dict[str, Shape]:
    width, mlp_width, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged_width = width * vision["spatial_merge_size"] ** 2
    shapes: dict[str, Shape] = {
        "visual.patch_embed.proj.weight": (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    }
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.gate_proj", mlp_width, width)
        shapes |= _linear(f"{block}.mlp.up_proj", mlp_width, width)
        shapes |= _linear(f"{block}.mlp.down_proj", width, mlp_width)
    shapes["visual.merger.ln_q.weight"] = (width,)
    shapes |= _linear("visual.merger.mlp.0", merged_width, merged_width)
    shapes |= _linear("visual.merger.mlp.2", vision["out_hidden_size"], merged_width)
    return shapes


def _text_shapes(text: Config) -> dict[str, Shape]:
    width, mlp_width = text["hidden_size"], text["intermediate_size"]
    key_width = width // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (text["vocab_size"], width)}
    for index in range(text["num_hidden_layers"]):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.input_layernorm.weight": (width,), f"{block}.post_attention_layernorm.weight": (width,)}
        shapes |= _linear(f"{block}.self_attn.q_proj", width, width)
        shapes |= _linear(f"{block}.self_attn.k_proj", key_width, width)
        shapes |= _linear(f"{block}.self_attn.v_proj", key_width, width)
        shapes |= {
            f"{block}.self_attn.o_proj.weight": (width, width),
            f"{block}.mlp.gate_proj.weight": (mlp_width, width),
            f"{block}.mlp.up_proj.weight": (mlp_width, width),
            f"{block}.mlp.down_proj.weight": (width, mlp_width),
        }
    shapes["model.norm.weight"] = (width,)
    return shapes


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


# Standard deviation of a product's outputs for inputs of standard deviation 1, by the end of the weight's name.
_GAINS = {
    # Scores q.k / sqrt(head size) then deviate by 1.3 * 1.3: each row attends to some tokens much more than to
    # others, and yet no single token takes all, which would make the network chaotic in its rounding errors.
    "attn.qkv.weight": 1.3,
    "q_proj.weight": 1.3,
    "k_proj.weight": 1.3,
    # The logits then deviate by 2: far from both uniform and one-hot.
    "embed_tokens.weight": 2.0,
    "lm_head.weight": 2.0,
}
_BIAS_DEVIATION = 0.5


def random_tensor(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Returns the float32 tensor that a checkpoint of this seed has under a published name.

    Uniform rather than normal: cheaper by a lot for billions of values, and no outliers to dominate an error norm.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.empty(shape)
    if name.endswith(".bias"):
        bound = _BIAS_DEVIATION * math.sqrt(3)
        return values.uniform_(-bound, bound, generator=generator)
    if len(shape) == 1:
        # A norm: 0.5 to 1.5 with either sign. With one sign only, a tied head would find the last token's embedding
        # in its own hidden state and repeat that token for ever.
        values.uniform_(-1.0, 1.0, generator=generator)
        return values + 0.5 * torch.where(values < 0, -1.0, 1.0)
    gain = next((gain for ending, gain in _GAINS.items() if name.endswith(ending)), 1.0)
    bound = gain * math.sqrt(3 / math.prod(shape[1:]))
    return values.uniform_(-bound, bound, generator=generator)


def _write_weights(
    folder: Path, shapes: dict[str, Shape], seed: int, dtype: torch.dtype, key_layout: str, shards: int
) -> None:
    groups = _split_by_size(shapes, shards)
    rename: Callable[[str], str] = _nested_key if key_layout == "nested" else str
    weight_map = {}
    for index, names in enumerate(groups, start=1):
        file_name = f"model-{index:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        # One shard's tensors are all that is ever held.
        with ThreadPoolExecutor() as pool:  # a tensor's generator fills it on a single core
            values = pool.map(lambda name: random_tensor(name, shapes[name], seed).to(dtype), names)
            tensors = {rename(name): value for name, value in zip(names, values, strict=True)}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        del tensors
    if len(groups) > 1:
        total_size = sum(map(math.prod, shapes.values())) * dtype.itemsize
        index_content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index_content)


def _split_by_size(shapes: Mapping[str, Shape], shards: int) -> list[list[str]]:
    total = sum(map(math.prod, shapes.values()))
    groups: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name, shape in shapes.items():
        groups[before * shards // total].append(name)
        before += math.prod(shape)
    return [names for names in groups if names]


def _nested_key(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


# --- tokenizer ---

_BPE_VOCAB_SIZE = 432

# Qwen2's own split into words, before any merge.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the merges are learnt from: enough for words with and without a leading space, runs of spaces and newlines,
# punctuation before newlines, accents, and characters that are several bytes (so that some merge, and others do not).
_TRAINING_TEXT = """\
Pick up the red block and place it on the blue plate. Pick up the green cup and put it in the sink.
Open the top drawer, then close the bottom drawer. Move the gripper to the left of the robot arm.
What is the robot doing in this picture? The robot is picking up the block. Describe the image.
Describe the picture. The image shows a table with a cup, a plate and a block on the table.

You are a helpful assistant. You are the system. The user asks, the assistant answers.
system user assistant system user assistant user assistant

It's the robot's arm; it doesn't move. I'm sure we've seen that they're here, and he'll say he'd go.
IT'S THE ROBOT'S ARM. IT DOESN'T MOVE.


def move(arm, speed):
    if speed > 0:
        arm.move(speed)
    return arm

def place(arm, block):
    if block:
        arm.place(block)
    return arm


把红色的积木放在盘子上。把蓝色的积木放在桌子上。把杯子放在桌子上。
機器人 ロボット ロボット 로봇 로봇 café café naïve naïve 🤖 🤖 🦾
"""


def build_tokenizer(token_ids: Mapping[str, int]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with Qwen2's rules and the added tokens at the given ids."""
    start = token_ids[ADDED_TOKENS[0]]
    learnt = json.loads(_trained_tokenizer().to_str())["model"]
    # `tokenizers` numbers added tokens from the end of the vocabulary, whatever ids a file asks for. A gap is
    # therefore filled with tokens that no merge makes.
    fillers = {f"<unused{index}>": index for index in range(len(learnt["vocab"]), start)}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    tokenizer = _bare_tokenizer(models.BPE(vocab=learnt["vocab"] | fillers, merges=merges))
    # One call for each kind keeps their order, and with it their ids.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    others = ADDED_TOKENS[len(SPECIAL_TOKENS) :]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in others])
    assert all(tokenizer.token_to_id(token) == index for token, index in token_ids.items())
    return tokenizer


def _trained_tokenizer() -> Tokenizer:
    tokenizer = _bare_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=_BPE_VOCAB_SIZE,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    return tokenizer


def _bare_tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


def _write_tokenizer(folder: Path, token_ids: Mapping[str, int]) -> None:
    tokenizer = json.loads(build_tokenizer(token_ids).to_str())
    model = tokenizer["model"]
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(token_ids))
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _tokenizer_config(token_ids: Mapping[str, int]) -> Config:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
            for token, index in token_ids.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
