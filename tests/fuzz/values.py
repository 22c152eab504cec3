"""Odd values: objects of every kind, and changes to a tensor's layout, dtype, shape and values."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
)

OBJECTS: tuple[Callable[[], object], ...] = (
    *(lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: -1, lambda: 7, lambda: 28),
    *(lambda: 10**30, lambda: -(10**30), lambda: 2**63, lambda: 10**6000, lambda: 0.5, lambda: 1.0, lambda: math.nan),
    *(lambda: math.inf, lambda: -math.inf, lambda: 1j, lambda: "", lambda: "hf", lambda: "last", lambda: "plain"),
    *(lambda: "cpu", lambda: "bfloat16", lambda: "\ud800", lambda: "x" * 100_000, lambda: b"chat", lambda: []),
    *(lambda: (), lambda: {}, lambda: set(), lambda: [None], lambda: ["a", "b"], lambda: [[0]], lambda: (0, 1)),
    *(lambda: [28, 28], lambda: {"a": 1}, lambda: {1, 2}, lambda: range(3), lambda: iter(["a"]), lambda: object()),
    *(lambda: Ellipsis, lambda: int, lambda: len, lambda: Decimal(1), lambda: Fraction(1, 2), lambda: np.int64(1)),
    *(lambda: np.uint8(2), lambda: np.float32(0.5), lambda: np.float64(0.5), lambda: np.bool_(True)),
    *(lambda: np.str_("chat"), lambda: np.zeros((2, 2)), lambda: np.ones((2, 2), dtype=bool)),
    *(lambda: np.array(["a", "b"]), lambda: torch.tensor(1), lambda: torch.tensor(0.5), lambda: torch.zeros(0)),
    *(lambda: torch.ones(2, 2, dtype=torch.bool), lambda: torch.Size([28, 28]), lambda: torch.float32),
    *(lambda: torch.int64, lambda: torch.device("cpu"), lambda: torch.device("meta"), lambda: nn.Linear(1, 1)),
)

STRINGS: tuple[Callable[[Random], str], ...] = (
    lambda rng: "",
    lambda rng: " ",
    lambda rng: "\n\n",
    lambda rng: "Go.",
    lambda rng: "  leading and trailing  ",
    lambda rng: "<|im_end|>",
    lambda rng: "<|image_pad|>" * rng.randint(1, 3),
    lambda rng: "<|vision_start|><|image_pad|><|vision_end|> and <|im_start|>system",
    lambda rng: "<|endoftext|>a<tool_call>b</tool_call>",
    lambda rng: "{images} {text} {{x}} {% for %}",
    lambda rng: "{image}",
    lambda rng: "红色的方块",
    lambda rng: "🤖🦾" * rng.randint(1, 4),
    lambda rng: "e\u0301 \u00e9 \u200b\u202e",
    lambda rng: "\x00\x01\x7f",
    lambda rng: "\ud800",
    lambda rng: "a\udcff b",
    lambda rng: "word " * rng.randint(1, 60),
    lambda rng: "robot " * 9000,
    lambda rng: "".join(chr(rng.randint(1, 0xD7FF)) for _ in range(rng.randint(1, 30))),
    lambda rng: np.str_("Go."),
)


class Subclass(Tensor):
    """A tensor of a class of its own, as libraries make them."""


def odd_object(rng: Random) -> object:
    return rng.choice(OBJECTS)()


def odd_string(rng: Random) -> str:
    return rng.choice(STRINGS)(rng)


def change(tensor: Tensor, rng: Random) -> tuple[str, object]:
    """One random change of a tensor, and its name."""
    while True:
        kind = rng.choice(("layout", "layout", "dtype", "shape", "value", "value"))
        name, function = rng.choice(tuple(CHANGES[kind].items()))
        try:
            return f"{kind}: {name}", function(tensor, rng)
        except (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError, AttributeError, AssertionError):
            continue  # PyTorch cannot make such a tensor of this one


def _strided_view(tensor: Tensor, rng: Random) -> Tensor:
    """Every other element of a larger tensor, along one axis."""
    dim = rng.randrange(tensor.ndim)
    wide = tensor.repeat_interleave(2, dim)
    return wide[(slice(None),) * dim + (slice(None, None, 2),)]


def _turned(tensor: Tensor, rng: Random) -> Tensor:
    """The same values, laid out in another order of axes."""
    order = list(range(tensor.ndim))
    rng.shuffle(order)
    return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.ndim)])


def _inference(tensor: Tensor, rng: Random) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _fake(tensor: Tensor, rng: Random) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


def _without_storage(tensor: Tensor, rng: Random) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _cut(tensor: Tensor, rng: Random) -> Tensor:
    dim = rng.randrange(tensor.ndim)
    return tensor.narrow(dim, 0, rng.randrange(tensor.shape[dim]))


def _repeated(tensor: Tensor, rng: Random) -> Tensor:
    dim = rng.randrange(tensor.ndim)
    return torch.cat([tensor, tensor.narrow(dim, 0, min(tensor.shape[dim], rng.randint(1, 2)))], dim)


def _permuted(tensor: Tensor, rng: Random) -> Tensor:
    order = list(range(tensor.ndim))
    rng.shuffle(order)
    return tensor.permute(order)


def _reshaped(tensor: Tensor, rng: Random) -> Tensor:
    dims = [rng.randrange(tensor.ndim) for _ in range(2)]
    shape = list(tensor.shape)
    shape[dims[0]], shape[dims[1]] = shape[dims[1]], shape[dims[0]]
    return tensor.reshape(shape)


def _spoiled(*values: float) -> Callable[[Tensor, Random], Tensor]:
    def spoil(tensor: Tensor, rng: Random) -> Tensor:
        value = rng.choice(values)
        if not tensor.dtype.is_floating_point and not math.isfinite(value):
            raise ValueError
        out = tensor.clone()
        out.view(-1)[rng.randrange(out.numel())] = value
        return out

    return spoil


def _swapped(tensor: Tensor, rng: Random) -> Tensor:
    """Two rows of the first axis in each other's place."""
    a, b = rng.sample(range(tensor.shape[0]), 2)
    out = tensor.clone()
    out[a], out[b] = tensor[b], tensor[a]
    return out


