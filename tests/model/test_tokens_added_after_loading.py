"""Tokens that are added after loading: ids, loss, training and files are transformers' (trap 37)."""

import copy
import json

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import ADDED_TOKENS, write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.sisters import FACTORS, skip_without
from tests.support import assert_equal_to, photos
from tests.training.test_loss import reference_loss

ACTIONS = [f"<action_{index}>" for index in range(2048)]
PRESETS = ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"]
STEPS = 20
TRAINING_TOLERANCE = 1e-4


def action_string(seed):
    generator = torch.Generator().manual_seed(seed)
    return "".join(ACTIONS[index] for index in torch.randint(0, 2048, (5,), generator=generator).tolist())


class Pair:
    """Our model and transformers' of one checkpoint, each with the action tokens, and equal new rows."""

    def __init__(self, folder, preset="tiny", **options):
        skip_without(preset)
        write_checkpoint(folder, preset, image={"min_pixels": FACTORS[preset] ** 2}, **options)
        self.folder, self.side = folder, 2 * FACTORS[preset]
        self.ours = QwenBatchedVL.from_pretrained(folder, device="cpu")
        self.theirs = TransformersReference.from_pretrained(folder)
        self.before = self.ours.model.embed_tokens.weight.detach().clone()
        self.added = self.ours.add_tokens(ACTIONS)
        assert self.theirs.tokenizer.add_tokens(ACTIONS) == self.added == 2048
        model = self.theirs.model
        rows = max(model.get_input_embeddings().weight.shape[0], len(self.theirs.tokenizer))
        model.resize_token_embeddings(rows)
        with torch.no_grad():
            pairs = [(self.ours.model.embed_tokens, model.get_input_embeddings())]
            if not self.ours.has_tied_head:
                pairs.append((self.ours.lm_head, model.get_output_embeddings()))
            for own, other in pairs:
                generator = torch.Generator().manual_seed(1)
                noise = torch.randn(own.weight.shape, generator=generator) * 0.05
                noise[: len(self.before)] = 0  # so that rows differ, which are all near one mean
                own.weight += noise
                other.weight.copy_(own.weight)

    def batch(self, step):
        frames = photos(2, 1, self.side, self.side, seed=step % 4).float() / 255
        return frames, [f"Last: {action_string(step)} go.", "Move."], [action_string(step + 100), "so: <action_7>"]


@pytest.fixture(scope="module", params=PRESETS)
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair") / "checkpoint", request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("untied") / "checkpoint", tied=False)


@pytest.mark.slow
def test_trap37_ids_of_added_tokens_are_the_tokenizers_in_texts_and_templates(pair):
    for text in ("<action_0>", f"a {action_string(1)} b<action_2047>", "<action_ 1> <|im_end|>x"):
        for template in ("chat", "plain", "<action_5>{images} {text}<action_9>"):
            frames = photos(1, 1, pair.side, pair.side)
            ours = pair.ours.processor(frames, [text], template=template)["input_ids"][0].tolist()
            if "<|im_end|>" in text:
                assert ours.count(pair.theirs.tokenizer.convert_tokens_to_ids("<action_5>")) == (template[0] == "<")
                continue
            assert ours == pair.theirs.processor_inputs(list(frames[0]), text, template)["input_ids"][0].tolist()


@pytest.mark.slow
def test_the_loss_of_action_strings_equals_transformers_and_so_do_20_steps_of_training(pair):
    ours, theirs = copy.deepcopy(pair.ours), copy.deepcopy(pair.theirs.model)
    reference = TransformersReference(theirs, pair.theirs.tokenizer, pair.theirs.image_processor)
    curves = []
    for parameters, loss_of in (
        (ours.parameters(), lambda batch: ours(batch[0], batch[1], targets=batch[2], resize=None).loss),
        (theirs.parameters(), lambda batch: reference_loss(reference, *batch)),
    ):
        optimiser = torch.optim.AdamW(parameters, lr=1e-3)
        losses = []
        for step in range(STEPS):
            loss = loss_of(pair.batch(step % 5))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert float(((curves[0] - curves[1]).abs() / curves[1]).max()) <= TRAINING_TOLERANCE
    assert curves[0][-1] < 0.9 * curves[0][0]


