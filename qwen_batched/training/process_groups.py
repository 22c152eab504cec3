"""Whether other processes work on the same step."""

from __future__ import annotations

import torch
from torch import nn

from qwen_batched.runtime.fast_path import is_plain


def needs_collective_participation(module: nn.Module) -> bool:
    """Whether others wait until this process has run `module`, even where its batch holds nothing for it.

    DDP waits for the gradient of every parameter, in a group of one too. FSDP and ZeRO-3 gather a block's weights in
    all processes or in none, at every call of the block, with gradients or without.
    """
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return False
    has_gradients = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    return has_gradients or not all(is_plain(child) for child in module.modules())
