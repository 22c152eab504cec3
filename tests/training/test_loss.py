"""`targets`: the answers' tokens are those of a conversation, and their loss is transformers' with masked labels."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qwen_batched.model.head
from qwen_batched import QwenBatchedVL
from qwen_batched.inputs.prompt_rows import TextCall
from qwen_batched.inputs.request import Request
from qwen_batched.inputs.sequence import NO_LABEL
from qwen_batched.model import pipeline
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.support import assert_equal_to, own_tokens, photos
from tests.training.gradients import (
    assert_gradients_equal,
    gradients,
    of_sample,
    photos_as_floats,
    published_parameters,
    reference_inputs,
)

TEXTS = ["Pick up the red block.", "", "Open the top drawer, then close the bottom drawer.\n"]
TARGETS = ["move left 0.25", "", "先打开上面的抽屉。🦾 Then close the other."]
ANSWERS = [
    *("left", "", " left ", "\n", "\n\nleft\n", " \n x", "\r\n"),
    *("把杯子放在桌子上。", "🤖👩‍🔬", "e\u0301", "\u0301e", "a" * 300),
]
MASK = torch.tensor([[True, False], [True, True], [False, False]])
END = "<|im_end|>"


@pytest.fixture(scope="module")
def models(load, device):
    """Our model by padding side, with gradients. Read only."""
    return {side: load(device=device, padding_side=side) for side in ("left", "right")}


@pytest.fixture
def prompts(model):
    return model.processor.prompts


# --- tokens ---


def conversation_ids(reference, cameras, text, answer):
    """Tokens of transformers' own rendering of a conversation, up to the end of the assistant's turn."""
    content = [{"type": "image"}] * cameras + [{"type": "text", "text": text}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    rendered = reference.tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered.endswith(answer + END + "\n")
    return reference.tokenizer(rendered.removesuffix("\n"))["input_ids"]


@pytest.mark.parametrize("cameras", [0, 1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_equal_transformers_rendering_of_a_conversation(prompts, reference, text, cameras):
    for answer in ANSWERS:
        ids, _ = prompts.encode_with_answer(text, answer, "chat", cameras)
        assert ids == conversation_ids(reference, cameras, text, answer), repr(answer)


@pytest.mark.parametrize("template", ["chat", "plain", "{images}{text}", "{text} {images} ->"])
@pytest.mark.parametrize("cameras", [0, 2])
def test_an_answer_follows_the_prompt_that_new_text_will_begin_with(prompts, template, cameras):
    """Tokenised whole, "up" and "per" would be "upper", and no call of `generate` would ever see such a prompt."""
    for answer in [*ANSWERS, "per", "."]:
        if template == "chat" and answer[:1].isspace():
            continue
        ids, count = prompts.encode_with_answer("Pick up", answer, template, cameras)
        assert ids[:-count] == prompts.encode("Pick up", template, cameras), repr(answer)
        assert ids[-count:-1] == (prompts.encode(answer, "plain", 0) if answer else []), repr(answer)
        assert ids[-1] == prompts.tokenizer.convert_tokens_to_ids(END)


@pytest.mark.parametrize("answer", ["\nleft", "\r\n\n", " \n x"])
def test_a_line_break_that_joins_the_chats_own_is_the_answers(prompts, answer):
    """As where transformers masks by characters (`return_assistant_tokens_mask`)."""
    ids, count = prompts.encode_with_answer("a", answer, "chat", 1)
    prompt = prompts.encode("a", "chat", 1)
    joined = len(prompt) - (len(ids) - count)
    assert ids[:-count] == prompt[: len(ids) - count] and joined in (0, 1)
    assert prompts.decode(ids[-count:-1]) == "\n" * joined + answer


@pytest.mark.parametrize("answer", [END, "<|image_pad|>", "a <|im_start|>user\n b", "<tool_call>"])
def test_trap18_control_tokens_inside_an_answer_stay_text(prompts, answer):
    ids, count = prompts.encode_with_answer("a", answer, "chat", 1)
    special = set(prompts.tokenizer.get_added_vocab().values())
    assert not special & set(ids[-count:-1])
    assert prompts.tokenizer.decode(ids[-count:-1]) == answer


def test_a_template_without_special_tokens_ends_answers_with_the_tokenizers_end_token(tmp_path, checkpoint):
    prompts = QwenBatchedVL.from_pretrained(checkpoint, device="cpu").processor.prompts
    prompts.tokenizer.eos_token = "<|endoftext|>"
    ends = {
        template: prompts.tokenizer.decode([prompts.end_token(template)]) for template in ("chat", "plain", "{text}")
    }
    assert ends == {"chat": END, "plain": "<|endoftext|>", "{text}": "<|endoftext|>"}


# --- labels ---


@pytest.mark.parametrize("mask", [None, MASK], ids=["all cameras", "some missing"])
@pytest.mark.parametrize("template", ["chat", "plain", "{text} {images} ->"])
def test_labels_are_the_answers_tokens_at_the_end_of_each_sequence(models, mask, template):
    texts = [text or "go" for text in TEXTS]  # in "plain", a prompt without images must have a token
    for model in models.values():
        images = photos(3, 2, 56, 84).to(model.device)
        batch = model.processor(images, texts, mask, targets=TARGETS, template=template)
        labels, own = batch["labels"], batch["attention_mask"]
        for i, (text, target) in enumerate(zip(texts, TARGETS, strict=True)):
            cameras = 2 if mask is None else int(mask[i].sum())
            ids, count = model.processor.prompts.encode_with_answer(text, target, template, cameras)
            mine = own_tokens(labels, own, i).tolist()
            assert mine == [NO_LABEL] * (len(mine) - count) + ids[-count:]
        assert bool((labels[~own] == NO_LABEL).all())
        assert batch["prepared"].answer_tokens == (labels != NO_LABEL).sum()


def test_targets_change_nothing_before_the_answer(models):
    for model in models.values():
        images = photos(3, 2, 56, 84).to(model.device)
        without, out = (model(images, TEXTS, targets=targets) for targets in (None, TARGETS))
        assert without.loss is None
        for i in range(3):
            before = own_tokens(without.last_hidden_state, without.attention_mask, i)
            assert_equal_to(own_tokens(out.last_hidden_state, out.attention_mask, i)[: len(before)], before)


# --- the loss ---


def reference_loss(reference, images, texts, targets, camera_mask=None, template="chat"):
    """transformers' mean over all labels of the batch, one sample at a time."""
    total, count = 0.0, 0
    for sample, (text, target) in enumerate(zip(texts, targets, strict=True)):
        frames = of_sample(images, camera_mask, sample)
        inputs = reference_inputs(reference, frames, text, template)
        answer = reference.tokenizer(target + END, return_tensors="pt")["input_ids"].to(reference.device)
        prompt = inputs["input_ids"]
        inputs = inputs | {
            name: torch.cat((value, torch.full_like(answer, name == "attention_mask")), dim=1)
            for name, value in inputs.items()
            if name in ("attention_mask", "mm_token_type_ids")
        }
        inputs["input_ids"] = torch.cat((prompt, answer), dim=1)
        labels = torch.cat((torch.full_like(prompt, -100), answer), dim=1)
        total = total + reference.model(**inputs, labels=labels, use_cache=False).loss * answer.shape[1]
        count += answer.shape[1]
    return total / count


