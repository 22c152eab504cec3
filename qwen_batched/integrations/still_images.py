"""In: chats and PIL images. Out: the batch that transformers' processor makes of them, also without torchvision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature
from transformers.utils import is_torchvision_available

from qwen_batched import QwenBatchedVL


class StillImageProcessor:
    """What transformers' processors of these families do with texts and still images.

    Theirs build a processor of videos too, which needs torchvision. Tokens, patches and grids are made by the same
    tokenizer and image processor, and are the same.

    Attributes:
        tokenizer, image_processor: transformers' own.
        chat_template: Jinja source; may be assigned.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, chat_template: str | None, image_token: str) -> None:
        """`of` is the usual way; `image_token` stands once for each image in a prompt."""
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.chat_template, self.image_token = chat_template, image_token

    @classmethod
    def of(cls, model: QwenBatchedVL) -> StillImageProcessor:
        """That of a loaded model's checkpoint."""
        folder = model.checkpoint.folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        images = AutoImageProcessor.from_pretrained(folder)
        return cls(tokenizer, images, model.processor.prompts.chat_template, image_token)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> Any:
        """The text of a conversation, or the texts of several.

        Args:
            conversation: Turns `{"role": ..., "content": ...}`, or a list of such lists. Images are entries
                `{"type": "image", "image": image}` of a content.
            add_generation_prompt: Whether an empty turn of the assistant follows.
            tokenize: Whether to return what `__call__` makes of the texts and the images in their turns: all of it with
                `return_dict`, otherwise the ids.
            return_dict: As said.
            **options: Those of `__call__`; without `tokenize` those of the template.

        Raises:
            ValueError: As `__call__` does.
        """
        texts = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **({} if tokenize else options),
        )
        if not tokenize:
            return texts
        chats = [conversation] if isinstance(texts, str) else conversation
        turns = [turn["content"] for chat in chats for turn in chat if not isinstance(turn["content"], str)]
        images = [part["image"] for content in turns for part in content if "image" in part]
        batch = self(texts, images, **options)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self, text: str | Sequence[str], images: Sequence[Image.Image] | None = None, **options: Any
    ) -> BatchFeature:
        """A batch of B texts.

        Args:
            text: With one image token for each image.
            images: Of all texts, in the order of their tokens; None or empty for none.
            **options: The tokenizer's (`padding`, `return_tensors`).

        Returns:
            input_ids, attention_mask and mm_token_type_ids (1 on image tokens), (B, S) with `padding=True` and
            `return_tensors="pt"`; with images also pixel_values (patches, patch_dim) and image_grid_thw (N, 3).

        Raises:
            ValueError: There are more or fewer images than image tokens.
        """
        texts = [text] if isinstance(text, str) else list(text)
        found = sum(each.count(self.image_token) for each in texts)
        if found != len(images or ()):
            raise ValueError(f"text must have an image token for each of {len(images or ())} images, got {found}")
        batch = {}
        if images:
            batch = dict(self.image_processor(images=list(images), return_tensors="pt"))
            counts = iter((batch["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            texts = [re.sub(re.escape(self.image_token), lambda x: x[0] * next(counts), each) for each in texts]
        batch = {**self.tokenizer(texts, **options), **batch}
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        ids = batch["input_ids"]
        is_tensor = isinstance(ids, torch.Tensor)
        batch["mm_token_type_ids"] = (
            (ids == image_id).int() if is_tensor else [[int(token == image_id) for token in row] for row in ids]
        )
        return BatchFeature(batch)

    def batch_decode(self, *arguments: Any, **options: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*arguments, **options)

    def decode(self, *arguments: Any, **options: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*arguments, **options)


def load_processor(model: QwenBatchedVL) -> Any:
    """The processor of a loaded model's checkpoint: transformers' own, or without torchvision `StillImageProcessor`."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(model.checkpoint.folder)
    return StillImageProcessor.of(model)
