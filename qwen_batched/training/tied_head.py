"""The output projection of a tied model: a linear layer whose weight is the embedding's own parameter.

As in transformers, `lm_head` is a layer of its own in both kinds of model, so what wraps the embedding (an adapter, a
saved copy) does not reach the head, and what wraps the head is called. Only the published keys tell them apart: a tied
head has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qwen_batched.checkpoint.keys import HEAD_NAME


def shared_names(model: nn.Module) -> dict[str, str]:
    """The names under `lm_head` of parameters that are the embedding's too, and their names there."""
    if model.lm_head is None:
        return {}
    names = {id(x): f"model.embed_tokens.{name}" for name, x in model.model.embed_tokens.named_parameters()}
    return {f"lm_head.{name}": names[id(x)] for name, x in model.lm_head.named_parameters() if id(x) in names}


def share(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Makes the embedding's parameters the head's again, by their names as of `shared_names`."""
    for head, embedding in shared.items():
        owner, _, leaf = head.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(embedding))


def add_head(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, assign: bool) -> None:
    """Gives a state dict about to be loaded a tied head's key. Raises `ValueError` where it has one that differs."""
    shared = shared_names(model)
    if HEAD_NAME not in shared:
        return
    head, embedding = prefix + HEAD_NAME, prefix + shared[HEAD_NAME]
    if embedding not in state_dict:
        return
    value = state_dict[embedding]
    if head in state_dict and not torch.equal(state_dict[head], value):
        raise ValueError(f"head and embedding are tied, but in the state_dict {head} differs from {embedding}")
    if assign and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value)  # assigned to both, and so still one
    state_dict[head] = state_dict[embedding] = value


def embedding_weight(embedding: nn.Module) -> Tensor:
    """The embedding's own weight; to ask a wrapper for `weight` may compute one."""
    weight = embedding._parameters.get("weight")
    return next(embedding.parameters()) if weight is None else weight
