"""What the decoder and the head run on, with room for a few tokens more, so that few shapes serve every call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree

from qwen_batched.inputs.batch import Batch, Features
from qwen_batched.inputs.pytree_nodes import register_node
from qwen_batched.inputs.sequence import NO_LABEL, feature_rows, find_places
from qwen_batched.runtime.room import Room, pad_all

# Steps an octave. Of tokens that all blocks compute each one more costs time; rows of padding cost attention only.
TOKEN_STEPS, PACKED_TOKEN_STEPS, ROW_STEPS, ANSWER_STEPS = 16, 64, 8, 4
LEAST_STEP = 16
FEW_TOKENS = 224  # up to which sizes are twice as far apart
# Of each tensor of `DecoderInputs`, in its order: along which dimension it has one for each place, and what stands on
# more of these. Features may have as many rows, and nothing reads those that they have not; None where neither holds.
PLACES = {
    "input_ids": (1, 0),
    "inputs_embeds": (1, 0),
    "features": (1, None),
    "feature_index": (1, -1),
    "rope_positions": (2, 0),
    "attention_mask": (1, 0),
    "kept": None,
    "labels": (1, NO_LABEL),
    "valid": None,
    "labels_valid": None,
}


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """B samples padded to S tokens. To PyTorch's pytrees tensors are children, all else the structure."""

    input_ids: Tensor | None  # int64 (B, S); None with `inputs_embeds`
    inputs_embeds: Tensor | None  # (B, S, D), in place of the embeddings of `input_ids`
    # Rows (B, R, D) of each sample, or (1, R, D) of all of them, main ones first, then deep ones; none without images.
    features: tuple[Tensor, ...]
    feature_index: Tensor | None  # int64 (B, S), the row that a token stands for, -1 elsewhere; None without images
    rope_positions: Tensor  # int64 (B, 3, S)
    attention_mask: Tensor  # bool (B, S)
    kept: Tensor | None  # int64, the places whose logits are wanted; None for all, or none
    labels: Tensor | None  # int64 (B, S)
    valid: Tensor | None  # bool (B,), see `Batch`, like the others
    labels_valid: Tensor | None  # bool (B,)
    tokens: int | None
    is_padded: bool
    answer_tokens: int | None
    has_spare: bool = False  # whether more tokens may be counted than there are, so that padding is computed
    room: int | None = None  # how many places each sample is given where it runs; None for S

    @classmethod
    def of(cls, batch: Batch, features: Features | None, logits: str | int | None) -> DecoderInputs:
        """Those of a batch, and of what goes where its image tokens stand; `logits` as in `Wanted`."""
        kept = None
        if isinstance(logits, int):
            length = batch.attention_mask.shape[1]
            kept = torch.arange(max(0, length - logits), length, device=batch.attention_mask.device)
        maps = () if features is None else (features.main, *features.deep)
        return cls(
            input_ids=batch.input_ids if batch.inputs_embeds is None else None,
            inputs_embeds=batch.inputs_embeds,
            features=tuple(feature_rows(each, by_sample=batch.images is None) for each in maps),
            feature_index=batch.feature_index if maps else None,
            rope_positions=batch.rope_positions,
            attention_mask=batch.attention_mask,
            kept=kept,
            labels=batch.labels,
            valid=batch.valid,
            labels_valid=batch.labels_valid,
            tokens=batch.tokens,
            is_padded=batch.is_padded,
            answer_tokens=batch.answer_tokens,
        )

    @property
    def length(self) -> int:
        """S."""
        return self.attention_mask.shape[1]

    def rounded_up(self) -> DecoderInputs:
        """The same with room for padding at the end and more counted tokens, up to the next of few sizes.

        Tokens that all blocks compute grow by at most 1/16 from 256 on, by 1/64 where samples differ in length. Which
        padding is computed reaches no token: it stands behind all tokens of its row. Features get room for as many rows
        as there are places, whatever images they are of.
        """
        batch, length = self.attention_mask.shape
        room, tokens = rounded_sizes(batch, length, self.tokens, self.is_padded)
        answers = self.answer_tokens
        if answers is not None:
            answers = min(round_up(answers, ANSWER_STEPS), batch * room)
        exceeds = bool(self.features) and self.features[0].shape[:2].numel() > batch * room
        return replace(
            self._with_a_row_for_each_place() if exceeds else self,
            tokens=tokens if self.is_padded else None,
            answer_tokens=answers,
            has_spare=self.is_padded and self.tokens is not None,
            room=room,
        )

    def _with_a_row_for_each_place(self) -> DecoderInputs:
        """The same with features (B, S, D): those of absent cameras, for which no token stands, take room too."""
        index_BS = self.feature_index
        rows, is_image = find_places(index_BS, self.features[0])
        features = tuple(x.flatten(0, 1).index_select(0, rows).unflatten(0, index_BS.shape) for x in self.features)
        places = torch.arange(self.length, device=index_BS.device)
        return replace(self, features=features, feature_index=torch.where(is_image[..., 0], places, -1))

    @property
    def rooms(self) -> list[Room | None]:
        """The room of each of its tensors, in the order of pytrees; None where one stays as it is."""
        total = None if self.room is None else len(self.attention_mask) * self.room
        rooms: list[Room | None] = []
        for name, place in PLACES.items():
            value = getattr(self, name)
            for x in value if isinstance(value, tuple) else (value,):
                if x is not None:
                    rooms.append(None if place is None or total is None else Room(place[0], total // len(x), place[1]))
        return rooms

    def padded(self) -> DecoderInputs:
        """The same with its room filled up."""
        if self.room is None:
            return self
        tensors, spec = _pytree.tree_flatten(self)
        return _pytree.tree_unflatten(pad_all(tensors, self.rooms), spec)


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


FACTS = ("tokens", "is_padded", "answer_tokens", "has_spare", "room")


register_node(DecoderInputs, FACTS)
