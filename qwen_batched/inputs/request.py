"""A checked call, as the host knows it: its tensors, and what shapes the batch that the device makes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from qwen_batched.inputs.batch import Features, Grid


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

    # (B, V_g, 3, H_g, W_g) for each group of cameras of one size, on the host or on `device`; none without frames.
    frames: tuple[Tensor, ...]
    camera_mask: Tensor | None  # bool (B, V) on `device`, False where a camera is absent; None where none is
    prompts: Prompts | None  # tokens on `device`; None for images only
    grids: tuple[Grid, ...]  # of each camera's image
    device: torch.device  # where the batch goes
    as_list: bool = False  # whether image features are to be a list, of one tensor for each camera
    features: Features | None = None  # in place of frames
    inputs_embeds: Tensor | None = None  # (B, S, D), in place of the embeddings of the tokens
    # Makes the prompts, where that was put off until the frames are on their way; None where it is done.
    lay_out: Callable[[], Prompts] | None = None

    @property
    def images(self) -> Request:
        """The request for images only."""
        return replace(self, prompts=None, lay_out=None)

    @property
    def laid_out(self) -> Request:
        """The request with its prompts."""
        return self if self.lay_out is None else replace(self, prompts=self.lay_out(), lay_out=None)


TENSORS = ("frames", "camera_mask", "features", "inputs_embeds")


def _flatten(request: Request) -> tuple[list[Any], Hashable]:
    given, prompts = [name for name in TENSORS if getattr(request, name) is not None], request.prompts
    children, sizes = [getattr(request, name) for name in given], None
    if prompts is not None:
        children += [prompts.ids] if prompts.answers is None else [prompts.ids, prompts.answers]
        sizes = (prompts.length, prompts.tokens, prompts.answer_tokens)
    return children, ((*given,), sizes, request.grids, request.device, request.as_list)


def _unflatten(children: Sequence[Any], context: tuple) -> Request:
    given, sizes, grids, device, as_list = context
    fields, rest = dict(zip(given, children, strict=False)), children[len(given) :]
    prompts = None
    if sizes is not None:
        length, tokens, answer_tokens = sizes
        prompts = Prompts(rest[0], length, tokens, rest[1] if len(rest) > 1 else None, answer_tokens)
    return Request(**{"camera_mask": None, **fields}, prompts=prompts, grids=grids, device=device, as_list=as_list)


_pytree.register_pytree_node(Request, _flatten, _unflatten)
