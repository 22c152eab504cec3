"""decode_attention: one more token of each sample, behind a key-value cache."""

from __future__ import annotations

from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, route


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tickets: Tensor
) -> Tensor:
    """See `reference.decode_attention`."""
    way = route((qkv, keys, values))
    if way == REFERENCE:
        return reference.decode_attention(qkv, cos, sin, keys, values, lengths, tickets)
    run = _forward.kernel if way == KERNEL else _forward.traced
    return run(qkv, cos, sin, keys, values, lengths, tickets)


_forward = Operator(
    "decode_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "Tensor(c!) tickets) -> Tensor",
    fake=lambda qkv, cos, sin, keys, values, lengths, tickets: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * keys.shape[2] * keys.shape[3]
    ),
)
