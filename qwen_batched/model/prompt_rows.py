"""Texts, a layout and a camera mask -> the token ids of a batch on its device, each row made once."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwen_batched.cache import LRUCache
from qwen_batched.config import TextConfig
from qwen_batched.kernels import ops
from qwen_batched.model.host_copies import copied, copy_to
from qwen_batched.model.prompt import Cameras, PromptEncoder
from qwen_batched.model.request import Grid, Prompts

MAX_CACHED_TEXTS, MAX_CACHED_BYTES = 4096, 64 << 20
MAX_DEVICE_LAYOUTS = 64  # of one text, where only the device knows which cameras are there and each has a slot


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A prompt's tokens (U,) on a device; the last `answer_tokens`, there also as `count` (1,), are its answer's."""

    ids: Tensor
    count: Tensor
    answer_tokens: int


@dataclass(frozen=True)
class TextCall:
    """What a call says of its prompts.

    Attributes:
        texts: B of them.
        targets: B answers; None without.
        template: As of `TensorProcessor`, like `system`.
        system: None for the chat template's own.
        max_new_tokens: How many tokens must find room behind each prompt.
    """

    texts: Sequence[str]
    targets: Sequence[str] | None
    template: str
    system: str | None
    max_new_tokens: int


class PromptRows:
    """The rows of recent calls."""

    def __init__(self) -> None:
        self._rows = LRUCache(MAX_CACHED_TEXTS, MAX_CACHED_BYTES, _row_bytes)

    def lay_out(
        self,
        encoder: PromptEncoder,
        config: TextConfig,
        call: TextCall,
        grids: Sequence[Grid],
        camera_mask: Tensor | None,
        device: torch.device,
    ) -> Prompts:
        """The tokens of a batch.

        Args:
            encoder: Makes them.
            config: Of the decoder: the longest sequence, and how many ids its embedding has.
            call: The texts.
            grids: Of each camera's image.
            camera_mask: Bool (B, V), on the host or on `device`; None where every camera is there.
            device: Where the ids go.

        Raises:
            ValueError: A prompt is empty or too long, a token of it has no embedding, or there are too many layouts.
        """
        stamp = encoder.stamp(call.template)
        cells = [h * w for h, w in grids]
        has_slots = encoder.has_slots(call.template)
        answers = call.targets or [None] * len(call.texts)

        def row(text: str, answer: str | None, here: Sequence[bool]) -> tuple[TokenRow, int]:
            """A row, and the length of its sequence."""
            span = sum(itertools.compress(cells, here)) - sum(here)
            cameras = tuple(here) if has_slots else sum(here)
            made = self._row(encoder, config, call, text, answer, cameras, span, stamp, device)
            return made, len(made.ids) + span

        if camera_mask is not None and camera_mask.device.type != "cpu":
            options = _options(cells, has_slots)
            rows = [
                row(text, answer, here) for text, answer in zip(call.texts, answers, strict=True) for here in options
            ]
            return _chosen(rows, len(call.texts), camera_mask, has_slots, call.targets is not None)
        present = [[True] * len(grids)] * len(call.texts) if camera_mask is None else camera_mask.tolist()
        rows = [row(*sample) for sample in zip(call.texts, answers, present, strict=True)]
        before = [length - made.answer_tokens for made, length in rows]
        if min(before) == 0:
            raise ValueError(f"a prompt must have at least one token, got none for sample {before.index(0)}")
        counts = None if call.targets is None else torch.cat([made.count for made, _ in rows])
        lengths = [length for _, length in rows]
        answer_tokens = sum(made.answer_tokens for made, _ in rows)
        return Prompts(_as_one([made.ids for made, _ in rows]), max(lengths), sum(lengths), counts, answer_tokens)

    def _row(
        self,
        encoder: PromptEncoder,
        config: TextConfig,
        call: TextCall,
        text: str,
        answer: str | None,
        cameras: Cameras,
        span: int,
        stamp: str | None,
        device: torch.device,
    ) -> TokenRow:
        """Tokens on the device, copied there the first time only; `span` more come with the images.

        Nothing is kept of a prompt that is refused.
        """

        def make() -> TokenRow:
            least = encoder.least_tokens(text) + (encoder.least_tokens(answer) if answer else 0)
            if least > config.max_position_embeddings:  # and is not worth tokenising
                _check_length(config, least, 0, "at least ")
            if answer is None:
                ids, answer_tokens = encoder.encode(text, call.template, cameras, call.system), 0
            else:
                ids, answer_tokens = encoder.encode_with_answer(text, answer, call.template, cameras, call.system)
            _check_length(config, len(ids) + span, call.max_new_tokens)
            check_embedding(encoder, config, ids)
            both = copy_to(device, torch.tensor([*ids, answer_tokens], dtype=torch.int64, device="cpu"))
            return TokenRow(both[:-1], both[-1:], answer_tokens)

        key = (text, answer, call.template, call.system, cameras, stamp, encoder, encoder.chat, device)
        row = copied(self._rows, key, make)
        _check_length(config, len(row.ids) + span, call.max_new_tokens)
        return row


