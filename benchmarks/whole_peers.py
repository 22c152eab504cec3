"""transformers' whole model, in the weights of the same checkpoint, and the products of a decoding step alone.

With the vision tower of `peers`, in its configurations default, varlen and compiled; `generation` is its decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from measure import captured, relative_l2
from peers import COMPILED_WARM_UP, TowerInputs, compiled_tower, precomputed_geometry
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from qwen_batched.checkpoint.config import TextConfig, VisionConfig
from qwen_batched.transformers_reference import TransformersReference


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length, laid out beforehand: all that transformers' model takes besides the pixels.

    Attributes:
        input_ids: (B, S).
        position_ids: (3, B, S); transformers computes its own unless compiled.
        is_image: Bool (B, S), True on image tokens.
        grid: (images, 3), in patches.
        geometry: `precomputed_geometry` of the grid.
    """

    input_ids: Tensor
    position_ids: Tensor
    is_image: Tensor
    grid: Tensor
    geometry: Mapping[str, Any]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], config: VisionConfig) -> Prompts:
        """From our processor's batch of frames of one size.

        Raises:
            ValueError: There is padding, which a compiled model would see.
        """
        if not batch["attention_mask"].all():
            raise ValueError("prompts must be of one length")
        images = batch["pixel_values"].shape[:2].numel()
        rows, columns = (side * config.spatial_merge_size for side in batch["raster_order"].shape[1:])
        grid = torch.tensor([[1, rows, columns]] * images, device=batch["input_ids"].device)
        positions = batch["rope_positions"].transpose(0, 1)
        is_image = batch["feature_index"] >= 0
        return cls(batch["input_ids"], positions, is_image, grid, precomputed_geometry(config, grid))

    def arguments(self) -> dict[str, Tensor]:
        """What its processor hands a transformers user, less the pixels."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "image_grid_thw": self.grid,
            "mm_token_type_ids": self.is_image.int(),
        }


def load(folder: str, num_layers: int | None = None, norm: str = "post", **options: Any) -> TransformersReference:
    """The reference of a checkpoint with its first `num_layers` decoder blocks, "pre" without the final norm."""
    reference = TransformersReference.from_pretrained(folder, **options)
    reference.decoder.layers = reference.decoder.layers[:num_layers]
    if norm == "pre":
        reference.decoder.norm = nn.Identity()
    return reference


def processed(reference: TransformersReference, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """transformers' pixels (tokens, patch_dim), float32, of frames (B, V, 3, H, W) uint8 on the host or the GPU.

    Resized on the device by PyTorch as its processor does it, which by itself would keep the aspect; then its processor
    makes the patches, on the device too.

    Raises:
        RuntimeError: It cannot do so on this device.
    """
    device = reference.device
    if device.type == "cuda" and not is_torchvision_available():
        raise RuntimeError("torchvision is not installed: transformers' processor cannot run on the GPU")
    frames = frames.to(device, non_blocking=True).flatten(0, 1)
    if tuple(frames.shape[-2:]) != size:
        frames = F.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
        frames = frames.clamp(0, 255).round().to(torch.uint8)
    made = reference.image_processor(images=list(frames), do_resize=False, return_tensors="pt", device=device)
    return made["pixel_values"].to(device)


def whole_model(reference: TransformersReference, visual: nn.Module, prompts: Prompts) -> Callable[[Tensor], Tensor]:
    """Pixels to last hidden states (B, S, D) by transformers' model with `visual` for its vision tower.

    Raises:
        RuntimeError: This transformers is another one than 5.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        raise RuntimeError(f"transformers {transformers.__version__} is called in another way")
    core, arguments = reference.model.model, prompts.arguments()

    def run(pixels: Tensor) -> Tensor:
        core.visual = visual
        return core(**arguments, pixel_values=pixels, use_cache=False).last_hidden_state

    return run


