"""Packed weights: one product where there were two, and nobody can tell by the parameters."""

import copy
import dataclasses
import gc
import io
import json
import pickle
import weakref

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from qwen_batched import QwenBatchedVL
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.linear.fused import FusedLinear, pack
from qwen_batched.linear.packed import PackedParameters
from qwen_batched.linear.padded import PaddedLinear, apply_padded_linear
from qwen_batched.model.decoder import DecoderAttention
from qwen_batched.model.parts.mlps import SwiGLU
from tests.support import Scaled, assert_equal_to, photos

# The packed product sums the same terms in another order.
TOLERANCE = 1e-6
FRAMES = photos(2, 2, 56, 84)
# (dim, hidden_dim): the tiny model's, the smallest, a multiple of the padding, and one more.
WIDTHS = [(80, 90), (8, 1), (16, 128), (16, 129), (1, 7)]


def make_mlp(dim=80, hidden_dim=90, bias=True, device="cpu", seed=0):
    torch.manual_seed(seed)
    with torch.device(device):  # `.to` would pack
        return SwiGLU(dim, hidden_dim, bias=bias).requires_grad_(False).eval()


def make_packed_mlp(*arguments, **options):
    mlp = make_mlp(*arguments, **options)
    pack(mlp)
    assert is_packed(mlp)
    return mlp


def plain(mlp, x):
    """The MLP as its parameters say."""
    return mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def inputs(dim=80, tokens=5, device="cpu"):
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(1)).to(device)


def lies_in(parameter, packed):
    """Whether a parameter's memory is inside another tensor's."""
    first, end = packed.data_ptr(), packed.data_ptr() + packed.nbytes
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return first <= parameter.data_ptr() and parameter.data_ptr() + (last + 1) * parameter.itemsize <= end


def groups_of(module):
    """Each packed tensor of a module, and the parameters that it is for."""
    found = []
    for fused in vars(module).values():
        if isinstance(fused, FusedLinear):
            layers = [getattr(module, name) for name in fused.names]
            found.append((fused._weights, [layer.weight for layer in layers]))
            found += [(fused._biases, [layer.bias for layer in layers])] if fused.has_bias else []
    if isinstance(module, PaddedLinear):
        found.append((module._columns, [module.weight]))
    return found


def is_packed(module):
    """Whether all that can be packed lies in the packed tensors."""
    groups = [group for child in module.modules() for group in groups_of(child)]
    packed = [holder.tensor(parameters) for holder, parameters in groups]
    for (_, parameters), tensor in zip(groups, packed, strict=True):
        assert tensor is None or all(lies_in(parameter, tensor) for parameter in parameters)
    return all(tensor is not None for tensor in packed)


def can_be_packed(mlp):
    pack(mlp)
    return is_packed(mlp)


# --- PackedParameters ---


def two_parameters():
    return nn.Parameter(torch.randn(3, 4), requires_grad=False), nn.Parameter(torch.randn(2, 4), requires_grad=False)


def make_packed():
    return PackedParameters(10, [slice(0, 3), slice(5, 7)])


def packed_of(holder, *parameters):
    holder.pack(parameters)
    return holder.tensor(parameters)


def test_parameters_stand_in_their_places_and_padding_is_zero():
    first, second = two_parameters()
    expected = torch.zeros(10, 4)
    expected[0:3], expected[5:7] = first, second
    assert torch.equal(packed_of(make_packed(), first, second), expected)


def test_every_parameter_has_a_storage_of_its_own():
    """What saves a state_dict takes tensors of one storage for one tensor."""
    parameters = two_parameters()
    packed_of(make_packed(), *parameters)
    for parameter in parameters:
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.untyped_storage().data_ptr() == parameter.data_ptr()
        assert parameter.storage_offset() == 0
        assert not parameter._is_view()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_outlive_what_packed_them(dtype):
    parameters = [nn.Parameter(x.to(dtype), requires_grad=False) for x in two_parameters()]
    before = [parameter.clone() for parameter in parameters]
    holder = make_packed()
    packed_of(holder, *parameters)
    del holder
    gc.collect()
    torch.randn(10_000)
    assert all(map(torch.equal, parameters, before))


