"""extend_attention: some tokens of each sample behind a cached prompt, which stays as it is."""

from __future__ import annotations

from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, route


def extend_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tickets: Tensor,
    causal: bool = True,
    visible: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See `reference.extend_attention`."""
    way = route((qkv, keys, values), (q_norm, k_norm))
    arguments = (qkv, cos, sin, keys, values, lengths, tickets, causal, visible, q_norm, k_norm, eps)
    if way == REFERENCE:
        return reference.extend_attention(*arguments)
    return (_forward.kernel if way == KERNEL else _forward.traced)(*arguments)


_forward = Operator(
    "extend_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor keys, Tensor values, Tensor lengths, "
    "Tensor(a!) tickets, bool causal, Tensor? visible, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor",
    fake=lambda qkv, cos, sin, keys, values, lengths, tickets, causal, visible, q_norm, k_norm, eps: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * keys.shape[2] * keys.shape[3]
    ),
)
