"""The network as a function: its modules and a typed batch -> a typed result. Tower, embed, place, decode, head.

No class around it: this is what a CUDA graph captures, what torch.compile sees and what can be exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_batched.inputs.batch import Batch, Features
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.attention import KeysValues, KVCache
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.decoder_inputs import DecoderInputs
from qwen_batched.model.embedding import embed
from qwen_batched.model.head import answer_loss, last_tokens
from qwen_batched.model.image_features import blank_features, features_of, features_of_images
from qwen_batched.model.vision import VisionTransformer
from qwen_batched.outputs import VLOutput


class Network(NamedTuple):
    """The modules of a model: the vision transformer, the decoder, and the output projection or None."""

    visual: VisionTransformer
    decoder: Decoder
    head: nn.Module | None


@dataclass(frozen=True)
class Wanted:
    """What a call asks for."""

    layers: tuple[int, ...]  # indices of hidden states, 0 for the input embeddings
    norm: str  # "post" or "pre", see `Decoder.forward`
    logits: str | int | None  # None, "last", "all", or of so many places at the end
    loss: str = "mean"  # or "sum", of the batch's labels
    keys_values: tuple[int, ...] = ()  # decoder blocks whose keys and values are returned
    cache: bool = False  # whether all keys and values are kept, for tokens behind the prompt


class Decoded(NamedTuple):
    """What decoder and head make of their inputs, of B samples padded to S tokens."""

    hidden_states: list[Tensor]  # (B, S, D) each
    logits: Tensor | None  # (B, S, vocabulary), or of the last token, or of the places that were kept
    loss: Tensor | None
    keys_values: list[tuple[Tensor, Tensor]] | None
    cache: tuple[Tensor, Tensor, Tensor] | None  # keys and values (L, B, S, K, E), tokens first, and lengths (B,)

    def cut(self, length: int, wanted: Wanted) -> Decoded:
        """The same of the first `length` places."""
        logits, pairs = self.logits, self.keys_values
        return self._replace(
            hidden_states=[x[:, :length].contiguous() for x in self.hidden_states],
            logits=logits[:, :length].contiguous() if wanted.logits == "all" and logits is not None else logits,
            keys_values=pairs and [tuple(x[:, :length].contiguous() for x in pair) for pair in pairs],
        )


def run(network: Network, batch: Batch, wanted: Wanted) -> VLOutput:
    """The result of a batch with texts."""
    features, inputs = encode(network.visual, batch, wanted)
    return output(batch, features, decode(network.decoder, network.head, wanted, inputs))


def encode(visual: VisionTransformer, batch: Batch, wanted: Wanted) -> tuple[Features | None, DecoderInputs]:
    """The features of a batch's images, None without images, and what the decoder runs on."""
    features = features_of(visual, batch)
    placed = blank_features(visual, batch) if features is None else features
    return features, DecoderInputs.of(batch, placed, wanted.logits)


def decode(decoder: Decoder, head: nn.Module | None, wanted: Wanted, inputs: DecoderInputs) -> Decoded:
    """From token ids and features to what is wanted."""
    embeds_BSD, deep = embed(decoder, inputs)
    mask, position_ids = inputs.attention_mask, inputs.rope_positions.transpose(0, 1)
    keys_values = cache = None
    if wanted.cache:
        text = decoder.config
        sizes = text.num_hidden_layers, *mask.shape, text.num_key_value_heads, text.head_dim
        cache = KVCache(*sizes, embeds_BSD)
    elif wanted.keys_values:
        keys_values = KeysValues(wanted.keys_values)
    needs_last = wanted.logits is not None or inputs.labels is not None
    layers = [*wanted.layers, decoder.config.num_hidden_layers] if needs_last else wanted.layers
    options = {"tokens": inputs.tokens, "deep_features": deep, "is_padded": inputs.is_padded}
    options["cache"] = keys_values if cache is None else cache
    hidden_states = decoder(embeds_BSD, position_ids, mask, layers, wanted.norm, **options)
    if inputs.has_spare:  # zeros on padding, as where it is not computed
        hidden_states = [x.masked_fill(~mask[..., None], 0) for x in hidden_states]
    logits = loss = None
    if needs_last:
        last = hidden_states.pop()
        last = last if wanted.norm == "post" else decoder.norm(last)[0]
    if inputs.kept is not None:
        logits = apply_linear(head, last.index_select(1, inputs.kept))
    elif wanted.logits is not None:
        logits = apply_linear(head, last_tokens(last, mask) if wanted.logits == "last" else last)
    if inputs.labels is not None:
        # The logits of all tokens, where there are any, are not computed twice.
        rows, of_rows = (logits, _same) if wanted.logits == "all" else (last, partial(apply_linear, head))
        loss = answer_loss(rows, mask, inputs.labels, inputs.answer_tokens, of_rows, wanted.loss)
        if inputs.labels_valid is not None:
            loss = loss.masked_fill(~inputs.labels_valid.all(), torch.nan)
    pairs = None if keys_values is None else keys_values.in_place(mask, inputs.is_padded)
    stored = None if cache is None else (cache.keys_LBCKE, cache.values_LBCKE, cache.lengths)
    return Decoded(hidden_states, logits, loss, pairs, stored)


def output(batch: Batch, features: Features | None, decoded: Decoded) -> VLOutput:
    """The result as callers get it."""
    return VLOutput(
        hidden_states=decoded.hidden_states,
        attention_mask=batch.attention_mask,
        image_mask=batch.feature_index >= 0,
        camera_ids=batch.camera_ids,
        position_ids=batch.rope_positions.transpose(0, 1),
        input_ids=batch.input_ids,
        image_features=None if features is None else features_of_images(features.main, batch),
        logits=decoded.logits,
        loss=decoded.loss,
        keys_values=decoded.keys_values,
    )


class Prefilled(NamedTuple):
    """A prompt of B samples that the decoder has run, padded to S tokens; a sample's tokens come first."""

    output: VLOutput
    keys_LBCKE: Tensor  # rotated, with room for C tokens, S at least
    values_LBCKE: Tensor
    lengths: Tensor  # int64 (B,), how many tokens each sample has
    next_positions: Tensor  # int64 (B,), the rope position of its next token


def prefilled(batch: Batch, features: Features | None, decoded: Decoded) -> Prefilled:
    """A result with what tokens behind the prompt need of it."""
    return Prefilled(output(batch, features, decoded), *decoded.cache, batch.rope_positions.amax(dim=(1, 2)) + 1)


def _same(logits: Tensor) -> Tensor:
    return logits
