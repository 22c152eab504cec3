"""What `config.json` and `preprocessor_config.json` say, as frozen dataclasses.

Field names are the files'. What a file leaves out is the family's default, because transformers leaves defaults out
when it saves. Where a file says a thing twice, transformers' order of reading holds. Errors do not name the file; who
reads it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from qwen_batched.arguments import MAX_INT, as_int, shown

# Beyond this a config is damaged: no module should be built to find that out.
MAX_BLOCKS = 1024
YARN_NUMBERS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# Of one frame. More would not fit into any GPU's memory, nor into the 32-bit numbers of some kernels.
MAX_FRAME_PIXELS = MAX_INT
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer: `config.json`'s `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    out_hidden_size: int
    hidden_act: str
    rope_theta: float | None = None  # None: no rotary embedding
    window_size: int | None = None  # None: every block attends to whole images
    fullatt_block_indexes: tuple[int, ...] | None = None
    num_position_embeddings: int | None = None  # of a learned table, a square of rows and columns
    deepstack_visual_indexes: tuple[int, ...] | None = None  # blocks whose outputs the decoder takes too
    leading_tokens: int = 0  # learned ones before an image's patches

    def __post_init__(self) -> None:
        _check_blocks("vision_config.depth", self.depth)
        table = (self.num_position_embeddings or 0) - self.leading_tokens
        if self.num_position_embeddings is not None and (table < 1 or math.isqrt(table) ** 2 != table):
            raise ValueError(
                f"vision_config.num_position_embeddings must be a square and {self.leading_tokens} leading tokens, "
                f"got {self.num_position_embeddings}"
            )
        if self.leading_tokens and self.window_size is not None:
            raise ValueError(f"vision_config: leading tokens belong to no window, got window_size={self.window_size}")
        if self.in_channels != 3:
            raise ValueError(f"vision_config.in_channels must be 3 (RGB), got {self.in_channels}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                "vision_config.hidden_size must be num_heads heads of a multiple of 4 (rotary over rows and columns), "
                f"got hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            )
        if self.window_size is not None and self.window_cells < 1:
            cell = f"a merged cell of {self.cell_size} pixels"
            raise ValueError(f"vision_config.window_size must hold {cell}, got {self.window_size}")

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
class Yarn:
    """Rope scaled to longer sequences (YaRN, arXiv:2309.00071): `rope_parameters` of type "yarn"."""

    factor: float  # how much longer sequences may be than those trained on
    original_max_position_embeddings: float  # the length trained on
    attention_factor: float  # of cosines and sines
    beta_fast: float = 32.0  # frequencies of more turns than this within the original length stay as they are
    beta_slow: float = 1.0  # those of fewer turns are divided by `factor`; between the two is a ramp
    truncate: bool = True  # whether the ramp begins and ends at whole frequencies


@dataclass(frozen=True)
class TextConfig:
    """The decoder: the text fields of `config.json`, flat (published) or under `text_config` (transformers 5)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    hidden_act: str
    explicit_head_dim: int | None = None  # None: the heads share the width
    yarn: Yarn | None = None  # None: rope is not scaled

    def __post_init__(self) -> None:
        _check_blocks("num_hidden_layers", self.num_hidden_layers)
        divides = self.explicit_head_dim is not None or self.hidden_size % self.num_attention_heads == 0
        if not divides or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "text config: num_attention_heads must divide hidden_size and be a multiple of num_key_value_heads, "
                f"got hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            expected = f"3 numbers (time, height, width) that sum to half the head size {self.head_dim}"
            raise ValueError(f"mrope_section must be {expected}, got {shown(list(self.mrope_section))}")

    @property
    def head_dim(self) -> int:
        return self.explicit_head_dim or self.hidden_size // self.num_attention_heads


