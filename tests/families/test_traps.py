"""The mistakes that the sister families invite, one test or more for each. `docs/traps.md` lists them."""

import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_batched import QwenBatchedVL
from qwen_batched.families import FAMILIES, family_of
from qwen_batched.linear.fused import pack
from qwen_batched.lora import load_adapter
from qwen_batched.model.geometry import look_up
from qwen_batched.model.parts.ropes import sectioned
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.parity.test_whole_model_parity import reference_run, to
from tests.sisters import FACTORS, Sister
from tests.support import assert_equal_to, noise, own_tokens, photos, relative_error

TEXTS = ["a", "Pick up the red block."]
NOTICEABLE = 1e-2  # a wrong formula differs by more
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture
def qwen3(sisters):
    return sisters("qwen3-vl-tiny")


@pytest.fixture(params=FACTORS)
def any_family(request, sisters):
    return sisters(request.param)


def their_features(reference, frame):
    """Merged features (cells, D) of a frame."""
    return reference.run(**reference.processor_inputs([frame.cpu()], "a")).image_features[0]


def assert_features_equal(model, reference, frames):
    """Those of frames (B, 1, 3, H, W), one by one in transformers."""
    found = model.encode_images(frames.to(model.device))
    for ours, frame in zip(found[:, 0], frames[:, 0], strict=True):
        assert_equal_to(ours.flatten(0, 1), their_features(reference, frame))


class Kept:
    """`with Kept(reference, blocks):` transformers has its first decoder blocks alone."""

    def __init__(self, reference, blocks):
        self.decoder, self.blocks = reference.decoder, blocks

    def __enter__(self):
        self.all, self.decoder.layers = self.decoder.layers, self.decoder.layers[: self.blocks]

    def __exit__(self, *exception):
        self.decoder.layers = self.all


# --- Qwen2-VL ---


@pytest.mark.parametrize("ratio", [4, 2.5])
def test_trap_qwen2_hidden_size_of_the_vision_config_is_the_output(ratio):
    with tempfile.TemporaryDirectory() as folder:
        written = write_checkpoint(Path(folder) / "c", "qwen2-vl-tiny")
        raw = json.loads((written / "config.json").read_text(encoding="utf-8"))
    raw["vision_config"]["mlp_ratio"] = ratio
    vision = family_of("qwen2_vl").read_config(raw).vision
    assert (vision.hidden_size, vision.out_hidden_size, vision.intermediate_size) == (80, 64, int(80 * ratio))


def test_trap_qwen2_biases_of_layer_norms_count(family):
    """In every norm of the tower, Qwen3-VL's as well; with another bias, both libraries give something else."""
    model, reference = family.load().requires_grad_(False), family.load_reference()
    frames = family.photos(1, 1, 2, 3)
    norms = [name for name, x in model.visual.named_modules() if isinstance(x, nn.LayerNorm)]
    assert len(norms) == 2 * model.config.vision.depth + 1 + len(model.config.vision.deepstack_visual_indexes or ())
    for name in norms:
        before = model(to(frames, family.device), ["a"]).last_hidden_state
        for tower in (model.visual, reference.visual):
            tower.get_submodule(name).bias.data.mul_(-1).add_(0.5)
        found = model(to(frames, family.device), ["a"])
        assert relative_error(found.last_hidden_state, before) > NOTICEABLE, name
        expected = reference.run(**reference.processor_inputs([frames[0, 0]], "a")).hidden_states[-1]
        assert_equal_to(found.last_hidden_state, expected)


# --- Qwen3-VL ---


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_trap_qwen3_hidden_states_are_before_the_deepstack_addition_and_the_last_one_after_it(family, kept):
    """With as few blocks as there are deep features, the last addition still comes before the final norm."""
    if kept >= len(family.layers):
        pytest.skip(f"{family.preset} has {len(family.layers) - 1} blocks")
    model, images = family.load(num_layers=kept).requires_grad_(False), family.photos(2, 2, 2, 3)
    out = model(to(images, family.device), TEXTS, layers=tuple(range(kept + 1)), logits="all")
    with Kept(family.reference, kept):
        for i, text in enumerate(TEXTS):
            _, expected, _ = reference_run(family.reference, images[i], text)
            for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
                assert_equal_to(own_tokens(ours, out.attention_mask, i), theirs[0])
            assert_equal_to(own_tokens(out.logits, out.attention_mask, i), expected.logits[0])


