"""What is exported computes what the live model computes, before and after it was traced."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from qwen_batched.export.parts import Parts
from qwen_batched.export.preprocessing import FramesToPatches
from qwen_batched.export.programs import (
    CachedDecoderProgram,
    CallProgram,
    DecoderProgram,
    VisionProgram,
    detached,
    place,
    rope_positions,
)
from qwen_batched.export.request import ExportRequest
from qwen_batched.export.tracing import trace
from qwen_batched.export.verification import relative_l2
from qwen_batched.ops import use_backend
from tests.sisters import FACTORS
from tests.support import assert_equal_to, photos

families = pytest.mark.parametrize("preset", FACTORS)
SETTINGS = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
TRACED = 2e-6  # relative L2 of a traced program, and of what was written, from the live model
TEXTS = ["Pick up the red block.", "go"]


def frames_of(batch, cameras, height, width, seed=0):
    return photos(batch, cameras, height, width, seed)


# --- programs ---


@given(data=st.data(), source=st.tuples(st.integers(28, 120), st.integers(28, 120)))
@SETTINGS
def test_patches_are_the_processors_to_the_last_bit(live, data, source):
    model = live("tiny")
    target = tuple(28 * data.draw(st.integers(1, 4)) for _ in range(2))
    frames = frames_of(2, 1, *source, seed=data.draw(st.integers(0, 9)))
    for given_frames in (frames, frames.float() / 255):
        ours = FramesToPatches(model.processor, source, target, given_frames.dtype, model.device)(given_frames[:, 0])
        theirs = model.processor(given_frames, resize=target, dtype=torch.float32)["pixel_values"][:, 0]
        if given_frames.dtype == torch.uint8:
            assert torch.equal(ours, theirs)
        else:  # the same weights, in another order of summation
            assert_equal_to(ours, theirs)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("frames_dtype", ["uint8", "float32"])
def test_programs_and_arguments_do_not_depend_on_defaults(live, default, frames_dtype):
    def results():
        made = ExportRequest.of(model, "engine", ((50, 70), (56, 84)), 2, "1-8", None, frames_dtype, 18, None)
        parts = Parts(detached(model), made)
        arguments = {name: parts.arguments(name, 2) for name in made.parts}
        found = {name: parts.part(name).program(*x.values()) for name, x in arguments.items()}
        flat = [x for each in found.values() for x in (each if isinstance(each, tuple) else (each,))]
        return [*flat, *(x for each in arguments.values() for x in each.values())]

    model = live("tiny")
    expected = results()
    with DEFAULTS[default]():
        found = results()
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@families
def test_arguments_lie_where_the_weights_do(live, preset):
    model, size = live(preset), (2 * FACTORS[preset], 3 * FACTORS[preset])
    made = ExportRequest.of(model, "engine", ((50, 70), size), 2, "1-8", None, "uint8", 18, None)
    parts = Parts(detached(model).to("meta"), made)
    for name in made.parts:
        assert {argument: x.device.type for argument, x in parts.arguments(name, 2).items() if not x.is_meta} == {}


@pytest.mark.gpu
@families
def test_every_part_runs_on_a_gpu(live, preset):
    model, size = live(preset), (2 * FACTORS[preset], 3 * FACTORS[preset])
    made = ExportRequest.of(model, "engine", ((50, 70), size), 2, "1-8", None, "float32", 18, None)
    here, there = Parts(detached(model), made), Parts(detached(model).to("cuda"), made)
    for name in made.parts:
        with use_backend("reference"):  # as they are traced
            results = [parts.part(name).program(*parts.arguments(name, 2).values()) for parts in (here, there)]
        ours, theirs = ([x] if isinstance(x, torch.Tensor) else x for x in results)
        for x, y in zip(theirs, ours, strict=True):
            assert x.is_cuda
            assert_equal_to(x.cpu(), y)


@families
def test_features_are_those_of_encode_images(live, preset):
    model, factor = live(preset), FACTORS[preset]
    program = VisionProgram(detached(model), (50, 70), (2 * factor, 3 * factor))
    frames = frames_of(3, 2, 50, 70)
    main, *deep = program(frames)
    features = model.encode_images(frames, resize=(2 * factor, 3 * factor), deepstack=bool(deep))
    if not deep:
        assert torch.equal(main, features.flatten(2, 3))
        return
    assert torch.equal(main, features.main.flatten(2, 3))
    for layer, maps in enumerate(features.deep):
        assert torch.equal(deep[0][:, layer], maps.flatten(2, 3))


@families
def test_a_call_and_the_decoder_give_what_the_live_model_gives(live, preset):
    model, factor = live(preset), FACTORS[preset]
    frames, resize = frames_of(2, 2, 50, 70), (2 * factor, 3 * factor)
    expected = model(frames, TEXTS, resize=resize, logits="all")
    own, mask = detached(model), expected.attention_mask
    vision = VisionProgram(own, (50, 70), resize)
    call = CallProgram(vision, DecoderProgram(own, (2, 3), hidden_states=True))
    hidden = call(frames, expected.input_ids, mask.long())
    assert_equal_to(hidden[mask], expected.last_hidden_state[mask])
    main, *deep = vision(frames)
    embeds = [place(x.flatten(1, 2), expected.image_mask) for x in (main, *(deep[0].unbind(1) if deep else ()))]
    more = (torch.stack(embeds[1:], dim=1),) if deep else ()
    logits = DecoderProgram(own, (2, 3))(expected.input_ids, mask.long(), embeds[0], *more)
    assert_equal_to(logits[mask], expected.logits[mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_image_tokens_on_padding_are_padding(live, side):
    model = live("tiny")
    own, frames = detached(model), frames_of(1, 1, 56, 84)
    expected = model(frames, ["go"], resize=None)
    call = CallProgram(VisionProgram(own, (56, 84), (56, 84)), DecoderProgram(own, (2, 3), hidden_states=True))
    padding = torch.full((1, 4), model.processor.config.image_token_id)
    ids, mask = [padding, expected.input_ids], [torch.zeros_like(padding), expected.attention_mask.long()]
    ids, mask = (torch.cat(x if side == "left" else x[::-1], dim=1) for x in (ids, mask))
    assert_equal_to(call(frames, ids, mask)[mask != 0], expected.last_hidden_state[0])


@families
@pytest.mark.slow
def test_the_decoder_by_the_layout_contract_equals_transformers_on_two_images(live, sisters, preset):
    """Ragged and padded on the left: what merging features without rope positions gets wrong."""
    sister, model = sisters(preset), live(preset)
    frames = sister.photos(2, 2, 2, 3)
    ours = model(frames, TEXTS, resize=None)
    own = detached(model)
    main, *deep = VisionProgram(own, frames.shape[-2:], frames.shape[-2:])(frames)
    embeds = [place(x.flatten(1, 2), ours.image_mask) for x in (main, *(deep[0].unbind(1) if deep else ()))]
    more = (torch.stack(embeds[1:], dim=1),) if deep else ()
    logits = DecoderProgram(own, (2, 3))(ours.input_ids, ours.attention_mask.long(), embeds[0], *more)
    for sample, text in enumerate(TEXTS):
        expected = sister.reference.run(**sister.reference.processor_inputs(list(frames[sample]), text)).logits[0]
        row = logits[sample][ours.attention_mask[sample]]
        assert torch.equal(row.argmax(-1), expected.argmax(-1))
        assert_equal_to(row, expected)


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    left=st.booleans(),
)
@SETTINGS
def test_rope_positions_are_the_live_models(live, h, w, rows, left):
    """Rows of 1 to 4 stretches of text with an image between each two."""
    model, image = live("tiny"), live("tiny").processor.config.image_token_id
    tokens = [[7, *(token for n in row for token in [image] * h * w + [5] * n)] for row in rows]
    length = max(map(len, tokens))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.bool)
    for sample, row in enumerate(tokens):
        place_of = slice(length - len(row), None) if left else slice(0, len(row))
        ids[sample, place_of], mask[sample, place_of] = torch.tensor(row), True
    grids = torch.tensor([[1, 2 * h, 2 * w]] * sum(map(len, rows)))
    pixels = torch.zeros(int(grids.prod(1).sum()), model.processor.config.vision.patch_dim)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": pixels, "image_grid_thw": grids}
    expected = model(**batch).position_ids
    assert torch.equal(rope_positions(ids == image, mask, (h, w)), expected)


@families
def test_the_cached_decoder_steps_as_generate_does(live, preset):
    model, factor = live(preset), FACTORS[preset]
    frames, resize = frames_of(2, 1, 50, 70), (2 * factor, factor)
    expected = model.generate(frames, TEXTS, resize=resize, max_new_tokens=12).token_ids
    first, own = model(frames, TEXTS, resize=resize), detached(model)
    main, *deep = VisionProgram(own, (50, 70), resize)(frames)
    embeds = [place(x.flatten(1, 2), first.image_mask) for x in (main, *(deep[0].unbind(1) if deep else ()))]
    program, text = CachedDecoderProgram(own), own.processor.config.text
    more = (torch.stack(embeds[1:], dim=1),) if deep else ()
    shape = (text.num_hidden_layers, 2, 0, text.num_key_value_heads, text.head_dim)
    ids, mask, positions, cache = (
        first.input_ids,
        first.attention_mask.long(),
        first.position_ids,
        [torch.zeros(shape)] * 2,
    )
    tokens = []
    for _ in range(12):
        logits, *cache = program(ids, mask, positions, embeds[0], *cache, *more)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids[:, 0])
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
        positions = positions.amax(dim=(0, 2))[None, :, None].expand(3, -1, 1) + 1
        embeds, more = [torch.zeros_like(embeds[0][:, :1])], tuple(torch.zeros_like(x[:, :, :1]) for x in more)
    for sample, row in enumerate(expected):
        assert torch.stack(tokens)[: len(row), sample].tolist() == row.tolist()


def test_a_generated_image_token_is_text(live):
    """As in the live model, where what was generated is looked up in the embedding."""
    model = live("tiny")
    program, text = CachedDecoderProgram(detached(model)), model.model.config
    past = torch.randn(text.num_hidden_layers, 1, 3, text.num_key_value_heads, text.head_dim)
    token = torch.tensor([[model.processor.config.image_token_id]])
    arguments = [torch.ones(1, 4, dtype=torch.int64), torch.full((3, 1, 1), 3), torch.zeros(1, 1, text.hidden_size)]
    logits = program(token, *arguments, past, past)[0]
    program.image_token_id = -1  # to which it is a token like any other
    assert torch.equal(logits, program(token, *arguments, past, past)[0])


# --- traced ---


@families
@pytest.mark.slow
def test_traced_parts_of_a_model_that_never_ran_serve_every_batch(sisters, preset):
    """Images of 5 x 6 merged cells, which have cut windows where there are windows."""
    factor = FACTORS[preset]
    model = sisters(preset).load(resample_backend="pillow")
    frames, chosen = ((50, 70), (5 * factor, 6 * factor)), ("call", "cached_decoder")
    parts = Parts(detached(model), ExportRequest.of(model, "engine", frames, 2, "1-8", None, "uint8", 18, chosen))
    for name in parts.request.parts:
        traced = trace(parts.part(name)).module()
        program = parts.part(name).program
        for batch in (1, 2, 3, 8):
            arguments = parts.arguments(name, batch, seed=batch).values()
            with torch.no_grad():
                results = [x if isinstance(x, tuple) else (x,) for x in (traced(*arguments), program(*arguments))]
            assert relative_l2(*results) <= TRACED


def test_tracing_leaves_the_live_model_as_it_was(sisters):
    model = sisters("tiny").load(resample_backend="pillow")
    frames, before = frames_of(1, 1, 56, 56), {name: p.clone() for name, p in model.state_dict().items()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = model(frames, ["a"]).last_hidden_state
    program = VisionProgram(detached(model), (56, 56), (56, 56))
    part_of = Parts(detached(model), ExportRequest.of(model, "engine", "56x56", 1, 2, None, "uint8", 18, ("vision",)))
    trace(part_of.part("vision"))
    program(frames)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(frames, ["a"]).last_hidden_state, expected)
    assert not any(hook for module in model.modules() for hook in module._forward_hooks)


def test_a_traced_program_shares_the_live_weights(live):
    model = live("tiny")
    pointers = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in detached(model).parameters()} == pointers
    assert all(isinstance(p, nn.Parameter) and not p.requires_grad for p in detached(model).parameters())


def test_sizes_are_fixed_only_where_they_were_asked_to_be(live):
    model = live("tiny")
    request = ExportRequest.of(model, "engine", "56x56", 1, "1-8", 20, "uint8", 18, ("decoder",))
    part = Parts(detached(model), request).part("decoder")
    assert isinstance(part.dynamic["input_ids"][0], type(Dim("batch"))) and set(part.dynamic["input_ids"]) == {0}
    free = ExportRequest.of(model, "engine", "56x56", 1, 3, None, "uint8", 18, ("decoder",))
    assert set(Parts(detached(model), free).part("decoder").dynamic["input_ids"]) == {1}


@given(
    cameras=st.integers(1, 4),
    more=st.integers(1, 40),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    batch=st.integers(1, 3),
)
@SETTINGS
def test_examples_hold_whole_images_however_short_the_sequence(live, cameras, more, h, w, batch):
    model = live("tiny")
    length = max(cameras * h * w + more, 2)
    request = ExportRequest.of(
        model, "engine", (28 * h, 28 * w), cameras, batch, length, "uint8", 18, ("decoder", "call")
    )
    parts = Parts(model, request)
    for name, fewer in (("decoder", 1), ("call", 0)):
        arguments = parts.arguments(name, batch)
        is_image = arguments["input_ids"] == model.processor.config.image_token_id
        expected = [(cameras - (sample % 2) * fewer) * h * w for sample in range(batch)]
        assert is_image.sum(1).tolist() == expected
        assert not (is_image & (arguments["attention_mask"] == 0)).any()