def _inverted(tensor: Tensor, rng: Random) -> Tensor:
    """One element moved by one; of bools, the other one."""
    out = tensor.clone()
    flat, place = out.view(-1), rng.randrange(out.numel())
    flat[place] = ~flat[place] if out.dtype == torch.bool else flat[place] + rng.choice((-1, 1))
    return out


CHANGES: dict[str, dict[str, Callable[[Tensor, Random], object]]] = {
    "layout": {
        "sparse": lambda x, rng: x.to_sparse(),
        "sparse rows": lambda x, rng: x.to_sparse_csr(),
        "nested": lambda x, rng: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x, rng: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "meta": _without_storage,
        "fake": _fake,
        "quantised": lambda x, rng: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        "mkldnn": lambda x, rng: x.float().to_mkldnn(),
        "negative view": lambda x, rng: torch._neg_view(-x),
        "expanded": lambda x, rng: x[:1].expand(x.shape),
        "strided": _strided_view,
        "turned": _turned,
        "parameter": lambda x, rng: nn.Parameter(x, requires_grad=x.dtype.is_floating_point),
        "wants a gradient": lambda x, rng: x.clone().requires_grad_(),
        "not a leaf": lambda x, rng: x.clone().requires_grad_() * 1,
        "inference tensor": _inference,
        "subclass": lambda x, rng: x.as_subclass(Subclass),
        "array": lambda x, rng: x.numpy(),
        "list": lambda x, rng: x.tolist(),
    },
    "dtype": {str(dtype): lambda x, rng, dtype=dtype: x.to(dtype) for dtype in DTYPES},
    "shape": {
        "one axis more": lambda x, rng: x.unsqueeze(rng.randint(0, x.ndim)),
        "one axis less": lambda x, rng: x.select(rng.randrange(x.ndim), 0),
        "a scalar": lambda x, rng: x.flatten()[0],
        "flat": lambda x, rng: x.flatten(),
        "cut": _cut,
        "repeated": _repeated,
        "permuted": _permuted,
        "reshaped": _reshaped,
        "empty": lambda x, rng: x[:0],
    },
    "value": {
        "not finite": _spoiled(math.nan, math.inf, -math.inf),
        "large": _spoiled(255, 1e4, 10**6, 2**31, 2**62),
        "negative": _spoiled(-1, -2, -100, -(2**31)),
        "off by one": _inverted,
        "zero": lambda x, rng: torch.zeros_like(x),
        "one": lambda x, rng: torch.ones_like(x),
        "times 255": lambda x, rng: x * 255,
        "flipped": lambda x, rng: x.flip(rng.randrange(x.ndim)),
        "rolled": lambda x, rng: x.roll(1, rng.randrange(x.ndim)),
        "rows swapped": _swapped,
    },
}
