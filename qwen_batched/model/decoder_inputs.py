"""What the decoder and the head run on, with room for a few tokens more, so that few shapes serve every text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.inputs.batch import Batch
from qwen_batched.inputs.pytree_nodes import register_node
from qwen_batched.inputs.sequence import NO_LABEL
from qwen_batched.model.embedding import Embedded

# Steps an octave. Of tokens that all blocks compute each one more costs time; rows of padding cost attention only.
TOKEN_STEPS, PACKED_TOKEN_STEPS, ROW_STEPS, ANSWER_STEPS = 16, 64, 8, 4
LEAST_STEP = 16
FEW_TOKENS = 224  # up to which sizes are twice as far apart


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """Embeddings of B samples padded to S tokens. To PyTorch's pytrees tensors are children, all else the structure."""

    inputs_embeds: Tensor  # (B, S, D)
    rope_positions: Tensor  # int64 (B, 3, S)
    attention_mask: Tensor  # bool (B, S)
    deep: tuple[Tensor, ...]  # each (B, S, D), see `Decoder.forward`
    kept: Tensor | None  # int64, the places whose logits are wanted; None for all, or none
    labels: Tensor | None  # int64 (B, S)
    labels_valid: Tensor | None  # bool (B,)
    tokens: int | None  # see `Batch`, like the others
    is_padded: bool
    answer_tokens: int | None
    has_spare: bool = False  # whether more tokens may be counted than there are, so that padding is computed

    @classmethod
    def of(cls, batch: Batch, embedded: Embedded, logits: str | int | None) -> DecoderInputs:
        """Those of a batch; `logits` as in `Wanted`."""
        kept = None
        if isinstance(logits, int):
            length = batch.attention_mask.shape[1]
            kept = torch.arange(max(0, length - logits), length, device=batch.attention_mask.device)
        return cls(
            embedded.inputs_embeds,
            batch.rope_positions,
            batch.attention_mask,
            tuple(embedded.deep),
            kept,
            batch.labels,
            batch.labels_valid,
            batch.tokens,
            batch.is_padded,
            batch.answer_tokens,
        )

    @property
    def length(self) -> int:
        """S."""
        return self.attention_mask.shape[1]

    def rounded_up(self) -> DecoderInputs:
        """The same with padding at the end and more counted tokens, up to the next of few sizes.

        Tokens that all blocks compute grow by at most 1/16 from 256 on, by 1/64 where samples differ in length. Which
        padding is computed reaches no token: it stands behind all tokens of its row.
        """
        batch, length = self.attention_mask.shape
        rows, tokens = rounded_sizes(batch, length, self.tokens, self.is_padded)
        more, answers = rows - length, self.answer_tokens
        if answers is not None:
            answers = min(round_up(answers, ANSWER_STEPS), batch * rows)
        changed = {"tokens": tokens if self.is_padded else None, "answer_tokens": answers}
        changed["has_spare"] = self.is_padded and self.tokens is not None
        if more:
            changed |= {
                "inputs_embeds": F.pad(self.inputs_embeds, (0, 0, 0, more)),
                "rope_positions": F.pad(self.rope_positions, (0, more)),
                "attention_mask": F.pad(self.attention_mask, (0, more)),
                "deep": tuple(F.pad(x, (0, 0, 0, more)) for x in self.deep),
                "labels": None if self.labels is None else F.pad(self.labels, (0, more), value=NO_LABEL),
            }
        return replace(self, **changed)


def rows_of(batch: int, length: int, is_padded: bool) -> int:
    """How many places each of so many sequences gets."""
    if is_padded:
        return round_up(length, ROW_STEPS)
    # Few tokens in all take about as long as a few more.
    return round_up(length, TOKEN_STEPS, 2 * LEAST_STEP if batch * length <= FEW_TOKENS else LEAST_STEP)


def rounded_sizes(batch: int, length: int, tokens: int | None, is_padded: bool) -> tuple[int, int]:
    """How many places each sequence gets, and how many tokens are computed; `tokens` of them are none of padding."""
    rows = rows_of(batch, length, is_padded)
    if not is_padded or tokens is None:
        return rows, batch * rows
    return rows, min(round_up(tokens, PACKED_TOKEN_STEPS), batch * rows)


def round_up(count: int, steps: int, least: int = LEAST_STEP) -> int:
    """The next size that is no less than `count`, of `steps` for each doubling, multiples of `least` at least."""
    step = max(least, (1 << max(count.bit_length() - 1, 0)) // steps)
    return -(-count // step) * step


FACTS = ("tokens", "is_padded", "answer_tokens", "has_spare")


register_node(DecoderInputs, FACTS)
