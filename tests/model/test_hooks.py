"""Hooks of modules run, and see and may change what transformers' would."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tests.support import assert_equal_to, own_tokens, photos

TEXTS = ["Pick up the red block.", "Go.", "open the drawer, then close it again"]
FRAMES = photos(3, 2, 84, 112)  # of which each processor makes the same pixels


@pytest.fixture(params=["left", "right"])
def either_model(request, model, right_padded_model):
    return model if request.param == "left" else right_padded_model


def watched(module, call):
    """The outputs of `module` during `call()`."""
    seen = []
    hook = module.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        call()
    finally:
        hook.remove()
    return seen


def test_a_hook_on_a_decoder_block_gets_the_blocks_output(either_model, reference):
    model, images = either_model, FRAMES.to(either_model.device)
    mask = model(images, TEXTS).attention_mask
    for index, block in enumerate(model.model.layers):
        (ours,) = watched(block, lambda: model(images, TEXTS))
        assert ours.shape == (*mask.shape, model.config.text.hidden_size)
        for i, text in enumerate(TEXTS):
            inputs = reference.processor_inputs(list(FRAMES[i]), text)
            (theirs,) = watched(reference.decoder.layers[index], lambda inputs=inputs: reference.run(**inputs))
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            assert_equal_to(own_tokens(ours, mask, i), theirs[0])


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_hooks_on_blocks_see_and_steer_as_in_transformers(sisters, preset, steered):
    """Of every family: what a block takes and gives, and what follows from an output that a hook has replaced."""
    loaded = sisters(preset)
    images, text = loaded.photos(1, 2, 2, 3).to(loaded.device), TEXTS[0]
    inputs = loaded.reference.processor_inputs(list(images[0]), text)
    calls = (
        lambda: loaded.model(images, [text], logits="last").logits,
        lambda: loaded.reference.run(**inputs).logits[:, -1],
    )
    for index, pair in enumerate(zip(loaded.model.model.layers, loaded.reference.decoder.layers, strict=True)):
        results = []
        for block, run in zip(pair, calls, strict=True):
            seen = []

            def hook(module, args, kwargs, out, seen=seen):
                hidden = out[0] if isinstance(out, tuple) else out
                seen.append((args[0] if args else kwargs["hidden_states"], hidden))
                return ((hidden * 0.5, *out[1:]) if isinstance(out, tuple) else hidden * 0.5) if steered else None

            handle = block.register_forward_hook(hook, with_kwargs=True)
            try:
                logits = run()
            finally:
                handle.remove()
            assert len(seen) == 1, index
            results.append((*seen[0], logits))
        for own, other in zip(*results, strict=True):
            assert_equal_to(own, other)


def test_a_hook_on_a_decoder_block_gets_one_token_of_each_sample_in_a_step_of_generation(model):
    outputs = watched(model.model.layers[1], lambda: model.generate(None, TEXTS, max_new_tokens=3))
    assert [tuple(x.shape[:2]) for x in outputs[1:]] == [(3, 1)] * (len(outputs) - 1)


MODULES = {
    "patch embedding": lambda model: model.visual.patch_embed.proj,
    "vision block": lambda model: model.visual.blocks[1],
    "decoder block": lambda model: model.model.layers[2],
    "last decoder block": lambda model: model.model.layers[-1],
    "MLP": lambda model: model.model.layers[1].mlp,
    "linear layer": lambda model: model.model.layers[1].self_attn.o_proj,
}


def results(model):
    with torch.no_grad():
        out = model(FRAMES.to(model.device), TEXTS, layers=(1, -1), norm="pre", cuda_graph=False)
    return [*out.hidden_states, out.image_features]


@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "full"])
@pytest.mark.parametrize("name", MODULES)
def test_a_hook_that_only_looks_runs_and_changes_no_result(model, name, kind):
    module, calls = MODULES[name](model), []
    expected = results(model)
    hook = {
        "forward": lambda: module.register_forward_hook(lambda *_: calls.append(1) and None),
        "forward pre": lambda: module.register_forward_pre_hook(lambda *_: calls.append(1) and None),
        "backward": lambda: module.register_full_backward_hook(lambda *_: calls.append(1) and None),
        "full": lambda: module.register_full_backward_pre_hook(lambda *_: calls.append(1) and None),
    }[kind]()
    try:
        found = results(model)
        if "forward" not in kind:
            frames = (FRAMES.to(model.device) / 255).requires_grad_(True)
            model(frames, TEXTS).last_hidden_state.sum().backward()
    finally:
        hook.remove()
    assert calls
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal_to(ours, theirs)


@pytest.mark.parametrize("name", ["vision block", "decoder block", "last decoder block", "patch embedding"])
def test_what_a_hook_returns_takes_the_outputs_place(model, name):
    module = MODULES[name](model)
    expected = results(model)
    hook = module.register_forward_hook(lambda module, args, out: 0.5 * out)
    try:
        assert not all(map(torch.equal, results(model), expected))
    finally:
        hook.remove()
    assert all(map(torch.equal, results(model), expected))


def test_a_hook_on_every_module_sees_every_block(model):
    seen = []
    expected = results(model)
    hook = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        found = results(model)
    finally:
        hook.remove()
    assert set(model.blocks) | {model.visual.patch_embed.proj} <= set(seen)
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal_to(ours, theirs)


def test_a_block_that_was_wrapped_is_called(load):
    class Halved(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, *rest) -> Tensor:
            return 0.5 * self.block(x, *rest)

    model = load().requires_grad_(False)
    hook = model.model.layers[1].register_forward_hook(lambda module, args, out: 0.5 * out)
    expected = results(model)
    hook.remove()
    model.model.layers[1] = Halved(model.model.layers[1])
    assert all(map(torch.equal, results(model), expected))
