"""Eligibility for fused kernels, packed weights and graphs: of tensors under the modes that are on, and of modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from qwen_batched.runtime.backend import backend, has_kernels, is_exporting, refuse_forced_triton

PLAIN_TENSORS = (Tensor, nn.Parameter)
PLAIN_PARAMETERS = {nn.Parameter, type(None)}
# How an operation runs: as plain PyTorch, by its kernel, or as an operator of PyTorch's that tracers see whole; and
# whether autograd records it.
REFERENCE, KERNEL, OPERATOR, KERNEL_WITH_GRADIENT, OPERATOR_WITH_GRADIENT = range(5)
plain_linear_types: set[type[nn.Module]] = {nn.Linear}  # whose `forward` is `F.linear` of weight and bias
_harmless: set[type] = set()  # of attributes that are no tensors


def route(
    activations: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...] = (), has_backward: bool = False
) -> int:
    """How an operation on these tensors runs, one of the constants above.

    Kernels compute in float32, take activations of one dtype, have no forward-mode derivative and no batching rule,
    and a gradient only if the operation `has_backward`. The reference has all these, since autograd sees through it.

    Raises:
        RuntimeError: Triton was asked for, and cannot serve.
    """
    first = activations[0]
    is_traced = torch.compiler.is_dynamo_compiling()
    can_bypass = not is_traced and type(first) in PLAIN_TENSORS and torch._C._len_torch_dispatch_stack() == 0
    if can_bypass and first.is_cpu and backend() != "triton":
        return REFERENCE
    is_transformed = not is_traced and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    can_bypass = can_bypass and first.is_cuda and not is_transformed and torch._C._get_tracing_state() is None
    dtype = first.dtype
    is_wide, is_mixed = dtype == torch.float64, False
    for tensor in activations:
        if tensor is not None and tensor.dtype != dtype:
            is_mixed, is_wide = True, is_wide or tensor.dtype == torch.float64
    for tensor in parameters:
        is_wide = is_wide or (tensor is not None and tensor.dtype == torch.float64)
    wants = torch.is_grad_enabled() and wants_gradient(*activations, *parameters)
    if is_transformed or is_wide or is_mixed or (wants and not has_backward):
        refuse_forced_triton(_why_reference(activations, wants and not has_backward, is_wide, is_mixed))
        return REFERENCE
    if not has_kernels(first.device):
        is_decomposed = backend() == "reference" and is_exporting()
        return REFERENCE if wants or can_bypass or is_decomposed else OPERATOR
    if wants:
        return KERNEL_WITH_GRADIENT if can_bypass else OPERATOR_WITH_GRADIENT
    return KERNEL if can_bypass else OPERATOR


def _why_reference(activations: tuple[Tensor | None, ...], lacks_backward: bool, is_wide: bool, is_mixed: bool) -> str:
    if lacks_backward:
        return "its kernels have no backward: call them under torch.no_grad()"
    if is_wide:
        return "its kernels compute in float32, and there is a float64 input"
    if is_mixed:
        dtypes = sorted({str(tensor.dtype) for tensor in activations if tensor is not None})
        return f"its kernels take inputs of one dtype, got {' and '.join(dtypes)}"
    return "its kernels have no forward-mode derivative, and run under no transform of functions"


def can_bypass_dispatcher(x: Tensor) -> bool:
    """Whether PyTorch would only call the kernel's launcher, which costs the host more than the launch itself.

    A profiler then sees only the kernel.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and x.is_cuda
        and type(x) in PLAIN_TENSORS
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record an operation on these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


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


def plain_linear(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """Weight and bias of a layer whose call is `F.linear` of these and nothing else; None for any other module.

    Not hooked, wrapped on the instance, compiled, pruned, quantised or sharded, and no hook of all modules is set. This
    is asked of every linear layer in every call, so it is one function without calls.
    """
    attributes = layer.__dict__
    if (
        type(layer) not in plain_linear_types
        or attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or layer._compiled_call_impl is not None
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return None
    parameters = attributes["_parameters"]
    if "weight" not in parameters or "bias" not in parameters or "weight" in attributes or "bias" in attributes:
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    if type(weight) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
        return None
    return weight, bias


def can_pack(layers: Sequence[nn.Module]) -> bool:
    """Whether the parameters of these layers may move into one tensor.

    They must be of plain linear layers, on one GPU and of one dtype. Memory that others know stays where it is: tied
    parameters, flat buffers (ZeRO, optimisers), FSDP2's. In a capture nothing would be copied before the replay.
    """
    parameters = []
    for layer in layers:
        plain = plain_linear(layer)
        if plain is None or has_fsdp_unsharded_params(layer):
            return False
        parameters += [parameter for parameter in plain if parameter is not None]
    return (
        all(parameter.is_cuda for parameter in parameters)
        and len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
        and len(set(map(id, parameters))) == len(parameters)
        and all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters)
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def can_fuse(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the caller may do what a call of `module` does by other means: a `kind` without hooks."""
    return type(module) is kind and runs_own_code(module) and not has_global_hooks()


def has_global_hooks() -> bool:
    """Whether a hook of all modules is set."""
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def runs_own_code(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else, apart from hooks of all modules."""
    attributes = module.__dict__
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or module._compiled_call_impl is not None
    )


def check_has_values(module: nn.Module) -> None:
    """Raises `ValueError` where the weight is on the meta device, and no hook of accelerate's brings its values."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_meta and runs_own_code(module):
        raise ValueError("the weights have no values: they are on the meta device; load the model with device=...")


def check_placement(device: torch.device, device_map: Mapping[str, object]) -> None:
    """Raises `ValueError` where a model cannot run as accelerate has placed it, by its `hf_device_map`.

    `device` is the embedding's.
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
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_fsdp_unsharded_params(module: nn.Module) -> bool:
    """Whether its parameters are FSDP2's: in a call ordinary ones, whose memory is freed after it.

    Nothing marks these, but `fully_shard` leaves hooks like these on every module whose parameters it takes.
    """
    return bool(module._load_state_dict_post_hooks)
