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
    updates = []
    matrices_a = layer.lora_A
    for adapter in layer.active_adapters:
        if adapter in matrices_a:
            update = _update(matrices_a[adapter], layer.lora_B[adapter], layer.scaling[adapter])
            if update is None or not _is_plain_lora(layer, adapter):
                return layer, ()
            updates.append(update)
    return layer.base_layer, tuple(updates)


def _update(a: nn.Module, b: nn.Module, scaling: float) -> LowRankUpdate | None:
    """What two linear layers add; None where they are more than matrices."""
    if not (is_plain_linear(a) and is_plain_linear(b)):
        return None
    of_a, of_b = a._parameters, b._parameters
    first, second = of_a["weight"], of_b["weight"]
    if first.dtype != second.dtype or of_a["bias"] is not None or of_b["bias"] is not None:
        return None
    return LowRankUpdate(first, second, scaling)


def _is_plain_lora(layer: nn.Module, adapter: str) -> bool:
    dropout = layer.lora_dropout[adapter]
    return (
        (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and runs_own_code(dropout)
        and not layer.use_dora.get(adapter)
        and adapter not in getattr(layer, "lora_variant", ())
        and getattr(layer, "cast_input_dtype_enabled", True)
    )
