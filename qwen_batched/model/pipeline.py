"""The network as a function: its modules and a typed batch -> a typed result. Embed, place, decode, head.

No class around it: this is what a CUDA graph captures, what torch.compile sees and what can be exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_batched.inputs.batch import Batch
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.attention import KeysValues, KVCache
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.embedding import Embedded, embed, features_of_images
from qwen_batched.model.head import answer_loss, last_tokens
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


def run(network: Network, batch: Batch, wanted: Wanted) -> VLOutput:
    """The result of a batch with texts."""
    keys_values = KeysValues(wanted.keys_values) if wanted.keys_values else None
    out = _decode(network, batch, embed(network.visual, network.decoder, batch), wanted, keys_values)
    if keys_values is not None:
        out.keys_values = keys_values.in_place(batch.attention_mask, batch.is_padded)
    return out


class Prefilled(NamedTuple):
    """A prompt of B samples that the decoder has run, padded to S tokens; a sample's tokens come first."""

    output: VLOutput
    keys_LBSKE: Tensor  # rotated
    values_LBSKE: Tensor
    lengths: Tensor  # int64 (B,), how many tokens each sample has
    next_positions: Tensor  # int64 (B,), the rope position of its next token


def prefill(network: Network, batch: Batch, wanted: Wanted) -> Prefilled:
    """The same, with what tokens behind the prompt need of it."""
    text, embedded = network.decoder.config, embed(network.visual, network.decoder, batch)
    heads = text.num_key_value_heads, text.head_dim
    cache = KVCache(text.num_hidden_layers, *batch.attention_mask.shape, *heads, embedded.inputs_embeds)
    out = _decode(network, batch, embedded, wanted, cache)
    next_positions = batch.rope_positions.amax(dim=(1, 2)) + 1
    return Prefilled(out, cache.keys_LBCKE, cache.values_LBCKE, cache.lengths, next_positions)


def _decode(
    network: Network, batch: Batch, embedded: Embedded, wanted: Wanted, cache: KVCache | KeysValues | None
) -> VLOutput:
    decoder, head = network.decoder, network.head
    inputs_embeds, deep, features = embedded
    mask, position_ids = batch.attention_mask, batch.rope_positions.transpose(0, 1)
    needs_last = wanted.logits is not None or batch.labels is not None
    layers = [*wanted.layers, decoder.config.num_hidden_layers] if needs_last else wanted.layers
    options = {"tokens": batch.tokens, "deep_features": deep, "is_padded": batch.is_padded, "cache": cache}
    hidden_states = decoder(inputs_embeds, position_ids, mask, layers, wanted.norm, **options)
    logits = loss = None
    if needs_last:
        last = hidden_states.pop()
        last = last if wanted.norm == "post" else decoder.norm(last)[0]
    if isinstance(wanted.logits, int):
        logits = apply_linear(head, last[:, -wanted.logits :])
    elif wanted.logits is not None:
        logits = apply_linear(head, last_tokens(last, mask) if wanted.logits == "last" else last)
    if batch.labels is not None:
        # The logits of all tokens, where there are any, are not computed twice.
        rows, of_rows = (logits, _same) if wanted.logits == "all" else (last, partial(apply_linear, head))
        loss = answer_loss(rows, mask, batch.labels, batch.answer_tokens, of_rows, wanted.loss)
        if batch.labels_valid is not None:
            loss = loss.masked_fill(~batch.labels_valid.all(), torch.nan)
    return VLOutput(
        hidden_states=hidden_states,
        attention_mask=mask,
        image_mask=batch.feature_index >= 0,
        camera_ids=batch.camera_ids,
        position_ids=position_ids,
        input_ids=batch.input_ids,
        image_features=None if features is None else features_of_images(features.main, batch),
        logits=logits,
        loss=loss,
    )


def _same(logits: Tensor) -> Tensor:
    return logits
