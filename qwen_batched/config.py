"""What a checkpoint folder's JSON files say, as dataclasses.

Field names are those of `config.json`, `preprocessor_config.json` and `generation_config.json`; defaults are those of
transformers' own configuration classes, because a file saved by transformers leaves a default out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

MODEL_TYPE = "qwen2_5_vl"
# Beyond these a config is damaged: no module should be built to find that out.
MAX_INT, MAX_BLOCKS = 2**31 - 1, 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer: `config.json`'s `vision_config`."""

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _check_blocks("vision_config.depth", self.depth)
        if self.in_channels != 3:
            raise ValueError(f"vision_config.in_channels must be 3 (RGB), got {self.in_channels}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                "vision_config.hidden_size must be num_heads heads of a multiple of 4 (rotary over rows and columns), "
                f"got hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            )
        if self.window_cells < 1:
            raise ValueError(
                f"vision_config.window_size must hold a merged cell of {self.cell_size} pixels, got {self.window_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def cell_size(self) -> int:
        """Side of a merged cell in pixels; image sides are multiples of it."""
        return self.patch_size * self.spatial_merge_size

    @property
    def cell_patches(self) -> int:
        """Patches that the merger joins into one token."""
        return self.spatial_merge_size**2

    @property
    def window_cells(self) -> int:
        """Side of a full attention window in merged cells."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """The decoder: the text fields of `config.json`, flat (published) or under `text_config` (transformers 5)."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)

    def __post_init__(self) -> None:
        _check_blocks("num_hidden_layers", self.num_hidden_layers)
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "text config: num_attention_heads must divide hidden_size and be a multiple of num_key_value_heads, "
                f"got hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section must be 3 numbers (time, height, width) that sum to half the head size "
                f"{self.head_dim}, got {list(self.mrope_section)}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass  # not frozen: where merging parts head and embedding, peft says so here
class QwenVLConfig:
    """`config.json`."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    tie_word_embeddings: bool = False
    dtype: torch.dtype | None = None  # None where the file does not say

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                "config.json: vision_config.out_hidden_size must be the decoder's hidden_size "
                f"{self.text.hidden_size}, got {self.vision.out_hidden_size}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> QwenVLConfig:
        """Reads either layout. Raises `ValueError` for what this package does not implement."""
        if raw.get("model_type") != MODEL_TYPE:
            raise ValueError(f"config.json: model_type must be {MODEL_TYPE!r}, got {raw.get('model_type')!r}")
        if raw.get("quantization_config"):
            raise ValueError("config.json: quantized checkpoints (quantization_config) are not supported")
        vision, text = _section(raw, "vision_config"), _section(raw, "text_config") or raw
        # transformers 4 wrote the tie into text_config at times; transformers 5 honours either place.
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
        top = {"image_token_id": raw.get("image_token_id", cls.image_token_id), "tie_word_embeddings": bool(tied)}
        if not _fits(top["image_token_id"], int):
            raise ValueError(f"config.json: image_token_id must be an int, got {top['image_token_id']!r}")
        return cls(vision=_vision_config(vision), text=_text_config(text), dtype=_dtype(raw, text), **top)

    def truncated(self, num_layers: int) -> QwenVLConfig:
        """The same model ending after `num_layers` decoder blocks."""
        total = self.text.num_hidden_layers
        if not _fits(num_layers, int) or not 0 < num_layers <= total:
            raise ValueError(f"num_layers must be an int from 1 to {total}, got {num_layers!r}")
        return replace(self, text=replace(self.text, num_hidden_layers=num_layers))


@dataclass(frozen=True)
class ImageConfig:
    """`preprocessor_config.json`. Defaults are transformers' `Qwen2VLImageProcessor`'s (CLIP's mean and deviation)."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not _fits(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must not exceed max_pixels, got {self.min_pixels} and {self.max_pixels}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                f"image_mean and image_std must be 3 numbers, std not 0, got {self.image_mean}, {self.image_std}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ImageConfig:
        """Reads `min_pixels`/`max_pixels` or `size.shortest_edge`/`size.longest_edge`; the former win."""
        for flag in ("do_resize", "do_rescale", "do_normalize"):
            if not raw.get(flag, True):
                raise ValueError(f"preprocessor_config.json: {flag}=false is not supported")
        if raw.get("resample", 3) != 3:
            raise ValueError(f"preprocessor_config.json: resample must be 3 (bicubic), got {raw['resample']!r}")
        size = _section(raw, "size")
        given = {
            "min_pixels": raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
            "max_pixels": raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return _from_fields(cls, {**raw, **given}, "preprocessor_config.json")


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`, as far as greedy decoding and sampling need it."""

    eos_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationConfig:
        """Reads `raw`; end tokens that it does not name come from config.json's content `config`."""
        for name in ("no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "min_new_tokens", "min_length"):
            if raw.get(name):
                raise ValueError(f"generation_config.json: {name} is not supported, got {raw[name]!r}")
        text = _section(config, "text_config")
        eos = raw.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
        eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        penalty = raw.get("repetition_penalty") or 1.0
        if not all(_fits(token, int) for token in eos) or not _fits(penalty, float) or penalty <= 0:
            raise ValueError(
                "generation_config.json: eos_token_id must be ints and repetition_penalty above 0, "
                f"got {eos} and {penalty!r}"
            )
        return cls(eos, float(penalty))


def _vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    _require(raw, "vision_config.hidden_act", "hidden_act", ("silu",))
    rope = _section(raw, "rope_parameters")
    _require(rope, "vision rope_type", "rope_type", ("axial", "default"))
    # The published files also have in_chans and spatial_patch_size; transformers reads neither.
    return _from_fields(VisionConfig, {**raw, **_given(rope, "rope_theta")}, "config.json: vision_config")


def _text_config(raw: Mapping[str, Any]) -> TextConfig:
    _require(raw, "hidden_act", "hidden_act", ("silu",))
    if raw.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window=true is not supported")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"config.json: layer_types must be a list, got {layer_types!r}")
    if "sliding_attention" in layer_types:
        raise ValueError("config.json: layer_types with sliding_attention are not supported")
    if raw.get("attention_dropout"):
        raise ValueError(f"config.json: attention_dropout must be 0, got {raw['attention_dropout']!r}")
    rope = _section(raw, "rope_parameters") or _section(raw, "rope_scaling")
    for name in ("rope_type", "type"):
        _require(rope, f"rope type ({name})", name, ("default", "mrope"))
    merged = {**raw, **_given(rope, "rope_theta", "mrope_section")}
    if "num_key_value_heads" in merged and merged["num_key_value_heads"] is None:
        merged["num_key_value_heads"] = merged.get("num_attention_heads", TextConfig.num_attention_heads)
    config = _from_fields(TextConfig, merged, "config.json")
    if raw.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"config.json: head_dim must be {config.head_dim}, got {raw['head_dim']!r}")
    return config


def _dtype(raw: Mapping[str, Any], text: Mapping[str, Any]) -> torch.dtype | None:
    names = [section.get(key) for section in (raw, text) for key in ("dtype", "torch_dtype")]
    name = next((name for name in names if name is not None), None)
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise ValueError(f"config.json: dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {section!r}")
    return section


def _given(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: raw[name] for name in names if name in raw}


def _require(raw: Mapping[str, Any], what: str, name: str, allowed: tuple[str, ...]) -> None:
    if raw.get(name, allowed[0]) not in allowed:
        raise ValueError(f"config.json: {what} must be one of {allowed}, got {raw[name]!r}")


C = TypeVar("C")


def _from_fields(cls: type[C], raw: Mapping[str, Any], where: str) -> C:
    """Builds `cls` from those keys of `raw` that are its fields, each checked against its default's type."""
    values = {}
    for field in fields(cls):
        value = raw.get(field.name)
        if value is None:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not _like_default(value, field.default):
            raise ValueError(f"{where}: {field.name} must be like {field.default!r}, got {value!r}")
        values[field.name] = value
    return cls(**values)


def _like_default(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_fits(item, type(default[0])) and item >= 0 for item in value)
    return _fits(value, type(default)) and value > 0


def _fits(value: object, kind: type) -> bool:
    """Whether `value` is a finite number of `kind`; an int serves as a float, a bool as neither."""
    allowed = (int, float) if kind is float else (int,)
    if not isinstance(value, allowed) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_INT


def _check_blocks(name: str, count: int) -> None:
    if count > MAX_BLOCKS:
        raise ValueError(f"config.json: {name} must be at most {MAX_BLOCKS}, got {count}")