@pytest.mark.slow
def test_an_untied_head_grows_too(untied):
    ours = untied.ours
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight and not ours.has_tied_head
    assert ours.lm_head.weight.shape == ours.model.embed_tokens.weight.shape
    assert ours.lm_head.out_features == len(ours.lm_head.weight)
    batch = untied.batch(0)
    assert_equal_to(ours(batch[0], batch[1], targets=batch[2], resize=None).loss, reference_loss(untied.theirs, *batch))


def test_spare_rows_are_used_first_and_all_that_was_there_stays(checkpoint, load):
    model = load()
    rows, before = model.config.text.vocab_size, model.model.embed_tokens.weight.detach().clone()
    weight = model.model.embed_tokens.weight
    frames = photos(1, 1, 56, 56)
    expected = model(frames, ["a"]).last_hidden_state.detach()
    spare = rows - len(AutoTokenizer.from_pretrained(checkpoint))
    assert spare > 3
    assert model.add_tokens(ACTIONS[:3]) == 3
    assert model.config.text.vocab_size == rows == len(model.model.embed_tokens.weight)
    assert model.add_tokens(ACTIONS[: spare + 5]) == spare + 2  # 3 of them are there
    assert model.add_tokens(ACTIONS[:3]) == 0 == model.add_tokens([])
    assert model.add_tokens("<|im_end|>") == 0
    assert len(weight) == model.config.text.vocab_size == model.model.config.vocab_size == rows + 5
    assert model.model.embed_tokens.weight is weight is model.lm_head.weight and model.has_tied_head
    assert weight.requires_grad and weight.dtype == before.dtype and model.model.embed_tokens.num_embeddings == rows + 5
    assert torch.equal(weight[:rows], before)
    mean = before.mean(dim=0)
    assert ((weight[rows:] - mean).abs() < 1e-3 * before.std()).all() and not torch.equal(
        weight[rows], weight[rows + 1]
    )
    assert torch.equal(model(frames, ["a"]).last_hidden_state.detach(), expected)
    out = model(None, [f"{ACTIONS[spare + 4]}"], logits="last", template="{text}")
    assert out.input_ids.tolist() == [[rows + 4]] and out.logits.shape[-1] == rows + 5


def test_new_rows_have_a_share_of_the_covariance_of_the_old_ones(load):
    model = load()
    old = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(len(old) + 20000)
    new = (model.model.embed_tokens.weight.detach()[len(old) :] - old.mean(dim=0)) / 1e-9**0.5
    # Of 20000 draws, each entry of the covariance is within a few hundredths of the variances.
    assert float((new.T.cov() - old.T.cov(correction=0)).abs().max()) < 0.1 * float(old.var(dim=0).max())


def test_texts_that_were_read_before_are_read_anew(load):
    model = load()
    text = f"go {ACTIONS[0]} now"
    for template in ("chat", "{text}" + ACTIONS[0]):
        before = model.processor(None, [text], template=template)["input_ids"]
        assert len(before[0]) > 3
    loss = model(None, ["a"], targets=[ACTIONS[0]]).loss
    model.add_tokens(ACTIONS[:1])
    index = model.processor.prompts.tokenizer.convert_tokens_to_ids(ACTIONS[0])
    for template, count in (("chat", 1), ("{text}" + ACTIONS[0], 2)):
        ids = model.processor(None, [text], template=template)["input_ids"][0].tolist()
        assert ids.count(index) == count
    assert model(None, ["a"], targets=[ACTIONS[0]]).loss != loss


def test_flags_of_added_tokens_count_and_special_ones_are_left_out_of_texts(load):
    model = load()
    model.add_tokens([AddedToken("<s>", lstrip=True, rstrip=True)], special_tokens=True)
    model.add_tokens("<t>")
    tokenizer, prompts = model.processor.prompts.tokenizer, model.processor.prompts
    ids = prompts.encode("a  <s>  <t> b", "{text}", 0)
    assert ids == tokenizer("a  <s>  <t> b")["input_ids"]
    assert prompts.decode(ids) == "a<t> b"