def test_padding_stays_zero_through_updates_in_place():
    parameters, holder = two_parameters(), make_packed()
    packed = packed_of(holder, *parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(7)
            parameter.data.add_(1)
    assert packed_of(holder, *parameters) is packed
    assert (packed[0:3] == 8).all()
    assert (packed[5:7] == 8).all()
    assert packed.sum() == 8 * (12 + 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:2],
        lambda data: data.t(),
        lambda data: data.view(torch.int32).view(torch.float32).as_strided((3, 3), (1, 3)),
    ],
    ids=["rows", "transposed", "strides"],
)
def test_another_view_of_the_same_memory_is_noticed(change):
    """Same address, other numbers: not what was packed. An error will do."""
    parameter = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    holder = PackedParameters(4, [slice(0, 3)])
    before = packed_of(holder, parameter)
    parameter.data = change(parameter.data)
    assert holder.tensor([parameter]) is None
    try:
        packed = packed_of(holder, parameter)
    except (RuntimeError, ValueError):
        return
    assert packed is not before
    assert torch.equal(packed[: len(parameter)], parameter)


@pytest.mark.parametrize("gone", [0, 1])
def test_the_packed_tensor_is_released_with_a_parameter(gone):
    parameters, holder = list(two_parameters()), make_packed()
    packed_of(holder, *parameters)
    other = parameters[1 - gone].clone()
    parameters[gone] = None
    assert holder._packing is None
    assert torch.equal(parameters[1 - gone], other)


def test_the_packed_tensor_goes_with_its_holder_without_the_garbage_collector():
    parameters, holder = two_parameters(), make_packed()
    packed_of(holder, *parameters)
    alive = weakref.ref(holder)
    gc.disable()
    try:
        del holder
        assert alive() is None
    finally:
        gc.enable()


def test_trap29_packing_in_inference_mode_leaves_ordinary_tensors(always_packed):
    mlp, x = make_mlp(), inputs()
    with torch.inference_mode():
        pack(mlp)
        mlp(x)
    assert is_packed(mlp)
    assert not any(parameter.is_inference() for parameter in mlp.parameters())
    mlp.requires_grad_(True)
    mlp(x).sum().backward()
    with torch.no_grad():
        for parameter in mlp.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)


# --- SwiGLU ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dim", "hidden_dim"), WIDTHS)
def test_the_packed_mlp_equals_the_plain_one(dim, hidden_dim, bias, always_packed, device):
    mlp, x = make_mlp(dim, hidden_dim, bias, device), inputs(dim, device=device)
    expected = plain(mlp, x)
    assert_equal_to(mlp(x), expected, TOLERANCE)
    assert not is_packed(mlp), "a call packs nothing"
    pack(mlp)
    assert is_packed(mlp)
    assert_equal_to(mlp(x), expected, TOLERANCE)
    assert_equal_to(plain(mlp, x), expected, TOLERANCE)


@pytest.mark.parametrize("shape", [(80,), (1, 80), (2, 3, 80), (0, 80)])
def test_the_packed_mlp_takes_any_leading_dimensions(shape, always_packed):
    mlp = make_packed_mlp()
    x = torch.randn(shape)
    out = mlp(x)
    assert out.shape == shape
    if out.numel():
        assert_equal_to(out, plain(mlp, x), TOLERANCE)


def test_updates_in_place_are_seen(always_packed, device):
    mlp, x = make_packed_mlp(device=device), inputs(device=device)
    for parameter in mlp.parameters():
        with torch.no_grad():
            parameter.mul_(-1.5).add_(0.1)
        assert is_packed(mlp)
        assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)


def test_one_moved_parameter_is_seen(always_packed, device):
    mlp, x = make_packed_mlp(device=device), inputs(device=device)
    for name in dict(mlp.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(mlp.get_submodule(owner), leaf)
        parameter.data = parameter.data.clone() * 2
        assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)
        setattr(mlp.get_submodule(owner), leaf, nn.Parameter(parameter.clone() * -1, requires_grad=False))
        assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)


@pytest.mark.parametrize("way", ["to", "assign", "load", "swap"])
def test_moved_weights_are_seen(way, always_packed, device):
    mlp, x = make_packed_mlp(device=device), inputs(device=device)
    other = make_mlp(device=device, seed=1)
    if way == "to":
        mlp, x = mlp.to(torch.float64), x.double()
    elif way == "assign":
        mlp.load_state_dict(other.state_dict(), assign=True)
    elif way == "load":
        mlp.load_state_dict(other.state_dict())
    else:
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    expected = plain(mlp, x)
    if way in ("assign", "load"):
        assert_equal_to(expected, plain(other, x), TOLERANCE)
    for _ in range(2):
        out = mlp(x)
        assert out.dtype == x.dtype
        assert_equal_to(out, expected, TOLERANCE)


