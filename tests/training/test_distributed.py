"""Two processes with halves of a batch give the gradients of one process with all of it, one half having no images."""

import pytest
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from tests.processes import run_python
from tests.support import assert_equal_to, relative_error
from tests.training.two_processes import ANSWERS, RATE, WHOLE, gradients_of, load, loss_of, own_states, with_lora

# The same float32 sums, half of them made elsewhere.
TOLERANCE = 1e-5

pytestmark = [pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"), pytest.mark.slow]


@pytest.fixture(scope="module")
def launched(checkpoint, tmp_path_factory):
    return launch(checkpoint, tmp_path_factory.mktemp("processes"))


def launch(checkpoint, folder, *scenarios):
    """What torchrun's two processes wrote: a function of the scenario, and of the process."""
    done = run_python("tests.training.two_processes", checkpoint, folder, *scenarios, processes=2)

    def result(scenario, rank):
        file = folder / f"{scenario}.{rank}.pt"
        assert file.exists(), f"the processes did not get through {scenario}:\n{done.stderr[-4000:]}"
        return torch.load(file, weights_only=True)

    result.folder = folder
    return result


@pytest.fixture(scope="module")
def expected(checkpoint):
    """One process's gradients of the mean loss of the whole batch."""
    return gradients_of(load(checkpoint), WHOLE)


def assert_equal_gradients(launched, scenario, expected, tolerance=TOLERANCE):
    for rank in (0, 1):
        found = launched(scenario, rank)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient is not None, f"{name} has no gradient in process {rank}"
            assert_equal_to(gradient, expected[name], tolerance)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("half", ["text_only", "cameras_missing"])
def test_trap30_gradients_are_those_of_one_process(launched, expected, way, half):
    assert_equal_gradients(launched, f"{way}_{half}", expected)


@pytest.mark.parametrize("scenario", ["fsdp_whole_model_at_once", "fsdp_groups_of_blocks"])
def test_gradients_of_a_model_sharded_in_larger_parts_are_those_of_one_process(launched, expected, scenario):
    assert_equal_gradients(launched, scenario, expected)


def test_gradients_of_recomputed_sharded_blocks_are_those_of_one_process(launched, expected):
    assert_equal_gradients(launched, "fsdp_checkpointing", expected)


def test_gradients_in_mixed_precision_are_as_near_as_those_of_one_process_in_bfloat16(launched, checkpoint, expected):
    rounded = gradients_of(load(checkpoint).to(torch.bfloat16), WHOLE)
    nearest = max(relative_error(rounded[name], gradient) for name, gradient in expected.items())
    assert_equal_gradients(launched, "fsdp_mixed_precision", expected, tolerance=2 * nearest)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_gradients_of_the_loss_of_answers_are_those_of_one_process(launched, checkpoint, way):
    expected = gradients_of(load(checkpoint), WHOLE | {"targets": ANSWERS}, loss=lambda out: out.loss)
    assert_equal_gradients(launched, f"{way}_answers", expected)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_trap30_gradients_with_a_frozen_tower_are_those_of_one_process(launched, expected, way):
    decoder = {name: gradient for name, gradient in expected.items() if not name.startswith("visual.")}
    assert_equal_gradients(launched, f"{way}_frozen_tower", decoder)


def test_trap30_gradients_of_lora_are_those_of_one_process(launched, checkpoint):
    pytest.importorskip("peft")
    expected = gradients_of(with_lora(checkpoint), WHOLE)
    assert any("visual" in name for name in expected)
    assert_equal_gradients(launched, "ddp_lora", expected)


def test_trap_qwen3_a_rank_without_images_gives_the_deep_mergers_their_gradients(tmp_path):
    """In DDP and FSDP2, beside a rank with images."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "qwen3-vl-tiny", image={"min_pixels": 32 * 32})
    scenarios = ("ddp_text_only", "fsdp_text_only", "fsdp_cameras_missing")
    (tmp_path / "processes").mkdir()
    launched, expected = launch(checkpoint, tmp_path / "processes", *scenarios), gradients_of(load(checkpoint), WHOLE)
    assert sum("deepstack_merger_list" in name and bool(x.any()) for name, x in expected.items()) == 3 * 6
    for scenario in scenarios:
        assert_equal_gradients(launched, scenario, expected)


def trained(checkpoint):
    """One process's model after a step."""
    model = load(checkpoint)
    loss_of(model(**WHOLE)).backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return model


def test_a_step_under_accelerate_is_that_of_one_process(launched, checkpoint):
    pytest.importorskip("accelerate")
    assert_equal_gradients(launched, "accelerate_ddp", dict(trained(checkpoint).named_parameters()))


@torch.no_grad()
def test_trap26_a_sharded_model_infers_from_its_own_weights_before_and_after_a_step(launched, checkpoint):
    with torch.enable_grad():
        after = trained(checkpoint)
    expected = own_states(load(checkpoint)(**WHOLE))
    expected |= {f"{name}, trained": states for name, states in own_states(after(**WHOLE)).items()}
    found = launched("fsdp_training_and_inference", 0) | launched("fsdp_training_and_inference", 1)
    assert found.keys() == expected.keys()
    for name, states in found.items():
        assert_equal_to(states, expected[name])


def test_a_sharded_model_is_saved_from_what_it_gathers(launched, checkpoint):
    refused = launched("fsdp_save", 0)
    assert "must be whole, got a DTensor" in refused["refusal"] and not refused["refused exists"]
    saved = QwenBatchedVL.from_pretrained(launched.folder / "saved", device="cpu").state_dict()
    for name, parameter in load(checkpoint).state_dict().items():
        assert torch.equal(saved[name], parameter), name
