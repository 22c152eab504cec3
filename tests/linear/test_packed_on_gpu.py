"""Packed weights on a GPU: training, optimisers, sharding and saving after graphs were captured."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from qwen_batched.linear.fused import FusedLinear
from tests.support import assert_equal_to, photos

pytestmark = pytest.mark.gpu

FRAMES, TEXTS = photos(2, 2, 56, 84), ["Pick up the red block.", "Open the drawer, then close it again."]
RATE = 1e-3


@pytest.fixture
def used(load):
    """A model of one's own that has been captured and replayed."""
    model = load(device="cuda")
    with torch.no_grad():
        for _ in range(3):
            model(FRAMES.cuda(), TEXTS)
    assert not model.visual.blocks[0].mlp.down_proj.weight.is_contiguous()
    return model


@pytest.fixture
def one_process():
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield
    dist.destroy_process_group()


def hidden_states(model, **options):
    out = model(FRAMES.cuda(), TEXTS, **options)
    return out.last_hidden_state[out.attention_mask]


def gradients(model):
    model.zero_grad()
    hidden_states(model).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def unpacked(model):
    """A copy whose layers run one after the other."""
    model = copy.deepcopy(model)
    for child in model.modules():
        for fused in (value for value in vars(child).values() if isinstance(value, FusedLinear)):
            fused.joins = False
    return model


def fused_linears(model):
    return [v for child in model.modules() for v in vars(child).values() if isinstance(v, FusedLinear)]


def test_gradients_of_packed_weights_are_those_of_separate_layers(used):
    for state in ("first", "again"):
        found, expected = gradients(used), gradients(unpacked(used))
        assert found.keys() == expected.keys(), state
        for name, gradient in found.items():
            assert_equal_to(gradient, expected[name])


@pytest.mark.parametrize("save", [False, True])
def test_a_fused_optimiser_takes_every_step_between_evaluations_and_saves(used, save):
    """It refuses a weight whose strides are not those of its state."""
    optimizer = torch.optim.AdamW(used.parameters(), lr=RATE, fused=True)
    before = []
    for _ in range(3):
        gradients(used)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen = [hidden_states(used) for _ in range(3)]  # run, captured, replayed
            expected = hidden_states(used, cuda_graph=False)
        for states in seen:
            assert_equal_to(states, expected)
        before.append(expected)
        if save:
            used.state_dict()
    assert not torch.allclose(before[0], before[-1])


def test_a_model_in_use_is_saved_by_safetensors(used, load, tmp_path):
    save_file(used.state_dict(), tmp_path / "model.safetensors")
    saved, expected = load_file(tmp_path / "model.safetensors"), load().state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_a_model_in_use_can_be_sharded_and_its_packed_memory_is_released(used, one_process):
    expected = hidden_states(used, cuda_graph=False).detach()
    for block in (*used.visual.blocks, *used.model.layers):
        fully_shard(block)
    fully_shard(used)
    with torch.no_grad():  # the graphs notice, and let go of the parameters that they were captured with
        assert_equal_to(hidden_states(used), expected)
    assert all(fused._weights._packing is None for fused in fused_linears(used))
    hidden_states(used).square().mean().backward()
    assert all(parameter.grad is not None for parameter in used.model.layers.parameters())


def test_a_model_in_use_is_sharded_as_accelerate_does(used, one_process):
    expected = hidden_states(used, cuda_graph=False).detach()
    state = {name: value.clone() for name, value in used.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # PyTorch asks for every parameter by its own name
    used.to("meta")
    assert all(parameter.is_contiguous() for parameter in used.parameters())
    for block in used.blocks:
        fully_shard(block)
    fully_shard(used)
    used.to_empty(device="cuda")
    set_model_state_dict(used, state, options=StateDictOptions(full_state_dict=True, strict=False))
    used.tie_weights()
    assert_equal_to(hidden_states(used).detach(), expected)


def test_sharding_frees_the_packed_memory(load, one_process):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(device="cuda")
    weights = torch.cuda.memory_allocated() - before
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert torch.cuda.memory_allocated() - before < 1.2 * weights
