"""Texts, a layout and a camera mask -> the token ids of a batch on its device, each row made once."""

from __future__ import annotations

import itertools
import operator
import sys
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwen_batched import ops
from qwen_batched.checkpoint.config import TextConfig
from qwen_batched.inputs.prompt import Cameras, PromptEncoder
from qwen_batched.inputs.request import Grid, Prompts
from qwen_batched.runtime.host_copies import cached_h2d, h2d
from qwen_batched.runtime.lru_cache import LRUCache

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
    """What a call says of its prompts."""

    encoder: PromptEncoder  # makes tokens of them
    config: TextConfig  # of the decoder: the longest sequence, and how many ids its embedding has
    texts: Sequence[str]  # B of them
    targets: Sequence[str] | None  # B answers; None without
    template: str  # as of `TensorProcessor`, like `system`
    system: str | None  # None for the chat template's own
    grids: Sequence[Grid]  # of each camera's image
    max_new_tokens: int  # how many tokens must find room behind each prompt
    device: torch.device  # where the ids go


class PromptRows:
    """Lays out prompts, and keeps the rows of recent calls."""

    def __init__(self) -> None:
        self._rows = LRUCache(MAX_CACHED_TEXTS, MAX_CACHED_BYTES, _row_bytes)

    def lay_out(self, call: TextCall, camera_mask: Tensor | None) -> Prompts:
        """The tokens of a batch whose cameras the host knows: `camera_mask`, bool (B, V), on the host, or None for all.

        Raises `ValueError` where a prompt is empty or too long, or a token of it has no embedding.
        """
        batch, cameras = len(call.texts), len(call.grids)
        present = [[True] * cameras] * batch if camera_mask is None else camera_mask.tolist()
        rows, lengths = self._rows_of(call, list(zip(present)))
        ids, answer_tokens = [], 0
        for sample, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length == row.answer_tokens:
                raise ValueError(f"a prompt must have at least one token, got none for sample {sample}")
            ids.append(row.ids)
            answer_tokens += row.answer_tokens
        answers = None if call.targets is None else torch.cat([row.count for row in rows])
        return Prompts(_pad_rows(ids), max(lengths), sum(lengths), answers, answer_tokens)

    def lay_out_on_device(self, call: TextCall, camera_mask: Tensor) -> Prompts:
        """The same where only the device knows the mask: whatever it may be is laid out, and the device chooses.

        Raises `ValueError` also where the template has slots for so many cameras that there are too many layouts.
        """
        cells, batch, has_slots = _cells(call), len(call.texts), call.encoder.has_slots(call.template)
        options = _options(cells, has_slots)
        rows, lengths = self._rows_of(call, [options] * batch)
        if has_slots:
            bits = torch.arange(len(cells), device=camera_mask.device)
            chosen = (camera_mask.long() << bits).sum(dim=1, keepdim=True)
        else:
            chosen = camera_mask.sum(dim=1, keepdim=True)
        ids = _pad_rows([row.ids for row in rows]).unflatten(0, (batch, len(options)))
        ids = ids.gather(1, chosen[..., None].expand(-1, 1, ids.shape[-1]))[:, 0]
        if call.targets is None:
            return Prompts(ids, max(lengths), tokens=None)
        answers = torch.cat([row.count for row in rows]).view(batch, len(options)).gather(1, chosen)[:, 0]
        samples = (rows[start : start + len(options)] for start in range(0, len(rows), len(options)))
        most = sum(max(row.answer_tokens for row in sample) for sample in samples)
        return Prompts(ids, max(lengths), None, answers, most)

    def _rows_of(self, call: TextCall, present: Sequence[Sequence[Sequence[bool]]]) -> tuple[list[TokenRow], list[int]]:
        """For each sample a row for each choice of its cameras, and the lengths of their sequences, images expanded."""
        stamp, has_slots = call.encoder.stamp(call.template), call.encoder.has_slots(call.template)
        cells = _cells(call)
        rows, lengths = [], []
        for text, answer, choices in zip(call.texts, call.targets or [None] * len(call.texts), present, strict=True):
            for here in choices:
                count = sum(here)
                span = sum(itertools.compress(cells, here)) - count
                row = self._row(call, text, answer, tuple(here) if has_slots else count, span, stamp)
                rows.append(row)
                lengths.append(len(row.ids) + span)
        return rows, lengths

    def _row(
        self, call: TextCall, text: str, answer: str | None, cameras: Cameras, span: int, stamp: str | None
    ) -> TokenRow:
        """Tokens on the device, copied there the first time only; `span` more come with the images.

        Nothing is kept of a prompt that is refused.
        """
        encoder, config = call.encoder, call.config

        def make() -> TokenRow:
            least = encoder.least_tokens(text) + (encoder.least_tokens(answer) if answer else 0)
            if least > config.max_position_embeddings:  # and is not worth tokenising
                _check_length(config, least, 0, "at least ")
            if answer is None:
                ids, answer_tokens = encoder.encode(text, call.template, cameras, call.system), 0
            else:
                ids, answer_tokens = encoder.encode_with_answer(text, answer, call.template, cameras, call.system)
            _check_length(config, len(ids) + span, call.max_new_tokens)
            if (largest := max(ids, default=0)) >= config.vocab_size:
                token = f"{largest} for {encoder.tokenizer.convert_ids_to_tokens(largest)!r:.100}"
                limit = f"{config.vocab_size}, the rows of the model's embedding"
                raise ValueError(f"token ids must be below {limit}, got {token}")
            # A tensor of a list takes the host several times as long as one of an array.
            both = h2d(call.device, torch.frombuffer(array("q", [*ids, answer_tokens]), dtype=torch.int64))
            return TokenRow(both[:-1], both[-1:], answer_tokens)

        key = (
            text,
            answer,
            call.template,
            call.system,
            cameras,
            stamp,
            encoder,
            encoder.vocabulary,
            encoder.chat,
            config.vocab_size,
            call.device,
        )
        row = cached_h2d(self._rows, key, make)
        if len(row.ids) + span + call.max_new_tokens > config.max_position_embeddings:  # which are not in the key
            _check_length(config, len(row.ids) + span, call.max_new_tokens)
        return row


def _cells(call: TextCall) -> list[int]:
    return list(itertools.starmap(operator.mul, call.grids))


def _check_length(config: TextConfig, length: int, max_new_tokens: int, about: str = "") -> None:
    limit = config.max_position_embeddings
    if length > limit:
        raise ValueError(f"a prompt must have at most {limit} tokens, images included, got {about}{length}")
    if length + max_new_tokens > limit:
        both = f"{length} and max_new_tokens={max_new_tokens}"
        raise ValueError(f"prompt and new tokens must fit into {limit} tokens, got {both}")


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


def _pad_rows(rows: list[Tensor]) -> Tensor:
    """Rows of ids as a tensor (rows, longest), filled up with `NO_TOKEN`."""
    if len(rows) == 1:
        return rows[0][None]  # a control loop's only prompt: two launches less
    return pad_sequence(rows, batch_first=True, padding_value=ops.NO_TOKEN)


def _row_bytes(key: tuple[Hashable, ...], row: object) -> int:
    strings = sum(sys.getsizeof(part) for part in key if isinstance(part, str))
    return strings + row.ids.numel() * row.ids.element_size()
