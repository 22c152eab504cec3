"""MLPs packed for a GPU: constants beside the live weights, which stay as they are."""

import copy

import pytest
import torch

from qwen_batched.export.packing import PackedSwiGLU, packed
from qwen_batched.model.parts.mlps import WIDTH_MULTIPLE, SwiGLU
from tests.support import relative_error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 100, WIDTH_MULTIPLE + 4])
def test_a_packed_mlp_gives_the_same_and_leaves_the_other_as_it_is(width, bias):
    torch.manual_seed(width)
    program = torch.nn.Sequential(torch.nn.Linear(24, 24), SwiGLU(24, width, bias)).requires_grad_(False)
    before, x = copy.deepcopy(program.state_dict()), torch.randn(2, 5, 24)
    ours = packed(program, with_kernels=False)
    assert isinstance(ours[1], PackedSwiGLU) and isinstance(program[1], SwiGLU)
    assert all(size % WIDTH_MULTIPLE == 0 for size in (len(ours[1].gate_up) // 2, ours[1].down.shape[1]))
    assert ours[0].weight is program[0].weight
    assert relative_error(ours(x), program(x)) <= 1e-6
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_a_width_that_is_a_multiple_stays():
    program = torch.nn.Sequential(SwiGLU(24, WIDTH_MULTIPLE, True))
    assert isinstance(packed(program, with_kernels=False)[0], SwiGLU)
