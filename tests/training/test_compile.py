"""`torch.compile` takes blocks and networks whole, and changes neither results nor gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from tests.sisters import FACTORS, FEW_BLOCKS
from tests.support import assert_equal_to, noise
from tests.training.gradients import assert_gradients_equal, gradients, probe_loss

FRAMES = noise(2, 2, 140, 112)  # full and partial windows
TEXTS = ["Pick up the red block.", ""]
TOLERANCE = 1e-6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A checkpoint with few blocks: compiling takes seconds for each kind."""
    vision = {"depth": 2, "fullatt_block_indexes": [1]}
    folder = tmp_path_factory.mktemp("shallow")
    return write_checkpoint(folder, "tiny", vision=vision, text={"num_hidden_layers": 3}, image={"min_pixels": 28 * 28})


@pytest.fixture
def model(shallow):
    torch._dynamo.reset()
    yield QwenBatchedVL.from_pretrained(shallow, device="cpu")
    torch._dynamo.reset()


def results(model, texts=TEXTS):
    out = model(FRAMES, texts)
    return out.last_hidden_state, gradients(probe_loss(out), model.named_parameters())


def assert_equal_results(found, expected):
    assert_equal_to(found[0], expected[0], TOLERANCE)
    named = {name.removeprefix("_orig_mod."): gradient for name, gradient in found[1].items()}
    assert_gradients_equal(named, expected[1], TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_compile_without_graph_breaks(model, checkpointing):
    expected = results(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=compiled, fullgraph=True)
    assert_equal_results(results(model), expected)
    # A tower's blocks over windows and over whole images, and a decoder's.
    assert compiled.frame_count == 3 < len(model.blocks)


def test_of_the_whole_model_one_graph_is_made_and_serves_other_texts(model):
    compiled = CompileCounterWithBackend("eager")
    whole = torch.compile(model, backend=compiled)
    for texts in (TEXTS, TEXTS[::-1]):
        assert_equal_results(results(whole, texts), results(model, texts))
    assert compiled.frame_count == 1


@pytest.mark.parametrize("preset", FACTORS)
def test_of_each_family_one_graph_is_made(preset, tmp_path):
    side = 2 * FACTORS[preset]
    write_checkpoint(tmp_path / "checkpoint", preset, image={"min_pixels": side * side}, **FEW_BLOCKS[preset])
    model = QwenBatchedVL.from_pretrained(tmp_path / "checkpoint", device="cpu")
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("eager")
    given = noise(2, 2, side, side), TEXTS
    found, expected = (call(*given, keys_values=(1,)) for call in (torch.compile(model, backend=compiled), model))
    assert_equal_to(found.last_hidden_state, expected.last_hidden_state, TOLERANCE)
    assert_equal_to(found.keys_values[0][0], expected.keys_values[0][0], TOLERANCE)
    assert compiled.frame_count == 1
    torch._dynamo.reset()


def test_compiled_blocks_infer_without_gradients(model):
    with torch.no_grad():
        expected = model(FRAMES, TEXTS).last_hidden_state
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        assert_equal_to(model(FRAMES, TEXTS).last_hidden_state, expected, TOLERANCE)
