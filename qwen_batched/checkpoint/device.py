"""Where parameters shall be and of which dtype: what a caller gives -> `torch.device` and `torch.dtype`."""

from __future__ import annotations

import torch

from qwen_batched.arguments import as_int, cut, shown
from qwen_batched.checkpoint.config import DTYPES


def resolve_dtype(dtype: torch.dtype | str | None, stored: torch.dtype | None) -> torch.dtype | None:
    """`dtype`, which may be given by its name, or `stored` for None and "auto"."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return stored
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        names = ", ".join(DTYPES)
        raise ValueError(f"dtype must be 'auto', a torch.dtype or the name of one ({names}), got {shown(dtype)}")
    return found


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """`device`, or CUDA where there is any, else the CPU. Raises `ValueError` where it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, (str, torch.device)):
        device = as_int("device", device, 0)
    try:
        # A tensor's device has its index: "cuda" becomes "cuda:0", and equal devices compare equal.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device has its own way to be missing
        raise ValueError(f"device {shown(device)} cannot be used here: {cut(error)}") from error
