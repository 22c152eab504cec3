"""A call as two graphs, of image features and of the decoder: what shapes one is its key, all else are its inputs."""

import dataclasses
import itertools
import random
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_batched import QwenBatchedVL, ops
from qwen_batched.calls import Calls
from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.generation import Decoding, loop, pool
from qwen_batched.inputs.prompt_rows import PromptRows
from qwen_batched.model.decoder_inputs import PACKED_TOKEN_STEPS, round_up, rows_of
from qwen_batched.model.warmup import _choose, _masks
from qwen_batched.runtime.snapshot import ModuleSnapshot
from qwen_batched.testing import write_checkpoint
from tests.support import photos

TEXTS = ["Pick up the red block.", "a"]


@pytest.fixture
def own(load, fake, monkeypatch):
    """A model whose graphs only pretend to be CUDA's."""
    monkeypatch.setattr(Calls, "_may_use_graphs", lambda self, processor, device, wanted: wanted)
    monkeypatch.setattr(Calls, "_rounds_up", lambda self, decoder, device: True)
    return load().requires_grad_(False)


def frames(seed=0, cameras=2, height=56, width=84):
    return photos(2, cameras, height, width, seed=seed)


def call(model, *arguments, **options):
    with torch.no_grad():
        return model(*arguments, **options)


def assert_equal(ours, theirs):
    for field in dataclasses.fields(ours):
        assert_same(getattr(ours, field.name), getattr(theirs, field.name), field.name)


def assert_same(ours, theirs, name):
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        for mine, wanted in zip(ours, theirs, strict=True):
            assert_same(mine, wanted, name)
    elif theirs is None:
        assert ours is None, name
    else:
        assert torch.equal(ours, theirs), name


def graphs_of(images):
    """One of the decoder, and one of the tower where there are frames."""
    return 1 + (images is not None)


def assert_replayed(model, fake, *arguments, **options):
    """A captured call gives what the call itself gives."""
    before = fake.replayed
    ours = call(model, *arguments, **options)
    assert fake.replayed == before + graphs_of(arguments[0])
    assert_equal(ours, call(model, *arguments, cuda_graph=False, **options))