@dataclass  # not frozen: where merging parts head and embedding, peft says so here
class QwenVLConfig:
    """`config.json`."""

    model_type: str
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    tie_word_embeddings: bool = False
    dtype: torch.dtype | None = None  # None where the file does not say

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], defaults: QwenVLConfig) -> QwenVLConfig:
        """Reads either layout, over `defaults`. Raises `ValueError` for what is not implemented here."""
        if raw.get("quantization_config"):
            raise ValueError("quantized checkpoints (quantization_config) are not supported")
        vision = _section(raw, "vision_config")
        # Published files have the text's fields at the top. Where text_config is there, those at the top mean nothing.
        text = raw if raw.get("text_config") is None else _section(raw, "text_config")
        # transformers 4 wrote the tie into text_config at times; transformers 5 honours either place.
        tied = [bool(_flag(section, "tie_word_embeddings")) for section in (raw, text)]
        image_token_id = raw.get("image_token_id", defaults.image_token_id)
        if not fits(image_token_id, int):
            raise ValueError(f"image_token_id must be an int, got {shown(image_token_id)}")
        networks = _vision_config(vision, defaults.vision), _text_config(text, defaults.text, nested=text is not raw)
        config = cls(defaults.model_type, *networks, image_token_id, any(tied), _dtype(raw))
        out, width = config.vision.out_hidden_size, config.text.hidden_size
        if out != width:
            raise ValueError(f"vision_config.out_hidden_size must be the decoder's hidden_size {width}, got {out}")
        return config

    def truncated(self, num_layers: int) -> QwenVLConfig:
        """The same model ending after `num_layers` decoder blocks."""
        num_layers = as_int("num_layers", num_layers, 1, self.text.num_hidden_layers)
        return replace(self, text=replace(self.text, num_hidden_layers=num_layers))

    def check_embedded(self, what: str, *token_ids: int) -> None:
        """Raises `ValueError` where one of these ids, which the model writes itself, has no embedding."""
        size = self.text.vocab_size
        if beyond := [token for token in token_ids if not 0 <= token < size]:
            raise ValueError(f"{what} must be below the vocab_size {size} of config.json, got {shown(beyond[0])}")


@dataclass(frozen=True)
class ImageConfig:
    """`preprocessor_config.json`."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            object.__setattr__(self, name, as_int(name, getattr(self, name), 1, MAX_FRAME_PIXELS))
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must not exceed max_pixels, got {self.min_pixels} and {self.max_pixels}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            both = f"{shown(self.image_mean)}, {shown(self.image_std)}"
            raise ValueError(f"image_mean and image_std must be 3 numbers, std not 0, got {both}")

    def check_patches(self, vision: VisionConfig) -> None:
        """Raises `ValueError` where images are cut into other patches than the vision transformer takes."""
        patches = (self.patch_size, self.merge_size, self.temporal_patch_size)
        expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        if patches != expected:
            names = "(patch_size, merge_size, temporal_patch_size)"
            raise ValueError(f"{names} must be {expected} as in config.json, got {patches}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], defaults: ImageConfig) -> ImageConfig:
        """Reads `min_pixels`/`max_pixels` or `size.shortest_edge`/`size.longest_edge`; the former win."""
        for flag in ("do_resize", "do_rescale", "do_normalize"):
            if not raw.get(flag, True):
                raise ValueError(f"{flag}=false is not supported")
        if raw.get("resample", 3) != 3:
            raise ValueError(f"resample must be 3 (bicubic), got {shown(raw['resample'])}")
        # Older versions of transformers called size's fields min_pixels and max_pixels as well.
        names = {"min_pixels": ("shortest_edge", "min_pixels"), "max_pixels": ("longest_edge", "max_pixels")}
        size = {name: raw.get(name) for name in names}
        if raw.get("size") is not None:
            given = _section(raw, "size")
            for name, keys in names.items():
                found = [size[name], *(given.get(key) for key in keys)]
                size[name] = next((value for value in found if value is not None), None)
                if size[name] is None:
                    raise ValueError(f"size must have {keys[0]} where {name} is not given, got {shown(dict(given))}")
        return _from_fields(defaults, {**raw, **size})


def _vision_config(raw: Mapping[str, Any], defaults: VisionConfig) -> VisionConfig:
    _require(raw, "vision_config.hidden_act", "hidden_act", (defaults.hidden_act,))
    rope = _rope(raw)
    _require(rope, "the vision's rope_type", "rope_type", ("axial", "default"))
    # The published files also have in_chans and spatial_patch_size; transformers reads neither.
    return _from_fields(defaults, {**raw, **_given(rope, "rope_theta")}, "vision_config.")


def _text_config(raw: Mapping[str, Any], defaults: TextConfig, nested: bool) -> TextConfig:
    _require(raw, "hidden_act", "hidden_act", (defaults.hidden_act,))
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types must be a list, got {shown(layer_types)}")
    if others := [kind for kind in layer_types if kind != "full_attention"]:
        raise ValueError(f"layer_types must all be full_attention, got {shown(others[0])}")
    if raw.get("attention_dropout"):
        raise ValueError(f"attention_dropout must be 0, got {shown(raw['attention_dropout'])}")
    rope = _rope(raw)
    _require(rope, "the rope type", "rope_type", ("default", "mrope", "yarn"))
    merged = {**raw, "mrope_section": rope.get("mrope_section"), **_given(rope, "rope_theta")}
    if "num_key_value_heads" in merged and merged["num_key_value_heads"] is None:
        merged["num_key_value_heads"] = merged.get("num_attention_heads", defaults.num_attention_heads)
    if defaults.explicit_head_dim is not None:
        merged["explicit_head_dim"] = raw.get("head_dim")
    config = _from_fields(defaults, merged)
    if raw.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"head_dim must be {config.head_dim}, got {shown(raw['head_dim'])}")
    if rope["rope_type"] != "yarn":
        return config
    _require(rope, "partial_rotary_factor", "partial_rotary_factor", (1,))
    # A field of text_config wins over the parameter; among the flat layout's fields transformers does not look for it.
    original = raw.get("original_max_position_embeddings") if nested else None
    if original is None:
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return replace(config, yarn=_yarn(rope, original, config))


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of rope with their `rope_type`, from whichever of their two places and two names."""
    rope = _section(raw, "rope_scaling") or _section(raw, "rope_parameters")
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}