def test_parameters_shared_by_two_layers_stay_right(always_packed):
    mlp, x = make_mlp(), inputs()
    mlp.up_proj.weight = mlp.gate_proj.weight
    pack(mlp)
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(-2)
    assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)
    first, second = make_mlp(seed=2), make_mlp(seed=3)
    second.gate_proj.weight = first.gate_proj.weight
    for _ in range(2):
        for part in (first, second):
            pack(part)
            assert_equal_to(part(x), plain(part, x), TOLERANCE)
        with torch.no_grad():
            first.gate_proj.weight.mul_(-2)


# --- what must not be packed ---


class Adapter(nn.Module):
    """A layer and a low-rank update, as LoRA makes them."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


NAMES = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_layer_is_called(name, used, always_packed, device):
    mlp, x = (make_packed_mlp if used else make_mlp)(device=device), inputs(device=device)
    before = plain(mlp, x)
    setattr(mlp, name, Adapter(getattr(mlp, name)).to(device).requires_grad_(False))
    assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)
    assert not torch.allclose(mlp(x), before)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "with_kwargs"])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_a_layer_run(name, kind, always_packed, device):
    mlp, x = make_packed_mlp(device=device), inputs(device=device)
    before, calls = mlp(x), []
    layer = getattr(mlp, name)
    if kind == "forward":
        hook = layer.register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)
    elif kind == "forward_pre":
        hook = layer.register_forward_pre_hook(lambda module, args: (calls.append(1) or args[0] * 2,))
    else:
        hook = layer.register_forward_hook(
            lambda module, args, kwargs, out: calls.append(1) or out * 2, with_kwargs=True
        )
    assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)
    assert len(calls) == 2
    assert not torch.allclose(mlp(x), before)
    hook.remove()
    assert_equal_to(mlp(x), before, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_backward_hooks_of_a_frozen_layer_run(name, always_packed):
    mlp, x = make_packed_mlp(), inputs().requires_grad_()
    calls = []
    getattr(mlp, name).register_full_backward_hook(lambda *args: calls.append(1) and None)
    mlp(x).sum().backward()
    assert calls


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_replaced_on_the_instance_is_called(name, always_packed):
    """As accelerate does for layers that it moves between devices."""
    mlp, x = make_packed_mlp(), inputs()
    layer = getattr(mlp, name)
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)
    assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_gained_or_lost_its_bias_is_itself(name, bias, always_packed):
    mlp, x = make_packed_mlp(bias=bias), inputs()
    old = getattr(mlp, name)
    setattr(mlp, name, nn.Linear(old.in_features, old.out_features, bias=not bias).requires_grad_(False))
    assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)


@pytest.mark.parametrize("way", ["new", "sliced", "one row"])
def test_a_pruned_mlp_is_itself(way, always_packed):
    mlp, x = make_packed_mlp(), inputs()
    kept = 1 if way == "one row" else 40
    for name in NAMES:
        layer = getattr(mlp, name)
        index = (slice(None), slice(0, kept)) if name == "down_proj" else (slice(0, kept),)
        for leaf in ("weight", "bias"):
            if leaf == "bias" and name == "down_proj":
                continue
            part = getattr(layer, leaf).data[index[: getattr(layer, leaf).ndim]]
            if way == "sliced":
                getattr(layer, leaf).data = part
            else:
                setattr(layer, leaf, nn.Parameter(part.clone(), requires_grad=False))
    expected = plain(mlp, x)
    assert_equal_to(mlp(x), expected, TOLERANCE)


@pytest.mark.parametrize("packed", [True, False])
def test_trap27_trainable_parameters_get_their_gradients(packed, always_packed, device):
    mlp, x = (make_packed_mlp if packed else make_mlp)(device=device), inputs(device=device)
    mlp.requires_grad_(True)
    gradients = []
    for run in (mlp, lambda x: plain(mlp, x)):
        gradients.append(torch.autograd.grad(run(x).square().sum(), list(mlp.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert_equal_to(ours, theirs)
    assert (mlp._gate_up._weights.tensor([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None) == packed
    assert mlp.down_proj.weight.is_contiguous()


@pytest.mark.parametrize("name", [name + "." + leaf for name in NAMES for leaf in ("weight", "bias")])
def test_one_trainable_parameter_gets_its_gradient(name, always_packed):
    mlp, x = make_packed_mlp(), inputs()
    parameter = mlp.get_parameter(name).requires_grad_()
    (ours,) = torch.autograd.grad(mlp(x).square().sum(), parameter)
    (theirs,) = torch.autograd.grad(plain(mlp, x).square().sum(), parameter)
    assert_equal_to(ours, theirs)


@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("hidden_dim", [90, 128])
def test_unpacked_weights_are_joined_for_a_call_if_that_pays(hidden_dim, wants_gradient, always_packed, monkeypatch):
    """Padded, rows begin at multiples of 16 bytes. Otherwise training saves the copy, and inference does not: its
    results must be those of a graph, which multiplies by packed weights."""
    mlp = make_mlp(80, hidden_dim).requires_grad_(wants_gradient)
    before = [parameter.data_ptr() for parameter in mlp.parameters()]
    products, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: products.append(tuple(args[1].shape)) or linear(*args))
    mlp(inputs())
    separate = [(128, 80), (128, 80), (80, 128)]
    assert products == ([(256, 80), (80, 128)] if hidden_dim == 90 or not wants_gradient else separate)
    assert [parameter.data_ptr() for parameter in mlp.parameters()] == before


@pytest.mark.parametrize("packed", [True, False])
def test_training_multiplies_by_queries_keys_and_values_at_once(packed, always_packed, monkeypatch):
    attention, x = make_attention().requires_grad_(True), inputs(48)
    if packed:
        pack(attention)
    products, linear = [], nn.functional.linear
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *args: products.append(tuple(args[1].shape)) or linear(*args))
        ours = project(attention, x)
    assert products == [(48 + 16 + 16, 48)]
    wanted = [
        parameter
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        for parameter in layer.parameters()
    ]
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    theirs = torch.cat(projections(attention, x), dim=-1)
    for mine, other in zip(*(torch.autograd.grad(out, wanted, probe) for out in (ours, theirs)), strict=True):
        assert_equal_to(mine, other, TOLERANCE)


def test_gradients_flow_through_frozen_packed_weights(always_packed, device):
    mlp, x = make_packed_mlp(device=device), inputs(device=device).requires_grad_()
    (ours,) = torch.autograd.grad(mlp(x).square().sum(), x)
    assert is_packed(mlp)
    (theirs,) = torch.autograd.grad(plain(mlp, x).square().sum(), x)
    assert_equal_to(ours, theirs)


def test_training_after_inference_moves_the_packed_weights(always_packed, device):
    mlp, x = make_packed_mlp(device=device).requires_grad_(True), inputs(device=device)
    with torch.no_grad():
        before = mlp(x)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.1)
    mlp(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = mlp(x)
        assert_equal_to(after, plain(mlp, x), TOLERANCE)
    assert not torch.allclose(before, after)


@pytest.mark.slow
def test_a_compiled_mlp_does_not_use_packed_weights(always_packed):
    mlp, x = make_packed_mlp(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    assert_equal_to(compiled(x), plain(mlp, x), TOLERANCE)


def test_functional_call_uses_what_it_is_given(always_packed):
    mlp, x = make_packed_mlp(), inputs()
    other = make_mlp(seed=1)
    given = {name: value.clone() for name, value in other.state_dict().items()}
    assert_equal_to(torch.func.functional_call(mlp, given, (x,)), plain(other, x), TOLERANCE)
    assert not is_packed(other)
    assert_equal_to(mlp(x), plain(make_mlp(), x), TOLERANCE)


def test_can_be_packed_says_no_on_a_cpu():
    mlp = make_mlp()
    assert not can_be_packed(mlp)
    mlp(inputs())
    assert not is_packed(mlp)


class LayerOfAnotherKind(nn.Linear):
    """As quantised layers are."""


class ParameterOfAnotherKind(nn.Parameter):
    """As quantised and sharded parameters are."""


def give_another_kind_of_parameter(mlp):
    mlp.up_proj.weight = ParameterOfAnotherKind(mlp.up_proj.weight.data, requires_grad=False)


OBSTACLES = {
    "another kind of layer": lambda mlp: setattr(mlp, "up_proj", LayerOfAnotherKind(80, 90).requires_grad_(False)),
    "another kind of parameter": give_another_kind_of_parameter,
    "tied": lambda mlp: setattr(mlp.up_proj, "weight", mlp.gate_proj.weight),
    "other dtype": lambda mlp: mlp.up_proj.double(),
    "hooked": lambda mlp: mlp.down_proj.register_forward_hook(lambda module, args, out: None),
    "replaced forward": lambda mlp: setattr(mlp.gate_proj, "forward", mlp.gate_proj.forward),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_an_obstacle_leaves_the_layers_of_its_product_unpacked(obstacle, always_packed):
    mlp = make_mlp()
    OBSTACLES[obstacle](mlp)
    before = [parameter.data_ptr() for parameter in mlp.parameters()]
    pack(mlp)
    moved = [name for (name, p), ptr in zip(mlp.named_parameters(), before, strict=True) if p.data_ptr() != ptr]
    others = [name for name, _ in mlp.named_parameters() if "down" not in name]
    assert moved == (others if obstacle == "hooked" else ["down_proj.weight"])


def test_can_be_packed_says_no_under_a_hook_of_all_modules(always_packed):
    mlp = make_mlp()
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert not can_be_packed(mlp)
    finally:
        hook.remove()
    assert can_be_packed(mlp)


def test_trap26_nothing_is_packed_inside_somebodys_capture(always_packed, monkeypatch):
    """Copies in a capture are only recorded: parameters would lie in memory that has no values."""
    mlp, x = make_mlp(), inputs()
    expected = plain(mlp, x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not can_be_packed(mlp)
    assert_equal_to(mlp(x), expected)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pack(mlp)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_packed(mlp)
    assert_equal_to(mlp(x), expected)


def test_a_move_that_moves_nothing_leaves_the_parameters_packed(always_packed):
    mlp = make_packed_mlp()
    before = [holder.tensor(parameters) for child in mlp.modules() for holder, parameters in groups_of(child)]
    addresses = [parameter.data_ptr() for parameter in mlp.parameters()]
    mlp.to("cpu").float()
    assert is_packed(mlp)
    assert [parameter.data_ptr() for parameter in mlp.parameters()] == addresses
    released = [weakref.ref(tensor) for tensor in before]
    del before
    mlp.to(torch.bfloat16)
    assert is_packed(mlp), "moved weights are packed again"
    assert all(tensor() is None for tensor in released)


def test_a_model_without_values_has_contiguous_weights_and_no_packed_memory(always_packed, monkeypatch):
    """accelerate moves a model to the meta device before it shards it."""
    mlp = make_packed_mlp()
    monkeypatch.setattr(nn.Parameter, "is_cuda", False)
    mlp.to("meta")
    assert all(parameter.is_contiguous() for parameter in mlp.parameters())
    assert all(holder._packing is None for child in mlp.modules() for holder, _ in groups_of(child))


def test_a_replica_whose_weights_are_plain_attributes_is_not_packed(always_packed):
    """As nn.DataParallel makes them."""
    mlp, x = make_mlp(), inputs()
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        for name, value in list(layer._parameters.items()):
            del layer._parameters[name]
            setattr(layer, name, value.detach())
    assert_equal_to(mlp(x), plain(mlp, x))


def test_transposed_parameters_pad_their_columns():
    parameter = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    before, holder = parameter.detach().clone(), PackedParameters(6, [slice(0, 4)], transposed=True)
    packed = packed_of(holder, parameter)
    assert torch.equal(packed.t(), nn.functional.pad(before, (0, 2)))
    assert torch.equal(parameter, before)
    assert lies_in(parameter, packed)
    parameter.mul_(2)
    assert torch.equal(packed_of(holder, parameter).t(), nn.functional.pad(2 * before, (0, 2)))


@pytest.mark.parametrize(("hidden_dim", "padded"), [(128, False), (129, True)])
def test_the_down_projection_is_packed_where_it_needs_padding(hidden_dim, padded, always_packed):
    mlp = make_mlp(16, hidden_dim)
    before = mlp.down_proj.weight.data_ptr()
    pack(mlp)
    assert (type(mlp.down_proj) is PaddedLinear) == padded
    assert (mlp.down_proj.weight.data_ptr() != before) == padded


# --- PaddedLinear: contiguous for whoever takes parameters over ---


@pytest.fixture
def packed_mlp(always_packed):
    mlp = make_packed_mlp()
    assert not mlp.down_proj.weight.is_contiguous()
    return mlp


def ask_for_parameters(mlp):
    return dict(mlp.down_proj.named_parameters(recurse=False))["weight"]


def ask_as_accelerate(mlp):
    return next(iter(mlp.down_proj.parameters(recurse=False)))


def ask_for_state(mlp):
    return mlp.state_dict()["down_proj.weight"]


def train(mlp):
    return mlp.requires_grad_(True).train().down_proj.weight


def want_a_gradient(mlp):
    mlp.requires_grad_(True)(inputs())
    return mlp.down_proj.weight


TAKEN_OVER = [ask_for_parameters, ask_as_accelerate, ask_for_state, train, want_a_gradient]


@pytest.mark.parametrize("take", TAKEN_OVER, ids=lambda take: take.__name__)
def test_a_weight_that_is_taken_over_is_contiguous_and_itself(take, packed_mlp):
    weight, x = packed_mlp.down_proj.weight, inputs()
    before, packed = weight.clone(), weakref.ref(packed_mlp.down_proj.padded_weight._base)
    expected = plain(packed_mlp, x)
    taken = take(packed_mlp)
    assert packed() is None
    assert packed_mlp.down_proj.weight is weight
    assert weight.is_contiguous() and taken.is_contiguous()
    assert torch.equal(weight, before)
    assert taken.data_ptr() == weight.data_ptr(), "who writes into it changes the parameter"
    assert_equal_to(packed_mlp(x), expected, TOLERANCE)


@pytest.mark.parametrize("take", TAKEN_OVER, ids=lambda take: take.__name__)
def test_a_weight_that_was_taken_over_is_packed_again_unless_it_is_trained(take, packed_mlp):
    """A fused optimiser refuses a weight whose strides are not those of its state."""
    take(packed_mlp)
    pack(packed_mlp)
    assert is_packed(packed_mlp) == (take not in (train, want_a_gradient))
    packed_mlp.eval()
    pack(packed_mlp)
    assert is_packed(packed_mlp) == (take is not want_a_gradient)


def test_a_frozen_weight_stays_packed_in_training(packed_mlp):
    assert is_packed(packed_mlp.train())
    packed_mlp.gate_proj.requires_grad_(True)
    packed_mlp(inputs()).sum().backward()
    assert is_packed(packed_mlp)


def test_packed_and_unpacked_down_projections_take_padded_and_unpadded_inputs(packed_mlp):
    layer, width = packed_mlp.down_proj, packed_mlp.hidden_dim
    x = inputs(width)
    padded = nn.functional.pad(x, (0, 128 - width))
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for _ in range(2):
        for given in (x, padded):
            assert_equal_to(apply_padded_linear(layer, given, width), expected, TOLERANCE)
        layer.restore()


@pytest.mark.gpu
def test_can_be_packed_says_yes_on_a_gpu_and_no_to_a_mix():
    mlp = make_mlp()
    assert not can_be_packed(mlp)
    assert is_packed(mlp.to("cuda"))
    mlp.up_proj.half()
    assert not can_be_packed(mlp)
    mlp.up_proj.float().cpu()
    assert not can_be_packed(mlp)


# --- the decoder's queries, keys and values ---


def make_attention(device="cpu", seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = dataclasses.replace(FAMILY.config.text, mrope_section=(1, 1, 2), **sizes)
    with torch.device(device):
        return DecoderAttention(config, 0, qkv_bias=True, qk_norm=None).requires_grad_(False)


def projections(attention, x):
    return [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]


def project(attention, x):
    return attention._qkv(attention, x)


def assert_projects(attention, x):
    assert_equal_to(project(attention, x), torch.cat(projections(attention, x), dim=-1), TOLERANCE)


def test_queries_keys_and_values_are_one_product(always_packed, monkeypatch):
    attention, x = make_attention(), inputs(48)
    names = {name: value.clone() for name, value in attention.state_dict().items()}
    pack(attention)
    assert is_packed(attention)
    products = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: products.append(args[1].shape) or linear(*args))
    project(attention, x)
    monkeypatch.undo()
    assert products == [(48 + 16 + 16, 48)]
    assert_projects(attention, x)
    assert all(torch.equal(value, names[name]) for name, value in attention.state_dict().items())


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_wrapped_projection_is_called(name, always_packed):
    """As peft wraps it."""
    attention, x = make_attention(), inputs(48)
    pack(attention)
    setattr(attention, name, Scaled(getattr(attention, name)))
    assert_projects(attention, x)


def test_projections_changed_in_place_moved_or_replaced_are_seen(always_packed):
    attention, x = make_attention(), inputs(48)
    pack(attention)
    attention.k_proj.weight.mul_(1.5)
    attention.v_proj.bias.add_(1)
    assert_projects(attention, x)
    attention.q_proj.weight.data = attention.q_proj.weight.data.clone() * 2
    assert_projects(attention, x)
    attention.v_proj = nn.Linear(48, 16).requires_grad_(False)
    assert_projects(attention, x)
    attention.to(torch.float64)
    assert is_packed(attention)
    assert_projects(attention, x.double())


# --- the model ---


@pytest.fixture
def packed_model(load, device, always_packed):
    """A model of one's own that is packed."""
    model = load(device=device).requires_grad_(False)
    assert is_packed(model)
    return model


