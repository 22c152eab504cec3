"""Under autocast our model is as near to float32 as transformers' model is, forward and backward."""

import pytest
import torch

from tests.support import own_tokens, photos, relative_error
from tests.training.gradients import (
    errors,
    gradients,
    of_sample,
    photos_as_floats,
    probe_loss,
    probed,
    published_parameters,
    reference_inputs,
)

FRAMES = photos(2, 2, 140, 112)
TEXTS = ["Pick up the red block.", "Open the top drawer, then close it."]
MASK = torch.tensor([[True, True], [True, False]])
# Two roundings of the same float32 numbers: each as far off as the other, and from each other up to twice as far.
FACTOR = 2


@pytest.fixture
def ours(load, device):
    return load(device=device)


def our_results(model, frames, texts=TEXTS, camera_mask=MASK):
    """Hidden states and logits of each sample's own tokens, and all gradients."""
    out = model(frames, texts, camera_mask, logits="all", resize=None)
    found = gradients(probe_loss(out), model.named_parameters(), frames)
    samples = range(len(texts))
    states, logits = (
        torch.cat([own_tokens(x, out.attention_mask, sample) for sample in samples])
        for x in (out.last_hidden_state, out.logits)
    )
    return {"hidden states": states, "logits": logits}, found


def their_results(reference, frames):
    outputs = [
        reference.model(**reference_inputs(reference, of_sample(frames, MASK, sample), text), output_hidden_states=True)
        for sample, text in enumerate(TEXTS)
    ]
    states = [output.hidden_states[-1][0] for output in outputs]
    found = gradients(probed([[x] for x in states]), published_parameters(reference), frames)
    return {"hidden states": torch.cat(states), "logits": torch.cat([output.logits[0] for output in outputs])}, found


@pytest.mark.slow
def test_results_and_gradients_are_as_near_to_float32_as_those_of_transformers(ours, reference, device):
    frames = photos_as_floats(FRAMES.to(device))
    exact, exact_gradients = their_results(reference, frames)
    with torch.autocast(device, torch.bfloat16):
        found, found_gradients = our_results(ours, frames)
        expected, expected_gradients = their_results(reference, frames)
    for name, values in found.items():
        assert values.dtype == expected[name].dtype
        allowed = FACTOR * relative_error(expected[name], exact[name])
        assert relative_error(values, exact[name]) <= allowed, name
        assert relative_error(values, expected[name]) <= allowed, name
    allowed = errors(expected_gradients, exact_gradients)
    for name, error in errors(found_gradients, exact_gradients).items():
        assert error <= FACTOR * allowed[name], name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_answers_has_gradients_under_autocast(ours, device, checkpointing):
    def loss():
        return ours(FRAMES.to(device), TEXTS, MASK, targets=["to the left", "no"]).loss

    exact = gradients(loss(), ours.named_parameters())
    if checkpointing:
        ours.gradient_checkpointing_enable()
    with torch.autocast(device, torch.bfloat16):
        value = loss()
    assert value.dtype == torch.float32
    found = errors(gradients(value, ours.named_parameters()), exact)
    assert max(found.values()) < 0.1  # of bfloat16's three digits, two and a half are left


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_autocast_that_casts_nothing_changes_nothing(load, device, wants_gradient):
    model = load(device=device, dtype=torch.bfloat16)
    frames = FRAMES.to(device)
    with torch.set_grad_enabled(wants_gradient):
        plain = model(frames, TEXTS, targets=["a", "b"], logits="all")
        with torch.autocast(device, torch.bfloat16):
            found = model(frames, TEXTS, targets=["a", "b"], logits="all")
            features = model.encode_images(frames)
    assert torch.equal(found.logits, plain.logits) and torch.equal(found.loss, plain.loss)
    assert torch.equal(features, plain.image_features)
    assert found.loss.dtype == plain.loss.dtype == torch.float32


@pytest.mark.gpu
def test_autocast_that_casts_nothing_keeps_graphs(load):
    model = load(device="cuda", dtype=torch.bfloat16)
    frames = FRAMES.cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        outs = [model(frames, TEXTS).last_hidden_state for _ in range(3)]
    assert len(model._calls.decoder) == 1
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_autocast_casts_where_one_parameter_has_another_dtype(load, device):
    model = load(device=device, dtype=torch.bfloat16)
    model.lm_head.float()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        assert model(FRAMES.to(device), TEXTS, logits="last").logits.dtype == torch.bfloat16
