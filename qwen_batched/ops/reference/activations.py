"""What stands between the layers of an MLP. See the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops.resize import widen


def swiglu(
    gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """SiLU(gate + gate_bias) * (up + up_bias), (..., F) (Shazeer 2020, arXiv:2002.05202).

    `gate` and `up` (..., F), or `gate` alone is both, (..., 2F); the biases (F,), both or none.
    """
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    x, y = widen(gate), widen(up)
    if gate_bias is not None:
        x, y = x + gate_bias, y + up_bias
    return (F.silu(x) * y).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    """The gradient of `swiglu` without biases: (..., F) and its inputs to (..., 2F), the gate's and the up's."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    grad, x, y = widen(grad), widen(gate), widen(up)
    share = torch.sigmoid(x)
    grad_gate = grad * y * share * (1 + x * (1 - share))
    return torch.cat((grad_gate, grad * x * share), dim=-1).to(gate.dtype)


def gelu(x: Tensor, form: str) -> Tensor:
    """A GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) by its name in config.json, (...) to (...).

    "gelu" is exact, "gelu_pytorch_tanh" its approximation by a tanh, "quick_gelu" by a sigmoid.
    """
    if form == "quick_gelu":
        return quick_gelu(x)
    return F.gelu(x, approximate={"gelu": "none", "gelu_pytorch_tanh": "tanh"}[form])


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 * x)`, CLIP's (Radford et al. 2021, arXiv:2103.00020), (...) to (...)."""
    wide = widen(x)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `quick_gelu`, from that of its result and its input."""
    scaled = 1.702 * widen(x)
    share = torch.sigmoid(scaled)
    return (widen(grad) * share * (1 + scaled * (1 - share))).to(x.dtype)
