"""transformers' base class of models, for tools that ask for it."""

from __future__ import annotations

from torch import nn

try:
    from transformers import PreTrainedModel
except (ImportError, RuntimeError):
    # It imports torchvision where that is installed, broken too. No tool of transformers' can be imported then either.
    PreTrainedModel = nn.Module

__all__ = ["PreTrainedModel"]