def check_embedding(encoder: PromptEncoder, config: TextConfig, ids: Sequence[int]) -> None:
    """Raises `ValueError` where the decoder's embedding has no row for a token."""
    largest = max(ids, default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"token ids must be below {config.vocab_size}, the rows of the model's embedding, got {largest} for "
            f"{encoder.tokenizer.convert_ids_to_tokens(largest)!r:.100}"
        )


def _check_length(config: TextConfig, length: int, max_new_tokens: int, about: str = "") -> None:
    limit = config.max_position_embeddings
    if length > limit:
        raise ValueError(f"a prompt must have at most {limit} tokens, images included, got {about}{length}")
    if length + max_new_tokens > limit:
        raise ValueError(
            f"prompt and new tokens must fit into {limit} tokens, got {length} and max_new_tokens={max_new_tokens}"
        )


def _options(cells: Sequence[int], has_slots: bool) -> list[tuple[bool, ...]]:
    """The cameras that may be there: each number of them, with the largest images; or, with slots, each choice."""
    if not has_slots:
        largest = sorted(range(len(cells)), key=cells.__getitem__, reverse=True)
        return [tuple(camera in largest[:count] for camera in range(len(cells))) for count in range(len(cells) + 1)]
    if 2 ** len(cells) > MAX_DEVICE_LAYOUTS:
        raise ValueError(
            f"a camera_mask on the device and a template with {{image}} for each camera make 2^{len(cells)} layouts, "
            f"more than {MAX_DEVICE_LAYOUTS}: give the mask on the host"
        )
    return [choice[::-1] for choice in itertools.product((False, True), repeat=len(cells))]


def _chosen(
    rows: Sequence[tuple[TokenRow, int]], batch: int, camera_mask: Tensor, has_slots: bool, has_targets: bool
) -> Prompts:
    """Of the rows for all options of each sample, those that the mask asks for; the device chooses."""
    if has_slots:
        bits = torch.arange(camera_mask.shape[1], device=camera_mask.device)
        chosen = (camera_mask.long() << bits).sum(dim=1, keepdim=True)
    else:
        chosen = camera_mask.sum(dim=1, keepdim=True)
    length = max(length for _, length in rows)
    ids = _as_one([row.ids for row, _ in rows]).unflatten(0, (batch, -1))
    ids = ids.gather(1, chosen[..., None].expand(-1, 1, ids.shape[-1]))[:, 0]
    if not has_targets:
        return Prompts(ids, length, tokens=None)
    answers = torch.cat([row.count for row, _ in rows]).view(batch, -1)
    options = len(rows) // batch
    most = (max(row.answer_tokens for row, _ in rows[i : i + options]) for i in range(0, len(rows), options))
    return Prompts(ids, length, None, answers.gather(1, chosen)[:, 0], sum(most))


def _as_one(rows: list[Tensor]) -> Tensor:
    """Rows of ids as a tensor (rows, longest), filled up with `NO_TOKEN`."""
    if len(rows) == 1:
        return rows[0][None]  # a control loop's only prompt: two launches less
    return pad_sequence(rows, batch_first=True, padding_value=ops.NO_TOKEN)


def _row_bytes(key: tuple[Hashable, ...], row: object) -> int:
    strings = sum(sys.getsizeof(part) for part in key if isinstance(part, str))
    return strings + row.ids.numel() * row.ids.element_size()