def from_frames(
    reference: TransformersReference, visual: nn.Module, prompts: Prompts, size: tuple[int, int]
) -> Callable[[Tensor], Tensor]:
    """`whole_model` behind `processed`: frames to last hidden states."""
    model = whole_model(reference, visual, prompts)
    return lambda frames: model(processed(reference, frames, size))


def compiled_model(
    reference: TransformersReference, varlen: nn.Module, prompts: Prompts, pixels: Tensor
) -> tuple[Callable[[Tensor], Tensor], float, float]:
    """transformers' whole model compiled for one shape: `compiled_tower`, and the language model under the same mode.

    Geometry and positions are computed beforehand; there is no mask, since no prompt is padded.

    Args:
        reference: Of whose language model it is made.
        varlen: The tower `with_varlen_attention`.
        prompts: The only ones that the result serves.
        pixels: Of the only shape that it takes, in the model's dtype.

    Returns:
        As `compiled_tower`.
    """
    expected = whole_model(reference, varlen, prompts)(pixels)
    started = time.perf_counter()
    tower, *_ = compiled_tower(varlen, TowerInputs(pixels, prompts.grid, prompts.geometry))
    decoder = torch.compile(reference.decoder, mode="reduce-overhead", dynamic=False)

    def run(pixels: Tensor) -> Tensor:
        # Copied: the next graph may take the memory that the features lie in.
        features, *deep = (x.clone() for x in tower(TowerInputs(pixels, prompts.grid, prompts.geometry)))
        embeds = reference.decoder.embed_tokens(prompts.input_ids)
        embeds = embeds.masked_scatter(prompts.is_image[..., None], features)
        arguments = {"position_ids": prompts.position_ids, "attention_mask": None, "use_cache": False}
        if deep:
            arguments |= {"visual_pos_masks": prompts.is_image, "deepstack_visual_embeds": deep}
        return decoder(inputs_embeds=embeds, **arguments).last_hidden_state

    for _ in range(COMPILED_WARM_UP):
        run(pixels)
    return run, time.perf_counter() - started, relative_l2(run(pixels), expected)


def generation(
    reference: TransformersReference, prompts: Prompts, pixels: Tensor, **options: Any
) -> Callable[[int], Tensor]:
    """Greedy decoding by transformers' `generate`: as many tokens (B, count) as are asked for, none ends a sample."""
    reference.model.generation_config.eos_token_id = None
    arguments = prompts.arguments() | {"pixel_values": pixels, "do_sample": False} | options
    length = prompts.input_ids.shape[1]

    def run(count: int) -> Tensor:
        tokens = reference.model.generate(**arguments, max_new_tokens=count)[:, length:]
        if tokens.shape[1] != count:
            raise RuntimeError(f"asked for {count} tokens, transformers made {tokens.shape[1]}")
        return tokens

    return run


def hidden_states(reference: TransformersReference, frames: Tensor, texts: Sequence[str]) -> Tensor:
    """Last hidden states (tokens, D) of frames (B, V, 3, H, W) and B texts, sample by sample."""
    inputs = [reference.processor_inputs(list(one), text) for one, text in zip(frames, texts, strict=True)]
    return torch.cat([reference.run(**one).hidden_states[-1][0] for one in inputs])


def products(config: TextConfig, tokens: int, like: Tensor, head: bool = False) -> Callable[[], object]:
    """The replay of all matrix products of the decoder over so many tokens, with the output projection or without."""
    random = partial(torch.randn, dtype=like.dtype, device=like.device)
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    packed = heads + 2 * config.num_key_value_heads * config.head_dim
    block = [(width, packed), (heads, width), (width, 2 * mlp), (mlp, width)]
    weights = [random(n, k) for _ in range(config.num_hidden_layers) for k, n in block]
    weights += [random(config.vocab_size, width)] if head else []
    inputs = {k: random(tokens, k) for k in (width, heads, mlp)}

    def run() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return captured(run) if like.device.type == "cuda" else run
