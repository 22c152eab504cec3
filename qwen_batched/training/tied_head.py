"""The output projection: a linear layer whose weight, in a tied model, is the embedding's own parameter.

As in transformers, `lm_head` is a layer of its own in both kinds of model, so what wraps the embedding (an adapter, a
saved copy) does not reach the head, and what wraps the head is called. Only the published keys tell them apart: a tied
head has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.checkpoint.weights import EMBEDDING_NAME, HEAD_NAME
from qwen_batched.training.checkpointing import GradientCheckpointing


class TiedHead(GradientCheckpointing):
    """A model with a decoder and an output projection that may be tied to its embedding.

    Attributes:
        config: Says whether the two are tied.
        model: The decoder.
        lm_head: The output projection; None where it was left out.
    """

    config: QwenVLConfig
    model: nn.Module
    lm_head: nn.Module | None

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What peft and transformers ask which parameters the config ties to which."""
        return {} if self.lm_head is None else {HEAD_NAME: EMBEDDING_NAME}

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection; None where it was left out."""
        return self.lm_head

    def tie_weights(self) -> None:
        """Makes the embedding's parameter the head's, where the config ties them."""
        if self.lm_head is not None and self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def has_tied_head(self) -> bool:
        """Whether head and embedding share a parameter; merging an adapter can part them."""
        return len(self._shared_names()) > 0

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        """The tensors by their published names, of which a tied head has none."""
        state = super().state_dict(*arguments, **keywords)
        if HEAD_NAME in self._shared_names():
            prefix = arguments[1] if len(arguments) > 1 else keywords.get("prefix", "")
            state.pop(prefix + HEAD_NAME, None)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *arguments: Any
    ) -> None:
        shared = self._shared_names()
        if HEAD_NAME in shared:
            head, embedding = prefix + HEAD_NAME, prefix + shared[HEAD_NAME]
            if embedding in state_dict:
                value = state_dict[embedding]
                if head in state_dict and not torch.equal(state_dict[head], value):
                    raise ValueError(
                        f"head and embedding are tied, but in the state_dict {head} differs from {embedding}"
                    )
                if local_metadata.get("assign_to_params_buffers") and not isinstance(value, nn.Parameter):
                    value = nn.Parameter(value)  # assigned to both, and so still one
                state_dict[head] = state_dict[embedding] = value
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _apply(self, *arguments: Any, **keywords: Any) -> TiedHead:
        """`.to()` and the like: some make new parameters, of the head and of the embedding each its own."""
        shared = self._shared_names()
        super()._apply(*arguments, **keywords)
        for head, embedding in shared.items():
            owner, _, leaf = head.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(embedding))
        return self

    def _embedding_weight(self) -> Tensor:
        """The embedding's own weight; to ask a wrapper for `weight` may compute one."""
        embedding = self.model.embed_tokens
        weight = embedding._parameters.get("weight")
        return next(embedding.parameters()) if weight is None else weight

    def _shared_names(self) -> dict[str, str]:
        """The names under `lm_head` of parameters that are the embedding's too, and their names there."""
        if self.lm_head is None:
            return {}
        names = {id(x): f"model.embed_tokens.{name}" for name, x in self.model.embed_tokens.named_parameters()}
        return {f"lm_head.{name}": names[id(x)] for name, x in self.lm_head.named_parameters() if id(x) in names}
