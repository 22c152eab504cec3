"""HF Trainer trains, evaluates, saves and resumes the model as it does one of transformers'."""

import copy
import functools

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from qwen_batched import QwenBatchedVL
from tests.conversations import transformers_batch
from tests.support import photos

accelerate = pytest.importorskip("accelerate")

IS_5 = Version(transformers.__version__).release >= (5,)
FRAMES = photos(8, 1, 56, 84)
TEXTS = ["Pick up the red block.", "", "Go on.", "Open the top drawer.", "Stop.", "Wait for me.", "Left.", "Now right."]
ANSWERS = ["yes", "to the left", "no", "done", "stopped", "waiting", "left", "right"]
STEPS, ACCUMULATION = 30, 2


@pytest.fixture(scope="module", autouse=True)
def accelerates_state():
    """Is of the whole process, which other tests fork, and is put back."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Samples(Dataset):
    """Indices of samples, for a collator that prepares them."""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return {"index": index}


def ours(model):
    """Our class and batches; of another class and its batches, the like runs under the same tests."""

    def collate(rows):
        index = [row["index"] for row in rows]
        texts, answers = [TEXTS[i] for i in index], [ANSWERS[i] for i in index]
        return model.processor(FRAMES[index], texts, targets=answers)

    return collate


def trainer(model, folder, collate=ours, evaluates=False, **options):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if evaluates:
        defaults |= {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 4}
        defaults |= {"prediction_loss_only": True}
    arguments = TrainingArguments(str(folder), **defaults | options)
    data = Samples()
    return Trainer(model, arguments, data_collator=collate(model), train_dataset=data, eval_dataset=data)


def losses(trained, key="loss"):
    return {entry["step"]: entry[key] for entry in trained.state.log_history if key in entry}


@pytest.fixture(scope="module")
def uninterrupted(load, tmp_path_factory):
    """The model and the Trainer after all steps, with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("trainer")
    model = load().train()
    trained = trainer(model, folder, evaluates=True, save_strategy="steps", save_steps=15)
    trained.train()
    return trained


@pytest.mark.slow
def test_training_lowers_the_loss_and_evaluation_has_its_own(uninterrupted):
    curve, evaluated = losses(uninterrupted), losses(uninterrupted, "eval_loss")
    assert list(curve) == list(range(1, STEPS + 1)) and list(evaluated) == [10, 20, 30]
    assert curve[STEPS] < 0.8 * curve[1] and evaluated[30] < evaluated[10]


@pytest.mark.slow
def test_the_loss_curve_is_that_of_a_plain_loop_over_the_same_batches(load, tmp_path):
    model = load().train()
    plain = copy.deepcopy(model)
    trained = trainer(model, tmp_path, max_steps=6, lr_scheduler_type="constant", max_grad_norm=0.0, seed=3)
    batches = []
    trained.data_collator = lambda rows, collate=trained.data_collator: batches.append(collate(rows)) or batches[-1]
    trained.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for first in range(0, 12, ACCUMULATION):
        total = 0.0
        for batch in batches[first : first + ACCUMULATION]:
            loss = plain(**batch).loss / ACCUMULATION
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        expected.append(total)
    assert list(losses(trained).values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_the_loss_curve_is_that_of_transformers_class_on_its_own_batches(sisters, preset, tmp_path):
    """With accumulation, evaluation, and a stop and a resumption in the middle of ours."""
    loaded = sisters(preset)

    make = functools.partial(transformers_batch, loaded.reference, loaded.factor, [1, 1], labels=True, turns=1)
    batches = [make(seed=index) for index in range(len(TEXTS))]  # of two samples each
    if not IS_5:
        batches = [{name: x for name, x in batch.items() if name != "mm_token_type_ids"} for batch in batches]

    def of_transformers(model):
        return lambda rows: batches[rows[0]["index"]]

    def run(model, folder, **options):
        sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "learning_rate": 1e-4}
        model = model.train().requires_grad_(True)
        return trainer(model, folder, of_transformers, evaluates=True, **sizes, **options)

    theirs = run(copy.deepcopy(loaded.reference.model), tmp_path / "theirs")
    theirs.train()
    first = run(loaded.load(), tmp_path / "ours", save_strategy="steps", save_steps=15)
    first.add_callback(StopAt(15))
    first.train()
    ours = run(loaded.load(), tmp_path / "ours")
    ours.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-15"))
    for key in ("loss", "eval_loss"):
        expected, found = losses(theirs, key), losses(ours, key)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    assert losses(ours)[STEPS] < losses(ours)[1]