def test_trap_qwen3_hidden_states_are_not_the_next_blocks_input(qwen3):
    """What a block gives out, and what the next one takes in, differ by the deep features, on image tokens alone."""
    model, taken = qwen3.model, []
    norms = [block.input_layernorm for block in model.model.layers[1:4]]
    hooks = [norm.register_forward_pre_hook(lambda _, args: taken.append(args[0])) for norm in norms]
    out = model(to(qwen3.photos(1, 1, 2, 3), qwen3.device), ["a"], layers=(1, 2, 3, 4))
    for hook in hooks:
        hook.remove()
    is_image = out.image_mask[0]
    for hidden, stream in zip(out.hidden_states[:3], taken, strict=True):
        assert relative_error(stream[is_image], hidden[0][is_image]) > NOTICEABLE
        assert torch.equal(stream[~is_image], hidden[0][~is_image])


@pytest.mark.parametrize("kept", [1, 2, 3, 5])
def test_trap_qwen3_the_last_kept_block_is_given_before_the_norm(qwen3, kept):
    """As GR00T takes it, deep features added."""
    model, images = qwen3.load(num_layers=kept).requires_grad_(False), qwen3.photos(2, 2, 2, 3)
    out = model(to(images, qwen3.device), TEXTS, norm="pre")
    with Kept(qwen3.reference, kept):
        for i, text in enumerate(TEXTS):
            _, _, before_norm = reference_run(qwen3.reference, images[i], text)
            assert_equal_to(own_tokens(out.last_hidden_state, out.attention_mask, i), before_norm[0])


def test_trap_qwen3_heads_do_not_fill_the_width(qwen3, monkeypatch):
    """In the output projection, in packed weights and in the key-value cache."""
    text = qwen3.model.config.text
    assert text.num_attention_heads * text.head_dim != text.hidden_size
    assert qwen3.model.model.layers[0].self_attn.o_proj.weight.shape == (64, 6 * 24)
    images, model = qwen3.photos(2, 1, 2, 3), qwen3.load().requires_grad_(False)
    frames = to(images, qwen3.device)
    inputs = [qwen3.reference.processor_inputs(list(images[i]), each) for i, each in enumerate(TEXTS)]
    expected = [qwen3.reference.greedy(each, 12).tolist() for each in inputs]
    assert [row.tolist() for row in model.generate(frames, TEXTS, max_new_tokens=12).token_ids] == expected
    before = model(frames, TEXTS).last_hidden_state
    with monkeypatch.context() as patch:  # the CPU packs where a GPU would
        patch.setattr(nn.Parameter, "is_cuda", True, raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        pack(model)
        attention = model.model.layers[0].self_attn
        projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        assert attention._qkv._weights.tensor(projections).shape == ((6 + 2 * 2) * 24, 64)
        with torch.no_grad():
            assert_equal_to(model(frames, TEXTS).last_hidden_state, before)
            assert [row.tolist() for row in model.generate(frames, TEXTS, max_new_tokens=12).token_ids] == expected


def test_trap_qwen3_heads_of_72(tmp_path, device):
    """The 8B model's tower: no power of two, and no multiple of 16."""
    model = Sister("qwen3-vl-tiny", tmp_path / "c", device, vision={"hidden_size": 144, "num_heads": 2})
    assert model.model.config.vision.head_dim == 72
    model.check(model.photos(2, 2, 3, 2), TEXTS)


def test_trap_qwen3_rope_is_interleaved_and_an_image_that_is_no_square_tells(qwen3, monkeypatch):
    model, image, text = qwen3.model, qwen3.photos(1, 1, 2, 5), TEXTS[1]
    expected = qwen3.reference.run(**qwen3.reference.processor_inputs([image[0, 0]], text)).hidden_states[-1]
    image = to(image, qwen3.device)
    found, of_text = model(image, [text]), model(None, [text])
    assert_equal_to(found.last_hidden_state, expected)
    rows, columns = (found.position_ids[axis][found.image_mask] for axis in (1, 2))
    assert len(rows.unique()) == 2 and len(columns.unique()) == 5
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "rope", sectioned)
        by_sections, of_text_alone = model(image, [text]), model(None, [text])
    assert_equal_to(of_text_alone.last_hidden_state, of_text.last_hidden_state)
    assert relative_error(by_sections.last_hidden_state, expected) > NOTICEABLE