def encoded(model):
    batch = model.processor(FRAMES.to(model.device), dtype=model.dtype)
    with torch.no_grad():
        return model.visual(**batch)


def addresses(model):
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_a_packed_model_is_left_alone_by_calls_and_by_packing_again(packed_model):
    packed = addresses(packed_model)
    pack(packed_model.visual, packed_model.model)
    with torch.no_grad():
        packed_model(FRAMES.to(packed_model.device), ["Go.", "Stop."])
    assert addresses(packed_model) == packed


@pytest.fixture
def own(load, monkeypatch):
    """A model of one's own that is not packed."""
    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "is_cuda", False, raising=False)
        return load().requires_grad_(False)


def test_pack_leaves_alone_what_cannot_be_packed(own, always_packed):
    wrapped, hooked = own.model.layers[0].mlp, own.visual.blocks[1].mlp
    wrapped.gate_proj = Scaled(wrapped.gate_proj)
    hooked.up_proj.register_forward_hook(lambda module, args, out: None)
    before = addresses(wrapped.gate_proj), addresses(hooked.up_proj)
    pack(own)
    assert (addresses(wrapped.gate_proj), addresses(hooked.up_proj)) == before
    assert is_packed(own.model.layers[1].mlp)


def test_pack_without_memory_leaves_the_rest_unpacked(own, always_packed, monkeypatch):
    before = {name: value.clone() for name, value in own.state_dict().items()}
    original, calls = PackedParameters.pack, []

    def full_at_the_third(self, parameters):
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(PackedParameters, "pack", full_at_the_third)
        pack(own)
    groups = [group for child in own.modules() for group in groups_of(child)]
    assert len(calls) == 3
    assert sum(holder.tensor(parameters) is not None for holder, parameters in groups) == 2
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    pack(own)
    assert is_packed(own)


