"""accelerate prepares, trains, saves and resumes the model as any other."""

import pytest
import torch
from torch.utils.data import DataLoader

from qwen_batched import QwenBatchedVL
from tests.processes import run_python
from tests.support import assert_equal_to, photos

accelerate = pytest.importorskip("accelerate")
dispatched = pytest.importorskip("tests.training.two_dispatched_processes")

FRAMES = photos(4, 2, 56, 84)
TEXTS = ["Pick up the red block.", "", "Go on.", "Open the top drawer."]
ANSWERS = ["yes", "to the left", "no", "done"]


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    """On the CPU, in full and in mixed precision; accelerate's state is of the whole process, and is put back."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision=request.param)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepare(accelerator, model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    samples = [{"images": FRAMES[i], "texts": TEXTS[i], "targets": ANSWERS[i]} for i in range(len(TEXTS))]
    loader = DataLoader(samples, batch_size=2, collate_fn=collate)
    return accelerator.prepare(model, optimizer, loader)


def collate(samples):
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return batch | {"images": torch.stack(batch["images"])}


def train(accelerator, model, optimizer, loader, epochs=1):
    losses = []
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_prepared_model_trains(accelerator, load):
    losses = train(accelerator, *prepare(accelerator, load()), epochs=4)
    assert sum(losses[-2:]) < sum(losses[:2])


def test_a_prepared_model_takes_the_steps_of_a_plain_one(accelerator, load):
    model, optimizer, loader = prepare(accelerator, load())
    train(accelerator, model, optimizer, loader)
    plain = load()
    steps = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for first in (0, 2):
        rows = slice(first, first + 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"):
            loss = plain(FRAMES[rows], TEXTS[rows], targets=ANSWERS[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
    for (name, ours), theirs in zip(
        accelerator.unwrap_model(model).named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_training_resumes_from_a_saved_state(accelerator, load, tmp_path):
    prepared = prepare(accelerator, load())
    train(accelerator, *prepared)
    accelerator.save_state(tmp_path)
    expected = train(accelerator, *prepared)
    accelerator.load_state(tmp_path)
    assert train(accelerator, *prepared) == expected


def test_the_unwrapped_model_is_saved_for_transformers(accelerator, load, tmp_path):
    model, optimizer, loader = prepare(accelerator, load())
    train(accelerator, model, optimizer, loader)
    accelerator.unwrap_model(model).save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    saved = QwenBatchedVL.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert_equal_to(saved(FRAMES, TEXTS).last_hidden_state, plain(FRAMES, TEXTS).last_hidden_state, tolerance=0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_dispatcher_gives_each_process_its_rows(checkpoint, load, tmp_path):
    program = "tests.training.two_dispatched_processes"
    done = run_python(program, checkpoint, tmp_path, processes=2, ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr[-3000:]
    model = load()
    losses = []
    for batch in dispatched.batches(model, 4):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    expected = dispatched.gradients_of(model)
    for way in dispatched.WAYS:
        parts = [torch.load(tmp_path / f"{way}.{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert_equal_to(torch.stack([part["losses"] for part in parts]).mean(0), torch.stack(losses))
        for part in parts:
            for name, gradient in part["gradients"].items():
                assert_equal_to(gradient, expected[name], tolerance=1e-5)


@pytest.mark.parametrize("dispatches", [False, True])
def test_a_stream_trains_in_one_process(load, dispatches):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    loading = accelerate.utils.DataLoaderConfiguration(dispatch_batches=dispatches)
    own = accelerate.Accelerator(cpu=True, dataloader_config=loading)
    model = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer, loader = own.prepare(model, optimizer, dispatched.batches(model, 4))
    losses = train(own, prepared, optimizer, loader, epochs=4)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert len(losses) == 8 and sum(losses[-2:]) < sum(losses[:2])


@pytest.mark.slow
def test_workers_of_a_data_loader_prepare_the_same_batches(load):
    model = load()
    loader = DataLoader(range(4), batch_size=2, num_workers=2, collate_fn=Prepare(model.processor))
    for found, rows in zip(loader, ([0, 1], [2, 3]), strict=True):
        expected = Prepare(model.processor)(rows)
        assert found.keys() == expected.keys() and found["prepared"] == expected["prepared"]
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert torch.equal(model(**found).loss, model(**expected).loss)


class Prepare:
    """A collator that workers can be sent."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        return self.processor(FRAMES[rows], [TEXTS[i] for i in rows], targets=[ANSWERS[i] for i in rows])
