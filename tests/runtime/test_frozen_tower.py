"""Training on a frozen vision transformer: its features come from a graph, all gradients stay what they are."""

import pytest
import torch
from torch import nn

from qwen_batched import QwenBatchedVL
from qwen_batched.calls import Calls
from qwen_batched.testing import write_checkpoint
from tests.support import assert_equal_to, photos

TEXTS = ["Pick up the red block.", "a"]
MASK = torch.tensor([[True, False], [True, True]])
MIXED = [photos(2, 1, 56, 84)[:, 0], photos(2, 1, 84, 56)[:, 0]]
CALLS = {
    "uniform": lambda seed: {"images": photos(2, 2, 56, 84, seed=seed)},
    "mask": lambda seed: {"images": photos(2, 2, 56, 84, seed=seed), "camera_mask": MASK},
    "mixed sizes": lambda seed: {"images": MIXED if seed == 0 else [x.flip(-1) for x in MIXED]},
    "floats": lambda seed: {"images": photos(2, 2, 56, 84, seed=seed) / 255, "resize": (28, 56)},
    "targets": lambda seed: {"images": photos(2, 2, 56, 84, seed=seed), "targets": ["Yes.", "No, it is not."]},
}


@pytest.fixture
def frozen(load, fake, monkeypatch):
    """A model whose decoder is trained and whose graphs only pretend to be CUDA's."""
    monkeypatch.setattr(Calls, "_may_use_graphs", lambda self, processor, device, wanted: wanted)
    return freeze_tower(load())


def freeze_tower(model):
    model.visual.requires_grad_(False)
    return model


def placed(arguments, device):
    def moved(value):
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return [x.to(device) for x in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}


def step(model, arguments, **options):
    """Hidden states and the gradients of all that is trained."""
    out = model(texts=TEXTS, **placed(arguments, model.device), **options)
    loss = out.last_hidden_state[out.attention_mask].square().mean() + (0 if out.loss is None else out.loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out.last_hidden_state.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]


def assert_same(ours, theirs, equal=torch.equal):
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine is None) == (expected is None)
        assert mine is None or equal(mine, expected)


@pytest.mark.parametrize("name", CALLS)
def test_the_tower_is_replayed_and_gradients_are_the_same(frozen, fake, name):
    for seed in (0, 1, 2, 1):
        assert_same(step(frozen, CALLS[name](seed)), step(frozen, CALLS[name](seed), cuda_graph=False))
    assert (fake.captured, fake.replayed) == (1, 3)


@pytest.fixture
def deep(tmp_path, fake, monkeypatch):
    """The same of Qwen3-VL, whose decoder takes features of blocks in between too."""
    monkeypatch.setattr(Calls, "_may_use_graphs", lambda self, processor, device, wanted: wanted)
    write_checkpoint(tmp_path, "qwen3-vl-tiny", image={"min_pixels": 32 * 32})
    return freeze_tower(QwenBatchedVL.from_pretrained(tmp_path, device="cpu"))


@pytest.mark.parametrize("name", CALLS)
def test_trap_qwen3_the_graph_of_a_frozen_tower_gives_deep_features(deep, fake, name):
    calls = [CALLS[name](seed) for seed in (0, 1, 2, 1)]
    calls = [call | {"resize": (32, 64)} if name == "floats" else call for call in calls]
    for call in calls:
        assert_same(step(deep, call), step(deep, call, cuda_graph=False))
    assert (fake.captured, fake.replayed) == (1, 3)


def test_trap_qwen3_deep_mergers_that_are_trained_keep_a_frozen_tower_from_a_graph(deep, fake):
    deep.visual.deepstack_merger_list.requires_grad_(True)
    mergers = {id(parameter) for parameter in deep.visual.deepstack_merger_list.parameters()}
    for seed in (0, 1, 2):
        call = CALLS["uniform"](seed)
        found = step(deep, call)
        assert_same(found, step(deep, call, cuda_graph=False))
        trained = [parameter for parameter in deep.parameters() if parameter.requires_grad]
        gradients = [x for x, parameter in zip(found[1:], trained, strict=True) if id(parameter) in mergers]
        assert len(gradients) == len(mergers) and all(x.any() for x in gradients)
    assert fake.captured == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu_the_tower_is_replayed_and_gradients_are_the_same(load, name):
    model = freeze_tower(load(device="cuda"))
    for seed in (0, 1, 2, 1):
        expected = step(model, CALLS[name](seed), cuda_graph=False)
        for ours, theirs in zip(step(model, CALLS[name](seed)), expected, strict=True):
            if theirs is not None:
                assert_equal_to(ours, theirs)
    assert sum(map(bool, model._calls.tower._calls.values())) == 1


def test_features_of_a_step_outlive_the_next(frozen):
    """Gradients may be taken after more steps of the same shape."""
    first = CALLS["uniform"](0)
    expected = step(frozen, first, cuda_graph=False)
    for _ in range(2):
        step(frozen, first)
    out = frozen(texts=TEXTS, **first)
    for seed in (1, 2):
        step(frozen, CALLS["uniform"](seed))
    trained = [parameter for parameter in frozen.parameters() if parameter.requires_grad]
    loss = out.last_hidden_state[out.attention_mask].square().mean()
    assert_same(torch.autograd.grad(loss, trained, allow_unused=True), expected[1:])


