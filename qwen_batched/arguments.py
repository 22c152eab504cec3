"""What callers and files give: integers of any kind as ints, dtypes by name, values in messages cut to be readable."""

from __future__ import annotations

import numbers
import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_INT = 2**31 - 1
MAX_SHOWN = 200

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 12
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def dtype_name(dtype: torch.dtype | str) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def shown(value: object) -> str:
    """`repr(value)`, at most `MAX_SHOWN` characters of it however large the value is."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # Python refuses to write integers of more than 4300 digits, and a __repr__ may raise anything
        return f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def cut(text: object) -> str:
    """The first 300 characters of a text that may be a file's or a library's, and so of any length."""
    text = str(text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def integer(value: object) -> object:
    """A NumPy integer as an int; anything else as it is, for a check to judge."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def as_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int: Python's or NumPy's. Raises `ValueError` for a bool, a float, or what is out of range."""
    number = value if type(value) is int else integer(value)
    if type(number) is not int or number < low or (high is not None and number > high):
        expected = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an int {expected}, got {shown(value)}")
    return number
