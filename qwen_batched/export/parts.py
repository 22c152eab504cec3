"""The programs of an export with arguments to trace, and to compare, them with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import Dim

from qwen_batched.export.programs import (
    CachedDecoderProgram,
    CallProgram,
    DecoderProgram,
    VisionProgram,
    rope_positions,
)
from qwen_batched.export.request import TEXT_TOKENS, ExportRequest
from qwen_batched.export.tracing import Part
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

PAST = 5  # tokens before the new ones, of example arguments


class Parts:
    """The parts of a model's export, by name."""

    def __init__(self, model: QwenBatchedVL, request: ExportRequest) -> None:
        """Takes a `detached` model."""
        self.model, self.request = model, request
        self.config, self.grid = model.processor.config, request.grid
        self.text = model.model.config  # of the decoder blocks that there are
        self._like = model.visual.patch_embed.proj.weight
        self.dtype = self._like.dtype  # of the weights
        self._deep = len(self.config.vision.deepstack_visual_indexes or ())
        self._vision = VisionProgram(model, request.source, request.size, request.frames_dtype)
        self._made: dict[str, Part] = {}

    def part(self, name: str) -> Part:
        """A part with example arguments of a batch of two or more, made once."""
        if name not in self._made:
            least, most = self.request.batch
            example = 2 if least <= 2 <= most else least
            batch = {} if least == most else {0: Dim("batch", min=least, max=most)}
            self._made[name] = getattr(self, f"_{name}_part")(batch, self.arguments(name, example))
        return self._made[name]

    def arguments(self, name: str, batch: int, seed: int = 0) -> dict[str, Tensor]:
        """Random arguments: frames, ragged sequences padded on the left, as many images as there are cameras."""
        generator = torch.Generator("cpu").manual_seed(seed)
        if name == "vision":
            return {"frames": self._frames(batch, generator)}
        sequences = self._sequences(batch, generator, full=name == "call")
        ids, mask, is_image = (x.to(self._like.device) for x in sequences)
        if name == "call":
            return {"frames": self._frames(batch, generator), "input_ids": ids, "attention_mask": mask}
        width = self.text.hidden_size
        random = {"dtype": torch.float32, "device": "cpu", "generator": generator}
        shape = (batch, ids.shape[1], width)
        embeds = torch.randn(shape, **random).to(self._like) * is_image[..., None]
        deep = {}
        if self._deep:
            values = torch.randn(batch, self._deep, ids.shape[1], width, **random)
            deep["deep_embeds"] = values.to(self._like) * is_image[:, None, :, None]
        if name == "decoder":
            return {"input_ids": ids, "attention_mask": mask, "image_embeds": embeds, **deep}
        shape = (self.text.num_hidden_layers, batch, PAST, self.text.num_key_value_heads, self.text.head_dim)
        past = [torch.randn(shape, **random).to(self._like) for _ in range(2)]
        positions = rope_positions(is_image, mask != 0, self.grid)
        seen = torch.ones(batch, PAST, dtype=torch.int64, device="cpu")
        seen[:, 0] = 0
        mask = torch.cat((seen.to(mask), mask), dim=1)
        named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions + PAST, "image_embeds": embeds}
        return {**named, "past_keys": past[0], "past_values": past[1], **deep}

    def _frames(self, batch: int, generator: torch.Generator) -> Tensor:
        shape = (batch, self.request.cameras, 3, *self.request.source)
        if self.request.frames_dtype == torch.uint8:
            frames = torch.randint(0, 256, shape, dtype=torch.uint8, device="cpu", generator=generator)
        else:
            frames = torch.rand(shape, dtype=torch.float32, device="cpu", generator=generator)
        return frames.to(self._like.device, self.request.frames_dtype)

    def _sequences(self, batch: int, generator: torch.Generator, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and image tokens; every second sample is shorter, by an image too unless `full`."""
        cells, cameras, config = self.grid[0] * self.grid[1], self.request.cameras, self.config
        length = self.request.sequence or cameras * cells + cameras + TEXT_TOKENS
        texts = torch.arange(min(config.image_token_id, self.text.vocab_size), device="cpu")
        ids = texts[torch.randint(0, min(len(texts), 1000), (batch, length), device="cpu", generator=generator)]
        mask = torch.ones_like(ids)
        for sample, row in enumerate(ids):
            images = cameras - (sample % 2 and not full)
            free = length - images * cells  # tokens of text, in equal stretches around the images
            for image in range(images):
                start = (image + 1) * free // (images + 1) + image * cells
                row[start : start + cells] = config.image_token_id
            if sample % 2 and free // (images + 1) > 2:
                mask[sample, :2] = 0
        return ids, mask, ids == config.image_token_id

    def _vision_part(self, batch: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        results = ("image_features", "deep_features") if self._deep else ("image_features",)
        return Part(self._vision, examples, {"frames": batch}, results)

    def _decoder_part(self, batch: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        length = {} if self.request.sequence else {1: self._length("sequence", 2)}
        dynamic = {name: batch | length for name in ("input_ids", "attention_mask", "image_embeds")}
        dynamic["deep_embeds"] = batch | {dim + 1: size for dim, size in length.items()}
        return Part(DecoderProgram(self.model, self.grid), examples, dynamic, ("logits",))

    def _cached_decoder_part(self, batch: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        tokens, past = self._length("tokens", 1), self._length("past", 0)
        second = {1: batch[0]} if batch else {}
        dynamic = {name: batch | {1: tokens} for name in ("input_ids", "image_embeds")}
        dynamic |= {"attention_mask": batch | {1: Dim.AUTO}, "position_ids": second | {2: tokens}}
        dynamic |= {name: second | {2: past} for name in ("past_keys", "past_values")}
        dynamic["deep_embeds"] = batch | {2: tokens}
        return Part(CachedDecoderProgram(self.model), examples, dynamic, ("logits", "keys", "values"))

    def _call_part(self, batch: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        length = {} if self.request.sequence else {1: self._length("sequence", 2)}
        dynamic = {"frames": batch} | {name: batch | length for name in ("input_ids", "attention_mask")}
        decoder = DecoderProgram(self.model, self.grid, hidden_states=True)
        return Part(CallProgram(self._vision, decoder), examples, dynamic, ("hidden_states",))

    def _length(self, name: str, least: int) -> Dim:
        return Dim(name, min=least, max=self.text.max_position_embeddings)
