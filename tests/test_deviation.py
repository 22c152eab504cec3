"""`python -m qwen_batched.deviation`: what is right passes, a planted error is found, bad input is one line."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import is_torchvision_available

from qwen_batched import QwenBatchedVL
from qwen_batched.deviation import __main__ as tool
from qwen_batched.deviation import batch_effect, bounds, cases, comparison, memory
from qwen_batched.deviation.measures import Continuation, Distance, Equality
from qwen_batched.model import decoder, geometry, tensor_processor
from qwen_batched.ops.segments import Run
from qwen_batched.transformers_reference import TransformersReference
from tests.sisters import skip_without

SIZE = (140, 252)  # full windows side by side, and windows cut off at both edges
QUICK = ("--device", "cpu", "--sizes", "140x252", "--new-tokens", "2")
FLOAT32 = ("--dtype", "float32", "--float64", "never")


def run(*arguments):
    return tool.main([str(argument) for argument in arguments])


def verdict(out):
    """What stands below the tables."""
    return out[out.rindex("\n\n") :]


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory):
    """Of a run that is right: its files."""
    folder = tmp_path_factory.mktemp("report")
    files = ("--json", folder / "report.json", "--plot", folder / "plot.png")
    sizes = ("--sizes", "140x252", "56", "--batch", "3", "--cameras", "2")
    assert run("--model", checkpoint, "--device", "cpu", *sizes, "--float64", "always", *files) == 0
    return folder


@pytest.fixture(scope="module")
def numbers(report):
    return json.loads((report / "report.json").read_text())


# --- measures ---


def test_distance_measures_as_it_says():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(50, 7, generator=generator)
    ours = theirs + 0.1 * torch.randn(50, 7, generator=generator)
    distance = Distance()
    for rows in (slice(0, 1), slice(1, 30), slice(30, 50)):
        distance.add(ours[rows], theirs[rows])
    assert distance.relative_l2 == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-5)
    assert distance.mean_relative == pytest.approx(((ours - theirs).abs() / (theirs.abs() + 1)).mean().item(), rel=1e-5)
    cosines = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    assert distance.min_cosine == pytest.approx(cosines.min().item())
    assert distance.median_cosine == pytest.approx(cosines.median().item())


def test_distance_is_the_same_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(23, 5, generator=generator) for _ in range(2))
    whole, parts = Distance(), Distance()
    whole.add(ours, theirs)
    monkeypatch.setattr("qwen_batched.deviation.measures.CHUNK", 15)
    parts.add(ours, theirs)
    assert parts.numbers() == pytest.approx(whole.numbers())
    assert len(parts.cosines) == 8


def test_distance_of_something_broken_keeps_no_bound():
    for ours in (torch.full((3, 4), torch.nan), torch.zeros(2, 4)):
        distance = Distance()
        distance.add(ours, torch.ones(3, 4))
        assert not distance.relative_l2 <= 1e9
        assert not distance.mean_relative <= 1e9


def test_equality_counts_what_differs():
    measure = Equality()
    measure.add(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
    measure.add(torch.tensor([1, 2]), torch.tensor([1, 2, 3, 4]))
    assert measure.numbers() == {"total": 7, "different": 5}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([4, 7, 1], {"total": 3, "agreeing": 3, "differing": 0, "ties": 0}),
        ([4, 2, 1], {"total": 3, "agreeing": 1, "differing": 1, "ties": 0}),
        ([4, 8, 0], {"total": 3, "agreeing": 1, "differing": 1, "ties": 1}),  # 8 was as likely as 7
        ([4, 7], {"total": 3, "agreeing": 2, "differing": 1, "ties": 0}),
        ([4, 7, 1, 1], {"total": 3, "agreeing": 3, "differing": 1, "ties": 0}),
    ],
)
def test_continuations_differ_where_they_do_but_for_ties(tokens, expected):
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).clamp(max=2)
    scores[torch.arange(3), torch.tensor([4, 7, 1])] = 5.0
    scores[1, 8] = 5.0 - 1e-6
    measure = Continuation()
    measure.add(torch.tensor(tokens), torch.tensor([4, 7, 1]), scores)
    assert measure.numbers() == expected


# --- a run that is right ---


@pytest.mark.slow
def test_every_stage_is_measured_in_both_dtypes(numbers, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    blocks = [f"vision block {i}" for i in range(config["vision_config"]["depth"])]
    layers = [f"decoder block {i + 1}" for i in range(config["num_hidden_layers"])]
    assert numbers["stages"] == [
        *("pixels", "patch embedding", *blocks, "merger", "token ids", "rope positions"),
        *("embeddings", *layers, "final hidden states", "logits", "greedy tokens"),
    ]
    for size in ("140x252", "56x56"):
        assert list(numbers["by_size"][size]) == numbers["stages"]
        for stage, runs in numbers["by_size"][size].items():
            assert {"ours float32", "ours bfloat16", "theirs bfloat16"} <= set(runs), stage
            assert "theirs float32" in runs or stage == "greedy tokens"
    assert numbers["missed"] == [] and numbers["first_wrong"] is None


@pytest.mark.slow
def test_numbers_are_plausible(numbers):
    exact = ("token ids", "rope positions")
    for stage, runs in numbers["all_sizes"].items():
        if stage in exact:
            assert all(found["different"] == 0 and found["total"] > 0 for found in runs.values())
        elif stage == "greedy tokens":
            assert runs["ours float32"]["agreeing"] == runs["ours float32"]["total"] == 2 * 3 * 8
        else:
            assert 0 <= runs["ours float32"]["relative_l2"] < 2e-6, stage
            assert runs["theirs float32"]["relative_l2"] < 2e-6, stage
            assert 1e-4 < runs["ours bfloat16"]["relative_l2"] < 0.1, stage
            assert 1e-4 < runs["theirs bfloat16"]["relative_l2"] < 0.1, stage
            assert 0.99 < runs["ours bfloat16"]["min_cosine"] <= runs["ours bfloat16"]["median_cosine"] <= 1
    final = numbers["all_sizes"]["final hidden states"]
    assert final["theirs float32"]["relative_l2"] > 0, "float64 must differ from float32"


@pytest.mark.slow
def test_a_stage_is_what_the_two_models_give(checkpoint, numbers):
    """Measured by hand, without the tool: a vision block, a decoder block, the end."""
    case = cases.made_up((56, 56), 3, 2, cases.TEXTS)
    model = QwenBatchedVL.from_pretrained(checkpoint, torch.bfloat16, "cpu")
    reference = TransformersReference.from_pretrained(checkpoint)
    with torch.no_grad():
        out = model(case.images, list(case.texts), layers=(2, -1))
        vision = model.encode_images(case.images, layers=(3,))[0]
    pairs = {"vision block 3": [], "decoder block 2": [], "final hidden states": []}
    for sample in range(3):
        inputs = reference.processor_inputs(case.frames(sample), case.texts[sample])
        blocks = reference.vision_block_outputs(inputs["pixel_values"], inputs["image_grid_thw"], [3])[0]
        theirs = reference.run(**inputs)
        own = out.attention_mask[sample]
        pairs["vision block 3"].append((vision[sample].flatten(0, 2), torch.cat([x.flatten(0, 1) for x in blocks])))
        for stage, states, layer in (("decoder block 2", 0, 2), ("final hidden states", 1, -1)):
            pairs[stage].append((out.hidden_states[states][sample][own], theirs.hidden_states[layer][0]))
    for stage, found in pairs.items():
        ours, theirs = (torch.cat(part).double() for part in zip(*found, strict=True))
        expected = ((ours - theirs).norm() / theirs.norm()).item()
        assert numbers["by_size"]["56x56"][stage]["ours bfloat16"]["relative_l2"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_plot_is_a_picture_with_both_curves(report):
    with Image.open(report / "plot.png") as picture:
        colours = {colour for count, colour in picture.convert("RGB").getcolors(2**20) if count > 50}
    assert picture.format == "PNG" and picture.width > 1000
    assert {(0x25, 0x63, 0xEB), (0xEA, 0x58, 0x0C)} <= colours


@pytest.mark.slow
def test_the_table_has_a_row_for_each_stage_and_size(checkpoint, capsys):
    # In bfloat16 the worst token of a single size is a matter of chance, and so is whether the bounds hold.
    run("--model", checkpoint, *QUICK, "--layers", "0", "2", "--vision-layers", "-1")
    out, err = capsys.readouterr()
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert [row for row in rows if "block" in row] == ["vision block 5", "decoder block 2"]
    assert {"embeddings", "merger", "final hidden states", "140x252"} <= set(rows)
    assert err == ""
    assert max(map(len, out.splitlines())) < 160
    assert run("--model", checkpoint, *QUICK, *FLOAT32) == 0
    assert "All bounds hold" in capsys.readouterr().out


@pytest.mark.slow
def test_cameras_of_different_sizes_and_files_are_compared_too(checkpoint, tmp_path, capsys):
    for name, size in (("front.png", (252, 140)), ("wrist.jpg", (84, 112))):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / name)
    images = ("--images", tmp_path / "front.png", tmp_path / "wrist.jpg", "--texts", "lift", "open the drawer", "")
    assert run("--model", checkpoint, "--device", "cpu", *images, *FLOAT32, "--new-tokens", "0") == 0
    assert "3 samples x 2 cameras" in capsys.readouterr().out


def test_frames_that_are_resized_are_compared_too(checkpoint):
    assert run("--model", checkpoint, *QUICK[:2], "--sizes", "100x130", *FLOAT32, "--new-tokens", "0") == 0


@pytest.mark.slow
def test_another_library_for_resizing_leaves_the_networks_comparable(checkpoint, monkeypatch, capsys):
    """As on a GPU beside a transformers without torchvision."""
    monkeypatch.setattr(TransformersReference, "resample_backend", "another library")
    process = TransformersReference._processed

    def brighter(self, frames, on_device):
        return process(self, [frame.clamp(max=250) + 3 for frame in frames], on_device)

    monkeypatch.setattr(TransformersReference, "_processed", brighter)
    assert run("--model", checkpoint, *QUICK[:2], "--sizes", "100x130", *FLOAT32, "--new-tokens", "0") == 0
    assert "round differently" in capsys.readouterr().out
    assert run("--model", checkpoint, *QUICK, *FLOAT32) == 1, "without a resize there is no excuse"
    assert "first went wrong at: pixels" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "size"), [("small", "84x112"), ("qwen2-vl-small", "84x112"), ("qwen3-vl-small", "96x128")]
)
def test_trained_like_weights_pass_too(preset, size, capsys):
    skip_without(preset)
    options = ("--device", "cpu", "--sizes", size, "--new-tokens", "0")
    assert run("--preset", preset, "--weights", "trained-like", *options) == 0
    assert f"preset {preset}, trained-like weights" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["pillow", "torchvision"])
def test_the_report_names_the_library_that_resizes_and_transformers_uses_the_same(
    checkpoint, tmp_path, capsys, backend
):
    path = tmp_path / "report.json"
    options = ("--resample-backend", backend, *FLOAT32, "--new-tokens", "0", "--json", path)
    assert run("--model", checkpoint, *QUICK[:2], "--sizes", "100x130", *options) == 0
    out = capsys.readouterr().out
    assert f"frames resized as by {backend}" in out
    assert json.loads(path.read_text())["settings"]["resample_backend"] == backend
    there = backend == "pillow" or is_torchvision_available()
    assert ("round differently" in " ".join(out.split())) == (not there), (
        "transformers falls back to Pillow, and it is said"
    )


@pytest.mark.gpu
def test_a_run_on_a_gpu_passes(checkpoint, tmp_path):
    path = tmp_path / "report.json"
    sizes = ("--sizes", "140x252", "100x130", "--batch", "3")
    assert run("--model", checkpoint, "--device", "cuda", *sizes, "--dtype", "float32", "--float64", "always") == 0
    # A model of 64 channels scatters: what its bfloat16 ratio is, is no matter here.
    assert run("--model", checkpoint, "--device", "cuda", *sizes, "--dtype", "bfloat16", "--json", path) in (0, 1)
    final = json.loads(path.read_text())["all_sizes"]["final hidden states"]
    assert final["ours bfloat16"]["relative_l2"] < 1.2 * final["theirs bfloat16"]["relative_l2"]


# --- planted errors ---


@pytest.fixture
def spoil(monkeypatch):
    """Changes every model of ours that is loaded."""
    load = QwenBatchedVL.from_pretrained.__func__

    def plant(change):
        def spoiled(cls, *arguments, **keywords):
            model = load(cls, *arguments, **keywords)
            change(model)
            return model

        monkeypatch.setattr(QwenBatchedVL, "from_pretrained", classmethod(spoiled))

    return plant


def skip_norm(norm):
    def forward(update, residual=None):
        stream = update if residual is None else update + residual
        return stream, stream

    norm.forward = forward


def swap_gate_and_up(mlp):
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def scale_a_little(model):
    model.visual.blocks[2].attn.proj.weight.data *= 1 + 1e-4


MODEL_ERRORS = [
    ("vision block 4", lambda model: swap_gate_and_up(model.visual.blocks[4].mlp)),
    ("decoder block 2", lambda model: swap_gate_and_up(model.model.layers[1].mlp)),
    ("vision block 3", lambda model: skip_norm(model.visual.blocks[3].norm1)),
    ("merger", lambda model: skip_norm(model.visual.merger.ln_q)),
    ("decoder block 3", lambda model: skip_norm(model.model.layers[2].post_attention_layernorm)),
    ("final hidden states", lambda model: skip_norm(model.model.norm)),
    ("vision block 2", scale_a_little),
    ("patch embedding", lambda model: model.visual.patch_embed.proj.weight.data.mul_(1.001)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "change"), MODEL_ERRORS, ids=[stage for stage, _ in MODEL_ERRORS])
def test_an_error_in_the_model_is_found_where_it_is(checkpoint, spoil, capsys, stage, change):
    spoil(change)
    assert run("--model", checkpoint, *QUICK, *FLOAT32) == 1
    assert f"It first went wrong at: {stage}\n" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "change"), MODEL_ERRORS[:2], ids=[stage for stage, _ in MODEL_ERRORS[:2]])
def test_an_error_is_found_on_a_gpu(checkpoint, spoil, capsys, stage, change):
    spoil(change)
    assert run("--model", checkpoint, *QUICK, "--device", "cuda", *FLOAT32) == 1
    assert f"It first went wrong at: {stage}\n" in capsys.readouterr().out


def positions_off_by_one_after_the_image(monkeypatch):
    expand = tensor_processor.expand_prompts

    def shifted(*arguments, **keywords):
        sequences = expand(*arguments, **keywords)
        after = (sequences.camera_ids >= 0).cummax(dim=1).values & (sequences.camera_ids < 0)
        sequences.position_ids.add_(after)
        return sequences

    monkeypatch.setattr(tensor_processor, "expand_prompts", shifted)


# The exponents of a head of the same size, beginning at 1.
def vision_frequencies_off_by_one(monkeypatch):
    right = geometry.inverse_frequencies
    monkeypatch.setattr(geometry, "inverse_frequencies", lambda dim, theta: right(dim, theta) * theta ** (-2 / dim))


def decoder_frequencies_off_by_one(monkeypatch):
    right = geometry.decoder_frequencies
    monkeypatch.setattr(
        decoder, "decoder_frequencies", lambda config: right(config) * config.rope_theta ** (-2 / config.head_dim)
    )


def window_boundary_moved(monkeypatch):
    right = geometry._window_order

    def moved(*arguments):
        order, (first, *rest) = right(*arguments)
        assert first.count > 1
        cut = first.length + 4  # a merged cell further
        runs = (Run(0, 1, cut), Run(cut, 1, first.length - 4), Run(2 * first.length, first.count - 2, first.length))
        return order, (*(run for run in runs if run.count), *rest)

    monkeypatch.setattr(geometry, "_window_order", moved)


def rows_and_columns_swapped(monkeypatch):
    right = geometry._rotary_tables
    monkeypatch.setattr(geometry, "_rotary_tables", lambda config, places: right(config, places[::-1]))


def cameras_swapped(monkeypatch):
    right = tensor_processor.TensorProcessor._pixels

    monkeypatch.setattr(tensor_processor.TensorProcessor, "_pixels", lambda *arguments: right(*arguments).flip(1))


def last_new_token_wrong(monkeypatch):
    right = QwenBatchedVL.generate

    def wrong(*arguments, **keywords):
        output = right(*arguments, **keywords)
        for tokens in output.token_ids:
            tokens[-1] = (tokens[-1] + 1) % 500
        return output

    monkeypatch.setattr(QwenBatchedVL, "generate", wrong)


def head_scaled(monkeypatch):
    right = QwenBatchedVL.logits
    monkeypatch.setattr(QwenBatchedVL, "logits", lambda self, states: right(self, states) * 1.01)


CODE_ERRORS = [
    ("rope positions", positions_off_by_one_after_the_image),
    ("decoder block 1", decoder_frequencies_off_by_one),
    ("vision block 0", vision_frequencies_off_by_one),
    ("vision block 0", window_boundary_moved),
    ("vision block 0", rows_and_columns_swapped),
    ("pixels", cameras_swapped),
    ("greedy tokens", last_new_token_wrong),
    ("logits", head_scaled),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "plant"), CODE_ERRORS, ids=[stage for stage, _ in CODE_ERRORS])
def test_an_error_in_the_code_is_found_where_it_is(checkpoint, monkeypatch, capsys, stage, plant):
    plant(monkeypatch)
    assert run("--model", checkpoint, *QUICK, *FLOAT32) == 1
    assert f"It first went wrong at: {stage}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_an_error_is_found_in_bfloat16_alone(checkpoint, spoil, capsys):
    spoil(lambda model: swap_gate_and_up(model.model.layers[1].mlp))
    assert run("--model", checkpoint, *QUICK, "--dtype", "bfloat16") == 1
    assert "It first went wrong at: decoder block 2\n" in capsys.readouterr().out


@pytest.mark.slow
def test_less_precision_than_transformers_has_is_found(checkpoint, spoil, capsys):
    """What is right in float32 and rounds once too often in bfloat16."""

    def coarse(model):
        norm = model.model.layers[2].input_layernorm
        forward = norm.forward
        if model.dtype == torch.bfloat16:
            norm.forward = lambda update, residual: forward(update, ((residual + update) * 1.3 / 1.3 - update) * 1.01)

    spoil(coarse)
    assert run("--model", checkpoint, *QUICK, "--batch", "3") == 1
    out = capsys.readouterr().out
    assert "bfloat16 ratio" in out and "float32 relative L2" not in out


@pytest.mark.slow
def test_float64_decides_where_float32_is_above_its_bound(checkpoint, spoil, monkeypatch, capsys):
    """A bound that our float32 does not keep: transformers' own float32 is measured, and twice that is the bound."""
    monkeypatch.setattr(comparison, "FLOAT32_BOUND", 1e-9)
    monkeypatch.setattr(bounds, "FLOAT32_BOUND", 1e-9)
    arguments = ("--model", checkpoint, *QUICK, "--dtype", "float32")
    run(*arguments)
    out = capsys.readouterr().out
    assert "transformers' own deviation from its float64" in out
    assert "final hidden states, 140x252" not in verdict(out)  # twice theirs is enough
    spoil(lambda model: model.model.layers[2].mlp.down_proj.weight.data.mul_(1 + 1e-4))
    assert run(*arguments) == 1
    assert "decoder block 3, 140x252" in verdict(capsys.readouterr().out)


