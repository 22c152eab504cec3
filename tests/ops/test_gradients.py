"""Gradients, second derivatives and tangents through every operation equal the references'; none is dropped."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_batched import ops
from qwen_batched.model.geometry import resize_axis
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run, Segments
from tests.ops.everything import MEAN, STD
from tests.ops.support import normal, rope_tables
from tests.support import assert_equal_to


def gradient_cases(device):
    segments = Segments.of((Run(0, 2, 12), Run(24, 1, 5)), torch.device(device))
    cos, sin = rope_tables(29, 16, device)
    frames = torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(0)).to(device)
    slots = torch.arange(29, device=device).flip(0) + 3
    how = (1.0, MEAN.to(device), STD.to(device), torch.arange(4, device=device), 14, 2, 2, torch.float32)
    tables = (*resize_axis(40, 56, torch.device(device)), *resize_axis(30, 56, torch.device(device)))
    x, y, weight, qkv = (
        value.to(device) for value in (normal(5, 80), normal(5, 80, seed=1), normal(80, seed=2), normal(2, 29, 96))
    )
    return {
        "rms_norm": (
            lambda x, w: ops.add_norm(x, None, w, None, 1e-6)[0],
            lambda x, w: reference.add_norm(x, None, w, None, 1e-6)[0],
            (x, weight),
        ),
        "add_norm": (
            lambda x, y, w: torch.cat(ops.add_norm(x, y, w, None, 1e-6)),
            lambda x, y, w: torch.cat(reference.add_norm(x, y, w, None, 1e-6)),
            (x, y, weight),
        ),
        "add_norm-eps": (
            lambda x, y, w: ops.add_norm(x, y, w, None, 0.3)[0],
            lambda x, y, w: reference.add_norm(x, y, w, None, 0.3)[0],
            (x, y, weight),
        ),
        "layer_norm": (
            lambda x, w, b: ops.add_norm(x, None, w, b, 1e-6)[0],
            lambda x, w, b: reference.add_norm(x, None, w, b, 1e-6)[0],
            (x, weight, y[0]),
        ),
        "add_layer_norm": (
            lambda x, y, w, b: torch.cat(ops.add_norm(x, y, w, b, 0.3)),
            lambda x, y, w, b: torch.cat(reference.add_norm(x, y, w, b, 0.3)),
            (x, y, weight, x[0]),
        ),
        "add_norm-stream": (
            lambda x, y: ops.add_norm(x, y, weight, None, 1e-6)[1] ** 2,
            lambda x, y: reference.add_norm(x, y, weight, None, 1e-6)[1] ** 2,
            (x, y),
        ),
        "quick_gelu": (ops.quick_gelu, reference.quick_gelu, (x,)),
        "gelu_linear": (
            lambda x, w, b: ops.gelu_linear(x, w, b, (), "gelu_pytorch_tanh"),
            lambda x, w, b: reference.gelu_linear(x, w, b, (), "gelu_pytorch_tanh"),
            (x, y, weight[:5]),
        ),
        "swiglu": (ops.swiglu, reference.swiglu, (x, y)),
        "swiglu-biases": (ops.swiglu, reference.swiglu, (x, y, weight, 2 * weight)),
        "swiglu-packed": (ops.swiglu, reference.swiglu, (x,)),
        "swiglu-halves": (ops.swiglu_linear, reference.swiglu_linear, (x, y[:4])),
        "swiglu-halves-biases": (ops.swiglu_linear, reference.swiglu_linear, (x, y[:4], weight[:2], weight[2:4])),
        "linear": (ops.linear, reference.linear, (x[:1], y, weight[:5])),
        "swiglu_linear": (ops.swiglu_linear, reference.swiglu_linear, (x[:1], y[:4], weight[:2], weight[2:4])),
        "mrope": (
            lambda qkv: ops.mrope(qkv, cos, sin, 2, slots, 40),
            lambda qkv: reference.mrope(qkv, cos, sin, 2, slots, 40),
            (qkv[0],),
        ),
        "mrope-norms": (
            lambda qkv, q, k: ops.mrope(qkv, cos, sin, 2, slots, 40, q, k, 0.1),
            lambda qkv, q, k: reference.mrope(qkv, cos, sin, 2, slots, 40, q, k, 0.1),
            (qkv[0], x[0, :16], x[1, :16]),
        ),
        "rotary_attention": (
            lambda qkv: ops.rotary_attention(qkv, cos, sin, segments, 2),
            lambda qkv: reference.rotary_attention(qkv, cos, sin, segments, 2),
            (qkv,),
        ),
        "frames_to_patches": (
            lambda frames: ops.frames_to_patches(frames, 56, 56, tables, *how, resample_backend=ops.PILLOW),
            lambda frames: reference.frames_to_patches(frames, 56, 56, None, *how, resample_backend=ops.PILLOW),
            (frames,),
        ),
    }


GRADIENT_CASES = list(gradient_cases("cpu"))
WITHOUT_BACKWARD = ("swiglu-biases", "linear", "frames_to_patches")


def wanted_inputs(inputs):
    """The inputs whose gradients are wanted: each alone, and all of them."""
    return [(index,) for index in range(len(inputs))] + [tuple(range(len(inputs)))]


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_equal_the_references_and_are_never_dropped(case, backend, device):
    if backend == "triton" and (case in WITHOUT_BACKWARD or (device == "cpu" and torch.cuda.is_available())):
        pytest.skip("not for this kernel, or not on this device")
    function, expected, inputs = gradient_cases(device)[case]
    with ops.use_backend(backend):
        for wanted in wanted_inputs(inputs):
            gradients = []
            for run in (function, expected):
                leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(inputs)]
                out = run(*leaves)
                assert out.requires_grad, f"detached from input {wanted}"
                probe = normal(*out.shape, seed=7).to(device)
                gradients.append(torch.autograd.grad((out * probe).sum(), [leaves[index] for index in wanted]))
            for ours, theirs in zip(*gradients, strict=True):
                assert_equal_to(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", [case for case in GRADIENT_CASES if case != "frames_to_patches"])
def test_second_derivatives_equal_the_references_and_are_never_dropped(case, backend, device):
    """As a penalty on gradients wants them."""
    if backend == "triton" and (case in WITHOUT_BACKWARD or (device == "cpu" and torch.cuda.is_available())):
        pytest.skip("not for this kernel, or not on this device")
    function, expected, inputs = gradient_cases(device)[case]
    seconds = []
    with ops.use_backend(backend), sdpa_kernel(SDPBackend.MATH):  # PyTorch's other attentions have none
        for run in (function, expected):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves)
            firsts = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
            penalty = sum(first.square().sum() for first in firsts)
            seconds.append(torch.autograd.grad(penalty, leaves))
    for ours, theirs in zip(*seconds, strict=True):
        assert_equal_to(ours, theirs)


@pytest.mark.parametrize("case", WITHOUT_BACKWARD)
def test_a_forced_triton_refuses_to_drop_a_gradient(case, device):
    function, _, inputs = gradient_cases(device)[case]
    with ops.use_backend("triton"):
        for wanted in wanted_inputs(inputs):
            leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(inputs)]
            with pytest.raises(RuntimeError, match=r"triton.*backward.*no_grad"):
                function(*leaves)


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_forward_mode_derivatives_equal_the_references_and_are_never_dropped(case, device):
    function, expected, inputs = gradient_cases(device)[case]
    if case == "frames_to_patches":
        pytest.skip("PyTorch's antialiased resize has no forward derivative")
    tangents = tuple(normal(*x.shape, seed=8).to(device) for x in inputs)
    try:
        _, theirs = torch.func.jvp(expected, inputs, tangents)
    except NotImplementedError:
        pytest.skip("PyTorch's attention has no forward derivative here")
    _, ours = torch.func.jvp(function, inputs, tangents)
    assert_equal_to(ours, theirs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        assert_equal_to(forward_ad.unpack_dual(function(*duals)).tangent, theirs)


@pytest.mark.parametrize("case", [case for case in GRADIENT_CASES if case != "gelu_linear"])  # PyTorch's own kernels
def test_a_forced_triton_refuses_to_drop_a_tangent(case, device):
    """Of each input alone, without grad mode too."""
    function, _, inputs = gradient_cases(device)[case]
    for index, x in enumerate(inputs):

        def of_one(x, index=index):
            return function(*inputs[:index], x, *inputs[index + 1 :])

        with ops.use_backend("triton"), torch.no_grad():
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"triton.*forward-mode"):
                of_one(forward_ad.make_dual(x, torch.ones_like(x)))
            with pytest.raises(RuntimeError, match=r"triton.*forward-mode"):
                torch.func.jvp(of_one, (x,), (torch.ones_like(x),))


def test_without_grad_mode_or_a_leaf_no_gradient_is_recorded(device):
    function, _, inputs = gradient_cases(device)["swiglu"]
    assert not function(*inputs).requires_grad
    with torch.no_grad():
        assert not function(*(x.clone().requires_grad_() for x in inputs)).requires_grad
