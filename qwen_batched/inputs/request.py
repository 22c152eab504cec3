"""A checked call, as the host knows it: its tensors, and what shapes the batch that the device makes of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

from qwen_batched.inputs.batch import Grid


@dataclass(frozen=True, eq=False)
class Prompts:
    """The texts of a batch as tokens, each with its answer where there are targets, and one token for each image."""

    ids: Tensor  # int64 (B, U), as `expand_prompts` takes them
    length: int  # S of the sequences, images expanded
    tokens: int | None  # how many tokens they have in all; None where only the device knows
    # Int64 (B,), how many tokens at the end of each are its answer's; None without targets.
    answers: Tensor | None = None
    answer_tokens: int = 0  # how many these are in all, or the most there can be where only the device knows


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call. To PyTorch's pytrees its tensors are children, all else is the structure, hashable."""

    # (B, V_g, 3, H_g, W_g) for each group of cameras of one size, on the host or on `device`; none for text only.
    frames: tuple[Tensor, ...]
    camera_mask: Tensor | None  # bool (B, V) on `device`, False where a camera is absent; None where none is
    prompts: Prompts | None  # tokens on `device`; None for images only
    grids: tuple[Grid, ...]  # of each camera's image
    device: torch.device  # where the batch goes
    as_list: bool = False  # whether image features are to be a list, of one tensor for each camera


def _flatten(request: Request) -> tuple[list[Tensor], Hashable]:
    mask, prompts = request.camera_mask, request.prompts
    tensors, sizes = [*request.frames], None
    if mask is not None:
        tensors.append(mask)
    if prompts is not None:
        tensors += [prompts.ids] if prompts.answers is None else [prompts.ids, prompts.answers]
        sizes = (prompts.length, prompts.tokens, prompts.answers is not None, prompts.answer_tokens)
    return tensors, (len(request.frames), mask is not None, sizes, request.grids, request.device, request.as_list)


def _unflatten(tensors: Sequence[Tensor], context: tuple) -> Request:
    count, has_mask, sizes, grids, device, as_list = context
    frames, rest, prompts = tuple(tensors[:count]), list(tensors[count:]), None
    mask = rest.pop(0) if has_mask else None
    if sizes is not None:
        length, tokens, has_answers, answer_tokens = sizes
        prompts = Prompts(rest[0], length, tokens, rest[1] if has_answers else None, answer_tokens)
    return Request(frames, mask, prompts, grids, device, as_list)


_pytree.register_pytree_node(Request, _flatten, _unflatten)
