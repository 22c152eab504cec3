"""Every operation is exported whole with a dynamic batch, and with windows whose number scales."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from qwen_batched import ops
from qwen_batched.ops.segments import Run, Segments
from tests.ops.support import normal

HOW = (1 / 255, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), torch.arange(4), 14, 2, 2, torch.float32, ops.PILLOW)
pytestmark = pytest.mark.slow
BATCH, FEW = Dim("batch", min=2, max=4096), 3


def windows(qkv, cos, sin):
    """As many windows of 4 tokens as there is room for."""
    count = qkv.shape[1] // 4
    table = torch.stack((4 * torch.arange(count), torch.full((count,), 4)), dim=1).int()
    return ops.rotary_attention(qkv, cos, sin, Segments((Run(0, count, 4),), table), 2)


def packed(x, weight):
    return ops.packed_linear(x, weight, None, [weight[:3], weight[3:]], [], [slice(0, 3), slice(3, 7)])


# By operation: a call, its tensors for a batch of `b`, and which of them have the batch first.
CASES = {
    "add_norm": (
        lambda x, y, w: ops.add_norm(x, y, w, None, 1e-6),
        lambda b: (normal(b, 8), normal(b, 8), normal(8)),
        2,
    ),
    "rms_norm": (lambda x, w: ops.add_norm(x, None, w, None, 1e-6), lambda b: (normal(b, 8), normal(8)), 1),
    "swiglu": (ops.swiglu, lambda b: (normal(b, 6), normal(b, 6)), 2),
    "swiglu-packed": (ops.swiglu, lambda b: (normal(b, 6),), 1),
    "linear": (ops.linear, lambda b: (normal(b, 8), normal(7, 8)), 1),
    "packed_linear": (packed, lambda b: (normal(b, 8), normal(7, 8)), 1),
    "swiglu_linear": (ops.swiglu_linear, lambda b: (normal(b, 8), normal(6, 8)), 1),
    "norm_linear": (
        lambda x, y, norm, w: ops.norm_linear(x, y, norm, 1e-6, w),
        lambda b: (normal(b, 8), normal(b, 8), normal(8), normal(7, 8)),
        2,
    ),
    "likeliest_token": (ops.likeliest_token, lambda b: (normal(b, 70),), 1),
    "mrope": (
        lambda qkv, cos, sin: ops.mrope(qkv, cos, sin, 1),
        lambda b: (normal(b, 32), normal(b, 4), normal(b, 4)),
        3,
    ),
    "mrope-slots": (
        lambda qkv, cos, sin, slots: ops.mrope(qkv, cos, sin, 1, slots, 2 * slots.shape[0]),
        lambda b: (normal(b, 32), normal(b, 4), normal(b, 4), torch.arange(b) + 1),
        4,
    ),
    "rotary_attention": (windows, lambda b: (normal(b, 12, 48), normal(12, 4), normal(12, 4)), 1),
    "causal_attention": (
        ops.causal_attention,
        lambda b: (normal(b, 5, 4, 8), normal(b, 5, 2, 8), normal(b, 5, 2, 8)),
        3,
    ),
    "decode_attention": (
        ops.decode_attention,
        lambda b: (
            *(normal(b, 32), normal(b, 4), normal(b, 4)),
            *(torch.zeros(b, 9, 1, 8), torch.zeros(b, 9, 1, 8), torch.arange(b) % 9, torch.zeros(b, dtype=torch.int32)),
        ),
        7,
    ),
    "extend_attention": (
        lambda qkv, cos, sin, *rest: ops.extend_attention(
            *(x.flatten(0, 1) for x in (qkv, cos, sin)), *rest[:-1], rest[-1].flatten()
        ),
        lambda b: (
            *(normal(b, 3, 32), normal(b, 3, 4), normal(b, 3, 4)),
            *(normal(b, 9, 1, 8), normal(b, 9, 1, 8), torch.arange(b) % 9, torch.zeros(b, 6, dtype=torch.int32)),
        ),
        7,
    ),
    "expand_prompts": (
        lambda prompts, grids: ops.expand_prompts(prompts, grids, None, 9, 0, 5 * prompts.shape[0], True),
        lambda b: (torch.tensor([[1, 9, 2]]).expand(b, -1).contiguous(), torch.tensor([[2, 3]])),
        1,
    ),
    "frames_to_patches": (
        lambda frames: ops.frames_to_patches(frames, 56, 56, None, *HOW),
        lambda b: (torch.zeros(b, 3, 56, 56, dtype=torch.uint8),),
        1,
    ),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_exported_with_a_dynamic_batch(name, strict):
    function, make, batched = CASES[name]
    shapes = (tuple({0: BATCH} if index < batched else None for index in range(len(make(FEW)))),)
    with torch.no_grad():
        program = export(Calls(function), make(FEW), dynamic_shapes=shapes, strict=strict)
        for batch in (FEW, 7):
            ours, expected = program.module()(*make(batch)), function(*make(batch))
            torch.testing.assert_close(ours, expected)
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if "qwen_batched" in str(node.target)}
    fused = name.split("-")[0].replace("rms_norm", "add_norm").replace("add_add", "add")
    own = {"linear", "packed_linear", "causal_attention"}  # PyTorch's products and attention
    fused = fused.replace("swiglu_linear", "swiglu").replace("norm_linear", "add_norm")
    assert called == (set() if fused in own else {fused})


@pytest.mark.parametrize("strict", [False, True])
def test_windows_scale_with_the_tokens_of_an_image(strict):
    tokens = 4 * Dim("windows", min=2, max=64)
    inputs = [(normal(2, 4 * n, 48), normal(4 * n, 4, seed=1), normal(4 * n, 4, seed=2)) for n in (3, 5)]
    with torch.no_grad():
        shapes = (({1: tokens}, {0: tokens}, {0: tokens}),)
        program = export(Calls(windows), inputs[0], dynamic_shapes=shapes, strict=strict)
        for each in inputs:
            torch.testing.assert_close(program.module()(*each), windows(*each))
    assert any("rotary_attention" in str(node.target) for node in program.graph.nodes)
