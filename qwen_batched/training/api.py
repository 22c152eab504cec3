"""What training code asks of a model, by the names that it knows from transformers' models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qwen_batched.checkpoint.keys import EMBEDDING_NAME, HEAD_NAME
from qwen_batched.families import Family, family_of
from qwen_batched.training import tied_head
from qwen_batched.training.adapter_names import AdapterNames
from qwen_batched.training.checkpointing import GradientCheckpointing


class Trainable(AdapterNames, GradientCheckpointing):
    """A model of a vision transformer `visual`, a decoder `model` and an `lm_head` that `config` may tie, or None."""

    @property
    def family(self) -> Family:
        """What tells models of its `model_type` from others."""
        return family_of(self.config.model_type)

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """Where peft looks for what transformers has renamed, when it loads an adapter: to the names as of now."""
        adapters = self.family.keys.adapters
        others = "|".join(re.escape(stored) for stored, _ in adapters)
        return {f"^(?!{others}){re.escape(name)}": stored for stored, name in adapters}

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, the vision transformer's first: what to `fully_shard` before the model, or to compile.

        The rest of the model, the output projection with it, is best sharded as one: how often that is called depends
        on how many answers there are, and processes must agree on it.
        """
        return [*self.visual.blocks, *self.model.layers]

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What peft and transformers ask which parameters the config ties to which."""
        if self.lm_head is None:
            return {}
        keys = self.family.keys
        return {HEAD_NAME: keys.adapter_name(EMBEDDING_NAME) if self._has_nested_names else EMBEDDING_NAME}

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

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        """The arguments of a call that continues a prompt. peft asks for this method; `generate` does without."""
        return {"input_ids": input_ids, **inputs}

    @property
    def has_tied_head(self) -> bool:
        """Whether head and embedding share a parameter; merging an adapter can part them."""
        return len(tied_head.shared_names(self)) > 0

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        """The tensors by their published names, of which a tied head has none."""
        state = super().state_dict(*arguments, **keywords)
        if HEAD_NAME in tied_head.shared_names(self):
            prefix = arguments[1] if len(arguments) > 1 else keywords.get("prefix", "")
            state.pop(prefix + HEAD_NAME, None)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *arguments: Any
    ) -> None:
        self._to_module_names(state_dict, prefix)
        tied_head.add_head(self, state_dict, prefix, assign=local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _apply(self, *arguments: Any, **keywords: Any) -> Trainable:
        """`.to()` and the like: some make new parameters, of the head and of the embedding each its own."""
        shared = tied_head.shared_names(self)
        super()._apply(*arguments, **keywords)
        tied_head.share(self, shared)
        return self
