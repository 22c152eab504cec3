"""A checked call, as the host knows it: its tensors, and what shapes the batch that the device makes of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int]  # height and width of an image in merged cells


@dataclass(frozen=True, eq=False)
class Prompts:
    """The texts of a batch as tokens, each with its answer where there are targets, and one token for each image.

    Attributes:
        ids: Int64 (B, U), as `expand_prompts` takes them.
        length: S of the sequences, images expanded.
        tokens: How many tokens they have in all; None where only the device knows.
        answers: Int64 (B,), how many tokens at the end of each are its answer's; None without targets.
        answer_tokens: How many these are in all, or the most there can be where only the device knows.
    """

    ids: Tensor
    length: int
    tokens: int | None
    answers: Tensor | None = None
    answer_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call: its tensors, and all that the host knows of them.

    Attributes:
        frames: (B, V_g, 3, H_g, W_g) for each group of cameras of one size, on the host or on `device`; none for text
            alone.
        camera_mask: Bool (B, V) on `device`, False where a camera is absent; None where none is.
        prompts: Tokens on `device`; None for images alone.
        grids: Of each camera's image.
        device: Where the batch goes.
        as_list: Whether image features are to be a list, of one tensor for each camera.
    """

    frames: tuple[Tensor, ...]
    camera_mask: Tensor | None
    prompts: Prompts | None
    grids: tuple[Grid, ...]
    device: torch.device
    as_list: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that differ from call to call."""
        return *self.frames, *(x for x in self._others if x is not None)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """All else that shapes the batch."""
        prompts = self.prompts
        sizes = None if prompts is None else (prompts.length, prompts.tokens, prompts.answer_tokens)
        return len(self.frames), *(x is not None for x in self._others), self.grids, sizes, self.device, self.as_list

    def with_tensors(self, tensors: Sequence[Tensor]) -> Request:
        """The same request for other `tensors` of the same shapes."""
        rest = list(tensors)
        frames = tuple(rest.pop(0) for _ in self.frames)
        mask, ids, answers = (None if x is None else rest.pop(0) for x in self._others)
        prompts = None if self.prompts is None else replace(self.prompts, ids=ids, answers=answers)
        return replace(self, frames=frames, camera_mask=mask, prompts=prompts)

    @property
    def _others(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ids, answers = (None, None) if self.prompts is None else (self.prompts.ids, self.prompts.answers)
        return self.camera_mask, ids, answers