MASK = torch.tensor([[True, False], [True, True]])
CALLS = {
    "images": lambda seed: ((frames(seed), TEXTS), {}),
    "text only": lambda seed: ((None, TEXTS), {}),
    "a mask": lambda seed: ((frames(seed), TEXTS, MASK), {}),
    "a list": lambda seed: (([frames(seed)[:, 0], frames(seed, height=84)[:, 1]], TEXTS), {}),
    "layers": lambda seed: ((frames(seed), TEXTS), {"layers": (0, 2, -1), "norm": "pre"}),
    "last logits": lambda seed: ((frames(seed), TEXTS), {"logits": "last"}),
    "all logits": lambda seed: ((frames(seed), TEXTS), {"logits": "all"}),
    "resize": lambda seed: ((frames(seed), TEXTS), {"resize": (28, 56)}),
    "no resize": lambda seed: ((frames(seed), TEXTS), {"resize": None}),
    "float frames": lambda seed: ((frames(seed) / 255, TEXTS), {}),
    "template": lambda seed: ((frames(seed), TEXTS), {"template": "plain"}),
    "targets": lambda seed: ((frames(seed), TEXTS), {"targets": ["left", "up"]}),
    "targets and a mask": lambda seed: ((frames(seed), TEXTS, MASK), {"targets": ["left", ""], "logits": "last"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_is_captured_and_later_ones_replay(own, fake, name):
    for count in range(5):
        arguments, options = CALLS[name](count)
        ours = call(own, *arguments, **options)
        assert fake.captured == graphs_of(arguments[0]) * (count > 0)
        assert fake.replayed == graphs_of(arguments[0]) * count
        assert_equal(ours, call(own, *arguments, cuda_graph=False, **options))


@pytest.mark.slow
def test_trap26_all_calls_in_turn_give_what_each_gives_alone(own, fake):
    for seed in range(4):
        for make in CALLS.values():
            arguments, options = make(seed)
            assert_equal(call(own, *arguments, **options), call(own, *arguments, cuda_graph=False, **options))
    # Four kinds of frames, and nine of what is asked of the decoder: a mask or a resize is nothing to it.
    assert len(own._calls.tower) == 4 and len(own._calls.decoder) == 9 and fake.captured == 13


# By how many cameras and of what size, and which of them are there; few words or more, of few sizes of the decoder.
SHARING = [
    {"cameras": 2},
    {"cameras": 1},
    {"cameras": 1, "height": 84},
    {"cameras": 2, "text": "b c"},
    {"cameras": 3, "mask": [False, True, False]},
    {"cameras": 12, "mask": [False] * 11 + [True]},  # with more rows of features than the sequence has places
    {"cameras": 1, "as_list": True},
]


def shared_call(model, cameras, height=56, text="a", mask=None, as_list=False, size=1, sick=False, **options):
    images = frames(7, cameras, height)[:size]
    if sick:
        images = images.float() / 255
        images[0] = torch.nan
    images = images.to(model.device)
    given = None if mask is None else torch.tensor([mask] * size)
    return call(model, [*images.unbind(1)] if as_list else images, [text] * size, given, **options)


def assert_cameras_share_a_graph(model, size):
    for kind in SHARING[:2] * 2:
        shared_call(model, size=size, **kind)
    (decoder,) = model._calls.decoder._calls.values()
    for _ in range(2):
        for kind in (*SHARING, *reversed(SHARING)):
            # What a larger call leaves behind reaches no smaller one.
            assert not shared_call(model, 2, sick=True, size=size).last_hidden_state[0].isfinite().any()
            ours = shared_call(model, size=size, **kind)
            assert_equal(ours, shared_call(model, size=size, cuda_graph=False, **kind))
            assert ours.last_hidden_state.isfinite().all()
    assert [*model._calls.decoder._calls.values()] == [decoder]


@pytest.mark.parametrize("size", [1, 2])
def test_trap26_cameras_frame_sizes_masks_and_texts_share_a_graph_of_the_decoder(own, fake, size):
    assert_cameras_share_a_graph(own, size)


@pytest.mark.parametrize("size", [1, 2])
def test_deep_features_share_it_too(tmp_path, own, fake, size):
    write_checkpoint(tmp_path, "qwen3-vl-tiny", image={"min_pixels": 32 * 32})
    assert_cameras_share_a_graph(QwenBatchedVL.from_pretrained(tmp_path, device="cpu").requires_grad_(False), size)


@pytest.mark.parametrize("texts", [["a", "a"], TEXTS])
@pytest.mark.parametrize("kind", ["room", "padding"])
def test_no_embedding_of_padding_reaches_a_token(own, fake, texts, kind):
    expected = [call(own, frames(seed), texts) for seed in range(3)]
    padding = 0 if kind == "room" else own.processor.prompts.pad_token_id
    assert not (expected[0].input_ids[expected[0].attention_mask] == padding).any()
    with torch.no_grad():
        own.model.embed_tokens.weight[padding] = torch.nan
    for seed, wanted in enumerate(expected):
        ours, mask = call(own, frames(seed), texts), wanted.attention_mask
        assert torch.equal(ours.last_hidden_state[mask], wanted.last_hidden_state[mask])


def test_nothing_given_for_padding_reaches_a_token(own, fake):
    mask = call(own, None, TEXTS).attention_mask
    clean = torch.randn(*mask.shape, own.model.config.hidden_size)
    sick = clean.masked_fill(~mask[..., None], torch.nan)
    assert not sick.isfinite().all()
    for _ in range(3):
        wanted, ours = (call(own, None, TEXTS, inputs_embeds=given).last_hidden_state for given in (clean, sick))
        assert torch.equal(ours[mask], wanted[mask])


class Launches(TorchDispatchMode):
    """What PyTorch is asked to compute between the tower's graph and the decoder's, without views and the layout."""

    def __init__(self, model, monkeypatch):
        super().__init__()
        self.names, self.counts = [], False
        for graphs, begins in ((model._calls.tower, True), (model._calls.decoder, False)):
            (one,) = graphs._calls.values()
            monkeypatch.setattr(one.graph, "replay", self.switching(one.graph.replay, False, begins))
        # One kernel on a GPU.
        expand = self.switching(ops.expand_prompts, False, True)
        monkeypatch.setattr(ops, "expand_prompts", expand)

    def switching(self, function, during, after):
        def switched(*arguments):
            self.counts = during
            result = function(*arguments)
            self.counts = after
            return result

        return switched

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.counts and not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("preset", "maps"), [("tiny", 1), ("qwen3-vl-tiny", 4)])
def test_between_the_graphs_stand_only_copies_of_results_and_inputs(tmp_path, own, fake, monkeypatch, preset, maps):
    write_checkpoint(tmp_path, preset, image={"min_pixels": 32 * 32})
    model = QwenBatchedVL.from_pretrained(tmp_path, device="cpu").requires_grad_(False)
    for _ in range(3):
        call(model, frames()[:1], ["a"])
    with Launches(model, monkeypatch) as launches:
        call(model, frames(1)[:1], ["a"])
    # Ids, places of features, positions, the mask, and the features.
    assert launches.names == ["clone"] * maps + ["copy_"] * (4 + maps)


def test_a_hook_on_a_block_or_on_the_embedding_sees_sequences_as_long_as_they_are(load):
    decoder, gpu = load().model, torch.device("cuda")
    assert Calls()._rounds_up(decoder, gpu)
    for module in (decoder, decoder.layers[1], decoder.embed_tokens):
        handle = module.register_forward_hook(lambda *arguments: None)
        assert not Calls()._rounds_up(decoder, gpu)
        handle.remove()
    assert Calls()._rounds_up(decoder, gpu)


def add_one_token_more_than_there_are_rows(model):
    spare = model.config.text.vocab_size - model.processor.prompts.vocabulary.largest_id - 1
    model.add_tokens([f"<new {i}>" for i in range(spare + 1)])
    return f"<new {spare}>"


@pytest.mark.parametrize("last", ["forward", "generate", "extend"])
def test_tokens_added_since_go_to_no_graph_that_has_no_rows_for_them(own, fake, last):
    """An index past the end of the old embedding would end the process, before anyone looked at the modules."""

    def run(text, **more):
        if last == "generate":
            return own.generate(None, [text], max_new_tokens=2, template="plain", **more).token_ids[0]
        cache = own.prefill(None, ["a b"], template="plain", cuda_graph=False)
        if last == "extend":
            return own.extend(cache, torch.tensor([own.processor.prompts.encode(text, "plain", 0)]), **more)
        return call(own, None, [text], template="plain", **more).last_hidden_state

    assert len(own.processor.prompts.encode("a", "plain", 0)) == 1
    for _ in range(3):
        run("a")
    new = add_one_token_more_than_there_are_rows(own)
    assert own.processor.prompts.encode(new, "plain", 0) == [own.config.text.vocab_size - 1]
    replayed = fake.replayed
    ours = run(new)
    assert fake.replayed == replayed and torch.equal(ours, run(new, cuda_graph=False))


@pytest.mark.parametrize("last", ["forward", "generate", "extend", "targets"])
def test_rows_added_by_hand_keep_calls_from_graphs_of_fewer(own, fake, last):
    def run(**more):
        if last == "generate":
            own.generate(None, ["a"], max_new_tokens=2, **more)
        elif last == "extend":
            own.extend(own.prefill(None, ["a"], cuda_graph=False), torch.tensor([[rows - 1]]), **more)
        else:
            call(own, None, ["a"], targets=["b"] if last == "targets" else None, **more)

    rows, width = own.model.embed_tokens.weight.shape
    for _ in range(3):
        run()
    for config in (own.config, own.processor.config):  # by which ids are checked, and not the decoder's own
        config.text = dataclasses.replace(config.text, vocab_size=rows + 8)
    if last == "targets":
        own.lm_head = nn.Linear(width, rows + 8, bias=False)
    else:
        own.model.embed_tokens = nn.Embedding(rows + 8, width)
    own.requires_grad_(False)
    rows, replayed = rows + 8, fake.replayed
    run()
    assert fake.replayed == replayed


def test_trap26_prompts_of_one_length_share_a_graph_and_others_do_not(own, fake):
    tokenizer = own.processor.prompts.tokenizer
    texts = ["1234", "5678"]
    assert len({len(tokenizer(text).input_ids) for text in texts}) == 1
    for _ in range(2):
        call(own, frames(), [texts[0], "a"])
    assert_replayed(own, fake, frames(), [texts[1], "b"])
    captured = fake.captured
    longer = call(own, frames(), [texts[0] + " 9 1 2", "a"])
    assert fake.captured == captured
    assert_equal(longer, call(own, frames(), [texts[0] + " 9 1 2", "a"], cuda_graph=False))


def test_trap26_a_ragged_batch_of_the_same_length_but_other_tokens_is_another_graph(own, fake):
    for _ in range(3):
        call(own, None, ["pick up the red block", "a"])
    for _ in range(2):
        ragged = ["pick up the red block", "a b c"]
        assert_equal(call(own, None, ragged), call(own, None, ragged, cuda_graph=False))
    order = ["a", "pick up the red block"]  # the same lengths in another order are only other inputs
    assert_replayed(own, fake, None, order)


def test_trap26_another_mask_is_only_another_input_where_the_counts_agree(own, fake):
    for _ in range(2):
        call(own, frames(), TEXTS, MASK)
    assert_replayed(own, fake, frames(), TEXTS, torch.tensor([[False, True], [True, True]]))
    nobody = torch.zeros(2, 2, dtype=torch.bool)
    assert_equal(call(own, frames(), TEXTS, nobody), call(own, frames(), TEXTS, nobody, cuda_graph=False))


def test_trap26_answers_of_one_length_share_a_graph_and_others_do_not(own, fake):
    tokenizer = own.processor.prompts.tokenizer
    assert len({len(tokenizer(answer).input_ids) for answer in ("1234", "5678")}) == 1
    for _ in range(2):
        call(own, None, ["ab", "a"], targets=["1234", "a b c"])
    assert_replayed(own, fake, None, ["cd", "a"], targets=["5678", "a b c"])
    # Another end of the prompt, the same tokens in all: other tokens are to be learnt.
    assert_replayed(own, fake, None, ["a", "ab"], targets=["a b c", "1234"])
    for targets in (["1234 9", "a b c"], None, ["1234", ""]):
        for _ in range(3):
            theirs = call(own, None, ["ab", "a"], targets=targets, cuda_graph=False)
            assert_equal(call(own, None, ["ab", "a"], targets=targets), theirs)


@pytest.mark.slow
def test_trap26_weights_in_the_decoder_and_the_head(own, fake):
    def check():
        for _ in range(3):
            arguments = frames(), TEXTS
            assert_equal(call(own, *arguments, logits="last"), call(own, *arguments, logits="last", cuda_graph=False))

    check()
    own.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    check()
    own.model.norm.weight.data = own.model.norm.weight.data.clone() * 2
    check()
    own.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 2)
    check()


def test_what_happens_to_the_decoder_leaves_the_graphs_of_image_features(own, fake):
    with torch.no_grad():
        for _ in range(3):
            own.encode_images(frames())
        own.model.norm.weight.data = own.model.norm.weight.data.clone()
        before = fake.replayed
        own.encode_images(frames())
    assert fake.replayed == before + 1


# --- the tower is looked at while the decoder is at work ---


def shift_weights(visual):
    visual.merger.mlp[0].weight.data = visual.merger.mlp[0].weight.data + 1


def count_passes(visual):
    visual.passes = 0

    def forward(*arguments, **options):
        visual.passes += 1
        return type(visual).forward(visual, *arguments, **options)

    visual.forward = forward


CHANGES = {
    "weights": shift_weights,
    "a hook": lambda visual: visual.register_forward_hook(lambda module, given, out: 2 * out),
    "a method": count_passes,
    "mode": lambda visual: visual.train(),
}


@pytest.fixture
def looks(fake, monkeypatch):
    """How many replays there had been when modules were looked at, and the first of these modules."""
    looks, matches = [], ModuleSnapshot.matches

    def logged(self, *modules):
        looks.append((fake.replayed, modules[0]))
        return matches(self, *modules)

    monkeypatch.setattr(ModuleSnapshot, "matches", logged)
    return looks


def test_the_tower_is_looked_at_when_the_decoder_is_on_its_way(own, fake, looks):
    for seed in range(2):
        call(own, frames(seed), TEXTS)
    looks.clear()
    before = fake.replayed
    call(own, frames(2), TEXTS)
    assert looks == [(before + 2, own.visual), (before + 2, own.model)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("text", ["a", "another text, of which there is no graph"])
@pytest.mark.parametrize("prepared", [False, True])
def test_no_one_sees_the_features_of_a_tower_that_has_changed(own, fake, change, text, prepared):
    def run(seed, text, **options):
        given = frames(seed), [text] * 2
        return call(own, **own.processor(*given), **options) if prepared else call(own, *given, **options)

    for seed in range(3):
        run(seed, "a")
    seen = []

    def hook(module, given, out):
        if not fake.replaying:
            seen.append(out.clone())

    own.model.layers[0].register_forward_hook(hook)
    CHANGES[change](own.visual)
    assert_equal(run(3, text), run(3, text, cuda_graph=False))
    ours, theirs = seen
    assert torch.equal(ours, theirs)
    assert len(own._calls.tower) == len(own._calls.decoder) == 0


def replace_memory(module):
    for parameter in module.parameters():
        parameter.data = parameter.data.flip(0).clone()


def hook_a_block(module):
    block = module if hasattr(module, "blocks") else module.layers[0]
    block.register_forward_hook(lambda module, given, out: 2 * out)


GENERATION_CHANGES = {
    "weights": replace_memory,
    "a hook": hook_a_block,
    "mode": lambda module: module.train(),
    "nothing": lambda module: None,
}


def test_modules_are_looked_at_once_the_first_steps_are_launched(own, fake, looks, monkeypatch):
    for seed in range(3):
        own.generate(frames(seed), TEXTS, max_new_tokens=4)
    looks.clear()
    before = fake.replayed
    own.generate(frames(3), TEXTS, max_new_tokens=1)
    assert looks == [(before + 2, own.visual), (before + 2, own.model)]

    def at_once(tokens_BN, run):
        run(tokens_BN.shape[1] - 1)
        yield tokens_BN.tolist()

    monkeypatch.setattr(loop, "_token_chunks", at_once)  # as on a GPU, several steps before the first look at tokens
    looks.clear()
    before = fake.replayed
    own.generate(frames(3), TEXTS, max_new_tokens=4)
    # A step changes its state, so that the decoder is looked at for the steps before the first of them.
    assert looks == [(before + 2, own.model), (before + 5, own.visual), (before + 5, own.model)]


@pytest.mark.parametrize("change", GENERATION_CHANGES)
@pytest.mark.parametrize("part", ["visual", "model"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3}], ids=["likeliest", "drawn"])
def test_a_generation_of_modules_that_have_changed_begins_anew(own, fake, change, part, options):
    def run(seed, **more):
        torch.manual_seed(seed)
        pieces = []
        out = own.generate(frames(seed), TEXTS, max_new_tokens=5, stream=pieces.append, **options, **more)
        return out.token_ids, ["".join(each) for each in zip(*pieces, strict=True)], out.texts, torch.rand(1)

    for seed in range(3):
        run(seed)
    replayed = fake.replayed
    run(3)
    assert fake.replayed == replayed + 2 + 4
    GENERATION_CHANGES[change](getattr(own, part))
    ours, theirs = run(4), run(4, cuda_graph=False)
    assert all(torch.equal(x, y) for x, y in zip(ours[0], theirs[0], strict=True))
    assert ours[1] == theirs[1] == ours[2] == theirs[2] and ours[3] == theirs[3]
    graphs = own._calls.tower if part == "visual" else own._calls.decoder
    assert (len(graphs) == 0) == (change != "nothing")


@pytest.mark.parametrize("kind", ["forward", "prepared", "prefill", "generate"])
def test_a_hook_of_the_tower_sees_a_call_once_though_the_decoder_has_changed(own, fake, kind):
    def run(seed, **more):
        if kind == "generate":
            return torch.stack(own.generate(frames(seed), TEXTS, max_new_tokens=3, **more).token_ids)
        if kind == "prefill":
            return own.prefill(frames(seed), TEXTS, **more).output.last_hidden_state
        if kind == "prepared":
            return call(own, **own.processor(frames(seed), TEXTS), **more).last_hidden_state
        return call(own, frames(seed), TEXTS, **more).last_hidden_state

    def drawn(**more):
        draws.clear()
        torch.manual_seed(0)
        return run(3, **more), draws[:], torch.rand(1)

    draws = []
    own.visual.register_forward_hook(lambda module, given, out: draws.append(torch.rand(1).item()))
    for seed in range(3):
        run(seed)
    assert len(own._calls.decoder) == 1
    replace_memory(own.model)
    (ours, seen, after), (theirs, once, expected) = drawn(), drawn(cuda_graph=False)
    assert torch.equal(ours, theirs) and seen == once and len(once) == 1 and torch.equal(after, expected)


def test_a_progress_bar_is_shown_once_though_the_decoder_has_changed(own, fake, capsys):
    for seed in range(3):
        own.generate(frames(seed), TEXTS, max_new_tokens=3)
    replace_memory(own.model)
    own.generate(frames(3), TEXTS, max_new_tokens=3, progress=True)
    assert capsys.readouterr().err.count("0/3") == 1


def test_a_tower_that_changes_at_every_call_ends_every_call(own, fake):
    for seed in range(6):
        shift_weights(own.visual)
        assert_equal(call(own, frames(seed), TEXTS), call(own, frames(seed), TEXTS, cuda_graph=False))
        call(own, frames(seed), TEXTS)


def test_capture_makes_the_graph_ahead_of_time(own, fake):
    own.capture(torch.zeros_like(frames()), TEXTS, logits="last")
    assert fake.captured == 2
    assert_replayed(own, fake, frames(), TEXTS, logits="last")


def test_capture_makes_the_graph_though_all_places_are_taken(own, fake):
    own._calls.decoder.max_graphs = 1
    for _ in range(4):
        call(own, None, TEXTS)
    own.capture(torch.zeros_like(frames()), TEXTS)
    assert fake.captured == 3
    assert_replayed(own, fake, frames(), TEXTS)


@pytest.mark.parametrize("first", ["forward", "encode_images"])
def test_trap26_a_call_that_reaches_more_layers_leaves_earlier_graphs_true(own, fake, monkeypatch, first):
    """All weights are packed before the first graph, those of layers too that it does not run."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)  # the CPU packs where a GPU would
    calls = {
        "forward": [{"layers": (1,)}, {"layers": (-1,)}, {"layers": (0,)}],
        "encode_images": [{"layers": (0,)}, {"layers": None}, {"layers": (-1,)}],
    }[first]
    with torch.no_grad():
        run = own.encode_images if first == "encode_images" else lambda images, **options: own(images, TEXTS, **options)
        for options in calls:
            for _ in range(2):
                run(frames(), **options)
        captured = len(calls) + (first == "forward")  # and one tower for all
        assert fake.captured == captured
        for options in calls:
            replayed = fake.replayed
            run(frames(), **options)
            assert fake.replayed == replayed + (2 if first == "forward" else 1)
    assert fake.captured == captured
    parts = own.visual.blocks if first == "encode_images" else (*own.visual.blocks, *own.model.layers)
    weights = [[block.mlp.gate_proj.weight, block.mlp.up_proj.weight] for block in parts]
    assert all(block.mlp._gate_up._weights.tensor(pair) is not None for block, pair in zip(parts, weights, strict=True))


def test_capture_refuses_what_a_call_refuses(own):
    with pytest.raises(ValueError, match="template"):
        own.capture(frames(), TEXTS, template="nothing")
    with pytest.raises(TypeError, match="texts"):
        own.capture(frames(), None)


def test_bad_input_is_refused_on_a_captured_shape_too(own):
    for _ in range(3):
        call(own, frames(), TEXTS)
    for arguments, options in [
        *(((frames(), ["one"]), {}), ((frames(), TEXTS, MASK[:1]), {}), ((frames(), TEXTS), {"layers": (99,)})),
        ((frames(), TEXTS), {"resize": (56, 83)}),
        *(((frames(), TEXTS), {"targets": ["one"]}), ((frames().int(), TEXTS), {})),
    ]:
        with pytest.raises((ValueError, TypeError)):
            call(own, *arguments, **options)


def test_gradients_make_no_graph(own, fake):
    batch = own.requires_grad_(True).processor(frames(), TEXTS)
    for _ in range(3):
        own(**batch)
        own(frames(), TEXTS)
    assert fake.captured == 0


def test_a_prepared_batch_has_a_graph(own, fake):
    batch = own.processor(frames(), TEXTS)
    outs = [call(own, **batch).last_hidden_state for _ in range(3)]
    assert fake.captured == 2
    assert torch.equal(outs[0], call(own, frames(), TEXTS).last_hidden_state)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_processor_of_another_class_or_with_a_method_of_its_own_makes_no_graph(load):
    """It may draw at random, say, or train something: a graph would always give what came when it was captured."""
    calls, processor, gpu = Calls(), load().processor, torch.device("cuda")
    assert calls._may_use_graphs(processor, gpu, True)
    assert not calls._may_use_graphs(processor, torch.device("cpu"), True)
    processor.batch = processor.batch
    assert not calls._may_use_graphs(processor, gpu, True)
    del processor.batch
    processor.__class__ = type("Augmenting", (type(processor),), {})
    assert not calls._may_use_graphs(processor, gpu, True)


# --- generation, a graph for a step ---

GENERATE = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "top k and p": {"temperature": 1.3, "seed": 3, "top_k": 20, "top_p": 0.9},
}


def assert_generates_the_same(model, **options):
    ours = model.generate(frames(), TEXTS, max_new_tokens=12, **options)
    theirs = model.generate(frames(), TEXTS, max_new_tokens=12, cuda_graph=False, **options)
    assert [ids.tolist() for ids in ours.token_ids] == [ids.tolist() for ids in theirs.token_ids]
    assert ours.texts == theirs.texts


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_steps_after_the_first_replay(own, fake, name, penalty):
    own.generation_config = GenerationConfig(eos_token_ids=(), repetition_penalty=penalty)
    assert_generates_the_same(own, **GENERATE[name])
    assert fake.captured == 1
    assert fake.replayed == 10, "of 12 tokens one is the prompt's, one a first step's"
    for count in (1, 2):  # from now on all of it comes from graphs: features, prompt, every step
        assert_generates_the_same(own, **GENERATE[name])
        assert fake.captured == 3 and fake.replayed == 10 + 13 * count
    assert len(own._calls.idle._idle) == 1


def test_a_decoder_of_more_blocks_gets_no_state_of_fewer(own, fake):
    layers, whole = own.model.layers, own.config.text

    def cut(count):
        own.model.layers = layers[:count]
        text = dataclasses.replace(whole, num_hidden_layers=count)
        own.model.config = own.config.text = own.processor.config.text = text

    for count in (1, len(layers), 1):  # and back: a state is of its kind, whatever outdated prompts it was made for
        cut(count)
        for seed in range(3):
            ours, theirs = (own.generate(frames(seed), TEXTS, max_new_tokens=4, cuda_graph=x) for x in (True, False))
            assert all(map(torch.equal, ours.token_ids, theirs.token_ids))


def test_an_error_in_the_stream_leaves_a_state_that_serves_again(own, fake):
    with pytest.raises(ZeroDivisionError):
        own.generate(frames(), TEXTS, max_new_tokens=8, stream=lambda pieces: 1 / 0)
    assert len(own._calls.idle._idle) == 1
    assert_generates_the_same(own)


def test_generations_of_one_kind_follow_each_other_in_one_state(own, fake):
    """Whatever the last one left there: longer prompts, more tokens, drawn ones, NaN."""
    own.generation_config = GenerationConfig(eos_token_ids=())
    options = {"temperature": 1.0, "allowed_tokens": list(range(300)), "logprobs": True}
    kinds = [{}, {"camera_mask": MASK}, {"max_new_tokens": 3}, {"max_new_tokens": 20}, {"seed": 4}]
    for kind in (*kinds, *kinds):
        chosen = {"max_new_tokens": 12, "seed": 1, **options, **kind}
        ours = own.generate(frames(), TEXTS, **chosen)
        theirs = own.generate(frames(), TEXTS, cuda_graph=False, **chosen)
        assert ours.texts == theirs.texts
        assert all(torch.equal(x, y) for x, y in zip(ours.logprobs, theirs.logprobs, strict=True))
        sick = frames().float() / 255
        sick[0] = torch.nan
        reasons = own.generate(sick, TEXTS, **chosen).finish_reasons
        assert reasons == ["invalid", "length"]
    assert len(own._calls.idle._idle) <= 5


def test_a_stream_that_generates_and_a_second_thread_get_states_of_their_own(own, fake):
    own.generation_config = GenerationConfig(eos_token_ids=())
    want = own.generate(frames(), TEXTS, max_new_tokens=8, cuda_graph=False).texts
    inner = []

    def stream(pieces):
        if len(inner) < 3:
            inner.append(own.generate(frames(), TEXTS, max_new_tokens=8).texts)

    assert own.generate(frames(), TEXTS, max_new_tokens=8, stream=stream).texts == want
    assert inner == [want] * 3
    own.to(torch.float32)  # forgets all
    assert own._calls.idle._idle == []


def test_a_state_that_was_lent_when_all_were_forgotten_is_not_kept(own, fake):
    own.generation_config = GenerationConfig(eos_token_ids=())
    own.generate(frames(), TEXTS, max_new_tokens=8, stream=lambda pieces: own.clear_graphs())
    assert own._calls.idle._idle == []
    calls = []

    def clear_once(pieces):
        calls.append(pieces)
        if len(calls) == 2:
            own.clear_graphs()

    own.generate(frames(), TEXTS, max_new_tokens=8, stream=clear_once)
    assert own._calls.idle._idle == [] and own.graph_count == 0, "nor is its graph, captured afterwards"


def test_idle_states_are_few(own, fake, monkeypatch):
    monkeypatch.setattr(pool, "MAX_IDLE", 3)
    own.generation_config = GenerationConfig(eos_token_ids=())
    for count in (4, 40, 70, 130, 4):
        own.generate(None, ["a"], max_new_tokens=count)
    assert len(own._calls.idle._idle) == 3
    assert len(own._calls.steps) == 3, "a state that is given up takes its graph with it"
    monkeypatch.setattr(pool, "MAX_BYTES", own._calls.idle._idle[-1].nbytes)
    own.generate(None, ["a"], max_new_tokens=4)
    assert len(own._calls.idle._idle) == 1


@pytest.mark.parametrize("change", ["mode", "hook", "weights"])
def test_trap26_a_model_changed_between_two_steps_repeats_no_step(own, fake, change):
    """A step changes state: a stale one must not run before the true one."""
    own.generation_config = GenerationConfig()
    expected = own.generate(frames(), TEXTS, max_new_tokens=12, cuda_graph=False)
    calls = []

    def stream(pieces):
        calls.append(pieces)
        if len(calls) == 6 and change == "mode":
            own.train()
        if len(calls) == 6 and change == "hook":
            own.model.layers[0].register_forward_hook(lambda *_: None)
        if len(calls) == 6 and change == "weights":
            own.model.norm.weight.data = own.model.norm.weight.data.clone()

    out = own.generate(frames(), TEXTS, max_new_tokens=12, stream=stream)
    assert [ids.tolist() for ids in out.token_ids] == [ids.tolist() for ids in expected.token_ids]


def test_trap29_the_state_of_a_step_may_change_outside_inference_mode(own, monkeypatch):
    """Where graphs are captured; a step's state made inside could not be."""
    made = []
    init = Decoding.__init__
    monkeypatch.setattr(
        Decoding, "__init__", lambda self, *args, **options: made.append(self) or init(self, *args, **options)
    )
    with torch.inference_mode():
        own.generate(frames(), TEXTS, max_new_tokens=3, temperature=1.0, seed=0, cuda_graph=False)
    state = [x for holder in (made[0], made[0]._cache) for x in vars(holder).values() if isinstance(x, torch.Tensor)]
    assert len(state) >= 7
    assert not any(x.is_inference() for x in state)
    before = made[0].tokens.clone()
    with torch.inference_mode(False):
        made[0]._column.fill_(1)
        made[0].step()
    assert torch.equal(made[0].tokens[:, 0], before[:, 0])


def test_hooks_see_every_step(own, fake):
    seen = []
    own.model.layers[0].register_forward_hook(lambda *_: seen.append(1) and None)
    own.generation_config = GenerationConfig()
    own.generate(None, TEXTS, max_new_tokens=6)
    assert len(seen) == 6
    assert fake.captured == 0


@pytest.mark.slow
def test_a_head_of_its_own_and_weights_changed_between_calls(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(Calls, "_may_use_graphs", lambda self, processor, device, wanted: wanted)
    folder = write_checkpoint(tmp_path / "checkpoint", tied=False, image={"min_pixels": 28 * 28})
    model = QwenBatchedVL.from_pretrained(folder, device="cpu").requires_grad_(False)
    assert_generates_the_same(model)
    model.lm_head.weight.mul_(-1)
    assert_generates_the_same(model)
    model.lm_head.weight.data = model.lm_head.weight.data.clone().flip(0)
    assert_generates_the_same(model)


# --- the device is at work on frames while the host is at the texts ---


@pytest.fixture
def log(own, monkeypatch):
    """Of what comes when: the vision transformer, and the texts."""
    log = []
    for owner, name in ((Calls, "encode"), (PromptRows, "lay_out"), (PromptRows, "lay_out_on_device")):
        real = getattr(owner, name)

        def logged(*arguments, real=real, name=name, **options):
            log.append("frames" if name == "encode" else "texts")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, logged)
    return log


@pytest.mark.parametrize("mask", [None, MASK])
def test_texts_are_tokenised_when_the_frames_are_on_their_way(own, fake, log, mask):
    call(own, frames(), ["A new text.", "Another one."], mask)
    own.generate(frames(), ["A third text.", "A fourth."], max_new_tokens=2, camera_mask=mask)
    assert log == ["frames", "texts"] * 2


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["a" * 10**6, "b"], {}),
        (["", ""], {"template": "{text}{images}", "camera_mask": torch.zeros(2, 2, dtype=torch.bool)}),
        (["a", "b"], {"template": "{text}{image}"}),
        (["a", "b"], {"template": "{text}{image}{image}", "camera_mask": [[True] * 2] * 2}),
        (["a", "b"], {"targets": ["c", "\ud800"]}),
    ],
    ids=["too long", "no token", "no layout", "no mask", "no answer"],
)
def test_texts_that_are_refused_are_refused_before_any_work(own, fake, log, texts, options):
    with pytest.raises((TypeError, ValueError)):
        call(own, frames(), texts, **options)
    assert "frames" not in log