def test_names_shapes_and_values_of_the_parameters_are_the_checkpoints(packed_model, load):
    ours, expected = packed_model.state_dict(), load().state_dict()
    assert list(ours) == list(expected)
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        assert torch.equal(ours[name].cpu(), value), name
    assert [name for name, _ in packed_model.named_parameters()] == list(expected)
    assert sum(p.numel() for p in packed_model.parameters()) == sum(x.numel() for x in expected.values())


def test_saving_writes_bitwise_what_was_loaded(packed_model, checkpoint, tmp_path):
    packed_model.save_pretrained(tmp_path)
    written = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    original = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].is_contiguous()
        assert torch.equal(written[name], value), name
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert files <= 1.01 * sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


@pytest.mark.slow
def test_saving_in_shards_is_as_without_packing(packed_model, load, tmp_path, monkeypatch):
    """Tensors that share a storage go into one shard; packed parameters must not look like that."""
    split = huggingface_hub.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        huggingface_hub,
        "split_torch_state_dict_into_shards",
        lambda *args, **options: split(*args, **options | {"max_shard_size": 200_000}),
    )
    packed_model.save_pretrained(tmp_path / "packed")
    load().save_pretrained(tmp_path / "plain")
    packed, plain = (
        json.loads((tmp_path / n / "model.safetensors.index.json").read_text()) for n in ("packed", "plain")
    )
    assert len(set(plain["weight_map"].values())) > 2
    again = QwenBatchedVL.from_pretrained(tmp_path / "packed", device="cpu")
    for name, value in again.state_dict().items():
        assert torch.equal(value, packed_model.state_dict()[name].cpu()), name
    assert packed == plain


