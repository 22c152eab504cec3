"""A linear layer with low-rank updates: in place and in few products what the formula says, and so its gradients."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched import ops
from qwen_batched.ops import reference
from qwen_batched.ops.low_rank import LowRankUpdate
from tests.support import assert_equal_to, relative_error

BFLOAT16_STEP = 2**-8


def tensor(*shape, seed, dtype=torch.float32, device="cpu", grad=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype).requires_grad_(grad)


def layer_with(widths, rank, *, rows=5, dim=12, bias=True, dtype=torch.float32, factors=None, device="cpu", extra=0):
    """Input, weight, bias and one update per width; between the updates' columns lie two of none."""
    total = sum(widths) + 2 * len(widths)
    x = tensor(rows, dim + extra, seed=0, dtype=dtype, device=device, grad=True)
    weight = tensor(total, dim + extra, seed=1, dtype=dtype, device=device)
    updates, start = [], 0
    for index, width in enumerate(widths):
        a, b = (
            tensor(*shape, seed=10 * index + k, dtype=factors or dtype, device=device, grad=True)
            for k, shape in enumerate([(rank + index, dim), (width, rank + index)], start=2)
        )
        updates.append(LowRankUpdate(a, b, 0.5 + index, start))
        start += width + 2
    return x, weight, tensor(total, seed=9, dtype=dtype, device=device) if bias else None, updates


def inputs_of(x, updates):
    return [x, *(factor for update in updates for factor in (update.a, update.b))]


