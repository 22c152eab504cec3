"""What the vision tower and the processor are measured against.

transformers' vision tower, in the weights of the same checkpoint, in three configurations:
  default   as it loads: scaled dot product attention, a loop over the windows, or over the images where there are none
  varlen    torch's variable-length attention, registered as its attention function
  compiled  that under torch.compile(mode="reduce-overhead"), one fixed shape, its geometry computed beforehand
`products`  the tower's matrix products alone, in one CUDA graph: a floor for any implementation in the same precision.
`image_processor`  transformers' image processor, on the GPU or through PIL.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from measure import Work, captured, relative_l2
from PIL import Image
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.model.geometry import split_into_passes
from qwen_batched.transformers_reference import TransformersReference

# transformers takes an attention function for a packed one, and hands it the sequences' bounds, by "flash" in its name.
VARLEN = "flash_attention_varlen_torch"
# Tiles of a matrix product are 128 wide: 3420 becomes 3456.
WIDTH_MULTIPLE = 128
GATED = "silu"  # the activation of towers whose MLP has a gate
COMPILED_WARM_UP = 4  # compile, warm up for the graph, record it, replay it


@dataclass(frozen=True)
class TowerInputs:
    """transformers' inputs: `pixels` (tokens, patch_dim), `grid` (images, 3) in patches, `geometry` made from it."""

    pixels: Tensor
    grid: Tensor
    geometry: Mapping[str, Any]


# Merged features (cells, D), raster order, image by image; then those of deep blocks, where the model has them.
Tower = Callable[[TowerInputs], list[Tensor]]


def random_inputs(config: VisionConfig, work: Work, like: Tensor, count: int) -> list[TowerInputs]:
    """`count` inputs of random pixels, dtype and device those of `like`."""
    rows, columns = (side // config.patch_size for side in work.size)
    grid = torch.tensor([[1, rows, columns]] * work.images, device=like.device)
    geometry = precomputed_geometry(config, grid)
    shape = (work.images * rows * columns, config.patch_dim)
    pixels = [torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(count)]
    return [TowerInputs(one, grid, geometry) for one in pixels]


def precomputed_geometry(config: VisionConfig, grid: Tensor) -> dict[str, Any]:
    """All that transformers' tower derives from the grid, as arguments of its forward; empty before transformers 5."""
    try:
        from transformers import vision_utils

        merge, bounds = config.spatial_merge_size, vision_utils.get_vision_cu_seqlens(grid)
        found = {
            "position_ids": vision_utils.get_vision_position_ids(grid, merge),
            "cu_seqlens": bounds,
            "max_seqlen": int(bounds.diff().max()),
        }
        if config.window_size is not None:
            windows = vision_utils.get_vision_window_index(grid, merge, config.window_size, config.patch_size)
            found |= {"window_index": windows[0].to(grid.device), "cu_window_seqlens": windows[1]}
            found["max_window_seqlen"] = int(windows[1].diff().max())
        if config.num_position_embeddings is not None:
            side = math.isqrt(config.num_position_embeddings)
            taps = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, side, align_corners=True, spatial_merge_size=merge
            )
            found |= {"interp_indices": taps[0], "interp_weights": taps[1]}
    except (ImportError, AttributeError):
        return {}
    return found


def default_tower(visual: nn.Module) -> Tower:
    """transformers' tower as it was loaded; it makes its geometry at each call, as its users' calls do."""
    return lambda inputs: _features(visual(inputs.pixels, grid_thw=inputs.grid))


def with_varlen_attention(visual: nn.Module) -> nn.Module:
    """A copy of transformers' tower whose attention is torch's variable-length kernel.

    Raises:
        RuntimeError: This torch has none.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error
    transformers.AttentionInterface.register(VARLEN, _varlen_attention)
    visual = copy.deepcopy(visual)
    for module in visual.modules():
        config = getattr(module, "config", None)
        if isinstance(config, transformers.PretrainedConfig):
            config._attn_implementation = VARLEN
    return visual


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """torch's flash attention for packed sequences: (1, heads, tokens, head size) to (1, tokens, heads, head size)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    lengths = (cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k))
    return varlen_attn(q, k, v, *lengths, scale=scaling)[None], None


def compiled_tower(visual: nn.Module, inputs: TowerInputs) -> tuple[Tower, float, float]:
    """transformers' tower compiled for the shape of `inputs`, its CUDA graph recorded.

    What was compiled before is dropped: a second shape of one function would be compiled for any shape, slower.

    Args:
        visual: The tower `with_varlen_attention`.
        inputs: Of the only shape that the result takes. A result of it is overwritten by its next call.

    Returns:
        The tower, the seconds that it took to get there, and its relative L2 distance from `visual` uncompiled.

    Raises:
        RuntimeError: This transformers takes no geometry.
    """
    if not inputs.geometry:
        raise RuntimeError(f"transformers {transformers.__version__} takes no precomputed geometry")
    expected = default_tower(visual)(inputs)
    torch.compiler.reset()
    compiled = torch.compile(visual, mode="reduce-overhead", dynamic=False)

    def run(inputs: TowerInputs) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        # The tower takes its arguments out of the dict that it gets.
        return _features(compiled(inputs.pixels, grid_thw=inputs.grid, **dict(inputs.geometry)))

    started = time.perf_counter()
    for _ in range(COMPILED_WARM_UP):
        run(inputs)
    error = relative_l2(run(inputs)[0], expected[0])
    return run, time.perf_counter() - started, error