def test_safetensors_takes_a_packed_state_dict_or_model(packed_model, load, tmp_path):
    """It refuses tensors that share memory or are not contiguous; of a model it would write one of them alone."""
    save_file(packed_model.state_dict(), tmp_path / "state.safetensors")
    save_model(packed_model, str(tmp_path / "model.safetensors"))
    for name in ("state", "model"):
        loaded, state = load_file(tmp_path / f"{name}.safetensors"), load().state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.slow
def test_load_state_dict_after_packing_is_seen(packed_model, load, device):
    other = load(device=device).requires_grad_(False)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    for assign in (False, True):
        packed_model.load_state_dict(load(device=device).state_dict())
        missing, unexpected = packed_model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert not missing
        assert not unexpected
        packed_model.requires_grad_(False)
        assert_equal_to(encoded(packed_model), encoded(other), TOLERANCE)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_packed_model_is_independent(name, packed_model):
    other = COPIES[name](packed_model)
    pack(packed_model, other)
    before = encoded(packed_model)
    assert torch.equal(encoded(other), before)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    changed = encoded(other)
    assert not torch.allclose(changed, before)
    assert torch.equal(encoded(packed_model), before)
    for parameter in packed_model.parameters():
        parameter.zero_()
    assert torch.equal(encoded(other), changed)
    assert is_packed(other)


