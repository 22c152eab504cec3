"""Gradient checkpointing changes no gradient, and what is frozen keeps no activations."""

import copy
import gc
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

from qwen_batched import BatchedDecoder, BatchedVisionTransformer, QwenBatchedVL, ops
from tests.support import assert_equal_to, photos
from tests.training.gradients import gradients, photos_as_floats, probe_loss

TEXTS = ["Pick up the red block.", "", "Open the drawer."]
TARGETS = ["to the left", "", "b"]
MASK = torch.tensor([[True, False], [True, True], [False, False]])


@pytest.fixture
def fresh(load):
    """A model of one's own."""
    return load()


def uniform(device="cpu"):
    return photos(3, 2, 61, 90).to(device)


def mixed(device="cpu"):
    images = uniform(device)
    return [images[:, 0], images[:, 1, :, :, :60]]


CALLS = {
    "one size": lambda device: (uniform(device), {}),
    "mixed sizes": lambda device: (mixed(device), {}),
    "cameras missing": lambda device: (uniform(device), {"camera_mask": MASK}),
    "text only": lambda device: (None, {}),
    "layers and norm": lambda device: (uniform(device), {"layers": (0, 2, 3), "norm": "pre"}),
}


def gradients_of(model, images, options):
    frames = photos_as_floats(images)
    out = model(frames, TEXTS, targets=TARGETS, **options)
    return gradients(out.loss + probe_loss(out), model.named_parameters(), frames)


class Kept:
    """A tensor that some graph holds for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


class Saved:
    """What autograd keeps, as long as it keeps it, of what runs inside the `with` block."""

    def __enter__(self):
        self._kept = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor):
        kept = Kept(tensor)
        self._kept.add(kept)
        return kept

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    @property
    def bytes(self):
        """Weights are there anyway, and so are their transposes."""
        gc.collect()
        activations = [kept.tensor for kept in self._kept if not isinstance(kept.tensor, nn.Parameter)]
        return sum(x.nbytes for x in activations if not isinstance(x._base, nn.Parameter))


# --- the same gradients ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CALLS)
def test_trap27_gradients_are_the_same_with_and_without_checkpointing(load, device, name, side):
    model = load(device=device, padding_side=side)
    images, options = CALLS[name](device)
    expected = gradients_of(model, images, options)
    model.gradient_checkpointing_enable()
    found = gradients_of(model, images, options)
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert gradient.isfinite().all()
            assert_equal_to(found[name], gradient, tolerance=0 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_blocks_run_again_in_the_backward_pass_and_only_then(fresh, train):
    fresh.train(train)
    ran = Counter()
    for block in fresh.blocks:
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: ran.update([module]))
    fresh.gradient_checkpointing_enable()
    with torch.no_grad():
        fresh(uniform(), TEXTS)
    assert set(ran.values()) == {1}
    loss = fresh(uniform(), TEXTS, targets=TARGETS).loss
    assert set(ran.values()) == {2}
    loss.backward()
    assert len(ran) == len(fresh.blocks) and set(ran.values()) == {3}
    fresh.gradient_checkpointing_disable()
    fresh(uniform(), TEXTS, targets=TARGETS).loss.backward()
    assert set(ran.values()) == {4}


def test_hooks_of_a_block_run_once(fresh):
    """FSDP's gather weights: in the backward pass they have been gathered already."""
    ran = Counter()
    for block in fresh.blocks:
        block.register_forward_pre_hook(lambda module, args: ran.update([module]))
    fresh.gradient_checkpointing_enable()
    fresh(uniform(), TEXTS, targets=TARGETS).loss.backward()
    assert set(ran.values()) == {1}


def test_randomness_inside_a_block_is_the_same_again(fresh):
    """As LoRA's dropout."""
    for block in fresh.blocks:
        block.mlp.down_proj = nn.Sequential(block.mlp.down_proj, nn.Dropout(0.5))
    fresh.train()

    def found():
        torch.manual_seed(0)
        return gradients_of(fresh, uniform(), {})

    expected = found()
    fresh.gradient_checkpointing_enable()
    for name, gradient in found().items():
        assert torch.equal(gradient, expected[name]), name


# --- what is kept ---


def test_blocks_keep_nothing_of_their_insides(fresh):
    with Saved() as kept:
        before = fresh(uniform(), TEXTS, targets=TARGETS)
    fresh.gradient_checkpointing_enable()
    with Saved() as recomputed:
        after = fresh(uniform(), TEXTS, targets=TARGETS)
    assert torch.equal(before.loss, after.loss)
    assert 0 < recomputed.bytes < 0.2 * kept.bytes


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_frozen_vision_transformer_has_no_graph(fresh, checkpointing):
    fresh.visual.requires_grad_(False)
    if checkpointing:
        fresh.gradient_checkpointing_enable()
    with Saved() as saved:
        features = fresh.encode_images(uniform())
    assert not features.requires_grad
    assert saved.bytes == 0
    fresh(uniform(), TEXTS, targets=TARGETS).loss.backward()
    trained = {name for name, parameter in fresh.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in fresh.named_parameters() if name.startswith("model.")}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_frozen_blocks_before_the_first_that_trains_keep_nothing(fresh, checkpointing):
    fresh.requires_grad_(False)
    fresh.model.layers[2:].requires_grad_(True)
    if checkpointing:
        fresh.gradient_checkpointing_enable()
    with Saved() as saved:
        below = fresh(uniform(), TEXTS, layers=(0, 1))
    assert saved.bytes == 0 and not any(hidden.requires_grad for hidden in below.hidden_states)
    out = fresh(uniform(), TEXTS, layers=(2, 3, -1))
    assert [hidden.requires_grad for hidden in out.hidden_states] == [False, True, True]
    probe_loss(out).backward()
    for name, parameter in fresh.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("model.layers.2.", "model.layers.3.")), name


