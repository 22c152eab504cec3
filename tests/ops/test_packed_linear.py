"""ops.packed_linear: one product with several parameters, and a gradient for each."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen_batched import ops

LAYOUTS = {
    "packed": ((slice(0, 4), slice(4, 7), slice(7, 8)), 8),
    "padded": ((slice(0, 3), slice(5, 8)), 10),
    "single": ((slice(0, 5),), 5),
}


def make(layout, transposed=False, bias=True, dtype=torch.float64):
    """A buffer, its bias, and parameters that lie in them."""
    rows, total = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    weight, of_bias = torch.zeros(total, 6, dtype=dtype), torch.zeros(6 if transposed else total, dtype=dtype)
    for place in rows:
        weight[place] = torch.randn(weight[place].shape, generator=generator, dtype=dtype)
        of_bias[... if transposed else place] = 0.5
    parameters = [nn.Parameter(torch.from_dlpack(weight[p]).t() if transposed else weight[p].detach()) for p in rows]
    biases = [nn.Parameter(of_bias[... if transposed else place].detach()) for place in rows[: 1 if transposed else 9]]
    return (weight, of_bias, parameters, biases) if bias else (weight, None, parameters, [])


def plain(x, parameters, biases, layout, transposed):
    """The layers one by one, zeros in between."""
    rows, total = LAYOUTS[layout]
    if transposed:
        (place,) = rows
        return F.linear(x[..., place], parameters[0], biases[0] if biases else None)
    parts, end = [], 0
    for parameter, bias, place in itertools.zip_longest(parameters, biases, rows):
        parts += [x.new_zeros(*x.shape[:-1], place.start - end), F.linear(x, parameter, bias)]
        end = place.stop
    return torch.cat([*parts, x.new_zeros(*x.shape[:-1], total - end)], dim=-1)


CASES = [(layout, False) for layout in LAYOUTS] + [("single", True)]


@pytest.mark.parametrize(("layout", "transposed"), CASES)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_and_its_gradients_are_those_of_the_layers(layout, transposed, joined, bias):
    weight, of_bias, parameters, biases = make(layout, transposed, bias, torch.float32)
    rows, total = LAYOUTS[layout]
    x = torch.randn(2, 3, total if transposed else 6, requires_grad=True)
    buffers = (None, None) if joined else (weight, of_bias)
    out = ops.packed_linear(x, *buffers, parameters, biases, rows, transposed, total)
    expected = plain(x, parameters, biases, layout, transposed)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        without = ops.packed_linear(x, *buffers, parameters, biases, rows, transposed, total)
    assert torch.equal(without, out)
    grad = torch.randn(out.shape)
    wanted = [x, *parameters, *biases]
    of_ours, of_theirs = (torch.autograd.grad(result, wanted, grad) for result in (out, expected))
    for ours, theirs in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("layout", "transposed"), CASES)
@pytest.mark.parametrize("joined", [False, True])
def test_packed_linear_differentiates_once_and_twice(layout, transposed, joined):
    weight, of_bias, parameters, biases = make(layout, transposed)
    rows, total = LAYOUTS[layout]
    x = torch.randn(3, total if transposed else 6, dtype=torch.float64, requires_grad=True)

    def call(x, *tensors):
        # Numerical differentiation moves parameters; the buffer follows them as it does where both are one memory.
        own, own_biases = tensors[: len(rows)], tensors[len(rows) :]
        with torch.no_grad():
            for place, parameter in zip(rows, own, strict=True):
                weight[place] = parameter.t() if transposed else parameter
            for place, parameter in zip(rows, own_biases, strict=False):
                of_bias[... if transposed else place] = parameter
        buffers = (None, None) if joined else (weight.clone(), of_bias.clone())
        return ops.packed_linear(x, *buffers, own, own_biases, rows, transposed, total)

    tensors = [parameter.detach().clone().requires_grad_() for parameter in (*parameters, *biases)]
    assert torch.autograd.gradcheck(call, (x, *tensors))
    assert torch.autograd.gradgradcheck(call, (x, *tensors))


@pytest.mark.parametrize(("layout", "transposed"), CASES)
def test_packed_linears_gradients_are_taken_without_a_copy(layout, transposed):
    weight, of_bias, parameters, biases = make(layout, transposed)
    rows, total = LAYOUTS[layout]
    x = torch.randn(3, total if transposed else 6, dtype=torch.float64)
    ops.packed_linear(x, weight, of_bias, parameters, biases, rows, transposed).sum().backward()
    assert len({parameter.grad.untyped_storage().data_ptr() for parameter in parameters}) == 1
    assert all(parameter.grad.stride() == parameter.stride() for parameter in parameters)


def test_packed_linear_makes_only_the_gradients_that_are_wanted():
    weight, of_bias, parameters, biases = make("packed")
    for frozen in (parameters[0], biases[1]):
        frozen.requires_grad_(False)
    rows, _ = LAYOUTS["packed"]
    ops.packed_linear(torch.randn(3, 6).double(), weight, of_bias, parameters, biases, rows).sum().backward()
    assert parameters[0].grad is biases[1].grad is None
    assert all(tensor.grad is not None for tensor in (*parameters[1:], biases[0], biases[2]))


def test_packed_linear_notices_a_parameter_that_changed_before_the_backward_pass():
    weight, of_bias, parameters, biases = make("packed")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = ops.packed_linear(x, weight, of_bias, parameters, biases, LAYOUTS["packed"][0])
    with torch.no_grad():
        parameters[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_packed_linear_joins_what_is_freed_between_forward_and_backward():
    _, _, parameters, biases = make("padded")
    rows, total = LAYOUTS["padded"]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = ops.packed_linear(x, None, None, parameters, biases, rows, total=total)
    kept = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, *parameters)}


def test_packed_linear_under_autocast_is_that_of_the_layers():
    weight, of_bias, parameters, biases = make("padded", dtype=torch.float32)
    rows, _ = LAYOUTS["padded"]
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.packed_linear(x, weight, of_bias, parameters, biases, rows)
        expected = plain(x, parameters, biases, "padded", False)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.to(out.dtype))
    out.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_packed_linear_under_transforms_is_that_of_the_layers(transform):
    weight, of_bias, parameters, biases = make("padded")
    rows, _ = LAYOUTS["padded"]
    reduce = torch.sum if transform is torch.func.grad else lambda out: out
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    ours = transform(lambda x: reduce(ops.packed_linear(x, weight, of_bias, parameters, biases, rows)))(x)
    theirs = transform(lambda x: reduce(plain(x, parameters, biases, "padded", False)))(x)
    torch.testing.assert_close(ours, theirs)
