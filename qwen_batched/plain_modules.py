"""Whether a module runs nothing but its class's own code on plain parameters."""

from __future__ import annotations

from torch import Tensor, nn


def is_plain(module: nn.Module) -> bool:
    """Not hooked, wrapped on the instance, compiled, pruned, quantised or sharded; its submodules are not looked at."""
    return (
        not any(hooks_of(module))
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not any(isinstance(value, Tensor) for value in vars(module).values())
        and all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    )


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