@pytest.mark.slow
def test_a_saved_state_dict_of_a_packed_model_loads(packed_model, load):
    loaded = torch.load(_saved(packed_model.state_dict()), map_location="cpu")
    fresh = load()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(loaded)
    for name, value in load().state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_a_packed_model_equals_casting_a_fresh_one(packed_model, load, dtype, device):
    packed_model.to(dtype)
    fresh = load(device=device).requires_grad_(False).to(dtype)
    for (name, ours), theirs in zip(packed_model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(encoded(packed_model), encoded(fresh))


@pytest.mark.gpu
def test_moving_a_packed_model_to_the_host_frees_the_gpu(load):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(device="cuda").requires_grad_(False)
    weights = torch.cuda.memory_allocated() - before
    assert is_packed(model)
    model.to("cpu")
    assert torch.cuda.memory_allocated() - before < weights / 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "hidden_dim"), [(80, 90), (1280, 3420)])
def test_the_real_path_on_a_gpu_packs_and_equals_the_plain_mlp(dim, hidden_dim, dtype):
    mlp, x = make_mlp(dim, hidden_dim).to("cuda", dtype), inputs(dim, 64, "cuda").to(dtype)
    assert is_packed(mlp)
    exact = plain(copy.deepcopy(mlp).double(), x.double())
    expected = plain(mlp, x)
    with torch.no_grad():
        out = mlp(x)
    if dtype == torch.float32:
        assert_equal_to(out, exact)
    else:
        assert (out - exact).norm() <= 2 * (expected - exact).norm()