def results(linear, x, weight, bias, updates, grad):
    """The output, and the gradients of the input and of all matrices."""
    out = linear(x, weight, bias, updates)
    return out, *torch.autograd.grad(out, inputs_of(x, updates), grad)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rank=st.integers(1, 4),
    rows=st.integers(0, 6),
    bias=st.booleans(),
    extra=st.integers(0, 3),
)
def test_results_and_gradients_equal_the_formula(widths, rank, rows, bias, extra):
    case = layer_with(widths, rank, rows=rows, bias=bias, extra=extra, dtype=torch.float64)
    grad = tensor(rows, len(case[1]), seed=5, dtype=torch.float64)
    for ours, expected in zip(results(ops.linear, *case, grad), results(reference.linear, *case, grad), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "factors, wide", [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)], ids=str
)
def test_bfloat16_is_no_worse_than_the_formula_in_bfloat16(device, factors, wide, monkeypatch):
    """Beside float32 matrices, whether inputs are copied in float32 or not."""
    monkeypatch.setattr(sys.modules["qwen_batched.ops.adapted_linear"], "LEAST_WIDE", 0 if wide else 2**24)
    case = layer_with([48, 16], 8, rows=33, dim=64, dtype=torch.bfloat16, factors=factors, device=device)
    grad = tensor(33, len(case[1]), seed=5, dtype=torch.bfloat16, device=device)
    x, weight, bias, updates = case
    doubled = [update._replace(a=update.a.double(), b=update.b.double()) for update in updates]
    exact = results(reference.linear, x.double(), weight.double(), bias.double(), doubled, grad.double())
    plain = results(reference.linear, *case, grad)
    for ours, theirs, expected in zip(results(ops.linear, *case, grad), plain, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert relative_error(ours, expected) <= 1.02 * relative_error(theirs, expected) + BFLOAT16_STEP / 16


def test_the_output_keeps_the_inputs_dtype_beside_wider_matrices(device):
    x, weight, bias, updates = layer_with([4], 2, dtype=torch.bfloat16, factors=torch.float32, device=device)
    out = ops.linear(x, weight, bias, updates)
    grads = torch.autograd.grad(out.float().sum(), inputs_of(x, updates))
    assert out.dtype == grads[0].dtype == torch.bfloat16 and grads[1].dtype == grads[2].dtype == torch.float32


def test_gradients_of_gradients():
    x, weight, bias, updates = layer_with([3, 2], 2, rows=3, dim=4, dtype=torch.float64)

    def run(x, *factors):
        changed = [update._replace(a=a, b=b) for update, a, b in zip(updates, factors[::2], factors[1::2], strict=True)]
        return ops.linear(x, weight, bias, changed)

    assert torch.autograd.gradcheck(run, inputs_of(x, updates))
    assert torch.autograd.gradgradcheck(run, inputs_of(x, updates))


def test_forward_mode_derivatives():
    x, weight, bias, updates = layer_with([3], 2, dtype=torch.float64)
    tangent = torch.ones_like(x)
    found = [
        torch.autograd.functional.jvp(lambda x, linear=linear: linear(x, weight, bias, updates), x, tangent)[1]
        for linear in (ops.linear, reference.linear)
    ]
    torch.testing.assert_close(*found)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
        ours = torch.autograd.forward_ad.unpack_dual(ops.linear(dual, weight, bias, updates)).tangent
    torch.testing.assert_close(ours, found[1])


@pytest.mark.parametrize("chosen", [(0,), (1, 2), (2,), (0, 4)])
def test_only_gradients_that_are_wanted_are_given(chosen):
    x, weight, bias, updates = layer_with([3, 2], 2)
    inputs = inputs_of(x, updates)
    expected = torch.autograd.grad(reference.linear(x, weight, bias, updates).square().sum(), inputs)
    for index, each in enumerate(inputs):
        each.requires_grad_(index in chosen)
    wanted = [inputs[index] for index in chosen]
    found = torch.autograd.grad(ops.linear(x, weight, bias, updates).square().sum(), wanted)
    for ours, index in zip(found, chosen, strict=True):
        assert_equal_to(ours, expected[index])


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_layer_that_is_trained_itself_gets_its_gradient(trained):
    x, weight, bias, updates = layer_with([3], 2)
    parameter = {"weight": weight, "bias": bias}[trained].requires_grad_(True)
    found, expected = (
        torch.autograd.grad(linear(x, weight, bias, updates).square().sum(), parameter)[0]
        for linear in (ops.linear, reference.linear)
    )
    assert torch.equal(found, expected)


def test_autocast_computes_in_its_dtype(device):
    x, weight, bias, updates = layer_with([16, 8], 4, rows=9, dim=32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, theirs = (linear(x, weight, bias, updates) for linear in (ops.linear, reference.linear))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(ours, theirs) <= 2 * BFLOAT16_STEP
    grads = torch.autograd.grad(ours.float().square().sum(), inputs_of(x, updates))
    expected = torch.autograd.grad(theirs.float().square().sum(), inputs_of(x, updates))
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) <= 4 * BFLOAT16_STEP


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12), (0, 12), (1, 12), (0, 3, 12), (3, 0, 12)])
def test_any_shape_of_input(device, shape):
    _, weight, bias, updates = layer_with([3], 2, device=device)
    x = tensor(*shape, seed=0, device=device, grad=True)
    ours, theirs = (linear(x, weight, bias, updates) for linear in (ops.linear, reference.linear))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)


def test_gradients_of_odd_layouts(device):
    """An expanded gradient, one with gaps, an input with gaps."""
    case = layer_with([4, 3], 2, device=device)
    x, weight, bias, updates = case
    x = tensor(12, 10, seed=0, device=device, grad=True)[:, ::2].t()
    for grad in (
        torch.ones((), device=device).expand(5, len(weight)),
        tensor(5, 2 * len(weight), seed=3, device=device)[:, ::2],
        tensor(len(weight), 5, seed=3, device=device).t(),
    ):
        for ours, theirs in zip(
            results(ops.linear, x, weight, bias, updates, grad),
            results(reference.linear, x, weight, bias, updates, grad),
            strict=True,
        ):
            assert_equal_to(ours, theirs)