# --- bad input ---


@pytest.fixture
def refuses(capsys, monkeypatch):
    """Runs, and checks that one line says why, that the exit code is 2, and that no model was loaded."""

    def check(*arguments, message, before_loading=True):
        if before_loading:
            monkeypatch.setattr(comparison, "load_theirs", lambda *_: pytest.fail("the work has started"))
        try:
            code = run(*arguments)
        except SystemExit as error:  # argparse
            code = error.code
        out, err = capsys.readouterr()
        assert code == 2
        assert message in err
        assert err.startswith("deviation: ") and err.count("\n") == 1
        assert out == ""

    return check


def broken_checkpoint(checkpoint, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json", True),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights", True),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]),
        "not a readable safetensors file",
        True,
    ),
    "a tensor missing": (without_a_tensor, "transformers cannot load", False),
    "no tokenizer": (
        lambda folder: [path.unlink() for name in ("tokenizer*", "vocab*", "merges*") for path in folder.glob(name)],
        "tokenizer",
        True,
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused(refuses, checkpoint, tmp_path, kind):
    change, message, before_loading = BROKEN[kind]
    folder = broken_checkpoint(checkpoint, tmp_path, change)
    refuses("--model", folder, *QUICK, message=message, before_loading=before_loading)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "20x300"), "at least 28 x 28 pixels"),
        (("--sizes", "28x6000"), "aspect ratio"),
        (("--sizes", "28by28"), "expected pixels as 224 or 480x640"),
        (("--sizes", "0x28"), "expected pixels as 224 or 480x640"),
        (("--sizes", "9999999"), "too little memory on the host: frames of this size"),
        (("--new-tokens", "5000"), "max_new_tokens=5000"),
        (("--batch", "0"), "at least 1"),
        (("--new-tokens", "-1"), "expected a number"),
        (("--layers", "9"), "layers must be"),
        (("--vision-layers", "6"), "layers must be"),
        (("--device", "abacus"), "abacus"),
        (("--images", "nowhere.png"), "nowhere.png cannot be read as an image"),
        (("--dtype", "int8"), "int8"),
        (("--weights", "trained-like"), "cannot go with --model"),
        (("--batch-effect", "--plot", "x.png"), "--plot"),
        (("--texts", "pick up the cube " * 2000), "at most"),
    ],
)
def test_a_wrong_argument_is_refused(refuses, checkpoint, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    refuses("--model", checkpoint, "--device", "cpu", *arguments, message=message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("path", ["no folder/report", "."])
def test_a_path_that_cannot_be_written_is_refused(refuses, checkpoint, monkeypatch, tmp_path, option, path):
    monkeypatch.chdir(tmp_path)
    refuses("--model", checkpoint, *QUICK, option, path, message="cannot be written")


def test_checking_a_path_leaves_no_file_and_keeps_an_old_one(tmp_path):
    tool.check_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "old.json").write_text("old")
    tool.check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


def test_images_of_different_sizes_in_one_camera_are_refused(refuses, checkpoint, tmp_path):
    for name, size in (("a.png", (56, 56)), ("b.png", (84, 84))):
        Image.new("RGB", size).save(tmp_path / name)
    images = ("--images", tmp_path / "a.png", tmp_path / "b.png", "--cameras", "1", "--batch", "2")
    refuses("--model", checkpoint, "--device", "cpu", *images, message="same size in all samples, got 56x56 and 84x84")


def test_too_little_memory_is_said_before_the_work_starts(refuses, checkpoint, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e8)
    refuses("--model", checkpoint, *QUICK, message="too little memory on the host: a model in float32")


def test_too_little_memory_during_the_work_is_one_line_too(refuses, checkpoint, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation.")

    monkeypatch.setattr(tool, "compare", out_of_memory)
    refuses("--model", checkpoint, *QUICK, message="too little memory: CUDA out of memory.")


def test_a_transformers_that_is_known_to_be_wrong_is_refused_by_name(refuses, checkpoint, monkeypatch):
    def check():
        raise RuntimeError("transformers 4.55.0 cannot be the reference")

    monkeypatch.setattr(tool, "check_reference_version", check)
    refuses("--model", checkpoint, *QUICK, message="transformers 4.55.0 cannot be the reference")


def test_the_estimate_of_memory_counts_weights_and_stages(checkpoint):
    processor = tensor_processor.TensorProcessor.from_pretrained(checkpoint)
    stages = tool.Stages.of(processor.config)
    one, two = (
        memory.Needs.of(checkpoint, processor, [cases.made_up(SIZE, batch, 2, cases.TEXTS)], stages, 0)
        for batch in (1, 2)
    )
    model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu")
    assert one.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 1.9 < two.stages[0] / one.stages[0] < 2.1
    patches = 2 * SIZE[0] * SIZE[1] // 14**2
    assert one.stages[0] > 4 * patches * 80 * 7  # the vision blocks alone


# --- the batch's effect ---


@pytest.mark.slow
def test_the_batch_effect_is_small_and_measured_for_both(checkpoint, tmp_path, capsys):
    path = tmp_path / "effect.json"
    assert run("--model", checkpoint, *QUICK, "--batch-effect", "--json", path) == 0
    rows = json.loads(path.read_text())["batch_effect"]
    assert {(row["run"], row["situation"]) for row in rows} == {
        (f"{who} {dtype}", situation)
        for who in ("ours", "theirs")
        for dtype in ("float32", "bfloat16")
        for situation in batch_effect.SITUATIONS
    }
    for row in rows:
        assert row["worst_relative_l2"] <= (1e-5 if "float32" in row["run"] else 0.1), row
    assert "ours in float32 moves by 1e-05 at most" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sample_that_feels_its_neighbours_is_found(checkpoint, spoil, capsys):
    def lean_on_the_neighbours(model):
        embed = model.model.embed_tokens
        forward = embed.forward
        embed.forward = lambda ids: (lambda x: x + 1e-3 * x.mean(dim=0))(forward(ids))

    spoil(lean_on_the_neighbours)
    assert run("--model", checkpoint, *QUICK, "--batch-effect", "--dtype", "float32") == 1
    assert "MISSED" in capsys.readouterr().out


def test_transformers_batch_is_what_transformers_gives_alone(reference):
    case = cases.made_up(SIZE, 2, 1, cases.TEXTS)
    inputs = [reference.processor_inputs(case.frames(i), case.texts[i]) for i in range(2)]
    assert inputs[0]["input_ids"].shape != inputs[1]["input_ids"].shape
    for alone, together in zip(
        map(lambda x: reference.run(**x), inputs), reference.final_hidden_states(inputs), strict=True
    ):
        expected = alone.hidden_states[-1][0]
        assert ((together - expected).norm() / expected.norm()).item() < 1e-5


def test_the_worst_token_is_judged_strictly_only_where_it_is_no_matter_of_chance():
    def plan(trained_like, width):
        text = SimpleNamespace(hidden_size=width, num_hidden_layers=4)
        processor = SimpleNamespace(config=SimpleNamespace(text=text))
        return SimpleNamespace(processor=processor, trained_like=trained_like, cases=(), stages=tool.Stages((), ()))

    findings = comparison.Findings()
    for who, worst in (("ours", 1.1e-4), ("theirs", 1e-4)):
        distance = Distance(1.0, 1.0, 1.0, 1, [torch.tensor([1 - worst, 1.0], dtype=torch.float64)])
        findings.measures[(who, torch.bfloat16), "56x56", "final hidden states"] = distance

    def missed(*arguments):
        return len(list(bounds._low_precision_misses(plan(*arguments), findings, torch.bfloat16)))

    assert [missed(True, 2048), missed(True, 512), missed(False, 2048)] == [1, 0, 0]
    findings.measures[("ours", torch.bfloat16), "56x56", "final hidden states"].cosines = [torch.tensor([1 - 1.3e-4])]
    assert [missed(True, 2048), missed(True, 512), missed(False, 2048)] == [1, 1, 1]
