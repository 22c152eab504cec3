"""A call of every operation."""

import torch

from qwen_batched import ops
from qwen_batched.model.geometry import resize_axis
from qwen_batched.ops.segments import Run, Segments
from tests.ops.support import normal, rope_tables
from tests.support import noise

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)


def everything(x, weight, qkv, cos, sin, segments, frames, tables, order):
    normed, stream = ops.add_norm(x, None, weight, None, 1e-6)
    normed, stream = ops.add_norm(normed, stream, weight, None, 1e-6)
    how = (1 / 255, MEAN.to(x.device), STD.to(x.device), order, 14, 2, 2, torch.float32)
    patches = ops.frames_to_patches(frames, 56, 56, tables, *how, resample_backend=ops.PILLOW)
    attended = ops.rotary_attention(qkv, cos, sin, segments, 2)
    gate, up = normed.chunk(2, dim=-1)
    gated = ops.swiglu(gate, up), ops.swiglu(gate, up, *weight.chunk(2))
    products = ops.linear(normed[:1], weight[None]), ops.swiglu_linear(normed[:1], normed[:4])
    behind_norm = *ops.norm_linear(x[:1], normed[:1], weight, 1e-6, weight[None]), *ops.likeliest_token(x)
    turned = ops.mrope(qkv[0], cos, sin, 2)
    return normed, stream, *gated, *products, *behind_norm, turned, attended, patches


def everything_inputs(device):
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device(device))
    tables = (*resize_axis(40, 56, torch.device(device)), *resize_axis(30, 56, torch.device(device)))
    return (
        normal(5, 80).to(device),
        normal(80, seed=1).to(device),
        normal(2, 29, 96, seed=2).to(device),
        *rope_tables(29, 16, device),
        segments,
        noise(2, 1, 30, 40)[:, 0].to(device),
        tables,
        torch.arange(4, device=device),
    )
