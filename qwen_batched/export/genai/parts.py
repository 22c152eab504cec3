"""The graphs of a `genai` folder with arguments to trace, and to compare, them with; and prompts for all of them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.export import Dim

from qwen_batched.export.genai.programs import EmbeddingProgram, PatchesProgram, PromptsProgram, TextProgram, width
from qwen_batched.export.programs import DecoderProgram, VisionProgram
from qwen_batched.export.request import CALL, TEXT_TOKENS, ExportRequest
from qwen_batched.export.tracing import Part
from qwen_batched.inputs.prompt import PromptEncoder
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

PAST = 5  # tokens before the new ones, of example arguments
CHECK_TEXT = "Pick up the red block: 2 cm to the left, then café 漢字."
STEPS = 4  # tokens behind a prompt of the check, one by one


class GenaiParts:
    """The parts of a model's export for onnxruntime-genai, by name."""

    def __init__(self, model: QwenBatchedVL, request: ExportRequest) -> None:
        """Takes a `detached` model. Raises `ValueError` where no string says what a prompt of its tokens is."""
        self.model, self.request = model, request
        self._template = _readable_template(model.processor.prompts)
        # With as many images as cameras, and with none: what the runtime reads to check the folder.
        self.prompts = tuple(_prompt(model.processor.prompts, self._template, n) for n in (request.cameras, 0))
        self.text = model.model.config  # of the decoder blocks that there are
        self.cells = request.grid[0] * request.grid[1]
        self._like, self._width = model.visual.patch_embed.proj.weight, width(model)
        self.dtype = self._like.dtype  # of the weights
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
        """Random arguments of so many sequences. Of images there are as many as cameras, or with an odd seed one."""
        generator = torch.Generator("cpu").manual_seed(seed)
        random = {"dtype": torch.float32, "device": "cpu", "generator": generator}
        images = 1 if seed % 2 else self.request.cameras
        if name == "vision":
            vision = self.model.processor.config.vision
            images = 1 if seed % 2 else max(images, 2)
            shape = (images * self.cells * vision.cell_patches, vision.patch_dim)
            return {"pixel_values": torch.randn(shape, **random)}
        if name == CALL:
            return self._call_arguments(generator)
        images = max(images, 2 // self.cells)  # of two tokens or more together: a size of 1 would be taken for fixed
        ids, is_image = self._sequences(batch, images, generator)
        if name == "embedding":
            features = torch.randn(int(is_image.sum()), self._width, **random).to(self._like)
            return {"input_ids": ids, "image_features": features}
        embeds = torch.randn(*ids.shape, self._width, **random)
        embeds[..., self.text.hidden_size :] *= is_image[..., None]
        shape = (batch, self.text.num_key_value_heads, PAST, self.text.head_dim)
        mask = torch.ones(batch, PAST + ids.shape[1], dtype=torch.int64, device="cpu")
        mask[1::2, :2] = 0
        steps = torch.randint(0, 2, (3, *ids.shape), device="cpu", generator=generator)
        past = {name: torch.randn(shape, **random).to(self._like) for name in self._cache_names("past_key_values")}
        named = {"inputs_embeds": embeds.to(self._like), "attention_mask": mask}
        return {**named, "position_ids": PAST + steps.cumsum(-1), **past}

    def _call_arguments(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Frames, and the ids of `prompts`, each with its first tokens again behind it."""
        encoder, cameras = self.model.processor.prompts, self.request.cameras
        shape = (1, cameras, 3, *self.request.source)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, device="cpu", generator=generator)
        rows = []
        for images in (cameras, 0):
            ids = encoder.encode(CHECK_TEXT, self._template, images)
            counts = [self.cells if token == encoder.image_token_id else 1 for token in ids]
            row = [token for token, count in zip(ids, counts, strict=True) for _ in range(count)]
            rows.append(torch.tensor([row + row[:STEPS]], device="cpu"))
        return {"frames": frames, "input_ids": rows[0], "text_ids": rows[1]}

    def _sequences(self, batch: int, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (B, T) and which of them are image tokens, of images in the first sample, text between them."""
        image_token = self.model.processor.config.image_token_id
        texts = torch.arange(min(image_token, self.text.vocab_size), device="cpu")[:1000]
        shape = (batch, images * self.cells + images + TEXT_TOKENS)
        ids = texts[torch.randint(0, len(texts), shape, device="cpu", generator=generator)]
        for image in range(images):
            start = 1 + image * (self.cells + 1)
            ids[0, start : start + self.cells] = image_token
        return ids, ids == image_token

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{layer}.{x}" for layer in range(self.text.num_hidden_layers) for x in ("key", "value")]

    def _vision_part(self, _: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        patches = self.cells * self.model.processor.config.vision.cell_patches
        images = Dim("images", min=1, max=self.text.max_position_embeddings)
        program = PatchesProgram(self.model, self.request.grid)
        return Part(program, examples, {"pixel_values": {0: patches * images}}, ("image_features",))

    def _embedding_part(self, batch: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        features = Dim("image_tokens", min=0, max=self.text.max_position_embeddings)
        dynamic = {"input_ids": batch | {1: self._tokens()}, "image_features": {0: features}}
        return Part(EmbeddingProgram(self.model), examples, dynamic, ("inputs_embeds",))

    def _text_part(self, batch: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        tokens, past = self._tokens(), Dim("past", min=0, max=self.text.max_position_embeddings)
        second = {1: batch[0]} if batch else {}
        dynamic = {"inputs_embeds": batch | {1: tokens}, "attention_mask": batch | {1: Dim.AUTO}}
        dynamic |= {"position_ids": second | {2: tokens}}
        dynamic |= {name: batch | {2: past} for name in self._cache_names("past_key_values")}
        return Part(TextProgram(self.model), examples, dynamic, ("logits", *self._cache_names("present")))

    def _call_part(self, _: dict[int, Dim], examples: dict[str, Tensor]) -> Part:
        vision = VisionProgram(self.model, self.request.source, self.request.size)
        program = PromptsProgram(vision, DecoderProgram(self.model, self.request.grid), STEPS)
        return Part(program, examples, {}, ("logits", "text_logits"))

    def _tokens(self) -> Dim:
        return Dim("tokens", min=1, max=self.text.max_position_embeddings)


def _readable_template(prompts: PromptEncoder) -> str:
    """The checkpoint's own layout, or a plain one where it has none, or one that looks at its text."""
    if prompts.chat is not None:
        with contextlib.suppress(ValueError):
            prompts.pieces("chat", 0)
            return "chat"
    return "plain"


def _prompt(prompts: PromptEncoder, template: str, cameras: int) -> str:
    """A prompt as a string, control tokens included."""
    tokens = prompts.tokenizer.convert_ids_to_tokens
    pieces = (tokens(x) if isinstance(x, int) else x for x in prompts.pieces(template, cameras))
    return "".join(pieces).replace("{text}", CHECK_TEXT)
