"""What onnxruntime-genai runs: patches to features, ids and features to embeddings, embeddings to logits.

Shape letters as in CONTRIBUTING.md. W is the width that these three share: D, or of a model with L deep features
(1 + L) * D, the features of each layer behind one another. I images of one grid have T_img = h * w image tokens each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_batched.export.programs import DecoderProgram, VisionProgram, place, run_behind_cache
from qwen_batched.inputs.batch import Features
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.geometry import vision_plan
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL


def width(model: QwenBatchedVL) -> int:
    """W, see the module."""
    deep = model.processor.config.vision.deepstack_visual_indexes or ()
    return (1 + len(deep)) * model.model.config.hidden_size


class PatchesProgram(nn.Module):
    """Patches, as the runtime's image processor makes them, to image features."""

    def __init__(self, model: QwenBatchedVL, grid: tuple[int, int]) -> None:
        """Takes the grid (h, w) of every image, in merged cells."""
        super().__init__()
        vision, device = model.processor.config.vision, model.visual.patch_embed.proj.weight.device
        self.visual, self.grid, self.cell_patches = model.visual, grid, vision.cell_patches
        self.has_deep = vision.deepstack_visual_indexes is not None
        order = vision_plan(model.processor.plans, vision, *grid, device).window_order
        self.register_buffer("window_order", order, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Float32 (I * P, patch_dim), normalised, merged cells in raster order, to features (I * T_img, W)."""
        cells = pixel_values.unflatten(0, (-1, len(self.window_order), self.cell_patches))
        pixels = cells.index_select(1, self.window_order).flatten(1, 2)[:, None]  # each image is a sample
        if not self.has_deep:
            return self.visual(pixels, (self.grid,)).flatten(0, 3)
        features: Features = self.visual(pixels, (self.grid,), deepstack=True)
        return torch.cat((features.main, *features.deep), dim=-1).flatten(0, 3)


class EmbeddingProgram(nn.Module):
    """Token ids to input embeddings, features in the place of image tokens."""

    def __init__(self, model: QwenBatchedVL) -> None:
        super().__init__()
        self.embed_tokens, self.image_token_id = model.model.embed_tokens, model.processor.config.image_token_id
        self.more = width(model) - model.model.config.hidden_size

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Int64 ids (B, T) and features (M, W) to embeddings (B, T, W), which are zero in the width of deep features.

        The first M image tokens of the batch have features; any further one is text, as one that was generated is.
        """
        text = F.pad(self.embed_tokens(input_ids), (0, self.more))
        is_image = input_ids == self.image_token_id
        rank = (is_image.flatten().long().cumsum(0) - 1).view_as(input_ids)
        has_feature = is_image & (rank < torch.ones_like(image_features[:, 0], dtype=torch.int64).sum())
        rows = torch.cat((image_features, torch.zeros_like(text[0, :1])))  # one to look up where there is no image
        placed = rows.index_select(0, torch.where(has_feature, rank, 0).flatten()).unflatten(0, input_ids.shape)
        return torch.where(has_feature[..., None], placed, text)


class TextProgram(nn.Module):
    """Input embeddings to the next token's logits, behind a key-value cache."""

    def __init__(self, model: QwenBatchedVL) -> None:
        super().__init__()
        self.decoder, self.head = model.model, model.lm_head
        self.width = model.model.config.hidden_size

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits (B, 1, vocabulary) of the last token, then keys and values of each block, (B, K, C + T, E).

        Args:
            inputs_embeds: (B, T, W), as of `EmbeddingProgram`.
            attention_mask: Int64 (B, C + T), 0 on padding.
            position_ids: Int64 (3, B, T).
            *past: Keys and values of each block in turn, (B, K, C, E).
        """
        embeds, *deep = inputs_embeds.split(self.width, dim=-1)
        keys, values = ([x.transpose(1, 2) for x in past[first::2]] for first in (0, 1))
        hidden, keys, values = run_behind_cache(
            self.decoder, embeds, attention_mask != 0, position_ids, keys, values, deep
        )
        present = (x.transpose(1, 2) for pair in zip(keys, values, strict=True) for x in pair)
        return apply_linear(self.head, hidden[:, -1:]), *present


class PromptsProgram(nn.Module):
    """The logits that the runtime's own calls are compared with: of a prompt with images, and of one without."""

    def __init__(self, vision: VisionProgram, decoder: DecoderProgram, steps: int) -> None:
        """Takes how many tokens are fed one by one behind each prompt."""
        super().__init__()
        self.vision, self.decoder, self.steps = vision, decoder, steps

    def forward(self, frames: Tensor, input_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (steps + 1, vocabulary) of the last tokens of `input_ids` (1, S), with `frames`, and of `text_ids`."""
        main, *deep = self.vision(frames)
        is_image = input_ids == self.decoder.image_token_id
        embeds = [place(x.flatten(1, 2), is_image) for x in (main, *(deep[0].unbind(1) if deep else ()))]
        return self._last(input_ids, embeds), self._last(
            text_ids, [x.new_zeros(*text_ids.shape, x.shape[-1]) for x in embeds]
        )

    def _last(self, ids: Tensor, embeds: list[Tensor]) -> Tensor:
        deep = (torch.stack(embeds[1:], dim=1),) if len(embeds) > 1 else ()
        return self.decoder(ids, torch.ones_like(ids), embeds[0], *deep)[0, -self.steps - 1 :]
