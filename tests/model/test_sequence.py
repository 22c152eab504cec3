"""Sequences and rope positions against transformers' `get_rope_index` and a slow expansion (trap 14, trap 15)."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched.inputs.prompt_rows import TextCall
from qwen_batched.inputs.request import Request
from qwen_batched.inputs.sequence import expand_prompts
from qwen_batched.ops import NO_TOKEN
from tests.support import assert_equal_to, photos

SETTINGS = settings(max_examples=20, deadline=None)
PAD, START, END = 7, 8, 9  # any ids that are not the image token


@st.composite
def cases(draw, max_samples=3, whole=False):
    """Prompts as token lists with one image token for each present camera, grids, a mask, and how to pad.

    `whole`: as transformers needs them, images between start and end tokens, and no empty prompt.
    """
    cameras = draw(st.integers(0, 4))
    grids = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=cameras, max_size=cameras))
    batch = draw(st.integers(1, max_samples))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=cameras, max_size=cameras), min_size=batch, max_size=batch))
    prompts = []
    for row in mask:
        prompt = []
        for _ in range(sum(row)):
            prompt += draw(st.lists(st.integers(10, 99), max_size=4))
            prompt += [START, "image", END] if whole else ["image"]
        prompts.append(prompt + draw(st.lists(st.integers(10, 99), min_size=int(whole), max_size=6)))
    if not any(prompts):
        prompts[0] = [10]
    return {
        "prompts": prompts,
        "grids": grids,
        "mask": mask,
        "side": draw(st.sampled_from(["left", "right"])),
        "slack": draw(st.integers(0, 3)),
        "all_present": all(map(all, mask)),
    }


def slow_expansion(case):
    """Each sample's tokens one by one: (id or "image", camera, feature, (t, h, w))."""
    first_feature = [sum(h * w for h, w in case["grids"][:camera]) for camera in range(len(case["grids"]))]
    samples = []
    for prompt, row in zip(case["prompts"], case["mask"], strict=True):
        present = [camera for camera, here in enumerate(row) if here]
        tokens, position = [], 0
        for token in prompt:
            if token != "image":
                tokens.append((token, -1, -1, (position,) * 3))
                position += 1
                continue
            camera = present.pop(0)
            height, width = case["grids"][camera]
            for y in range(height):
                for x in range(width):
                    feature = first_feature[camera] + y * width + x
                    tokens.append(("image", camera, feature, (position, position + y, position + x)))
            position += max(height, width)
        samples.append(tokens)
    return samples


def expand(case, image_token_id, device="cpu", length=None):
    width = max(map(len, case["prompts"]))
    rows = [
        [image_token_id if token == "image" else token for token in prompt] + [NO_TOKEN] * (width - len(prompt))
        for prompt in case["prompts"]
    ]
    mask = torch.tensor(case["mask"], dtype=torch.bool, device=device).reshape(len(rows), len(case["grids"]))
    return expand_prompts(
        torch.tensor(rows, device=device),
        torch.tensor(case["grids"], dtype=torch.int64, device=device).reshape(-1, 2),
        None if case["all_present"] else mask,
        image_token_id=image_token_id,
        pad_token_id=PAD,
        length=max(map(len, slow_expansion(case))) + case["slack"] if length is None else length,
        padding_side=case["side"],
    )


@given(case=cases())
@SETTINGS
def test_trap14_sequences_equal_a_slow_expansion(device, case):
    out = expand(case, image_token_id=5, device=device)
    length = out.input_ids.shape[1]
    for i, tokens in enumerate(slow_expansion(case)):
        padding = [(PAD, -1, -1, (0, 0, 0))] * (length - len(tokens))
        here = [False] * len(padding), [True] * len(tokens)
        expected = padding + tokens if case["side"] == "left" else tokens + padding
        attention_mask = [*here[0], *here[1]] if case["side"] == "left" else [*here[1], *here[0]]
        assert out.attention_mask[i].tolist() == attention_mask
        assert out.input_ids[i].tolist() == [5 if token[0] == "image" else token[0] for token in expected]
        assert out.camera_ids[i].tolist() == [token[1] for token in expected]
        assert out.feature_index[i].tolist() == [token[2] for token in expected]
        assert out.position_ids[:, i].T.tolist() == [list(token[3]) for token in expected]


def rope_index(reference, input_ids, attention_mask, grids):
    """transformers' positions (3, B, S) of padded sequences; `grids` (images, 2) in merged cells."""
    model = reference.model if hasattr(reference.model, "get_rope_index") else reference.model.model
    function = model.get_rope_index
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask.long(),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in grids]) if grids else None,
        "mm_token_type_ids": (input_ids == reference.model.config.image_token_id).int(),  # since version 5
    }
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in known})[0]


def assert_positions_equal(reference, out, grids):
    theirs = rope_index(reference, out.input_ids.cpu(), out.attention_mask.cpu(), grids)
    own = out.attention_mask.cpu()
    assert torch.equal(out.position_ids.cpu()[:, own], theirs[:, own])


@given(case=cases(whole=True))
@SETTINGS
def test_trap14_positions_equal_get_rope_index(reference, device, case):
    token_ids = reference.tokenizer.get_added_vocab()
    names = {START: "<|vision_start|>", END: "<|vision_end|>"}
    swap = {number: token_ids[name] for number, name in names.items()}
    case["prompts"] = [[swap.get(token, token) for token in prompt] for prompt in case["prompts"]]
    out = expand(case, token_ids["<|image_pad|>"], device)
    grids = [grid for row in case["mask"] for grid, here in zip(case["grids"], row, strict=True) if here]
    assert_positions_equal(reference, out, grids)