class StopAt(transformers.TrainerCallback):
    """Ends a run at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, arguments, state, control, **others):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_equals_an_uninterrupted_one(uninterrupted, load, tmp_path):
    folder = uninterrupted.args.output_dir
    resumed = trainer(load().train(), tmp_path, evaluates=True)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-15")
    late = {step: loss for step, loss in losses(uninterrupted).items() if step > 15}
    assert {step: loss for step, loss in losses(resumed).items() if step > 15} == late
    for (name, found), expected in zip(resumed.model.named_parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.slow
def test_a_checkpoint_of_trainer_loads_here_and_in_transformers(uninterrupted):
    folder = f"{uninterrupted.args.output_dir}/checkpoint-30"
    loaded = QwenBatchedVL.from_pretrained(folder, device="cpu")
    for (name, found), expected in zip(loaded.named_parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert loaded.config.use_cache == uninterrupted.model.config.use_cache  # which newer Trainers assign
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(theirs.get_input_embeddings().weight, uninterrupted.model.model.embed_tokens.weight)


@pytest.mark.slow
def test_a_sisters_checkpoint_of_trainer_resumes_and_loads(family, tmp_path):
    """Of a layout whose names in files are not those of the modules."""
    model = family.load().train()
    first = trainer(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    again = trainer(family.load().train(), tmp_path / "again", max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(map(torch.equal, again.model.parameters(), model.parameters()))
    loaded = QwenBatchedVL.from_pretrained(tmp_path / "checkpoint-2", device="cpu")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing_train(load, tmp_path):
    model = load().train()
    trained = trainer(model, tmp_path, max_steps=4, bf16=True, gradient_checkpointing=True)
    before = model.lm_head.weight.detach().clone()
    trained.train()
    assert model.is_gradient_checkpointing
    assert all(0 < loss < 20 for loss in losses(trained).values()) and not torch.equal(before, model.lm_head.weight)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_loss(load, tmp_path):
    curves = []
    for choice in (False, True):
        trained = trainer(load().train(), tmp_path / str(choice), max_steps=3, gradient_checkpointing=choice)
        trained.train()
        curves.append(list(losses(trained).values()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(load, tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    model = load().train()
    # Steps that climb: the first checkpoint is the best.
    trained = trainer(model, tmp_path, learning_rate=0.3, load_best_model_at_end=True, **options)
    trained.train()
    evaluated = losses(trained, "eval_loss")
    best = min(evaluated, key=evaluated.get)
    assert trained.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and best != 3
    saved = QwenBatchedVL.from_pretrained(trained.state.best_model_checkpoint, device="cpu")
    assert all(map(torch.equal, model.parameters(), saved.parameters()))


def test_evaluation_gathers_the_logits_and_nothing_else(load, tmp_path):
    model = load()
    predicted = trainer(model, tmp_path, prediction_loss_only=False).predict(Samples())
    assert "test_loss" in predicted.metrics
    outputs = set(model(FRAMES[:1], TEXTS[:1], logits="all").keys()) - {"loss", "logits"}
    assert outputs <= set(model.config.keys_to_ignore_at_inference)


def test_a_tokenizer_for_trainer_leaves_the_checkpoint_loadable(load, tmp_path):
    model = load().train()
    trained = trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trained.processing_class = transformers.AutoTokenizer.from_pretrained(model.checkpoint.folder)
    trained.train()
    loaded = QwenBatchedVL.from_pretrained(tmp_path / "checkpoint-1", device="cpu")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert model.generation_config.eos_token_id == loaded.generation_config.eos_token_id


def test_data_parallel_is_refused(model):
    with pytest.raises(ValueError, match="torchrun"):
        model._replicate_for_data_parallel()


def test_trainer_takes_it_for_a_model_of_transformers(load, tmp_path):
    made = trainer(load(), tmp_path)
    assert isinstance(made.model, transformers.PreTrainedModel)
    assert not made.model_accepts_loss_kwargs  # as with its class in transformers
    assert made.label_names == ["labels"]
    tokens = made.data_collator([{"index": 0}])
    assert made.floating_point_ops(tokens) == 6 * tokens["input_ids"].numel() * made.model.num_parameters(
        exclude_embeddings=True
    )
