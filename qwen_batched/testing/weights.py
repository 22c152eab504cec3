"""A checkpoint's tensors: their names and shapes, random values for them, and the files that hold them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen_batched.testing.config_files import write_json
from qwen_batched.testing.presets import Config

Shape = tuple[int, ...]


def tensor_shapes(text: Config, vision: Config, tied: bool, family: str = "qwen2_5_vl") -> dict[str, Shape]:
    """Returns the shape of every tensor of a checkpoint by its name among `visual.*`, `model.*` and `lm_head.*`."""
    shapes = _vision_shapes(vision, family) | _text_shapes(text, family)
    if not tied:
        shapes["lm_head.weight"] = (text["vocab_size"], text["hidden_size"])
    return shapes


def vision_widths(vision: Config) -> tuple[int, int, int]:
    """Returns the widths of the stream, the MLP and the merged features."""
    if "embed_dim" in vision:  # Qwen2-VL
        return vision["embed_dim"], int(vision["embed_dim"] * vision["mlp_ratio"]), vision["hidden_size"]
    return vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]


def _vision_shapes(vision: Config, family: str) -> dict[str, Shape]:
    width, mlp_width, out_width = vision_widths(vision)
    patch, merged_width = vision["patch_size"], width * vision["spatial_merge_size"] ** 2
    kernel = (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    shapes: dict[str, Shape] = {"visual.patch_embed.proj.weight": kernel}
    has_layer_norm = family != "qwen2_5_vl"
    if family == "qwen3_vl":
        shapes["visual.patch_embed.proj.bias"] = (width,)
        shapes["visual.pos_embed.weight"] = (vision["num_position_embeddings"], width)
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        for norm in ("norm1", "norm2"):
            shapes |= _norm(f"{block}.{norm}", width, has_layer_norm)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        if family == "qwen2_5_vl":
            shapes |= _linear(f"{block}.mlp.gate_proj", mlp_width, width)
            shapes |= _linear(f"{block}.mlp.up_proj", mlp_width, width)
            shapes |= _linear(f"{block}.mlp.down_proj", width, mlp_width)
        else:
            first, last = ("fc1", "fc2") if family == "qwen2_vl" else ("linear_fc1", "linear_fc2")
            shapes |= _linear(f"{block}.mlp.{first}", mlp_width, width)
            shapes |= _linear(f"{block}.mlp.{last}", width, mlp_width)
    names = ("norm", "linear_fc1", "linear_fc2") if family == "qwen3_vl" else ("ln_q", "mlp.0", "mlp.2")
    mergers = {"visual.merger": width}
    for index in range(len(vision.get("deepstack_visual_indexes", ()))):
        mergers[f"visual.deepstack_merger_list.{index}"] = merged_width
    for merger, norm_width in mergers.items():
        norm, first, last = (f"{merger}.{name}" for name in names)
        shapes |= _norm(norm, norm_width, has_layer_norm)
        shapes |= _linear(first, merged_width, merged_width) | _linear(last, out_width, merged_width)
    return shapes


def _text_shapes(text: Config, family: str) -> dict[str, Shape]:
    width, mlp_width, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_size = text.get("head_dim", width // heads)
    query_width, key_width = head_size * heads, head_size * text["num_key_value_heads"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (text["vocab_size"], width)}
    for index in range(text["num_hidden_layers"]):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.input_layernorm.weight": (width,), f"{block}.post_attention_layernorm.weight": (width,)}
        for name, rows in (("q_proj", query_width), ("k_proj", key_width), ("v_proj", key_width)):
            layer = _linear(f"{block}.self_attn.{name}", rows, width)
            if family == "qwen3_vl":
                layer.popitem()  # no bias
            shapes |= layer
        if family == "qwen3_vl":
            shapes |= {f"{block}.self_attn.{name}.weight": (head_size,) for name in ("q_norm", "k_norm")}
        shapes |= {
            f"{block}.self_attn.o_proj.weight": (width, query_width),
            f"{block}.mlp.gate_proj.weight": (mlp_width, width),
            f"{block}.mlp.up_proj.weight": (mlp_width, width),
            f"{block}.mlp.down_proj.weight": (width, mlp_width),
        }
    shapes["model.norm.weight"] = (width,)
    return shapes


def _norm(name: str, width: int, has_bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if has_bias else {})}


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
_DEVIATIONS = {"pos_embed.weight": 1.0}  # of what is no product's weight
_BIAS_DEVIATION = 0.5


def random_tensor(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Returns the float32 tensor that a checkpoint of this seed has under a published name.

    Uniform rather than normal: cheaper by a lot for billions of values, and no outliers to dominate an error norm.
    """
    generator = random_generator(name, seed)
    values = torch.empty(shape)
    if name.endswith(".bias"):
        bound = _BIAS_DEVIATION * math.sqrt(3)
        return values.uniform_(-bound, bound, generator=generator)
    if len(shape) == 1:
        # A norm: 0.5 to 1.5 with either sign. With one sign only, a tied head would find the last token's embedding
        # in its own hidden state and repeat that token for ever.
        values.uniform_(-1.0, 1.0, generator=generator)
        return values + 0.5 * torch.where(values < 0, -1.0, 1.0)
    for ending, deviation in _DEVIATIONS.items():
        if name.endswith(ending):
            return values.uniform_(-deviation * math.sqrt(3), deviation * math.sqrt(3), generator=generator)
    gain = next((gain for ending, gain in _GAINS.items() if name.endswith(ending)), 1.0)
    bound = gain * math.sqrt(3 / math.prod(shape[1:]))
    return values.uniform_(-bound, bound, generator=generator)


def random_generator(name: str, seed: int) -> torch.Generator:
    """Returns a generator of random numbers of its own for every name and seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_tensors(shapes: Mapping[str, Shape], seed: int) -> Callable[[str], torch.Tensor]:
    """Returns what makes the tensor of a published name."""
    return lambda name: random_tensor(name, shapes[name], seed)


def write_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    make: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    key_layout: str,
    shards: int,
) -> None:
    """Writes one safetensors file, or `shards` with an index; `make` gives a tensor by its published name."""
    groups = _split_by_size(shapes, shards)
    prefixes = {"visual.": "model.visual.", "model.": "model.language_model."} if key_layout == "nested" else {}
    weight_map = {}
    for index, names in enumerate(groups, start=1):
        file_name = f"model-{index:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        # One shard's tensors are all that is ever held.
        with ThreadPoolExecutor() as pool:  # a tensor's generator fills it on a single core
            values = pool.map(lambda name: make(name).to(dtype), names)
            tensors = {_renamed(name, prefixes): value for name, value in zip(names, values, strict=True)}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        del tensors
    if len(groups) > 1:
        total_size = sum(map(math.prod, shapes.values())) * dtype.itemsize
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", content)


def _split_by_size(shapes: Mapping[str, Shape], shards: int) -> list[list[str]]:
    total = sum(map(math.prod, shapes.values()))
    groups: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name, shape in shapes.items():
        groups[before * shards // total].append(name)
        before += math.prod(shape)
    return [names for names in groups if names]


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)
