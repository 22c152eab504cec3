"""What training code asks of a model, by the names that it knows from transformers' models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.keys import EMBEDDING_NAME, HEAD_NAME
from qwen_batched.checkpoint.options import log_attention
from qwen_batched.families import Family, family_of
from qwen_batched.training import tied_head
from qwen_batched.training.adapter_names import AdapterNames
from qwen_batched.training.checkpointing import GradientCheckpointing
from qwen_batched.training.pretrained import PreTrainedModel


class Trainable(AdapterNames, GradientCheckpointing, PreTrainedModel):
    """A model of a vision transformer `visual`, a decoder `model` and an `lm_head` that `config` may tie, or None.

    It is a `PreTrainedModel` so that tools for transformers' models treat it as one: Trainer calls `save_pretrained`,
    and not only writes the tensors. What that class does when a model is made, it does not do here.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    loss_type = "ForConditionalGeneration"
    _keys_to_ignore_on_save = None
    shares_weights = False  # whether the parameters are another model's too

    def __init__(self, name_or_path: str) -> None:
        nn.Module.__init__(self)
        self.name_or_path = name_or_path  # what peft notes in an adapter's config
        self.warnings_issued: dict[str, bool] = {}

    @property
    def family(self) -> Family:
        """What tells models of its `model_type` from others."""
        return family_of(self.config.model_type)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer passes `num_items_in_batch`, and so weighs accumulated batches by their labels.

        As with transformers' class of the family; where it does not, batches count equally.
        """
        return self.family.accepts_loss_kwargs

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

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """Has no effect: attention has one implementation here. Logged once for each value."""
        log_attention(shown(attn_implementation))

    def init_weights(self) -> NoReturn:
        """Refuses to put random values in place of those that were loaded."""
        raise ValueError("init_weights: a model is loaded with its weights, and not initialised here")

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
        return len(tied_head.shared_names(self)) > 0

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuses `nn.DataParallel`, which Trainer takes where it sees several GPUs and no launcher."""
        raise ValueError(
            "the model does not run under nn.DataParallel: start one process for each GPU with torchrun or accelerate "
            "launch, or show the process one GPU by CUDA_VISIBLE_DEVICES"
        )

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
        self._take_either_layout(state_dict, prefix)
        tied_head.add_head(self, state_dict, prefix, assign=local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _take_either_layout(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Names the tensors of a state dict about to be loaded as the modules are, whichever layout they come in."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = prefix + self.family.keys.module_name(key.removeprefix(prefix))
            if name != key:
                if name in state_dict:
                    raise ValueError(f"the state_dict has the same tensor twice: {key} and {name}")
                state_dict[name] = state_dict.pop(key)

    def _apply(self, *arguments: Any, **keywords: Any) -> Trainable:
        """`.to()` and the like: some make new parameters, of the head and of the embedding each its own."""
        shared = tied_head.shared_names(self)
        super()._apply(*arguments, **keywords)
        tied_head.share(self, shared)
        return self