@pytest.fixture(scope="module")
def real_table(tmp_path_factory, device):
    """With a position table of the published size, 48 x 48."""
    vision = {"num_position_embeddings": 48 * 48, "depth": 2, "deepstack_visual_indexes": [0]}
    return Sister("qwen3-vl-tiny", tmp_path_factory.mktemp("table") / "c", device, vision=vision)


@pytest.mark.parametrize("cells", [(1, 1), (1, 3), (24, 24), (24, 7), (25, 26), (2, 30)], ids=str)
def test_trap_qwen3_position_table_at_grids_of_its_size_below_and_above(real_table, cells):
    """Grids of 2 x 2 patches, of 48 x 48, where every row is taken as it is, and above."""
    frames = noise(1, 1, *(side * real_table.factor for side in cells))
    assert_features_equal(real_table.model, real_table.reference, frames)


def test_trap_qwen3_a_grid_of_the_tables_size_takes_its_rows_as_they_are(real_table):
    visual = real_table.model.visual
    taps = visual.plan(24, 24, visual.pos_embed.weight.device).taps
    rows = look_up(taps, visual.pos_embed.weight)  # by cells of 2 x 2 patches
    table = visual.pos_embed.weight.view(24, 2, 24, 2, -1).transpose(1, 2).flatten(0, 3)
    assert torch.equal(rows, table)


@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "mixed sizes"])
def test_trap_qwen3_deep_features_of_an_absent_camera_are_zero(family, mixed):
    """So a masked camera is as good as none."""
    images = family.photos(3, 2, 2, 3)
    images = [images[:, 0], images[:, 1, :, : family.factor]] if mixed else images
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    family.check(images, ["a", "Pick up the cup", ""], camera_mask=mask)
    if family.preset.startswith("qwen3"):
        found = family.model.encode_images(to(images, family.device), camera_mask=mask, deepstack=True)
        for maps in found.deep:
            of_camera = [maps[0], maps[1]] if mixed else maps.unbind(1)
            for camera in (0, 1):
                assert not of_camera[camera][~mask[:, camera]].any()
                assert of_camera[camera][mask[:, camera]].any()


@pytest.mark.parametrize("kept", [1, 5])
def test_trap_qwen3_deep_mergers_get_gradients(qwen3, kept):
    """Those whose features a block is there to add."""
    model, reference = qwen3.load(num_layers=kept), qwen3.load_reference()
    images = qwen3.photos(1, 2, 2, 3)
    model(to(images, qwen3.device), TEXTS[:1]).last_hidden_state.square().mean().backward()
    inputs = reference._model_inputs(**reference.processor_inputs(list(images[0]), TEXTS[0]))
    with Kept(reference, kept):
        reference.model(**inputs, output_hidden_states=True).hidden_states[-1].square().mean().backward()
    ours, theirs = (dict(tower.deepstack_merger_list.named_parameters()) for tower in (model.visual, reference.visual))
    assert ours.keys() == theirs.keys() and len(ours) == 3 * 6
    for name, parameter in ours.items():
        if int(name[0]) < kept:
            assert parameter.grad.any(), name
            assert_equal_to(parameter.grad, theirs[name].grad, GRADIENT_TOLERANCE)
        else:
            assert parameter.grad is None and theirs[name].grad is None


def test_trap_qwen3_a_rank_without_images_runs_the_deep_mergers(qwen3):
    """One blank image, whose gradients are zero: others wait for every parameter's."""
    model = qwen3.load()
    expected = model(None, TEXTS).last_hidden_state
    with mock.patch.object(torch.distributed, "is_initialized", lambda: True):
        found = model(None, TEXTS).last_hidden_state
        found.square().mean().backward()
    assert torch.equal(found, expected)
    without = [name for name, x in model.visual.named_parameters() if x.grad is None]
    assert without == []
    assert not any(x.grad.any() for x in model.visual.deepstack_merger_list.parameters())


# --- all families ---


