"""Trained from the same start on the same samples, transformers and we go the same way, and end at the same weights."""

import pytest
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.transformers_reference import TransformersReference
from tests.support import assert_equal_to, own_tokens, photos
from tests.training.test_loss import reference_loss

STEPS, LEARNING_RATE = 50, 1e-3
CURVE_TOLERANCE = 1e-3  # rounding errors grow from step to step
pytestmark = pytest.mark.slow
COLOURS = ["red", "green", "blue", "yellow"]
SIZE = (56, 84)


def batch_of_step(step, device):
    """Two samples: a photograph, an instruction, an answer."""
    frames = photos(2, 1, *SIZE, seed=step % 4).to(device).float() / 255
    texts = [f"Which block is number {step % 7}?", "Pick up the " + COLOURS[step % 4] + " block."]
    return frames, texts, [COLOURS[step % 7 % 4], "moved"]


def train(parameters, loss_of):
    """The loss of every step."""
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.fixture(scope="module")
def trained(checkpoint, device):
    """Our model and transformers', and their losses."""
    ours = QwenBatchedVL.from_pretrained(checkpoint, device=device)
    ours.gradient_checkpointing_enable()

    def our_loss(step):
        frames, texts, targets = batch_of_step(step, device)
        return ours(frames, texts, targets=targets, resize=None).loss

    theirs = TransformersReference.from_pretrained(checkpoint, device=device)
    their_curve = train(theirs.model.parameters(), lambda step: reference_loss(theirs, *batch_of_step(step, device)))
    return ours, train(ours.parameters(), our_loss), theirs, their_curve


def test_the_loss_curve_of_50_steps_equals_transformers(trained):
    _, ours, _, theirs = trained
    assert theirs[-5:].mean() < 0.5 * theirs[:5].mean(), "there was nothing to learn"
    worst = float(((ours - theirs).abs() / theirs).max())
    assert worst <= CURVE_TOLERANCE, f"relative {worst:.1e}"


def test_a_trained_model_saved_gives_the_same_logits_in_transformers(trained, tmp_path, device):
    model, *_ = trained
    model.save_pretrained(tmp_path / "trained")
    frames, texts, _ = batch_of_step(0, device)
    frames = (frames * 255).round().to(torch.uint8)
    with torch.no_grad():
        out = model(frames, texts, logits="all", resize=None)
    loaded = TransformersReference.from_pretrained(tmp_path / "trained", device=device)
    start = TransformersReference.from_pretrained(model.checkpoint.folder, device=device)
    for i, text in enumerate(texts):
        inputs = loaded.processor_inputs(list(frames[i]), text)
        mine = own_tokens(out.logits, out.attention_mask, i)
        assert_equal_to(mine, loaded.run(**inputs).logits[0])
        with pytest.raises(AssertionError):  # training has moved it
            assert_equal_to(mine, start.run(**inputs).logits[0], tolerance=1e-2)


def test_a_trained_model_saved_and_loaded_is_the_same_to_the_last_bit(trained, tmp_path, device):
    model, *_ = trained
    model.save_pretrained(tmp_path / "trained")
    again = QwenBatchedVL.from_pretrained(tmp_path / "trained", device=device)
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