def test_tokens_added_by_hand_are_read_whatever_added_tokens_said_at_loading(load):
    model = load(added_tokens=())
    model.add_tokens(ACTIONS[:2])
    ids = model.processor.prompts.encode(ACTIONS[1], "{text}", 0)
    assert ids == [model.processor.prompts.tokenizer.convert_tokens_to_ids(ACTIONS[1])]


def test_transformers_own_way_of_adding_tokens_works_too(load):
    model = load()
    tokenizer = model.processor.prompts.tokenizer
    tokenizer.add_tokens(ACTIONS)
    embedding = model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert embedding is model.get_input_embeddings() and len(embedding.weight) % 64 == 0
    assert model.config.text.vocab_size == len(embedding.weight) >= len(tokenizer)
    assert model.processor(None, [ACTIONS[9]], template="{text}")["input_ids"].tolist() == [
        [tokenizer.convert_tokens_to_ids(ACTIONS[9])]
    ]


def test_the_control_tokens_stay_text(load):
    model = load()
    model.add_tokens([*ADDED_TOKENS, ACTIONS[0]])
    ids = model.processor(None, ["<|im_end|><|image_pad|>" + ACTIONS[0]], template="{text}")["input_ids"][0].tolist()
    control = set(model.processor.prompts.tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)))
    assert not control & set(ids) and len(ids) > 3


@pytest.mark.slow
def test_an_optimiser_made_before_trains_the_new_rows(load):
    model = load()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(None, ["a"], targets=["b"]).loss.backward()
    model.add_tokens(ACTIONS)
    assert model.lm_head.weight.grad is None
    optimiser.zero_grad()
    before = model.lm_head.weight.detach().clone()
    model(None, ["a"], targets=[ACTIONS[2000]]).loss.backward()
    optimiser.step()
    assert not torch.equal(model.model.embed_tokens.weight[-2048:], before[-2048:])


# --- files ---


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_saving_keeps_tokens_and_rows_for_transformers_and_us(tmp_path, tied):
    folder = write_checkpoint(tmp_path / "before", tied=tied)
    model = QwenBatchedVL.from_pretrained(folder, device="cpu")
    model.add_tokens([*ACTIONS, AddedToken("<x>", lstrip=True, normalized=False)])
    model.save_pretrained(tmp_path / "after")
    saved = json.loads((tmp_path / "after" / "config.json").read_text(encoding="utf-8"))
    text = saved.get("text_config") or saved
    assert text["vocab_size"] == model.config.text.vocab_size > 2048
    again = QwenBatchedVL.from_pretrained(tmp_path / "after", device="cpu")
    reference = TransformersReference.from_pretrained(tmp_path / "after")
    prompts = [f"go {action_string(3)}", "a  <x> b", "<|im_end|> c"]
    for text in prompts[:2]:
        expected = model.processor(None, [text])["input_ids"][0].tolist()
        assert again.processor(None, [text])["input_ids"][0].tolist() == expected
        assert reference.processor_inputs([], text)["input_ids"][0].tolist() == expected
        theirs = reference.run(**reference.processor_inputs([], text)).logits
        assert_equal_to(model(None, [text], logits="all").logits, theirs)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    again.save_pretrained(tmp_path / "third")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        first, second = ((tmp_path / at / name).read_bytes() for at in ("after", "third"))
        assert json.loads(first) == json.loads(second), name


