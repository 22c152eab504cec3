"""What training code asks of a model, by the names that it knows from transformers' models."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import nn

from qwen_batched.checkpoint.weights import NESTED_PREFIXES
from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder, BatchedVisionTransformer
from qwen_batched.training.tied_head import TiedHead


class Trainable(TiedHead):
    """A model of a vision transformer, a decoder and an output projection.

    Attributes:
        visual: The vision transformer.
        model: The decoder.
        device: Where the parameters are.
    """

    # Where peft looks for what transformers has renamed, when it loads an adapter.
    _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {
        f"^{re.escape(nested)}": published for nested, published in NESTED_PREFIXES
    }
    visual: BatchedVisionTransformer
    model: BatchedDecoder
    device: torch.device

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, the vision transformer's first: what to `fully_shard` before the model, or to compile.

        The rest of the model, the output projection with it, is best sharded as one: how often that is called depends
        on how many answers there are, and processes must agree on it.
        """
        return [*self.visual.blocks, *self.model.layers]

    def check_no_gradient_in_a_capture(self, images: object = None) -> None:
        """Raises `ValueError` where gradients of parameters or `images` are wanted while a CUDA graph is captured."""
        if not torch.is_grad_enabled() or self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return
        frames = images if isinstance(images, list | tuple) else [images]
        if any(getattr(tensor, "requires_grad", False) for tensor in (*frames, *self.parameters())):
            raise ValueError("a CUDA graph holds no gradients: capture the model under torch.no_grad()")