# --- memory that is somebody else's ---


def test_views_of_a_flat_buffer_stay_there(always_packed):
    """FSDP2, ZeRO and flat optimisers write to their buffer: a parameter moved out of it would not see that."""
    mlp, x = make_mlp(), inputs()
    flat = torch.cat([parameter.data.flatten() for parameter in mlp.parameters()])
    parts = flat.split([parameter.numel() for parameter in mlp.parameters()])
    for parameter, part in zip(mlp.parameters(), parts, strict=True):
        parameter.data = part.view(parameter.shape)
    pack(mlp)
    flat.mul_(1.5)
    assert_equal_to(mlp(x), plain(mlp, x), TOLERANCE)
    assert all(lies_in(parameter, flat) for parameter in mlp.parameters())


def test_layers_with_the_hooks_of_fully_shard_are_not_packed(always_packed):
    mlp = make_mlp()
    for layer in (mlp.up_proj, mlp.down_proj):
        layer.register_load_state_dict_post_hook(lambda module, keys: None)
    before = addresses(mlp)
    pack(mlp)
    assert addresses(mlp) == before


def test_weights_that_fsdp_frees_are_not_joined_where_autograd_would_keep_them(always_packed, monkeypatch):
    attention, products, linear = make_attention().requires_grad_(True), [], nn.functional.linear
    attention.q_proj.register_load_state_dict_post_hook(lambda module, keys: None)
    monkeypatch.setattr(nn.functional, "linear", lambda *args: products.append(tuple(args[1].shape)) or linear(*args))
    project(attention, inputs(48))
    with torch.autocast("cpu", torch.bfloat16):
        project(attention, inputs(48))
    assert products == [(80, 48), (48, 48), (16, 48), (16, 48)]


def test_training_under_fully_shard_multiplies_by_padded_weights_too(always_packed, monkeypatch):
    """Joining moves nothing."""
    mlp, products, linear = make_mlp().requires_grad_(True), [], nn.functional.linear
    mlp.up_proj.register_load_state_dict_post_hook(lambda module, keys: None)
    monkeypatch.setattr(nn.functional, "linear", lambda *args: products.append(tuple(args[1].shape)) or linear(*args))
    mlp(inputs())
    assert products == [(256, 80), (80, 128)]


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_bias_that_is_a_plain_tensor_gets_its_gradient(always_packed, name):
    mlp = make_mlp()
    layer = getattr(mlp, name)
    bias = layer.bias.detach().clone().requires_grad_(True)
    del layer.bias
    layer.bias = bias
    assert not can_be_packed(mlp)
    assert torch.autograd.grad(mlp(inputs()).sum(), bias)[0].abs().sum() > 0