def assert_loss_equals_transformers(models, reference, images, texts, targets, camera_mask=None, template="chat"):
    """The loss, and its gradient by every parameter and the frames, for each of `models`."""
    frames = photos_as_floats(images)
    theirs = reference_loss(reference, frames, texts, targets, camera_mask, template)
    expected = gradients(theirs, published_parameters(reference), frames)
    for model in models:
        out = model(frames, texts, camera_mask, targets=targets, template=template, resize=None)
        assert out.loss.shape == () and out.loss.dtype == torch.float32
        assert_equal_to(out.loss, theirs)
        assert_gradients_equal(gradients(out.loss, model.named_parameters(), frames), expected)


@pytest.mark.slow
def test_the_loss_equals_transformers_with_labels_masked(models, reference):
    images = photos(3, 2, 84, 140).to(reference.device)
    assert_loss_equals_transformers(models.values(), reference, images, TEXTS, TARGETS)


def test_the_loss_equals_transformers_with_cameras_missing(models, reference):
    images = photos(3, 2, 84, 140).to(reference.device)
    assert_loss_equals_transformers(models.values(), reference, images, TEXTS, TARGETS, MASK)


@pytest.mark.slow
def test_the_loss_equals_transformers_for_cameras_of_mixed_sizes(models, reference):
    images = [photos(3, 1, *size)[:, 0].to(reference.device) for size in ((84, 140), (140, 140))]
    assert_loss_equals_transformers(models.values(), reference, images, TEXTS, TARGETS)