def test_swiglu_of_an_adapted_product(device):
    x, gate_up, bias, _ = layer_with([6, 6], 3, dim=12, device=device)
    updates = [
        LowRankUpdate(tensor(3, 12, seed=k, device=device, grad=True), tensor(8, 3, seed=k + 5, device=device), 0.3, k)
        for k in (0, 8)
    ]
    biases = bias.chunk(2)
    for chosen in ((None, None), biases):
        ours = ops.swiglu_linear(x, gate_up, *chosen, updates)
        theirs = reference.swiglu_linear(x, gate_up, *chosen, updates)
        assert_equal_to(ours, theirs)
        with torch.no_grad():
            assert_equal_to(ops.swiglu_linear(x, gate_up, *chosen, updates), theirs)
        inputs = [x, *(update.a for update in updates)]
        for found, expected in zip(
            torch.autograd.grad(ours.square().sum(), inputs),
            torch.autograd.grad(theirs.square().sum(), inputs),
            strict=True,
        ):
            assert_equal_to(found, expected)


@pytest.mark.parametrize("name", ["linear", "swiglu_linear"])
def test_second_derivatives_in_float32_equal_the_formulas(device, name):
    """There the function's own backward pass is asked for one that can be differentiated."""
    x, weight, _, updates = layer_with([6, 6], 3, dim=12, bias=False, device=device)
    inputs = inputs_of(x, updates)
    options = (None,) if name == "linear" else (None, None)

    def second(module):
        out = getattr(module, name)(x, weight, *options, updates)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    for ours, theirs in zip(second(ops), second(reference), strict=True):
        assert_equal_to(ours, theirs)


def test_a_backward_pass_inside_autocast_is_that_of_the_forward_pass(device):
    for factors in (torch.float32, torch.bfloat16):
        dtype = torch.bfloat16 if factors == torch.bfloat16 else torch.float32
        x, weight, bias, updates = layer_with([4, 3], 2, dtype=dtype, factors=factors, device=device)
        inputs = inputs_of(x, updates)
        expected = torch.autograd.grad(ops.linear(x, weight, bias, updates).sum(), inputs)
        out = ops.linear(x, weight, bias, updates).sum()
        with torch.autocast(device, dtype=torch.bfloat16):
            found = torch.autograd.grad(out, inputs)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_transforms_and_tensors_without_values_go_through_the_formula():
    x, weight, bias, updates = layer_with([3], 2)
    x = x.detach()
    ours, theirs = (
        torch.func.jacrev(lambda x, linear=linear: linear(x, weight, bias, updates))(x)
        for linear in (ops.linear, reference.linear)
    )
    assert_equal_to(ours, theirs)
    mapped = torch.func.vmap(lambda row: ops.linear(row[None], weight, bias, updates)[0])(x)
    assert_equal_to(mapped, ops.linear(x, weight, bias, updates))
    on_meta = [update._replace(a=update.a.to("meta"), b=update.b.to("meta")) for update in updates]
    assert ops.linear(x.to("meta"), weight.to("meta"), bias.to("meta"), on_meta).shape == (5, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias, torch.ones_like(bias))
        out = torch.autograd.forward_ad.unpack_dual(ops.linear(x, weight, dual, updates))
        assert torch.equal(out.tangent, torch.ones_like(out.primal))


def test_nothing_given_is_changed():
    case = layer_with([3, 4], 2)
    x, weight, bias, updates = case
    before = [value.detach().clone() for value in (x, weight, bias, *inputs_of(x, updates)[1:])]
    ops.linear(x, weight, bias, updates).sum().backward()
    after = (x, weight, bias, *inputs_of(x, updates)[1:])
    assert all(torch.equal(value, old) for value, old in zip(after, before, strict=True))


def test_matrices_changed_before_the_backward_pass_are_noticed():
    x, weight, bias, updates = layer_with([3], 2)
    out = ops.linear(x, weight, bias, updates)
    with torch.no_grad():
        updates[0].b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