@pytest.mark.parametrize("layout", ["modules", "nested", "headless"])
def test_trap_all_key_layouts_and_back(any_family, tmp_path, layout):
    """Whatever stored keys are called, the same model; what it saves is laid out as its family publishes it."""
    prefixes = {
        "modules": {},
        "nested": {"visual.": "model.visual.", "model.": "model.language_model."},
        "headless": {"model.": "language_model."},
    }[layout]

    def renamed(name):
        return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)

    keys = FAMILIES[any_family.model.config.model_type].keys
    (stored,) = any_family.folder.glob("*.safetensors")
    tensors = {keys.module_name(name): x for name, x in load_file(stored).items()}
    for file in any_family.folder.iterdir():
        if file != stored:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({renamed(name): x for name, x in tensors.items()}, tmp_path / stored.name, metadata={"format": "pt"})
    model, expected = QwenBatchedVL.from_pretrained(tmp_path, device="cpu"), any_family.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name].cpu()) for name, x in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.safetensors")
    assert load_file(saved).keys() == {keys.saved_name(name) for name in tensors}
    assert all(torch.equal(x, tensors[keys.module_name(name)]) for name, x in load_file(saved).items())


def test_trap_all_what_is_saved_is_transformers_too(any_family, tmp_path):
    any_family.model.save_pretrained(tmp_path / "saved")
    reference = TransformersReference.from_pretrained(tmp_path / "saved", device=any_family.device)
    frames = any_family.photos(1, 1, 2, 3)
    ours = any_family.model(to(frames, any_family.device), ["a"]).last_hidden_state
    inputs = reference.processor_inputs([frames[0, 0]], "a")
    assert_equal_to(ours, reference.run(**inputs).hidden_states[-1])


def test_trap_all_adapters_named_by_another_layout(any_family, tmp_path):
    """peft's keys are those of the release that trained the adapter: nested, or as modules were named before 4.52."""
    peft = pytest.importorskip("peft")
    model = any_family.load_reference().model
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "qkv", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    before, keys = "base_model.model.", FAMILIES[any_family.model.config.model_type].keys
    modules = {keys.module_name(name.removeprefix(before)): x for name, x in stored.items()}
    layouts = {"nested": {keys.adapter_name(name): x for name, x in modules.items()}, "modules": modules}
    assert layouts["nested"].keys().isdisjoint(modules)
    for layout, tensors in layouts.items():
        shutil.copytree(tmp_path / "saved", tmp_path / layout)
        tensors = {before + name: x for name, x in tensors.items()}
        save_file(tensors, tmp_path / layout / "adapter_model.safetensors", metadata={"format": "pt"})
    frames = to(any_family.photos(1, 2, 2, 3), any_family.device)
    found = []
    with torch.no_grad():
        plain = any_family.model(frames, TEXTS[:1]).last_hidden_state
        for layout in layouts:
            ours = load_adapter(any_family.load(), tmp_path / layout)
            found.append(ours(frames, TEXTS[:1]).last_hidden_state)
    assert torch.equal(*found)
    assert relative_error(found[0], plain) > NOTICEABLE


@pytest.mark.slow
@torch.no_grad()
def test_trap_all_families_in_one_process_share_no_graph_plan_or_cache(tmp_path):
    """Called in turns with frames of one size, each gives what it gives when called alone."""
    frames, texts = photos(2, 2, 224, 224), ["pick up the red cube", "go"]  # multiples of 28 and of 32
    folders = [write_checkpoint(tmp_path / preset, preset, image={"min_pixels": 28 * 28}) for preset in FACTORS]
    alone = [QwenBatchedVL.from_pretrained(folder, device="cpu")(frames, texts, resize=None) for folder in folders]
    models = [QwenBatchedVL.from_pretrained(folder, device="cpu") for folder in folders]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for index in order:
            out = models[index](frames, texts, resize=None)
            assert torch.equal(out.last_hidden_state, alone[index].last_hidden_state)
            assert torch.equal(out.image_features, alone[index].image_features)
    for name in ("tower", "decoder", "steps", "suffixes", "idle"):
        assert len({id(getattr(model._calls, name)) for model in models}) == len(models)
    assert len({id(model.visual.plans) for model in models}) == len(models)