def test_the_loss_equals_transformers_for_text_alone(models, reference):
    assert_loss_equals_transformers(models.values(), reference, None, TEXTS, TARGETS)


@pytest.mark.parametrize("template", ["plain", "{text} {images}<|im_end|>\n"])
def test_the_loss_equals_transformers_in_other_templates(models, reference, template):
    images = photos(3, 2, 56, 84).to(reference.device)
    assert_loss_equals_transformers(models.values(), reference, images, TEXTS, TARGETS, template=template)


def test_the_loss_equals_transformers_with_a_head_of_its_own(tmp_path, device):
    folder = write_checkpoint(tmp_path / "untied", tied=False, image={"min_pixels": 784})
    ours, theirs = (kind.from_pretrained(folder, device=device) for kind in (QwenBatchedVL, TransformersReference))
    assert_loss_equals_transformers([ours], theirs, photos(2, 1, 56, 84).to(device), TEXTS[:2], TARGETS[:2])


def test_the_loss_of_a_batch_equals_transformers_own_of_the_padded_batch(models, reference):
    """What "mean" means in a batch: over all labels, not of the samples' means."""
    batch = models["left"].processor(None, TEXTS, targets=TARGETS, device=models["left"].device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    position_ids = batch["rope_positions"].transpose(0, 1)
    expected = reference.model(**inputs, position_ids=position_ids, use_cache=False).loss
    assert_equal_to(models["left"](**batch).loss, expected)


@pytest.mark.parametrize(
    "options", [{"layers": (1,)}, {"norm": "pre"}, {"logits": "all"}, {"logits": "last", "layers": (0, 2)}]
)
def test_the_loss_does_not_depend_on_what_else_is_asked_for(models, options):
    for model in models.values():
        images = photos(3, 2, 56, 84).to(model.device)
        expected = model(images, TEXTS, targets=TARGETS)
        out = model(images, TEXTS, targets=TARGETS, **options)
        assert_equal_to(out.loss, expected.loss)
        assert len(out.hidden_states) == len(options.get("layers", (-1,)))
        assert (out.logits is None) == ("logits" not in options)


def loss_by_hand(out, batch):
    """From the logits of all tokens."""
    scores, labels = out.logits[:, :-1], batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten())


@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "mixed sizes"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all cameras", "some missing"])
def test_a_prepared_batch_gives_the_same_loss(models, mixed, mask):
    for model in models.values():
        images = photos(3, 2, 113, 140)
        images = [images[:, 0], images[:, 1, :, :60]] if mixed else images
        on_host = model.processor(images, TEXTS, mask, targets=TARGETS)  # as in a data loader's worker
        out = model(**on_host, logits="all")
        assert_equal_to(model(images, TEXTS, mask, targets=TARGETS).loss, out.loss)
        batch = {name: on_host[name].to(model.device) for name in ("labels",)}
        assert_equal_to(out.loss, loss_by_hand(out, batch))


def test_labels_taken_away_do_not_count(models):
    model = models["left"]
    batch = model.processor(None, TEXTS, targets=TARGETS)
    batch["labels"][0], batch["labels"][2, -3:] = NO_LABEL, NO_LABEL
    out = model(**batch, logits="all")
    assert_equal_to(out.loss, loss_by_hand(out, {"labels": batch["labels"].to(model.device)}))
    batch["labels"][:] = NO_LABEL
    out = model(**batch)
    assert out.loss == 0
    assert all(
        bool((gradient == 0).all()) for gradient in torch.autograd.grad(out.loss, list(model.model.parameters()))
    )


