"""expand_prompts: each image token of a prompt becomes as many as its image has cells."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, route


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.expand_prompts`."""
    way = route((prompts,))
    if way == REFERENCE:
        return reference.expand_prompts(prompts, grids, camera_mask, image_token_id, pad_token_id, length, left)
    run = _forward.kernel if way == KERNEL else _forward.traced
    return run(prompts, grids, camera_mask, image_token_id, pad_token_id, length, left)


def _fake(
    prompts: Tensor, _grids: Tensor, _mask: Tensor | None, _image: int, _pad: int, length: int, _left: bool
) -> tuple[Tensor, ...]:
    batch = prompts.shape[0]
    ids, cameras, features = (prompts.new_empty(batch, length) for _ in range(3))
    mask = prompts.new_empty(batch, length, dtype=torch.bool)
    return ids, mask, prompts.new_empty(3, batch, length), cameras, features


_forward = Operator(
    "expand_prompts(Tensor prompts, Tensor grids, Tensor? camera_mask, int image_token_id, int pad_token_id, "
    "SymInt length, bool left) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
