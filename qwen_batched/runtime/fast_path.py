"""Whether a module runs nothing but its class's own code on plain parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PLAIN_PARAMETERS = {nn.Parameter, type(None)}
_harmless: set[type] = set()  # of attributes that are no tensors


def is_plain(module: nn.Module) -> bool:
    """Not hooked, wrapped on the instance, compiled, pruned, quantised or sharded; its submodules are not looked at."""
    if not runs_own_code(module):
        return False
    # Every layer is asked in every call, so this takes a microsecond: types once found harmless are known as such.
    kinds = set(map(type, vars(module).values()))
    if not kinds <= _harmless:
        if any(issubclass(kind, Tensor) for kind in kinds):
            return False
        _harmless.update(kinds)
    return set(map(type, module._parameters.values())) <= PLAIN_PARAMETERS


def is_plain_linear(module: nn.Module) -> bool:
    """The same of a linear layer, with `weight` and `bias` as it was built and no tensor in their place."""
    parameters, attributes = module._parameters, vars(module)
    return (
        type(module) is nn.Linear
        and runs_own_code(module)
        and type(parameters.get("weight")) is nn.Parameter
        and "bias" in parameters
        and type(parameters["bias"]) in PLAIN_PARAMETERS
        and "weight" not in attributes
        and "bias" not in attributes
    )


def runs_own_code(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else."""
    return (
        not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        )
        and module._compiled_call_impl is None
    )


def check_has_values(module: nn.Module) -> None:
    """Raises `ValueError` where the weight is on the meta device, and no hook of accelerate's brings its values."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_meta and runs_own_code(module):
        raise ValueError("the weights have no values: they are on the meta device; load the model with device=...")


def check_placement(device: torch.device, device_map: Mapping[str, object]) -> None:
    """Raises `ValueError` where a model cannot run as accelerate has placed it.

    Args:
        device: The embedding's.
        device_map: accelerate's `hf_device_map`; empty where there is none.
    """
    if device.type == "meta":
        raise ValueError(
            "the model's weights have no values: they are on the meta device, or accelerate has offloaded them. Load "
            "the model with device=..., or offload what comes after the embedding: `visual`, `model.layers`"
        )
    places = {str(place) for place in device_map.values()} - {"cpu", "disk"}
    if len(places) > 1:
        raise ValueError(f"a model runs on one device, accelerate has placed it on several: {sorted(places)}")


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The module's hooks around forward and backward, by kind."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def has_lent_parameters(module: nn.Module) -> bool:
    """Whether its parameters are FSDP2's, which lends ordinary ones for the time of a call and takes their memory back.

    Nothing marks these; but `fully_shard` leaves hooks like these on every module whose parameters it takes.
    """
    return bool(module._load_state_dict_post_hooks)
