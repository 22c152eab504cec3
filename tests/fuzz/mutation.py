"""Changes to the arguments of a call."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from tests.fuzz.values import DTYPES, change, odd_object, odd_string

TEMPLATES = (
    "{images}{text}",
    "{text}\n{images}",
    "front: {image} wrist: {image} {text}",
    "{image}{text}",
    "{images}",
    "{text}",
    "{images}{images}{text}",
    "{images}{text}{text}",
    "{text}{images}{",
    "{}{images}{text}",
    "{{images}}{text}",
    "{images}{text}{foo}",
    "{images!r}{text}",
    "{images:>10}{text}",
    "<|image_pad|>{text}",
    "<|vision_start|><|image_pad|><|vision_end|>{images}{text}",
    "<|im_start|>user\n{images}{text}<|im_end|>\n",
    "Chat",
    "chat ",
    "plain\n",
)
FITTING = {
    "template": TEMPLATES,
    "resize": (
        *("hf", None, (28, 28), (56, 84), [84, 56], (28, 28 * 9), "HF", ("28", "28"), (True, True), (56.0, 56)),
        *((27, 28), (0, 28), (-28, 28), (28,), (28, 28, 28), (28 * 2**70, 28), (28 * 10**5, 28 * 10**5)),
    ),
    "layers": ((-1,), (0,), [1, 0], (4,), (5,), (-5,), (-6,), (1, 1), (0, 1, 2, 3, 4), (True,), (10**30,), (1.0,), ()),
    "norm": ("post", "pre", "Post", None, ["post"], True),
    "logits": (None, "last", "all", "Last", True, ["all"], 1),
    "max_new_tokens": (1, 2, 3, 0, -1, 4096, 2**31, 2**63, True, 2.0, 10**400),
    "temperature": (0.0, 0.7, 1, 1e-30, 1e30, -1.0, -0.0, True),
    "top_k": (0, 1, 5, 10**6, 10**30, -1, 1.0, True),
    "top_p": (1.0, 0.5, 1, 1e-12, 0.0, 1.1, -0.5, True),
    "seed": (None, 0, 7, 2**63 - 1, 2**63, -1, 1.0, True),
    "chunk_size": (None, 1, 2, 100, 0, -1, 10**30, 1.0, True),
    "dtype": (*DTYPES, "float32", None),
    "device": (None, "cpu", torch.device("cpu"), "meta", "hpu", "cuda:99", 0, ""),
    "stream": (None, "print", 1),
    "system": (None, "", "You are a robot.", "<|im_end|>", "\ud800", ["a"], 1),
    "tokens": (None, 1, 0, -1, 10**9, True, 2.0),
}


def mutate(arguments: dict[str, object], rng: Random) -> str:
    """Changes one of `arguments`; returns what was done."""
    if rng.random() < 0.04:
        name = rng.choice(("max_length", "image_grid_thw", "pixel_values", "position_ids", "return_dict", "texts "))
        arguments[name] = odd_object(rng)
        return f"{name} given too"
    name = rng.choice(tuple(arguments))
    if rng.random() < 0.03:
        del arguments[name]
        return f"{name} left out"
    what, arguments[name] = odd_version(name, arguments[name], rng)
    return f"{name}: {what}"


def odd_version(name: str, value: object, rng: Random) -> tuple[str, object]:
    """Another value for an argument, made of `value` or not."""
    if name in FITTING and rng.random() < 0.7:
        return "another value", rng.choice(FITTING[name])
    if rng.random() < 0.1:
        return "an object", odd_object(rng)
    if isinstance(value, Tensor):
        return change(value, rng)
    if isinstance(value, (list, tuple)) and value:
        return _odd_list(name, value, rng)
    if isinstance(value, str) and rng.random() < 0.8:
        return "a string", odd_string(rng)
    return "an object", odd_object(rng)


def _odd_list(name: str, value: list | tuple, rng: Random) -> tuple[str, object]:
    if rng.random() < 0.7:
        place = rng.randrange(len(value))
        what, item = odd_version(f"{name}[]", value[place], rng)
        kind = list if isinstance(value, list) else tuple  # torch.Size takes nothing but ints
        return f"one item, {what}", kind((*value[:place], item, *value[place + 1 :]))
    what = rng.choice(tuple(LISTS))
    return what, LISTS[what](value)


LISTS: dict[str, Callable[[list | tuple], object]] = {
    "as a tuple": tuple,
    "as a list": list,
    "an item short": lambda x: x[:-1],
    "an item twice": lambda x: [*x, x[0]],
    "turned": lambda x: x[::-1],
    "nested": lambda x: [list(x)],
    "an iterator": iter,
    "a dict": lambda x: dict(enumerate(x)),
    "empty": lambda x: x[:0],
    "its first item": lambda x: x[0],
}
