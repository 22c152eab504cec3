"""In: a preset's name, a kind of weights, a seed and single fields to change.
Out: a checkpoint folder in the hub's layout of the preset's family, made-up weights and a working tokenizer included.

The folders load in transformers, so every promise can be tested against it without a download. They are also the
demo's default: `default_checkpoint()` writes a small one once per user.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch

from qwen_batched.testing import config_files, presets
from qwen_batched.testing.config_files import write_json
from qwen_batched.testing.presets import PRESETS, Config
from qwen_batched.testing.tokenizer import BPE_VOCAB_SIZE, added_tokens, write_tokenizer
from qwen_batched.testing.trained_like import trained_like_tensors
from qwen_batched.testing.weights import random_tensors, tensor_shapes, vision_widths, write_weights

KEY_LAYOUTS = ("published", "nested")
CONFIG_LAYOUTS = ("flat", "nested")
WEIGHTS = ("random", "trained-like")

# To be raised whenever write_checkpoint(preset="small") writes something else than before.
_FORMAT_VERSION = 1


def write_checkpoint(
    folder: str | Path,
    preset: str = "tiny",
    *,
    weights: str = "random",
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
    """Writes a checkpoint folder with made-up weights that transformers loads.

    The weights depend on their kind, on `seed` and on the model's shape only: another dtype, key layout, config layout
    or number of shards stores the same values (rounded to `dtype`).

    Args:
        folder: Created where needed; must be empty.
        preset: A key of `PRESETS`. "3b" and "7b" have the published shapes and token ids.
        weights: "random", or "trained-like": made up so that activations have a trained model's massive channels and
            peaked attention, which `trained_like.py` describes.
        seed: Seeds every tensor, together with its published name.
        dtype: The floating dtype of every tensor.
        key_layout: "published" (`visual.*`, `model.*`) or "nested" (`model.visual.*`, `model.language_model.*`); of
            Qwen3-VL both are nested.
        config_layout: "flat" as published (text fields at the top, but of Qwen3-VL; `rope_scaling`) or "nested"
            (`text_config`, `rope_parameters`).
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
    _check_known(weights, WEIGHTS, "weights")
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
    family, shared = chosen.family, presets.FAMILIES[chosen.family]
    text_config = _overridden(shared.text | chosen.text, text, "text")
    out_field = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    vision_defaults = shared.vision | {out_field: text_config["hidden_size"]} | chosen.vision
    vision_config = _overridden(vision_defaults, vision, "vision")
    tokens = added_tokens(family)
    _check_sizes(text_config, vision_config, start, len(tokens))
    token_ids = {token: start + index for index, token in enumerate(tokens)}
    image_config = _overridden(
        config_files.image_defaults(vision_config, family), image, "image", presets.IMAGE_EXTRA_FIELDS
    )
    defaults = config_files.generation_defaults(token_ids)
    generation_config = _overridden(defaults, generation, "generation", presets.GENERATION_EXTRA_FIELDS)
    config = config_files.config(text_config, vision_config, token_ids, tied, dtype, config_layout, family)
    shapes = tensor_shapes(text_config, vision_config, tied, family)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):  # old shards beside new ones would load as a mixture
        raise ValueError(f"expected an empty folder, got {folder} with files in it")
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", _without_none(image_config))
    write_json(folder / "generation_config.json", _without_none(generation_config))
    write_tokenizer(folder, token_ids, family)
    if weights == "random":
        make = random_tensors(shapes, seed)
    else:
        make = trained_like_tensors(shapes, seed, text_config, vision_config, token_ids["<|im_start|>"])
    write_weights(folder, shapes, make, dtype, "nested" if family == "qwen3_vl" else key_layout, shards)
    return folder


def default_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder of the embedded "small" checkpoint, which is written on the first call only.

    Args:
        cache_dir: Where it is kept; None: `qwen_batched` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen_batched"
    parent = cache if cache_dir is None else Path(cache_dir)
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


def _check_sizes(text: Config, vision: Config, special_token_start: int, added: int) -> None:
    width, heads, kv_heads = (text[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    vision_width, _, out = vision_widths(vision)
    sizes = {} if "head_dim" in text else {"text": (width, heads)}
    sizes["vision"] = vision_width, vision["num_heads"]
    for what, (size, parts) in sizes.items():
        if size % parts:
            raise ValueError(f"{what} hidden_size {size} does not divide by its {parts} heads")
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads do not divide by {kv_heads} key/value heads")
    head_size = text.get("head_dim", width // heads)
    if 2 * sum(text["mrope_section"]) != head_size:
        raise ValueError(f"mrope_section {text['mrope_section']} must sum to half the head size, {head_size} / 2")
    if out != width:
        raise ValueError(f"vision out_hidden_size {out} must equal text hidden_size {width}")
    last = text["vocab_size"] - added
    if not BPE_VOCAB_SIZE <= special_token_start <= last:
        raise ValueError(
            f"special_token_start must leave room for {BPE_VOCAB_SIZE} tokens below and {added} above it: "
            f"expected {BPE_VOCAB_SIZE} to {last} in a vocabulary of {text['vocab_size']}, got {special_token_start}"
        )