@pytest.mark.parametrize("template", ["chat", "plain", "{text}{images}", "a {image} b {image}{text}"])
def test_a_mask_that_only_the_device_knows_gives_the_same_loss(models, template):
    """On the CPU the host's path is what runs, so the device's path is called by hand, with the mask of the host."""
    texts, sizes = ["a", "b", "c"], ((2, 3), (1, 2))
    images = [photos(3, 1, 28 * h, 28 * w)[:, 0] for h, w in sizes]
    for model in models.values():
        processor = model.processor
        host = processor(images, texts, MASK, targets=TARGETS, template=template)
        text = processor.config.text
        call = TextCall(processor.prompts, text, texts, TARGETS, template, None, sizes, 0, MASK.device)
        prompts = processor._rows.lay_out_on_device(call, MASK)
        assert prompts.tokens is None and prompts.answer_tokens >= int((host["labels"] != NO_LABEL).sum())
        frames = tuple(x[:, None] for x in images)
        batch = processor.prepared(Request(frames, MASK, prompts, sizes, MASK.device), torch.float32)
        for i in range(3):
            mine, other = (own_tokens(b["labels"], b["attention_mask"], i) for b in (batch, host))
            assert torch.equal(mine, other)
        assert_equal_to(model(**batch).loss, model(**host).loss)


@pytest.mark.gpu
def test_a_mask_on_the_gpu_gives_the_same_loss(models, device):
    if device == "cpu":
        pytest.skip("the model takes nothing from a GPU")
    images = photos(3, 2, 56, 84).cuda()
    for model in models.values():
        here, there = (model(images, TEXTS, mask, targets=TARGETS).loss for mask in (MASK, MASK.cuda()))
        assert_equal_to(there, here)


# --- without the logits of all tokens ---


class WidestTensor(TorchDispatchMode):
    """Notes how many rows tensors have that are as wide as the vocabulary, but the weights themselves."""

    def __init__(self, weight):
        super().__init__()
        self.vocabulary, self.memory, self.rows = len(weight), weight.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            wide = isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == self.vocabulary
            if wide and x.untyped_storage().data_ptr() != self.memory:
                self.rows.add(x.shape[:-1].numel())
        return out


@pytest.mark.parametrize("frozen_decoder", [False, True])
def test_the_logits_of_all_tokens_are_never_there(load, monkeypatch, frozen_decoder):
    model = load()
    if frozen_decoder:
        model.model.requires_grad_(False)
    images = photos(3, 1, 56, 84)
    tokens = model.processor(images, TEXTS, targets=TARGETS)["prepared"].answer_tokens
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = model(images, TEXTS, targets=TARGETS).loss
    expected = torch.autograd.grad(whole, parameters)
    monkeypatch.setattr(qwen_batched.model.head, "TOKENS_PER_CHUNK", 5)
    assert tokens > 10
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with WidestTensor(model.model.embed_tokens.weight) as widest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(images, TEXTS, targets=TARGETS).loss
        found = torch.autograd.grad(loss, parameters)
    gradient_of_weight = {model.config.text.hidden_size}  # made transposed
    assert tokens not in gradient_of_weight
    assert widest.rows and widest.rows - gradient_of_weight <= set(range(6))
    assert not any(x.shape[-1:] == (model.config.text.vocab_size,) for x in kept if x.ndim)
    assert_equal_to(loss, whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal_to(ours, theirs)


def test_the_head_sees_only_tokens_that_predict_an_answer(models, monkeypatch):
    model, rows = models["left"], []
    project = pipeline.apply_linear
    monkeypatch.setattr(pipeline, "apply_linear", lambda head, x: (rows.append(len(x)), project(head, x))[1])
    images = photos(3, 2, 84, 140).to(model.device)
    answers = model.processor(images, TEXTS, targets=TARGETS)["prepared"].answer_tokens
    model(images, TEXTS, targets=TARGETS)
    assert sum(rows) == answers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_is_computed_in_float32_or_better(load, device, dtype):
    model = load(device=device, dtype=dtype)
    images = photos(3, 1, 56, 84).to(device)
    out = model(images, TEXTS, targets=TARGETS)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = load(device=device)(images, TEXTS, targets=TARGETS).loss
    assert_equal_to(out.loss, expected, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_loss_works_under_autocast_with_checkpointing(load, device):
    model = load(device=device)
    images = photos(3, 1, 56, 84).to(device)
    expected = model(images, TEXTS, targets=TARGETS).loss
    model.gradient_checkpointing_enable()
    with torch.autocast(device, torch.bfloat16):
        loss = model(images, TEXTS, targets=TARGETS).loss
    assert_equal_to(loss, expected, tolerance=1e-2)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