def test_a_model_that_is_frozen_whole_keeps_nothing(fresh):
    fresh.requires_grad_(False)
    fresh.gradient_checkpointing_enable()
    with Saved() as saved:
        out = fresh(uniform(), TEXTS, targets=TARGETS)
    assert saved.bytes == 0 and not out.loss.requires_grad


# --- the interface ---


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": False}, {"preserve_rng_state": False, "debug": False}])
def test_it_is_switched_on_and_off_like_transformers(fresh, options):
    assert not fresh.is_gradient_checkpointing
    fresh.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert fresh.is_gradient_checkpointing
    fresh(uniform(), TEXTS, targets=TARGETS).loss.backward()
    assert copy.deepcopy(fresh).is_gradient_checkpointing
    fresh.gradient_checkpointing_disable()
    assert not fresh.is_gradient_checkpointing


def test_every_n_layers_leaves_the_others_alone(fresh):
    fresh.gradient_checkpointing_enable(every_n_layers=3)
    assert [block.recomputing is not None for block in fresh.blocks] == [index % 3 == 0 for index in range(10)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ValueError, "reentrant"),
        ({"gradient_checkpointing_kwargs": {"reentrant": False}}, TypeError, "'reentrant'"),
        ({"offload": True}, ValueError, "offload"),
        ({"every_n_layers": 0}, ValueError, "at least 1"),
        ({"every_n_layers": True}, ValueError, "at least 1"),
    ],
)
def test_what_is_not_implemented_is_refused(fresh, arguments, error, message):
    with pytest.raises(error, match=message):
        fresh.gradient_checkpointing_enable(**arguments)
    assert not fresh.is_gradient_checkpointing


def test_the_vision_transformer_and_the_decoder_can_do_it_alone(checkpoint):
    visual, decoder = (
        kind.from_pretrained(checkpoint, device="cpu") for kind in (BatchedVisionTransformer, BatchedDecoder)
    )
    for network in (visual, decoder):
        network.gradient_checkpointing_enable()
        assert network.is_gradient_checkpointing
    whole = QwenBatchedVL.from_pretrained(checkpoint, device="cpu")
    whole.visual.gradient_checkpointing_enable()
    assert [block.recomputing is not None for block in whole.blocks] == [True] * 6 + [False] * 4


def test_the_blocks_are_those_of_both_networks(fresh):
    assert fresh.blocks == [*fresh.visual.blocks, *fresh.model.layers]
    assert {type(block).__name__ for block in fresh.blocks} == set(fresh._no_split_modules)


@pytest.mark.parametrize("first", ["adapter", "checkpointing"])
def test_peft_adapters_get_the_same_gradients_with_frozen_embeddings(fresh, first):
    """peft asks for inputs that want a gradient, which the reentrant variant alone needs."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "q_proj", "down_proj"], init_lora_weights=False)
    if first == "checkpointing":
        fresh.gradient_checkpointing_enable()
    model = peft.get_peft_model(fresh, config)

    def found():
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name for name in parameters)
        return gradients(model(uniform(), TEXTS, targets=TARGETS).loss, parameters)

    if first == "adapter":
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    recomputed = found()
    assert any("visual.blocks.0." in name for name in recomputed) and any("layers.0." in name for name in recomputed)
    model.gradient_checkpointing_disable()
    for name, gradient in found().items():
        assert float(gradient.norm()) > 0, name
        assert torch.equal(recomputed[name], gradient), name
    assert not fresh.model.embed_tokens(torch.tensor([1])).requires_grad


def test_the_embeddings_are_where_peft_looks_for_them(fresh):
    assert fresh.get_input_embeddings() is fresh.model.embed_tokens
    assert fresh.get_output_embeddings() is fresh.lm_head


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mask_on", [None, "cpu", "cuda"])
def test_a_training_forward_makes_no_synchronisation(load, dtype, checkpointing, mask_on):
    model = load(device="cuda", dtype=dtype)
    mask = None if mask_on is None else MASK.to(mask_on)
    if checkpointing:
        model.gradient_checkpointing_enable()
    images = uniform("cuda")
    model(images, TEXTS, mask, targets=TARGETS).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(images, TEXTS, mask, targets=TARGETS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
def test_checkpointing_takes_less_memory(load):
    model = load(device="cuda")
    images = photos(8, 2, 224, 224).cuda()

    def peak():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(images, ["a"] * 8, targets=["b"] * 8).loss.backward()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before

    peak()
    kept = peak()
    model.gradient_checkpointing_enable()
    assert peak() < 0.6 * kept


def test_blocks_run_again_on_the_backend_that_was_chosen_for_them(load, monkeypatch):
    """Backward passes on a GPU have threads of their own, which start with the default."""
    model, seen = load(), []
    model.gradient_checkpointing_enable()
    norm = model.model.layers[0].input_layernorm
    monkeypatch.setattr(norm, "forward", lambda *args, own=norm.forward: seen.append(ops.backend()) or own(*args))
    with ops.use_backend("reference"):
        loss = probe_loss(model(photos(1, 1, 56, 56), ["stop"]))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert seen == ["reference", "reference"]
