"""What tells one family of models from another, as one record of data."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import ImageConfig, QwenVLConfig, VisionConfig
from qwen_batched.checkpoint.keys import KeyLayout


@dataclass(frozen=True)
class PromptStyle:
    """How a family writes prompts."""

    image_token: str  # the token that stands for an image's features
    image: str  # what a layout writes for an image; holds `image_token` once
    default_pad: str  # pads where the tokenizer names neither a pad nor an end token
    # The added tokens of the family's published tokenizers, "special" there or not. In a user's text they stay text.
    # Every other added token of a checkpoint was added by its fine-tuner, and is read as a token.
    control_tokens: tuple[str, ...]


def vision_names(config: VisionConfig) -> dict[str, Any]:
    """A vision config's fields by transformers' names, where these are `VisionConfig`'s."""
    return {name: value for name, value in vars(config).items() if value is not None and name != "leading_tokens"}


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`."""

    config: QwenVLConfig  # what config.json may leave out
    image: ImageConfig  # what the image processor's config may leave out
    image_processor: str  # the class that the published image processor configs name
    keys: KeyLayout  # the layouts of stored keys
    prompt: PromptStyle  # how prompts are written
    vision_fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict  # a vision config by `VisionConfig`'s names
    vision_names: Callable[[VisionConfig], Mapping[str, Any]] = vision_names  # and back, for who reads `model.config`
    token_ids: Mapping[str, int] = field(default_factory=dict)  # of further tokens, which config.json may leave out
    accepts_loss_kwargs: bool = False  # whether Trainer passes `num_items_in_batch` to transformers' class
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of the text config that have one value here
    genai_type: str | None = None  # the type of model as which onnxruntime-genai runs it; None where it has none

    @property
    def model_type(self) -> str:
        """Its name in config.json."""
        return self.config.model_type

    def read_config(self, raw: Mapping[str, Any]) -> QwenVLConfig:
        """The model's shape. Raises `ValueError` for what this package does not implement."""
        vision = raw.get("vision_config")
        if isinstance(vision, Mapping):
            raw = {**raw, "vision_config": self.vision_fields(vision)}
        config = QwenVLConfig.from_dict(raw, self.config)
        text = raw.get("text_config") or raw
        for name, value in self.fixed.items():
            if text.get(name, value) != value:
                raise ValueError(f"{name} must be {value}, got {shown(text[name])}")
        return config

    def build_vision(self, config: QwenVLConfig, kind: type[nn.Module] | None = None) -> nn.Module:
        """The vision transformer with fresh weights; a `kind` of a user's own in place of the family's class."""
        return self._class("BatchedVisionTransformer", kind)(config.vision)

    def build_decoder(self, config: QwenVLConfig, kind: type[nn.Module] | None = None) -> nn.Module:
        """The decoder with fresh weights, likewise."""
        return self._class("BatchedDecoder", kind)(config.text)

    def _class(self, name: str, kind: type[nn.Module] | None) -> type[nn.Module]:
        """A class of this package stands for that of the checkpoint's family."""
        if kind is None or kind.__module__.startswith("qwen_batched.model."):
            return getattr(self._modeling(), name)
        return kind

    def _modeling(self) -> Any:
        # By name: the networks are built from parts that know of families.
        return importlib.import_module(f"qwen_batched.model.modeling_{self.model_type}_batched")
