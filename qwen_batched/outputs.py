"""What the model returns: dataclasses with the same fields at every call; what was not asked for is None."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass(eq=False)
class VLOutput(ModelOutput):
    """Result of `QwenBatchedVL.forward` for B samples padded to S tokens, D wide, with V cameras.

    Like every output of transformers it can be read by name, `out["loss"]`, and as a tuple of what is not None,
    `out[0]`: tools written for its models do.

    Attributes:
        loss: Float32 scalar, the mean cross entropy of all tokens of the batch's answers; None without targets.
        logits: None, (B, vocabulary) for `logits="last"`, (B, S, vocabulary) for `logits="all"`.
        hidden_states: One (B, S, D) for each of the `layers` asked for, in that order. Values on padding are finite
            and mean nothing.
        attention_mask: Bool (B, S), False on padding.
        image_mask: Bool (B, S), True where the token is an image token.
        camera_ids: Int64 (B, S), the camera of an image token, -1 elsewhere.
        position_ids: Int64 (3, B, S), temporal, height and width rope positions; 0 on padding.
        input_ids: Int64 (B, S).
        image_features: (B, V, h, w, D) in row-major order, a list of V tensors (B, h, w, D) when the cameras'
            feature grids differ, None without images.
        keys_values: For each of the decoder blocks asked for a pair of keys, rotated, and values, (B, S, K, E) each,
            0 on padding; None where none were.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: list[Tensor] | None = None
    attention_mask: Tensor | None = None
    image_mask: Tensor | None = None
    camera_ids: Tensor | None = None
    position_ids: Tensor | None = None
    input_ids: Tensor | None = None
    image_features: Tensor | list[Tensor] | None = None
    keys_values: list[tuple[Tensor, Tensor]] | None = None

    @property
    def last_hidden_state(self) -> Tensor:
        """The last of `hidden_states`."""
        return self.hidden_states[-1]


@dataclass(frozen=True, eq=False)
class GenerateOutput:
    """Result of `QwenBatchedVL.generate` for B samples, or B * num_return_sequences, sample by sample.

    Attributes:
        texts: The new text of each sample, special tokens left out, up to where a stop string begins.
        token_ids: The new tokens of each sample, an int64 vector; ends with the end token where one came, or with the
            token that completed a stop string.
        finish_reasons: "eos" where an end token came, "stop" where a stop string did, "length" where `max_new_tokens`
            was reached, "invalid" where the sample's logits were not finite (a frame that holds a NaN, a half-precision
            overflow). Such a sample ends there, with the tokens that came before, perhaps none; the others go on as if
            it were not in the batch.
        logprobs: For each sample a float32 vector, as long as its tokens: the log probability of each, of the
            distribution before temperature, top-k and top-p. None where not asked for.
    """

    texts: list[str]
    token_ids: list[Tensor]
    finish_reasons: list[str]
    logprobs: list[Tensor] | None = None
