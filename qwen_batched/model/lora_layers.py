"""peft's LoRA layers taken apart: the linear layer inside, and what the adapters add to it.

A wrapped layer called as it is runs some ten small operations forward and twenty backward. Known for what it is, it
runs as few large ones (`ops.linear`), together with the layers beside it.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from qwen_batched.kernels.low_rank import LowRankUpdate
from qwen_batched.plain_modules import is_plain, runs_own_code

Updates = tuple[LowRankUpdate, ...]


def take_apart(layer: nn.Module) -> tuple[nn.Module, Updates]:
    """The layer inside and the updates of its active adapters; the layer itself and none where it is not just these.

    It is more where an adapter is no plain LoRA (DoRA, a bias, dropout in training), where adapters are merged, where
    anything is hooked or replaced, or while compiling.
    """
    peft = sys.modules.get("peft.tuners.lora.layer")  # not imported for this: there are no such layers without it
    if peft is None or type(layer) is not peft.Linear or torch.compiler.is_compiling() or not is_plain(layer):
        return layer, ()
    if layer.merged:
        return layer, ()
    if layer.disable_adapters:
        return layer.base_layer, ()
    updates = tuple(_update(layer, name) for name in layer.active_adapters if name in layer.lora_A)
    return (layer, ()) if None in updates else (layer.base_layer, updates)


def _update(layer: nn.Module, adapter: str) -> LowRankUpdate | None:
    """What an adapter of peft's `layer` adds; None where that is no plain product."""
    a, b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    is_product = (
        _is_matrix(a)
        and _is_matrix(b)
        and a.weight.dtype == b.weight.dtype
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and runs_own_code(dropout)
        and not layer.use_dora.get(adapter)
        and adapter not in getattr(layer, "lora_variant", ())
        and getattr(layer, "cast_input_dtype_enabled", True)
    )
    return LowRankUpdate(a.weight, b.weight, layer.scaling[adapter]) if is_product else None


def _is_matrix(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear and layer.bias is None and type(layer.weight) is nn.Parameter and runs_own_code(layer)
    )