def test_a_tokenizer_of_older_files_is_saved_with_its_tokens(tmp_path):
    folder = write_checkpoint(tmp_path / "before")
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = {entry["content"]: entry["id"] for entry in state["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(known), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(entry["id"]): {name: entry[name] for name in names} for entry in state["added_tokens"]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = QwenBatchedVL.from_pretrained(folder, device="cpu")
    model.add_tokens(ACTIONS[:3])
    model.save_pretrained(tmp_path / "after")
    ids = model.processor.prompts.tokenizer.convert_tokens_to_ids(ACTIONS[:3])
    legacy = json.loads((tmp_path / "after" / "added_tokens.json").read_text(encoding="utf-8"))
    decoder = json.loads((tmp_path / "after" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert [legacy[token] for token in ACTIONS[:3]] == ids
    assert [decoder["added_tokens_decoder"][str(index)]["content"] for index in ids] == ACTIONS[:3]
    assert AutoTokenizer.from_pretrained(tmp_path / "after").convert_tokens_to_ids(ACTIONS[:3]) == ids


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_keeps_trained_rows(tmp_path, tied):
    peft = pytest.importorskip("peft")
    from qwen_batched.lora import load_adapter, save_adapter

    folder = write_checkpoint(tmp_path / "checkpoint", tied=tied)

    def grown():
        torch.manual_seed(0)
        model = QwenBatchedVL.from_pretrained(folder, device="cpu")
        model.add_tokens(ACTIONS[:200])
        return model

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(grown(), config)
    optimiser = torch.optim.SGD((x for x in adapted.parameters() if x.requires_grad), lr=0.5)
    adapted(None, [ACTIONS[1]], targets=[ACTIONS[199]]).loss.backward()
    optimiser.step()
    save_adapter(adapted, tmp_path / "adapter")
    expected = adapted(None, [ACTIONS[1]], logits="all").logits.detach()
    loaded = load_adapter(grown(), tmp_path / "adapter")
    assert_equal_to(loaded(None, [ACTIONS[1]], logits="all").logits.detach(), expected)
    assert not torch.allclose(grown()(None, [ACTIONS[1]], logits="all").logits, expected, rtol=1e-3)


def test_the_graph_of_an_earlier_loss_does_no_harm(load):
    model = load()
    earlier = model(None, ["a"], targets=["b"]).loss
    earlier.backward()
    model.add_tokens(ACTIONS)
    model(None, ["a"], targets=[ACTIONS[0]]).loss.backward()
    assert model.model.embed_tokens.weight.grad.shape == model.model.embed_tokens.weight.shape


def test_tokens_added_under_inference_mode_can_be_trained(load):
    model = load()
    with torch.inference_mode():
        model.add_tokens(ACTIONS)
    model(None, [ACTIONS[0]], targets=[ACTIONS[1]]).loss.backward()


def test_a_text_read_before_a_row_was_taken_off_is_refused(load):
    model = load()
    model.add_tokens(ACTIONS)
    model(None, [ACTIONS[-1]])
    model.resize_token_embeddings(model.config.text.vocab_size - 1)
    with pytest.raises(ValueError, match="token ids must be below"):
        model(None, [ACTIONS[-1]])


# --- refusals ---


def test_what_cannot_be_added_changes_nothing(load):
    model = load()
    tokenizer, rows = model.processor.prompts.tokenizer, model.config.text.vocab_size
    size = len(tokenizer)
    for bad in (None, 3, [3], {"a": 1}, [ACTIONS[0], None]):
        with pytest.raises(TypeError, match="new_tokens"):
            model.add_tokens(bad)
    for bad in ("", [ACTIONS[0], ""], ["\ud800"]):
        with pytest.raises(ValueError, match="new_tokens"):
            model.add_tokens(bad)
    for bad in ({"new_num_tokens": 0}, {"new_num_tokens": 1.5}, {"pad_to_multiple_of": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.resize_token_embeddings(**bad)
    with pytest.raises(ValueError, match=r"must be below the vocab_size 100"):
        model.resize_token_embeddings(100)
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens)
    with pytest.raises(ValueError, match="embed_tokens must be as loaded"):
        model.add_tokens(ACTIONS)
    assert len(tokenizer) == size and model.config.text.vocab_size == rows == len(model.lm_head.weight)
    assert ACTIONS[0] not in tokenizer.get_vocab()


def test_rows_are_taken_off_the_end(load):
    model = load()
    rows = model.config.text.vocab_size
    kept = max(*model.processor.prompts.written_ids(), *model.generation_config.eos_token_ids) + 1
    assert kept < rows
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(kept)
    assert (
        torch.equal(model.lm_head.weight, before[:kept]) and model(None, ["a"], logits="last").logits.shape[1] == kept
    )
    assert model.resize_token_embeddings() is model.model.embed_tokens
    assert len(model.lm_head.weight) == kept
