"""Token ids and features -> input embeddings (B, S, D), with each image token's feature in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_batched.inputs.sequence import find_places, place_features
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.decoder_inputs import DecoderInputs


def embed(decoder: Decoder, inputs: DecoderInputs) -> tuple[Tensor, list[Tensor]]:
    """Embeddings (B, S, D), and deep features where the main ones stand, each (B, S, D) and zero on text.

    See `Decoder.forward`. Samples that are not `valid` become NaN.
    """
    embeds_BSD, deep = inputs.inputs_embeds, []
    if embeds_BSD is None:
        embeds_BSD = decoder.embed_tokens(inputs.input_ids)
    if inputs.room is not None:  # so that padding may be computed
        # Attention multiplies what stands behind a token by 0, which a value that is not finite would survive.
        embeds_BSD = embeds_BSD.masked_fill(~inputs.attention_mask[..., None], 0)
    if inputs.features:
        main_BRD, *deep_BRD = inputs.features
        places = find_places(inputs.feature_index, main_BRD)
        blank = torch.zeros_like(embeds_BSD) if deep_BRD else None
        deep = [place_features(blank, rows_BRD, places) for rows_BRD in deep_BRD]
        embeds_BSD = place_features(embeds_BSD, main_BRD, places)
    if inputs.valid is not None:
        embeds_BSD = embeds_BSD.masked_fill(~inputs.valid[:, None, None], torch.nan)
    return embeds_BSD, deep
