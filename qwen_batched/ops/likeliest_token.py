"""likeliest_token: the next token of a greedy generation."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, route


def likeliest_token(logits: Tensor, forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.likeliest_token`."""
    way = route((logits,))
    if way == REFERENCE:
        return reference.likeliest_token(logits, forbidden)
    return (_forward.kernel if way == KERNEL else _forward.traced)(logits, forbidden)


_forward = Operator(
    "likeliest_token(Tensor logits, Tensor? forbidden) -> (Tensor, Tensor)",
    fake=lambda logits, forbidden: (
        logits.new_empty(logits.shape[0], dtype=torch.int64),
        logits.new_empty(logits.shape[0], dtype=torch.bool),
    ),
)
