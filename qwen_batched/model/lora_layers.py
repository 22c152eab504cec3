"""peft's LoRA layers taken apart: the linear layer inside, and what the adapters add to it.

A wrapped layer called as it is runs some ten small operations forward and twenty backward. Known for what it is, it
runs as few large ones (`ops.linear`), together with the layers beside it.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from qwen_batched.kernels.low_rank import LowRankUpdate
from qwen_batched.plain_modules import is_plain_linear, runs_own_code

Updates = tuple[LowRankUpdate, ...]


def take_apart(layer: nn.Module) -> tuple[nn.Module, Updates]:
    """The layer inside and the updates of its active adapters; the layer itself and none where it is not just these.

    It is more where an adapter is no plain LoRA (DoRA, a bias, dropout in training), where adapters are merged, where
    anything is hooked or replaced, or while compiling.
    """
    peft = sys.modules.get("peft.tuners.lora.layer")  # not imported for this: there are no such layers without it
    if (
        peft is None
        or type(layer) is not peft.Linear
        or layer.merged_adapters
        or not runs_own_code(layer)
        or torch.compiler.is_compiling()
    ):
        return layer, ()
    if layer.disable_adapters:
        return layer.base_layer, ()
    names = layer.active_adapters
    a, b, dropout = layer.lora_A, layer.lora_B, layer.lora_dropout
    updates = []
    for name in names:
        if name in a:
            if not (_are_matrices(a[name], b[name]) and _is_identity(dropout[name]) and _is_plain_lora(layer, name)):
                return layer, ()
            updates.append(LowRankUpdate(a[name].weight, b[name].weight, layer.scaling[name]))
    return layer.base_layer, tuple(updates)


def _are_matrices(a: nn.Module, b: nn.Module) -> bool:
    return (
        is_plain_linear(a)
        and is_plain_linear(b)
        and a.bias is None
        and b.bias is None
        and a.weight.dtype == b.weight.dtype
    )


def _is_identity(dropout: nn.Module) -> bool:
    is_off = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
    return is_off and runs_own_code(dropout)


def _is_plain_lora(layer: nn.Module, adapter: str) -> bool:
    return (
        not layer.use_dora.get(adapter)
        and adapter not in getattr(layer, "lora_variant", ())
        and getattr(layer, "cast_input_dtype_enabled", True)
    )