def test_a_prompt_and_its_new_tokens_that_do_not_fit_are_refused_before_any_work(own, fake, log):
    most = own.config.text.max_position_embeddings
    with pytest.raises(ValueError, match="must fit"):
        own.generate(frames(), TEXTS, max_new_tokens=most)
    assert "frames" not in log
    with pytest.raises(ValueError, match="embedding"):
        config = dataclasses.replace(own.processor.config.text, vocab_size=300)
        own.processor.config = dataclasses.replace(own.processor.config, text=config)
        call(own, frames(), TEXTS)
    assert "frames" not in log


# --- on a GPU, with CUDA's graphs ---


@pytest.fixture
def on_gpu(load):
    return load(device="cuda").requires_grad_(False)


def to_gpu(arguments):
    return [
        [camera.cuda() for camera in x] if isinstance(x, list) and isinstance(x[0], torch.Tensor)
        else x.cuda() if isinstance(x, torch.Tensor) and x.dtype != torch.bool
        else x
        for x in arguments
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_a_graph_of_the_whole_call_gives_bitwise_what_the_call_gives(on_gpu, name, dtype):
    on_gpu.to(dtype)
    for seed in range(5):
        arguments, options = CALLS[name](seed)
        arguments = to_gpu(arguments)
        ours = call(on_gpu, *arguments, **options)
        assert_equal(ours, call(on_gpu, *arguments, cuda_graph=False, **options))
    assert sum(map(bool, on_gpu._calls.decoder._calls.values())) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_trap26_on_a_gpu_cameras_and_texts_share_a_graph_of_the_decoder(on_gpu, size, dtype):
    assert_cameras_share_a_graph(on_gpu.to(dtype), size)


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("text", ["a", "another text, of which there is no graph"])
def test_a_tower_that_has_changed_is_seen_on_a_gpu(on_gpu, change, text):
    for seed in range(3):
        call(on_gpu, frames(seed).cuda(), ["a"] * 2)
    assert len(on_gpu._calls.tower) == 1
    CHANGES[change](on_gpu.visual)
    given = frames(3).cuda(), [text] * 2
    assert_equal(call(on_gpu, *given), call(on_gpu, *given, cuda_graph=False))
    assert len(on_gpu._calls.tower) == 0


@pytest.mark.gpu
def test_tokens_added_since_are_read_on_a_gpu(on_gpu):
    on_gpu.generation_config = GenerationConfig(repetition_penalty=1.1)

    def run(text, **more):
        new = on_gpu.generate(None, [text], max_new_tokens=3, allowed_tokens=[5, 6, 7], template="plain", **more)
        return new.token_ids[0], call(on_gpu, None, [text], template="plain", **more).last_hidden_state

    for _ in range(3):
        run("a")
    new = add_one_token_more_than_there_are_rows(on_gpu)
    for x, y in zip(run(new), run(new, cuda_graph=False), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_trap26_all_calls_in_turn_on_a_gpu(on_gpu):
    for seed in range(4):
        for make in CALLS.values():
            arguments, options = make(seed)
            arguments = to_gpu(arguments)
            ours = call(on_gpu, *arguments, **options)
            assert_equal(ours, call(on_gpu, *arguments, cuda_graph=False, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_give_the_same_tokens(on_gpu, name, dtype):
    on_gpu.to(dtype)
    on_gpu.generation_config = GenerationConfig(repetition_penalty=1.1)
    for _ in range(3):
        ours = on_gpu.generate(frames().cuda(), TEXTS, max_new_tokens=40, **GENERATE[name])
        theirs = on_gpu.generate(frames().cuda(), TEXTS, max_new_tokens=40, cuda_graph=False, **GENERATE[name])
        assert [ids.tolist() for ids in ours.token_ids] == [ids.tolist() for ids in theirs.token_ids]


@pytest.mark.gpu
def test_threads_on_streams_of_their_own_generate_in_each_others_states(on_gpu):
    """A state goes from one stream to another while the first may still be at work."""
    texts = [["Pick up the red block.", "a"], ["Open the drawer.", "b c d"]]
    images = [frames(seed).cuda() for seed in range(2)]

    def generate(which, **options):
        return [
            ids.tolist() for ids in on_gpu.generate(images[which], texts[which], max_new_tokens=24, **options).token_ids
        ]

    expected = [generate(which, cuda_graph=False) for which in range(2)]
    for which in range(2):
        for _ in range(2):
            generate(which)
    torch.cuda.synchronize()
    wrong = []

    def work(which):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(12):
                    assert generate(which) == expected[which]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, repr(wrong)


@pytest.mark.gpu
def test_memory_is_flat_over_many_generations(on_gpu):
    def round_trip(calls):
        for index in range(calls):
            on_gpu.generate(None, ["a" * (1 + index % 7), "b"], max_new_tokens=6)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    round_trip(14)
    before = round_trip(14)
    assert round_trip(56) <= before + 2**20


@pytest.mark.gpu
def test_pinned_host_frames_are_copied_without_a_stall(on_gpu):
    host = [frames(seed).pin_memory() for seed in range(4)]
    expected = [call(on_gpu, images, TEXTS, cuda_graph=False) for images in host]
    on_gpu.capture(host[0], TEXTS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = [call(on_gpu, images, TEXTS) for images in host]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(ours, expected, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.gpu
def test_memory_is_flat_over_many_shapes(on_gpu):
    on_gpu._calls.decoder.max_graphs = 4

    def round_trip(calls):
        for index in range(calls):
            call(on_gpu, frames(height=28 * (1 + index // 3 % 6)).cuda(), ["a" * (1 + index // 18 % 5), "b"])
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    round_trip(90)
    before = round_trip(90)
    assert round_trip(360) <= before + 2**20
    assert len(on_gpu._calls.decoder) <= 4


# --- a cached prompt ---


def test_a_prompt_and_tokens_behind_it_are_captured(own, fake):
    width = own.config.text.hidden_size
    for count in range(4):
        cache = own.prefill(frames(count), TEXTS)
        assert fake.captured == 2 * (count > 0) and fake.replayed == 2 * count
        want = call(own, frames(count), TEXTS, cuda_graph=False)
        assert_equal(cache.output, want)
    captured, replayed = fake.captured, fake.replayed
    for count in range(4):
        suffix = torch.randn(2, 3, width)
        ours = own.extend(cache, suffix)
        assert fake.captured == captured + (count > 0) and fake.replayed == replayed + count
        assert torch.equal(ours, own.extend(cache, suffix, cuda_graph=False))


def test_caches_in_turn_are_each_extended_and_copied_once_for_calls_that_follow_each_other(own, fake):
    suffix = torch.randn(2, 3, own.config.text.hidden_size)
    caches = [own.prefill(frames(seed), TEXTS) for seed in range(3)]
    for _ in range(2):
        own.extend(caches[0], suffix)
    (graph,) = own._calls.suffixes._calls.values()
    copies = []
    for order in (0, 0, 1, 1, 1, 0, 2):
        before = [buffer._version for buffer in graph.held]
        ours = own.extend(caches[order], suffix)
        copies.append(before != [buffer._version for buffer in graph.held])
        assert torch.equal(ours, own.extend(caches[order], suffix, cuda_graph=False))
    assert copies == [False, False, True, False, False, True, True]


def test_features_in_place_of_frames_have_a_graph(own, fake):
    features = own.encode_images(frames())
    captured = fake.captured
    for _ in range(2):
        call(own, None, TEXTS, image_features=features)
    assert fake.captured == captured + 1
    assert_replayed(own, fake, None, TEXTS, image_features=own.encode_images(frames(3)))
    embeds = torch.randn(*call(own, frames(), TEXTS).input_ids.shape, own.config.text.hidden_size)
    for _ in range(2):
        call(own, frames(), TEXTS, inputs_embeds=embeds)
    assert_replayed(own, fake, frames(1), TEXTS, inputs_embeds=embeds + 1)
    for _ in range(2):
        call(own, frames(), TEXTS, keys_values=(0, 1))
    before = fake.replayed
    pairs = call(own, frames(2), TEXTS, keys_values=(0, 1)).keys_values
    assert fake.replayed == before + 2
    want = call(own, frames(2), TEXTS, keys_values=(0, 1), cuda_graph=False).keys_values
    assert all(
        torch.equal(x, y) for pair, other in zip(pairs, want, strict=True) for x, y in zip(pair, other, strict=True)
    )


# --- warmup ---

WORDS = ["pick", "up", "the", "red", "block", "and", "open", "a", "drawer"]


def a_text(rng, tokens, most, model):
    """A random text of at most so many tokens."""
    while True:
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, most)))
        if len(tokens(text).input_ids) <= most:
            return text


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, "host", "device"])
@pytest.mark.parametrize("size", [1, 2])
def test_after_warmup_no_text_captures(own, fake, monkeypatch, size, mask):
    rng, tokens, most = random.Random(0), own.processor.prompts.tokenizer, 20
    images = frames()[:size]
    if mask == "device":
        monkeypatch.setattr(PromptRows, "lay_out", PromptRows.lay_out_on_device)
        if size == 1:
            monkeypatch.setattr("qwen_batched.model.warmup._knows_lengths", lambda mask: False)
    given = None if mask is None else torch.ones(1, 2, dtype=torch.bool)
    if mask == "device" and size == 2:
        pytest.skip("pretending is done for one sample")
    made = own.warmup(images, max_text_tokens=most, camera_mask=given, progress=False)
    captured = fake.captured
    assert made.graphs == captured == own.graph_count > 2
    for _ in range(12):
        texts = [a_text(rng, tokens, most, own) for _ in range(size)]
        drawn = None if mask is None else torch.rand(size, 2) < 0.6
        ours = call(own, frames(rng.randint(0, 9))[:size], texts, drawn)
        assert fake.captured == captured, texts
        assert ours.last_hidden_state.isfinite().all()
    own.clear_graphs()
    assert own.graph_count == 0


def test_warmup_refuses_what_cannot_be(own, fake):
    for wrong in ({"max_text_tokens": 0}, {"max_text_tokens": 10**6}, {"max_text_tokens": 5, "batch_sizes": ()}):
        with pytest.raises(ValueError):
            own.warmup(frames(), progress=False, **wrong)
    for wrong in ([], {"camera": frames()}, frames()[0], frames()[:0]):
        with pytest.raises((TypeError, ValueError), match="images"):
            own.warmup(wrong, max_text_tokens=5, progress=False)
    for wrong in ([[True, True]], torch.tensor(True), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises((TypeError, ValueError), match="camera_mask"):
            own.warmup(frames(), max_text_tokens=5, camera_mask=wrong, progress=False)
    own._calls.decoder.max_graphs = 2
    with pytest.raises(ValueError, match="graphs"):
        own.warmup(frames(), max_text_tokens=60, progress=False)
    own._calls.decoder.max_graphs = 3
    with pytest.raises(ValueError, match="need 4 graphs"):  # prompts of `generate` have graphs of their own
        own.warmup(frames()[:1], max_text_tokens=20, max_new_tokens=3, progress=False)
    with pytest.raises(ValueError, match="int"):
        own.warmup(frames(), max_text_tokens="a", progress=False)
    assert fake.captured == 0
    assert call(own, frames(), TEXTS).last_hidden_state.isfinite().all()


def test_warmup_needs_the_output_projection_only_to_generate(own, fake):
    own.has_lm_head = False
    with pytest.raises(ValueError, match="lm_head"):
        own.warmup(frames()[:1], max_text_tokens=5, max_new_tokens=3, progress=False)
    assert fake.captured == 0
    assert own.warmup(frames()[:1], max_text_tokens=5, progress=False).graphs == fake.captured > 1


def test_warmup_looks_for_memory_with_the_largest_batch_and_makes_no_graph_twice(own, fake, monkeypatch):
    tried = []
    monkeypatch.setattr(type(own), "_check_memory", lambda self, plan, arguments: tried.append(len(plan[1])))
    made = own.warmup(frames(), max_text_tokens=5, batch_sizes=(1, 3, 1), progress=False)
    assert tried == [3]
    assert made.graphs == fake.captured


@pytest.mark.parametrize("at", [0, 2])
def test_warmup_that_runs_out_of_memory_leaves_no_graph_of_its_own(own, fake, at):
    for _ in range(2):
        call(own, frames(), TEXTS)
    before = own.graph_count
    assert before == 2

    def fill():
        if fake.captured == before + at:
            fake.error = torch.OutOfMemoryError("CUDA out of memory")

    fake.before_capture = fill
    bounds = {"max_text_tokens": 20, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"exceed the GPU's memory, which holds the largest \d of \d+: lower"):
            own.warmup(frames(1, height=84), **bounds)
    assert own.graph_count == before
    fake.error, fake.before_capture = None, lambda: None
    assert_replayed(own, fake, frames(), TEXTS)
    assert own.warmup(frames(1, height=84), **bounds).graphs > before + at, "with memory it is as if never tried"


def test_warmup_tells_once_what_else_cannot_be_captured(own, fake):
    fake.error = RuntimeError("invalidated")
    with pytest.warns(RuntimeWarning, match="invalidated") as caught:
        assert own.warmup(frames(), max_text_tokens=5, progress=False).graphs == 0
    assert len(caught) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths", [[*range(10, 50)], [*range(20, 40), *range(84, 110), *range(150, 170)], [7], [7, 300]]
)
def test_warmup_chooses_a_call_for_every_shape_that_lengths_lead_to_and_none_twice(lengths, size):
    """Gaps between lengths are the tokens of cameras that are absent."""

    def shape(row):
        is_padded = len({*row}) > 1
        rows = rows_of(size, max(row), is_padded)
        tokens = round_up(sum(row), PACKED_TOKEN_STEPS) if is_padded else size * rows
        return min(tokens, size * rows), rows, is_padded

    chosen = [shape(row) for row in _choose(lengths, size, True)]
    assert {*chosen} == {shape(row) for row in itertools.combinations_with_replacement(lengths, size)}
    assert len({*chosen}) == len(chosen)


def test_warmup_leaves_out_every_camera_of_a_list_whose_sizes_differ():
    small, large = torch.zeros(1, 3, 28, 28), torch.zeros(1, 3, 56, 56)
    masks = {tuple(mask[0].tolist()) for mask in _masks([small, large], torch.ones(1, 2).bool(), torch.device("cpu"))}
    assert masks == {(True, True), (True, False), (False, True), (False, False)}
    alike = [*_masks([small] * 4, torch.ones(1, 4).bool(), torch.device("cpu"))]
    assert [int(mask.sum()) for mask in alike] == [4, 3, 2, 1, 0]