def test_encode_images_shares_the_graph(frozen, fake):
    images = photos(2, 2, 56, 84)
    for _ in range(2):
        step(frozen, {"images": images})
    frozen.encode_images(images)
    assert (fake.captured, fake.replayed) == (1, 2)


def test_generation_takes_its_features_from_a_graph(frozen, fake):
    images = photos(2, 2, 56, 84)
    expected = frozen.generate(images, TEXTS, max_new_tokens=1, cuda_graph=False).texts
    for count in range(3):  # one token takes no step, and so no graph of its own
        assert frozen.generate(images, TEXTS, max_new_tokens=1).texts == expected
        assert len(frozen._calls.tower) == min(count, 1)
        assert fake.captured == 2 * min(count, 1), "and the prompt's"


def test_what_a_hidden_wrapper_trains_is_never_captured(frozen, fake, monkeypatch):
    gain = torch.ones(1, requires_grad=True)
    embed = type(frozen.visual.patch_embed).forward
    monkeypatch.setattr(type(frozen.visual.patch_embed), "forward", lambda self, x: gain * embed(self, x))
    for seed in range(4):
        gain.grad = None
        frozen(texts=TEXTS, **CALLS["uniform"](seed)).last_hidden_state.square().mean().backward()
        assert gain.grad.abs() > 0
    with torch.no_grad():
        for _ in range(3):
            frozen.encode_images(photos(2, 2, 56, 84))
    gain.grad = None
    frozen(texts=TEXTS, **CALLS["uniform"](0)).last_hidden_state.square().mean().backward()
    assert gain.grad.abs() > 0


def test_hooks_of_the_tower_see_the_same_arguments_in_every_call(frozen):
    seen = []
    frozen.visual.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments)))
    for cuda_graph in (True, False):
        frozen(photos(2, 2, 56, 84), TEXTS, cuda_graph=cuda_graph)
    assert seen == [3, 3]


def test_a_tower_put_in_the_place_of_a_trained_one_is_replayed(load, fake, monkeypatch):
    monkeypatch.setattr(Calls, "_may_use_graphs", lambda self, processor, device, wanted: wanted)
    model, frozen_tower = load(), freeze_tower(load()).visual
    with torch.no_grad():
        model.encode_images(photos(2, 2, 56, 84))
    model.visual = frozen_tower
    for seed in range(4):
        step(model, CALLS["uniform"](seed))
    assert fake.captured == 1


def assert_no_graph(model, fake, arguments):
    for seed in range(3):
        assert_same(step(model, arguments(seed)), step(model, arguments(seed), cuda_graph=False))
    assert fake.captured == 0


def test_a_trained_tower_is_not_replayed(frozen, fake):
    frozen.visual.merger.ln_q.weight.requires_grad_(True)
    assert_no_graph(frozen, fake, CALLS["uniform"])
    assert step(frozen, CALLS["uniform"](0))[1] is not None


def test_frames_that_want_a_gradient_get_it(frozen, fake):
    for seed in range(3):
        frames = (photos(2, 2, 56, 84, seed=seed) / 255).requires_grad_(True)
        frozen(frames, TEXTS, resize=None).last_hidden_state.square().mean().backward()
        assert frames.grad.abs().sum() > 0
    assert fake.captured == 0


def test_a_trained_layer_that_a_hook_adds_gets_its_gradient(frozen, fake):
    projection = nn.Linear(frozen.config.text.hidden_size, frozen.config.text.hidden_size)
    frozen.visual.register_forward_hook(lambda module, arguments, features: projection(features))
    for seed in range(3):
        projection.zero_grad()
        frozen(photos(2, 2, 56, 84, seed=seed), TEXTS).last_hidden_state.square().mean().backward()
        assert projection.weight.grad.abs().sum() > 0
    assert fake.captured == 0


def test_a_tower_that_is_unfrozen_between_steps_gets_gradients(frozen, fake):
    for seed in range(3):
        step(frozen, CALLS["uniform"](seed))
    assert fake.captured == 1
    frozen.visual.requires_grad_(True)
    loss = frozen(texts=TEXTS, **CALLS["uniform"](0)).last_hidden_state.square().mean()
    assert torch.autograd.grad(loss, frozen.visual.patch_embed.proj.weight)[0].abs().sum() > 0


def test_weights_changed_in_place_are_read_anew(frozen):
    for seed in range(3):
        step(frozen, CALLS["uniform"](seed))
    with torch.no_grad():
        frozen.visual.merger.mlp[0].weight.mul_(-1)
    assert_same(step(frozen, CALLS["uniform"](0)), step(frozen, CALLS["uniform"](0), cuda_graph=False))


def test_the_features_of_a_prepared_batch_come_from_a_graph(frozen, fake):
    batch = frozen.processor(photos(2, 2, 56, 84), TEXTS)
    for _ in range(3):
        found = frozen(**batch).last_hidden_state
        found.mean().backward()
    assert fake.captured == 1
    assert_same([found], [frozen(**batch, cuda_graph=False).last_hidden_state])


def test_text_alone_is_trained_without_features(frozen, fake):
    assert_no_graph(frozen, fake, lambda seed: {"images": None})


def test_a_model_on_the_cpu_trains_without_graphs(load):
    model = freeze_tower(load())
    for seed in range(3):
        step(model, CALLS["uniform"](seed))
    assert len(model._calls.tower) == 0
    assert isinstance(model, QwenBatchedVL)
