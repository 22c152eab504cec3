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
class TextRows:
    """A text as tokens on a device, once for each of C choices of cameras."""

    ids: Tensor  # (C, U), filled up with `NO_TOKEN`
    counts: Tensor  # (C,), how many at the end of each row are its answer's
    lengths: Sequence[int]  # the same facts for the host: tokens of each row,
    answer_tokens: Sequence[int]  # and those of its answer


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
        rows, lengths = self._rows_of(call, [[here] for here in present])
        for sample, (row, (length,)) in enumerate(zip(rows, lengths, strict=True)):
            if length == row.answer_tokens[0]:
                raise ValueError(f"a prompt must have at least one token, got none for sample {sample}")
        ids = rows[0].ids  # a control loop's only prompt: two launches less
        if batch > 1:
            ids = pad_sequence([row.ids[0] for row in rows], batch_first=True, padding_value=ops.NO_TOKEN)
        answers = None if call.targets is None else torch.cat([row.counts for row in rows])
        totals = [length for (length,) in lengths]
        return Prompts(ids, max(totals), sum(totals), answers, sum(row.answer_tokens[0] for row in rows))

    def lay_out_on_device(self, call: TextCall, camera_mask: Tensor) -> Prompts:
        """The same where only the device knows the mask: whatever it may be is laid out, and the device chooses.

        Raises `ValueError` also where the template has slots for so many cameras that there are too many layouts.
        """
        cells, batch, has_slots = _cells(call), len(call.texts), call.encoder.has_slots(call.template)
        rows, lengths = self._rows_of(call, [_options(cells, has_slots)] * batch)
        if has_slots:
            bits = torch.arange(len(cells), device=camera_mask.device)
            chosen = (camera_mask.long() << bits).sum(dim=1, keepdim=True)
        else:
            chosen = camera_mask.sum(dim=1, keepdim=True)
        ids_BUC = rows[0].ids.T[None]
        if batch > 1:
            ids_BUC = pad_sequence([row.ids.T for row in rows], batch_first=True, padding_value=ops.NO_TOKEN)
        ids = ids_BUC.gather(2, chosen[:, None].expand(-1, ids_BUC.shape[1], 1))[..., 0]
        longest = max(map(max, lengths))
        if call.targets is None:
            return Prompts(ids, longest, tokens=None)
        answers = torch.stack([row.counts for row in rows]).gather(1, chosen)[:, 0]
        return Prompts(ids, longest, None, answers, sum(max(row.answer_tokens) for row in rows))

    def surely_lays_out(self, call: TextCall, camera_mask: Tensor | None) -> bool:
        """Whether no prompt can be refused, as far as can be told without tokenising: then that can wait.

        Raises `ValueError` where the template cannot be laid out.
        """
        encoder, config, cameras = call.encoder, call.config, len(call.grids)
        if call.targets is not None or encoder.has_slots(call.template):
            return False
        if encoder.vocabulary.largest_id >= config.vocab_size:
            return False
        room = config.max_position_embeddings - call.max_new_tokens - sum(_cells(call)) + cameras
        counts = range(cameras + 1) if camera_mask is not None else (cameras,)
        most = (encoder.most_tokens(text, call.template, n, call.system) for text in call.texts for n in counts)
        return all(tokens is not None and tokens <= room for tokens in most)

    def _rows_of(
        self, call: TextCall, present: Sequence[Sequence[Sequence[bool]]]
    ) -> tuple[list[TextRows], list[list[int]]]:
        """Each text for each choice of its cameras, and the lengths of these sequences, images expanded."""
        stamp, has_slots = call.encoder.stamp(call.template), call.encoder.has_slots(call.template)
        cells = _cells(call)
        rows, lengths = [], []
        for text, answer, choices in zip(call.texts, call.targets or [None] * len(call.texts), present, strict=True):
            counts = [sum(here) for here in choices]
            spans = [sum(itertools.compress(cells, here)) - count for here, count in zip(choices, counts, strict=True)]
            row = self._row(call, text, answer, tuple(map(tuple, choices) if has_slots else counts), spans, stamp)
            rows.append(row)
            lengths.append(list(map(operator.add, row.lengths, spans)))
        return rows, lengths

    def _row(
        self,
        call: TextCall,
        text: str,
        answer: str | None,
        choices: tuple[Cameras, ...],
        spans: Sequence[int],
        stamp: str | None,
    ) -> TextRows:
        """Tokens on the device, copied there the first time only; `spans` more come with the images.

        Nothing is kept of a prompt that is refused.
        """
        encoder, config = call.encoder, call.config

        def make() -> TextRows:
            least = encoder.least_tokens(text) + (encoder.least_tokens(answer) if answer else 0)
            if least > config.max_position_embeddings:  # and is not worth tokenising
                _check_length(config, least, 0, "at least ")
            encoded = []
            for cameras, span in zip(choices, spans, strict=True):
                if answer is None:
                    ids, answer_tokens = encoder.encode(text, call.template, cameras, call.system), 0
                else:
                    ids, answer_tokens = encoder.encode_with_answer(text, answer, call.template, cameras, call.system)
                _check_length(config, len(ids) + span, call.max_new_tokens)
                if (largest := max(ids, default=0)) >= config.vocab_size:
                    token = f"{largest} for {encoder.tokenizer.convert_ids_to_tokens(largest)!r:.100}"
                    limit = f"{config.vocab_size}, the rows of the model's embedding"
                    raise ValueError(f"token ids must be below {limit}, got {token}")
                encoded.append((ids, answer_tokens))
            return _on_device(encoded, call.device)

        key = (
            text,
            answer,
            call.template,
            call.system,
            choices,
            stamp,
            encoder,
            encoder.vocabulary,
            encoder.chat,
            config.vocab_size,
            call.device,
        )
        row = cached_h2d(self._rows, key, make)
        longest = max(map(operator.add, row.lengths, spans))
        if longest + call.max_new_tokens > config.max_position_embeddings:  # which are not in the key
            _check_length(config, longest, call.max_new_tokens)
        return row


def _on_device(encoded: Sequence[tuple[list[int], int]], device: torch.device) -> TextRows:
    """Token ids and how many of them are an answer's, of each choice: by one copy."""
    lengths = [len(ids) for ids, _ in encoded]
    longest, values = max(lengths), array("q")
    for ids, answer_tokens in encoded:
        values.extend([*ids, *[ops.NO_TOKEN] * (longest - len(ids)), answer_tokens])
    # A tensor of a list takes the host several times as long as one of an array.
    both = h2d(device, torch.frombuffer(values, dtype=torch.int64).view(len(encoded), longest + 1))
    return TextRows(both[:, :-1], both[:, -1], lengths, [answer_tokens for _, answer_tokens in encoded])


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


def _row_bytes(key: tuple[Hashable, ...], row: object) -> int:
    strings = sum(sys.getsizeof(part) for part in key if isinstance(part, str))
    return strings + row.ids.nbytes
