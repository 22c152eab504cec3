"""The vision-language model of starVLA's frameworks, by the interface that they call, on top of this package.

In: PIL images and instructions. Out: hidden states, a loss or tokens. starVLA chooses its model in `get_vlm_model` of
`starVLA/model/modules/vlm/__init__.py`; this is the whole change:

    def get_vlm_model(config):
        from qwen_batched.integrations.starvla import StarVLAInterface

        return StarVLAInterface(config)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

from qwen_batched import BatchedVL, VLOutput
from qwen_batched.integrations.still_images import load_processor

ACTION_TOKEN = re.compile(r"<robot_action_\d+>")  # as starVLA's script adds them
NO_LABEL = -100


class StarVLAInterface(nn.Module):
    """What starVLA's frameworks hold as `qwen_vl_interface`.

    Attributes:
        model: The model of `config.framework.qwenvl.base_vlm`, of any family that this package has.
        processor: transformers' AutoProcessor, padding on the left; without torchvision, which that needs for videos,
            a `StillImageProcessor` of the same tokenizer and image processor.
        config: The one given.
        action_tokens: The first and the last id of the action tokens; None where there are none.
    """

    def __init__(
        self,
        config: Any,
        processor: Any = None,
        action_tokens: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        """Loads the model.

        Args:
            config: starVLA's: a mapping, an OmegaConf node or an object with attributes. Of it
                `framework.qwenvl.base_vlm` is read, a hub id or a folder, and, where it is there,
                `datasets.vla_data.CoT_prompt`, a text with `{instruction}` in it.
            processor: In place of the checkpoint's own.
            action_tokens: The first and the last id; None for the tokenizer's `<robot_action_0>` and so on.
            **options: `BatchedVL.from_pretrained`'s (`dtype`, `device`, `num_layers`). `lm_head=False` saves the logits
                that frameworks with an action head of their own never read.

        Raises:
            ValueError: The config names no checkpoint, or the action tokens' ids have a gap; and as
                `from_pretrained` does.
        """
        super().__init__()
        name = _lookup(config, "framework", "qwenvl", "base_vlm")
        if not name:
            raise ValueError(f"config.framework.qwenvl.base_vlm must name a checkpoint, got {name!r}")
        self.config = config
        self.model = BatchedVL.from_pretrained(name, **options)
        self.processor = load_processor(self.model) if processor is None else processor
        self.processor.tokenizer.padding_side = "left"
        self.action_tokens = _action_tokens(self.processor.tokenizer) if action_tokens is None else action_tokens
        if self.action_tokens is not None:  # by the names that starVLA reads
            self._ACTION_TOKEN_MIN, self._ACTION_TOKEN_MAX = self.action_tokens

    def build_qwenvl_inputs(
        self,
        images: Sequence[Sequence[Image.Image]],
        instructions: Sequence[str],
        solutions: Sequence[str] | None = None,
    ) -> BatchFeature:
        """A batch of B samples for `forward` and `generate`.

        Each sample is one turn of a user, its images and then its instruction, put into the config's `CoT_prompt` where
        there is one; then its solution as an answer, where there is one; then the generation prompt. Control tokens in
        texts are read as such, as by transformers.

        Args:
            images: For each sample any number of RGB images of any sizes.
            instructions: B texts.
            solutions: B answers with action tokens in them; None for no labels.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (B, S) and pixel_values on the model's device. image_grid_thw
            stays on the host, where the model reads it without waiting for the GPU. With solutions also labels (B, S):
            the ids from a sample's first action token on, -100 elsewhere.

        Raises:
            ValueError: The lists differ in length, or there are solutions and no action tokens.
        """
        counts = {"images": len(images), "solutions": len(instructions if solutions is None else solutions)}
        if set(counts.values()) != {len(instructions)}:
            raise ValueError(f"there must be one of each for {len(instructions)} instructions, got {counts}")
        if solutions is not None and self.action_tokens is None:
            raise ValueError("solutions need action tokens, and the tokenizer has none: give action_tokens")
        prompt = _lookup(self.config, "datasets", "vla_data", "CoT_prompt") or "{instruction}"
        chats = []
        for sample, instruction in zip(images, instructions, strict=True):
            content = [{"type": "image", "image": image} for image in sample]
            content.append({"type": "text", "text": prompt.replace("{instruction}", instruction)})
            chats.append([{"role": "user", "content": content}])
        for chat, solution in zip(chats, solutions or (), strict=False):
            chat.append({"role": "assistant", "content": [{"type": "text", "text": solution}]})
        texts = [self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        token = self.processor.image_token
        for text, sample in zip(texts, images, strict=True):
            if text.count(token) != len(sample):
                raise ValueError(f"instructions and solutions must not hold the image token {token}")
        batch = self.processor(
            text=texts,
            images=[image for sample in images for image in sample] or None,
            padding=True,
            return_tensors="pt",
        )
        if solutions is not None:
            batch["labels"] = self._labels(batch["input_ids"], batch["attention_mask"])
        device = self.model.device
        for name, value in batch.items():
            if name != "image_grid_thw":
                batch[name] = value.to(device)
        return batch

    def forward(self, **kwargs: Any) -> VLOutput:
        """The model's output for a batch of `build_qwenvl_inputs`, and what transformers' models take besides.

        `.hidden_states` with `output_hidden_states=True`, `.loss` with labels, `.logits`: as transformers gives them.
        Frameworks call it under `torch.autocast`, which it neither needs nor enters by itself.
        """
        return self.model(**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """The model's `generate` for such a batch, with transformers' arguments."""
        return self.model.generate(**kwargs)

    def _labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        first, last = self.action_tokens
        is_action = (ids >= first) & (ids <= last)
        is_answer = (is_action.long().cumsum(dim=1) > 0) & (mask != 0)
        return ids.where(is_answer, NO_LABEL)


def _lookup(config: Any, *names: str) -> Any:
    """A nested entry of mappings and objects; None where there is none."""
    for name in names:
        if config is None:
            return None
        get = getattr(config, "get", None)
        config = get(name) if callable(get) else getattr(config, name, None)
    return config


def _action_tokens(tokenizer: Any) -> tuple[int, int] | None:
    ids = [index for token, index in tokenizer.get_added_vocab().items() if ACTION_TOKEN.fullmatch(token)]
    if not ids:
        return None
    if max(ids) - min(ids) + 1 != len(ids):
        raise ValueError(f"action tokens must have ids in a row, got {len(ids)} from {min(ids)} to {max(ids)}")
    return min(ids), max(ids)