def _yarn(rope: Mapping[str, Any], original: object, config: TextConfig) -> Yarn:
    """As transformers' `_compute_yarn_parameters` reads them; `original` is the length trained on."""
    for name in YARN_NUMBERS:
        if rope.get(name) is not None and (not fits(rope[name], float) or rope[name] < 0):
            raise ValueError(f"{name} of the rope type yarn must be a number of at least 0, got {shown(rope[name])}")
    if "factor" not in rope:
        raise ValueError("the rope type yarn needs a factor")
    if not fits(original, float) or original <= 0:
        raise ValueError(f"original_max_position_embeddings must be a number above 0, got {shown(original)}")
    factor = config.max_position_embeddings / original if rope["factor"] is None else rope["factor"]
    if not factor > 0 or config.rope_theta <= 1:
        both = f"{shown(factor)} and {shown(config.rope_theta)}"
        raise ValueError(f"the rope type yarn needs a factor above 0 and a rope_theta above 1, got {both}")
    attention, mscale, mscale_all = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and mscale and mscale_all:
        attention = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    elif attention is None:
        attention = _yarn_mscale(factor)
    beta_fast, beta_slow = (rope.get(name) or getattr(Yarn, name) for name in ("beta_fast", "beta_slow"))
    numbers = map(float, (factor, original, attention, beta_fast, beta_slow))
    return Yarn(*numbers, truncate=bool(rope.get("truncate", Yarn.truncate)))


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    """That at the top, as in transformers: the sections' own mean nothing."""
    name = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(name)}")
    return DTYPES.get(name)


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {shown(section)}")
    return section


def _flag(raw: Mapping[str, Any], name: str) -> bool | None:
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return value


def _given(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: raw[name] for name in names if name in raw}


def _require(raw: Mapping[str, Any], what: str, name: str, allowed: tuple[str, ...]) -> None:
    if raw.get(name, allowed[0]) not in allowed:
        raise ValueError(f"{what} must be one of {allowed}, got {shown(raw[name])}")


C = TypeVar("C")


def _from_fields(defaults: C, raw: Mapping[str, Any], where: str = "") -> C:
    """`defaults` with those keys of `raw` that are its fields, each checked against the default's type.

    A field that is None there is nothing that files of the family say.
    """
    values = {}
    for field in fields(defaults):
        value, default = raw.get(field.name), getattr(defaults, field.name)
        if value is None or default is None:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not _like_default(value, default):
            raise ValueError(f"{where}{field.name} must be like {default!r}, got {shown(value)}")
        values[field.name] = value
    return replace(defaults, **values)


def _like_default(value: object, default: object) -> bool:
    if isinstance(default, str):
        return value == default
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(fits(item, type(default[0])) and item >= 0 for item in value)
    return fits(value, type(default)) and value > 0


def fits(value: object, kind: type) -> bool:
    """Whether `value` is a finite number of `kind`; an int serves as a float, a bool as neither."""
    allowed = (int, float) if kind is float else (int,)
    if not isinstance(value, allowed) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_INT


def _check_blocks(name: str, count: int) -> None:
    if count > MAX_BLOCKS:
        raise ValueError(f"{name} must be at most {MAX_BLOCKS}, got {count}")
