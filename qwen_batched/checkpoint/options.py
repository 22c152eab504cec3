"""The options of every `from_pretrained` besides its own: huggingface_hub's, and those of transformers' calls."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from qwen_batched.arguments import as_int, shown
from qwen_batched.checkpoint.device import resolve_device, resolve_dtype
from qwen_batched.checkpoint.folder import HubOptions

Device = torch.device | str | int | None
O = TypeVar("O")


@dataclass(frozen=True)
class ProcessorOptions(HubOptions):
    """What `TensorProcessor.from_pretrained` takes: the hub's options, and that no code may be run."""

    trust_remote_code: bool | None = None  # only False or None: a checkpoint's own code is never run

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trust_remote_code:
            raise ValueError(
                "trust_remote_code must be False or left out: a checkpoint's own code is never run here, "
                f"got {shown(self.trust_remote_code)}"
            )


@dataclass(frozen=True)
class ModelOptions(ProcessorOptions):
    """What the models' `from_pretrained` take, so that calls written for transformers work."""

    torch_dtype: torch.dtype | str | None = None  # another name of `dtype`
    # Another name of `device`: one device, {"": device}, or "auto" for the default.
    device_map: Device | Mapping[str, Device] = None
    attn_implementation: Any = None  # has no effect; attention has one implementation here. Logged once for each value
    low_cpu_mem_usage: Any = None  # has no effect: weights are always read one tensor at a time

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attn_implementation is not None:
            log_attention(shown(self.attn_implementation))

    def placement(self, dtype: torch.dtype | str | None, device: Device) -> tuple[torch.dtype | str | None, Device]:
        """`dtype` and `device`, by whichever names. Raises `ValueError` where two differ, or for several devices."""
        if self.torch_dtype not in (None, "auto"):
            theirs = resolve_dtype(self.torch_dtype, stored=None)
            if dtype not in (None, "auto") and resolve_dtype(dtype, stored=None) != theirs:
                both = f"{shown(dtype)} and {shown(self.torch_dtype)}"
                raise ValueError(f"dtype and torch_dtype must be the same, got {both}")
            dtype = theirs
        mapped = _one_device(self.device_map)
        if mapped is None:
            return dtype, device
        if device is not None and resolve_device(device) != resolve_device(mapped):
            both = f"{shown(device)} and {shown(self.device_map)}"
            raise ValueError(f"device and device_map must be the same, got {both}")
        return dtype, mapped


@dataclass(frozen=True)
class SaveOptions:
    """What `save_pretrained` takes, so that calls written for transformers work."""

    is_main_process: bool = True  # False: another process writes, and nothing is done
    max_shard_size: int | str = "5GB"  # of a safetensors file
    safe_serialization: Any = True  # only True or None: a pickle is never written

    def __post_init__(self) -> None:
        if self.safe_serialization is not None and not self.safe_serialization:
            given = shown(self.safe_serialization)
            raise ValueError(f"safe_serialization must be True or left out: a pickle is never written, got {given}")


def read_options(kind: type[O], given: Mapping[str, Any], where: str = "from_pretrained") -> O:
    """The options `given` to the method `where` as `kind`. Raises `TypeError` for one that is unknown."""
    known = [field.name for field in fields(kind)]
    if unknown := ", ".join(sorted(given.keys() - set(known))):
        raise TypeError(f"{where} got unknown arguments: {unknown}; it also takes {', '.join(known)}")
    return kind(**given)


def _one_device(device_map: Device | Mapping[str, Device]) -> Device:
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise ValueError(
                'device_map must be one device or {"": device}; a model is not spread over several, '
                f"got {shown(dict(device_map))}"
            )
        device_map = device_map[""]
    if device_map is None or (isinstance(device_map, str) and device_map == "auto"):
        return None
    if isinstance(device_map, (str, torch.device)):
        return device_map
    return as_int("device_map", device_map, 0)


@functools.cache
def log_attention(value: str) -> None:
    """Says, once for each value, that an attention implementation that was asked for has no effect."""
    logging.getLogger(__name__).warning(
        "attn_implementation=%s has no effect: attention has one implementation here", value
    )
