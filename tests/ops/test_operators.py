"""Every operation as an operator of PyTorch's: its schema, its fake, and what compilers and exporters see."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_batched import ops
from qwen_batched.model.geometry import resize_axis
from qwen_batched.ops.segments import Run, Segments
from tests.ops.everything import MEAN, STD, everything, everything_inputs
from tests.ops.support import normal, rope_tables
from tests.support import assert_equal_to, noise


def decode_inputs(device="cpu"):
    """Three samples of 0, 5 and 8 tokens in a cache of 9, with 4 heads on 2."""
    cos, sin = rope_tables(3, 16, device)
    keys, values = (normal(3, 9, 2, 16, seed=seed).to(device) for seed in (1, 2))
    tickets = torch.zeros(6, dtype=torch.int32, device=device)
    return normal(3, 128).to(device), cos, sin, keys, values, torch.tensor([0, 5, 8], device=device), tickets


def extend_inputs():
    """Two samples of 0 and 6 tokens in a cache of 7, and three new tokens of each, with 4 heads on 2."""
    keys, values = (normal(2, 7, 2, 16, seed=seed) for seed in (1, 2))
    tickets = torch.zeros(24, dtype=torch.int32)
    return normal(6, 128), *rope_tables(6, 16, "cpu"), keys, values, torch.tensor([0, 6]), tickets


def prompt_inputs():
    """Two prompts of one image of 2 x 3 cells, token 9."""
    return torch.tensor([[1, 9, 2, -1], [1, 2, 9, 4]]), torch.tensor([[2, 3]])


def op_cases():
    """(name, inputs) by case: each registered operator, also with inputs that are not contiguous."""
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device("cpu"))
    cos, sin = rope_tables(29, 16, "cpu")
    runs = segments.sizes
    how = (1.0, MEAN, STD, torch.arange(4), 7, 2, 2, torch.float32, ops.PILLOW)
    tables = [*resize_axis(10, 28, torch.device("cpu")), *resize_axis(12, 28, torch.device("cpu"))]
    packed = normal(5, 180)
    norms = (normal(16, 2, seed=7)[:, 0], normal(16, seed=8), 1e-6)
    return {
        "rms_norm": ("add_norm", (normal(5, 80), None, normal(80), None, 1e-6)),
        "rms_norm-strided": ("add_norm", (normal(80, 5).t(), None, normal(80), None, 1e-6)),
        "add_norm": ("add_norm", (normal(5, 80), normal(5, 80, seed=1), normal(80), None, 1e-6)),
        "add_norm-strided": ("add_norm", (normal(80, 5).t(), normal(80, 5, seed=1).t(), normal(80), None, 1e-6)),
        "add_norm-layer": (
            "add_norm",
            (normal(80, 5).t(), normal(5, 80, seed=1), normal(80), normal(80, 2)[:, 0], 1e-6),
        ),
        "add_norm_backward-layer": (
            "add_norm_backward",
            (normal(80, 5).t(), None, normal(5, 80, seed=2), normal(80, 2)[:, 0], normal(80), 1e-6, True),
        ),
        "quick_gelu": ("quick_gelu", (normal(90, 5).t(),)),
        "quick_gelu_backward": ("quick_gelu_backward", (normal(5, 90), normal(90, 5).t())),
        "swiglu": ("swiglu", (normal(5, 90), normal(5, 90, seed=1), None, None)),
        "swiglu-halves": ("swiglu", (packed[:, :90], packed[:, 90:], packed[0, :90], packed[1, 90:])),
        "swiglu-strided": (
            "swiglu",
            (normal(90, 5).t(), normal(90, 5, seed=1).t(), normal(90, 2)[:, 0], normal(90, 2)[:, 1]),
        ),
        "add_norm_backward": (
            "add_norm_backward",
            (normal(5, 80), normal(5, 80, seed=1), normal(5, 80, seed=2), normal(80), None, 1e-6, True),
        ),
        "add_norm_backward-strided": (
            "add_norm_backward",
            (normal(80, 5).t(), None, normal(80, 5, seed=2).t(), normal(80, 2)[:, 0], None, 1e-6, True),
        ),
        "add_norm_backward-frozen": (
            "add_norm_backward",
            (normal(5, 80), None, normal(5, 80, seed=2), normal(80), None, 1e-6, False),
        ),
        "swiglu-packed": ("swiglu", (packed, None, None, None)),
        "swiglu_backward-packed": ("swiglu_backward", (normal(5, 90, seed=1), packed, None)),
        "swiglu_backward": ("swiglu_backward", (normal(5, 90, seed=1), packed[:, :90], packed[:, 90:])),
        "rotary_attention": ("rotary_attention", (normal(2, 29, 96), cos, sin, runs, segments.table, 2)),
        "rotary_attention-strided": (
            "rotary_attention",
            (normal(96, 29, 1).permute(2, 1, 0), cos, sin, runs, segments.table, 2),
        ),
        "rotary_attention-whole": (
            "rotary_attention",
            (normal(1, 29, 96), cos, sin, [0, 1, 29], torch.tensor([[0, 29]], dtype=torch.int32), 2),
        ),
        "linear": ("linear", (normal(1, 80), normal(7, 80, seed=1), normal(7, seed=2))),
        "linear-strided": ("linear", (normal(80, 2)[:, :1].t(), normal(80, 7).t(), None)),
        "swiglu_linear": ("swiglu_linear", (normal(1, 80), normal(14, 80), normal(7), normal(7, seed=1))),
        "swiglu_linear-strided": ("swiglu_linear", (normal(80, 2)[:, :1].t(), normal(80, 14).t(), None, None)),
        "norm_linear": (
            "norm_linear",
            (normal(1, 80), normal(1, 80, seed=1), normal(80, seed=2), 1e-6, normal(7, 80, seed=3), normal(7), False),
        ),
        "norm_linear-gated": (
            "norm_linear",
            (normal(1, 80), None, normal(80, seed=2), 1e-6, normal(14, 80, seed=3), None, True),
        ),
        "norm_linear-strided": (
            "norm_linear",
            (normal(80, 2)[:, :1].t(), None, normal(80, 2)[:, 0], 1e-6, normal(80, 7).t(), None, False),
        ),
        "likeliest_token": ("likeliest_token", (normal(3, 70), None)),
        "likeliest_token-forbidden": ("likeliest_token", (normal(70, 3).t(), normal(1, 70, seed=1) > 0)),
        "add_low_rank": ("add_low_rank", (normal(9, 40).bfloat16(), normal(9, 3), normal(3, 40), 0.5)),
        "add_low_rank-strided": (
            "add_low_rank",
            (normal(9, 80)[:, 7:40], normal(3, 9).t(), normal(33, 3, seed=1).t(), -2.0),
        ),
        "mixed_product": ("mixed_product", (normal(9, 40).bfloat16(), normal(40, 3), 0.5, False)),
        "mixed_product-turned": ("mixed_product", (normal(40, 9).bfloat16().t(), normal(3, 40).t(), -2.0, True)),
        "mrope": ("mrope", (normal(29, 128), cos, sin, 2, None, 29, None, None, 0.0)),
        "mrope-slots": ("mrope", (normal(128, 29).t(), cos, sin, 2, torch.arange(29).flip(0) + 3, 40, *norms)),
        "mrope_backward": ("mrope_backward", (normal(29, 128), None, cos, sin, 2, None, None, None, 0.0, False)),
        "mrope_backward-slots": (
            "mrope_backward",
            (normal(128, 40).t(), normal(128, 29).t(), cos, sin, 2, torch.arange(29).flip(0) + 3, *norms, True),
        ),
        "decode_attention": ("decode_attention", (*decode_inputs(), None, None, 0.0)),
        "decode_attention-norms": ("decode_attention", (*decode_inputs(), *norms)),
        "extend_attention": ("extend_attention", (*extend_inputs(), True, None, None, None, 0.0)),
        "extend_attention-mask": (
            "extend_attention",
            (*extend_inputs(), False, torch.ones(2, 3, 10) > 0, *norms),
        ),
        "expand_prompts": ("expand_prompts", (*prompt_inputs(), None, 9, 3, 12, True)),
        "expand_prompts-mask": ("expand_prompts", (*prompt_inputs(), torch.ones(2, 1).bool(), 9, 3, 12, False)),
        "frames_to_patches": ("frames_to_patches", (noise(1, 1, 28, 28)[0], 28, 28, None, *how)),
        "frames_to_patches-resize": ("frames_to_patches", (noise(1, 1, 12, 10)[0], 28, 28, tables, *how)),
        "frames_to_patches-float": ("frames_to_patches", (torch.rand(1, 3, 28, 28), 28, 28, None, *how)),
    }


OP_CASES = op_cases()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", OP_CASES)
def test_an_operator_is_what_its_schema_and_fake_say(case, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    name, inputs = OP_CASES[case]
    checks = ["test_schema", "test_faketensor"]
    if backend == "reference" and "strided" not in case:  # the same for both, and slow in the interpreter
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    with ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.qwen_batched, name).default, inputs, test_utils=checks)


def test_every_operator_is_checked():
    registered = {
        name.removeprefix("qwen_batched::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qwen_batched::")
    }
    # Compilers look into this one, which is registered at its first use: tests/export/test_kernels.py.
    assert registered - {"window_attention"} == {name for name, _ in OP_CASES.values()}


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_without_values_go_through_every_operation(dtype, kind):
    segments = Segments.of((Run(0, 2, 12),), torch.device("cpu"))
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        table = torch.zeros(segments.table.shape, dtype=torch.int32)
        x, weight, qkv = (torch.zeros(*shape, dtype=dtype) for shape in ((2, 24, 80), (80,), (2, 24, 96)))
        for residual in (None, x):
            normed, stream = ops.add_norm(x, residual, weight, None, 1e-6)
            assert normed.shape == stream.shape == x.shape
            assert normed.dtype == stream.dtype == dtype
        for bias in ((), (weight, weight)):
            out = ops.swiglu(x, x, *bias)
            assert (out.shape, out.dtype) == (x.shape, dtype)
        out = ops.rotary_attention(
            qkv, torch.zeros(24, 8), torch.zeros(24, 8), Segments(segments.runs, table), num_heads=2
        )
        assert (out.shape, out.dtype) == ((2, 24, 32), dtype)
        for rows in (1, 3):
            assert ops.linear(x[0, :rows], torch.zeros(7, 80, dtype=dtype)).shape == (rows, 7)
            assert ops.swiglu_linear(x[0, :rows], torch.zeros(14, 80, dtype=dtype)).shape == (rows, 7)
        out = ops.mrope(x[0], torch.zeros(24, 8), torch.zeros(24, 8), 1, torch.arange(24), 30)
        assert (out.shape, out.dtype) == ((30, 80), dtype)
        cache = torch.zeros(2, 2, 9, 1, 16, dtype=dtype)
        lengths, tickets = torch.zeros(2).long(), torch.zeros(2).int()
        out = ops.decode_attention(x[0, :2], torch.zeros(2, 8), torch.zeros(2, 8), *cache, lengths, tickets)
        assert (out.shape, out.dtype) == ((2, 48), dtype)
        out = ops.extend_attention(x[0, :6], torch.zeros(6, 8), torch.zeros(6, 8), *cache, lengths, tickets)
        assert (out.shape, out.dtype) == ((6, 48), dtype)
        prompts, grids = torch.zeros(2, 5).long(), torch.zeros(3, 2).long()
        assert ops.expand_prompts(prompts, grids, None, 9, 0, 12, True)[2].shape == (3, 2, 12)
        frames, tables = torch.zeros(2, 3, 30, 40, dtype=torch.uint8), tuple(torch.zeros(3) for _ in range(4))
        mean = std = torch.zeros(3, 1, 1)
        how = (1.0, mean, std, torch.zeros(6).long(), 14, 2, 2, dtype)
        patches = ops.frames_to_patches(frames, 56, 84, tables, *how, resample_backend=ops.PILLOW)
        assert (patches.shape, patches.dtype) == ((2, 24, 1176), dtype)
        assert patches.device.type == ("cpu" if kind == "fake" else "meta")


@pytest.mark.slow
@pytest.mark.parametrize("with_gradient", [False, True])
def test_every_operation_compiles_as_one_graph(device, with_gradient):
    inputs = everything_inputs(device)
    if with_gradient:
        for x in inputs[:3]:
            x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), everything(*inputs)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_equal_to(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
    if with_gradient:
        gradients = [torch.autograd.grad(sum(x.sum() for x in outs), inputs[:3]) for outs in (ours, expected)]
        for mine, theirs in zip(*gradients, strict=True):
            assert_equal_to(mine, theirs)