def _features(output: Any) -> list[Tensor]:
    """Since 5 the tower returns an object that holds the features, before the plain tensor of the merged ones."""
    if isinstance(output, Tensor):
        return [output]
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]


# --- the yardstick ---


def float32_features(
    folder: str | Path, sizes: Sequence[tuple[int, int]], count: int, device: torch.device
) -> dict[tuple[int, int], tuple[Tensor, list[TowerInputs], Tensor]]:
    """By size: frames (count, 1, 3, H, W), transformers' inputs of each, and its float32 features, image by image.

    TF32 must be off: transformers' patch embedding is a convolution.
    """
    reference = TransformersReference.from_pretrained(folder, dtype=torch.float32, device=device)
    tower, found = default_tower(reference.visual), {}
    for size in sizes:
        frames = soft_frames(count, size, device)
        made = [reference.processor_inputs([frame], "") for frame in frames]
        inputs = [TowerInputs(one["pixel_values"], one["image_grid_thw"], {}) for one in made]
        found[size] = (frames[:, None], inputs, torch.cat([tower(one)[0] for one in inputs]))
    return found


def soft_frames(count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """(count, 3, H, W) uint8: soft shapes with some noise, the same at every call."""
    generator = torch.Generator().manual_seed(size[0] * size[1])
    shapes = F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), size=size, mode="bicubic")
    noise = torch.randn(count, 3, *size, generator=generator)
    return (shapes * 255 + noise * 6).round().clamp(0, 255).to(torch.uint8).to(device)


# --- the floor ---


def products(config: VisionConfig, passes: Sequence[int], like: Tensor, ends: bool = True) -> Callable[[], object]:
    """The replay of all matrix products of the vision tower, and nothing else.

    One product for q, k and v, one for gate and up, a gated MLP's width padded, every block with weights of its own.

    Args:
        config: The tower's shape.
        passes: Patches of each pass.
        like: Dtype and device.
        ends: Whether the patch embedding and the mergers are among them, or the blocks alone.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    shapes = _product_shapes(config)
    weights = [[random(n, k) for k, n in shapes["block"]] for _ in range(config.depth)]
    first, last = ([random(n, k) for k, n in shapes[name]] for name in ("patches", "mergers")) if ends else ((), ())
    layers = [(1, [*first, *(weight for block in weights for weight in block)]), (config.cell_patches, last)]
    inputs = {
        (patches // merged, weight.shape[1]): random(patches // merged, weight.shape[1])
        for patches in set(passes)
        for merged, layer in layers
        for weight in layer
    }

    def run() -> None:
        for patches in passes:
            for merged, layer in layers:
                for weight in layer:
                    F.linear(inputs[patches // merged, weight.shape[1]], weight)

    return captured(run) if like.device.type == "cuda" else run


def passes_of(config: VisionConfig, work: Work) -> list[int]:
    """Patches of each pass that our tower makes of `work`."""
    each = work.size[0] * work.size[1] // config.patch_size**2
    passes = split_into_passes([work.images], [each], None)
    return [sum(rows.stop - rows.start for rows in one.values()) * each for one in passes]


def _product_shapes(config: VisionConfig) -> dict[str, list[tuple[int, int]]]:
    """(columns, rows) of each weight, fused and padded."""
    width, merged = config.hidden_size, config.hidden_size * config.cell_patches
    gated, mlp = config.hidden_act == GATED, config.intermediate_size
    if gated:
        mlp = -(-mlp // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    mergers = 1 + len(config.deepstack_visual_indexes or ())
    return {
        "patches": [(config.patch_dim, width)],
        "block": [(width, 3 * width), (width, width), (width, 2 * mlp if gated else mlp), (mlp, width)],
        "mergers": [(merged, merged), (merged, config.out_hidden_size)] * mergers,
    }


# --- the image processor ---


def as_pil(frames: Tensor) -> list[Image.Image]:
    """Frames (count, 3, H, W), uint8."""
    return [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames]


def in_transformers_order(batch: Mapping[str, Tensor], cell_patches: int) -> Tensor:
    """Our processor's batch of one camera as transformers has it: (tokens, patch_dim), cells in raster order."""
    cells = batch["pixel_values"][:, 0].unflatten(1, (-1, cell_patches))
    return cells[:, batch["raster_order"][0].flatten()].flatten(0, 2)


def gpu_image_processor(folder: str | Path, pixels: int) -> Callable[[Tensor], Tensor]:
    """transformers' processor on the frames' device: (frames, 3, H, W) uint8 to patches (tokens, patch_dim), float32.

    Raises:
        RuntimeError: There is no torchvision, which it needs.
    """
    if not is_torchvision_available():
        raise RuntimeError("torchvision is not installed: transformers' processor cannot run on the GPU")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor.from_pretrained(folder)

    def run(frames: Tensor) -> Tensor:
        size = {"shortest_edge": pixels, "longest_edge": pixels}
        return processor(list(frames), return_tensors="pt", size=size, device=frames.device)["pixel_values"]

    return run


def pil_image_processor(folder: str | Path, pixels: int, device: torch.device) -> Callable[[list[Image.Image]], Tensor]:
    """transformers' processor of PIL images, the copy of its result to `device` included.

    Raises:
        RuntimeError: This transformers does not let one choose.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        raise RuntimeError(f"transformers {transformers.__version__} chooses its image processor in another way")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    def run(images: list[Image.Image]) -> Tensor:
        size = {"shortest_edge": pixels, "longest_edge": pixels}
        return processor(images, return_tensors="pt", size=size)["pixel_values"].to(device)

    return run