@pytest.mark.parametrize("cameras", [0, 1, 2, 3])
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_trap14_the_models_positions_equal_get_rope_index(model, right_padded_model, reference, cameras, template):
    for ours in (model, right_padded_model):
        images = photos(3, cameras, 140, 252).to(ours.device) if cameras else None
        out = ours(images, ["a", " ", "open the top drawer\n" * 5], template=template)
        assert not out.attention_mask.all()
        assert_positions_equal(reference, out, [(5, 9)] * cameras * 3)


@pytest.mark.parametrize(("grid", "advance"), [((2, 7), 7), ((7, 2), 7), ((1, 1), 1), ((4, 4), 4)])
def test_trap14_text_after_an_image_starts_at_its_longer_side(grid, advance):
    case = {"prompts": [[10, "image", 11]], "grids": [grid], "mask": [[True]], "side": "left", "slack": 0}
    out = expand(case | {"all_present": True}, image_token_id=5)
    assert out.position_ids[:, 0, -1].tolist() == [1 + advance] * 3


def test_trap14_the_same_prompt_in_a_longer_row_is_only_shifted():
    case = {"prompts": [[10, "image", 11]], "grids": [(2, 3)], "mask": [[True]], "slack": 0, "all_present": True}
    for side, own in (("left", slice(12, None)), ("right", slice(0, 8))):
        short, long = (expand(case | {"side": side}, image_token_id=5, length=length) for length in (8, 20))
        assert torch.equal(long.position_ids[..., own], short.position_ids)
        assert torch.equal(long.feature_index[:, own], short.feature_index)


# --- a mask that only the device knows ---

# No empty one: "plain" without cameras would have no token, which the host's path refuses.
TEXTS = [".", "Pick up the red block.", "a\n\nb", "open the top drawer"]


def assert_same_tokens(ours, theirs):
    assert torch.equal(
        ours["position_ids"][:, ours["attention_mask"]],
        theirs["rope_positions"].transpose(0, 1)[:, theirs["attention_mask"]],
    )
    for name in ("input_ids", "camera_ids", "feature_index"):
        mine, other = ours[name], theirs[name]
        assert torch.equal(mine[..., ours["attention_mask"]], other[..., theirs["attention_mask"]]), name
    assert torch.equal(ours["attention_mask"].sum(1), theirs["attention_mask"].sum(1))


@given(
    data=st.data(), cameras=st.integers(1, 4), template=st.sampled_from(["chat", "plain", "{images}x{text}", "by slot"])
)
@SETTINGS
def test_a_mask_on_the_device_gives_the_same_sequences_as_one_on_the_host(
    model, right_padded_model, data, cameras, template
):
    """On the CPU the host's path is what runs, so the device's path is called by hand, with the mask of the host."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=cameras, max_size=cameras))
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=cameras, max_size=cameras), min_size=4, max_size=4))
    )
    images = [torch.zeros(4, 3, 28 * h, 28 * w, dtype=torch.uint8) for h, w in sizes]
    if template == "by slot":
        template = "".join(f"{camera}: {{image}} " for camera in range(cameras)) + "{text}"
    for processor in (model.processor, right_padded_model.processor):
        host = processor(images, TEXTS, mask, template=template)
        text = processor.config.text
        call = TextCall(processor.prompts, text, TEXTS, None, template, None, sizes, 0, mask.device)
        prompts = processor._rows.lay_out_on_device(call, mask)
        request = Request((), mask, prompts, tuple(sizes), mask.device)
        by_device = vars(processor._sequences(request))
        assert prompts.tokens is None
        assert_same_tokens(by_device, host)
        # Any mask must fit: the length is that of the longest text with every camera.
        everyone = processor(images, TEXTS, template=template)
        assert prompts.length == everyone["input_ids"].shape[1]


def test_a_text_is_tokenised_once_for_every_number_of_cameras(load, monkeypatch):
    processor = load().processor
    vocabulary, sizes, mask = processor.prompts.vocabulary, [(1, 1)] * 4, torch.ones(1, 4, dtype=torch.bool)

    def encoded(text):
        stretches = []
        with monkeypatch.context() as patch:
            patch.setattr(vocabulary, "encode", lambda s: stretches.append(s) or type(vocabulary).encode(vocabulary, s))
            text_config = processor.config.text
            call = TextCall(processor.prompts, text_config, [text], None, "chat", None, sizes, 0, mask.device)
            processor._rows.lay_out_on_device(call, mask)
        return [stretch for stretch in stretches if text in stretch]

    encoded("warm up: the layouts' own stretches")
    # Without an image the text follows other words than behind one.
    assert len(encoded("Pick up the red block.")) == 2


@pytest.mark.gpu
def test_a_mask_on_the_gpu_gives_the_same_hidden_states_as_one_on_the_host(load):
    model = load(device="cuda").requires_grad_(False)
    images = photos(4, 3, 84, 140).cuda()
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False], [True, True, True]])
    host, device = (model(images, TEXTS, camera_mask=m) for m in (mask, mask.cuda()))
    assert_equal_to(device.last_hidden_state[device.attention_mask], host.last_hidden_state[host.attention_mask])
