"""onnxruntime-genai runs an exported folder, and generates what the live model generates."""

import functools
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_batched.export import ExportError, export, onnx_files
from qwen_batched.export import __main__ as command
from qwen_batched.export.genai import config_files
from qwen_batched.export.genai.config_files import write_config_files
from qwen_batched.export.genai.programs import PatchesProgram
from qwen_batched.export.programs import VisionProgram, detached
from qwen_batched.export.request import ExportRequest
from qwen_batched.export.telemetry import without_telemetry
from tests.export.conftest import load
from tests.sisters import FACTORS
from tests.support import assert_equal_to, photos

pytest.importorskip("onnxscript", reason="needs the extra 'genai'")
genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra 'genai'")
pytestmark = pytest.mark.slow
WRITTEN = 2e-6  # relative L2 from the live model
presets = pytest.mark.parametrize("preset", ["tiny", "qwen3-vl-tiny"])


def request_of(model, source=(50, 70), cameras=2):
    factor = model.processor.config.vision.cell_size
    frames = (source, (2 * factor, 3 * factor))
    return ExportRequest.of(model, "genai", frames, cameras, "1-8", None, "uint8", 18, None)


@pytest.fixture(scope="module")
def folders(exported):
    """Whole tiny models by preset and dtype, exported for two images of 2 x 3 merged cells a prompt."""
    return functools.partial(exported, target="genai")


class Runtime:
    """A folder in onnxruntime-genai."""

    def __init__(self, folder):
        with without_telemetry():
            self.model = genai.Model(str(folder))
        self.processor, self.tokenizer = self.model.create_multimodal_processor(), genai.Tokenizer(self.model)

    def inputs(self, messages, frames):
        """What its processor makes of a turn, written by its chat template, and of frames as files."""
        files = []
        for frame in frames:
            file = io.BytesIO()
            Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
            files.append(file.getvalue())
        prompt = self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return self.processor(prompt, images=genai.Images.open_bytes(*files) if files else None)

    def generate(self, text, frames=(), count=64):
        """Ids of the prompt, and tokens generated as the folder's config says; the one that ends them is left out."""
        content = [*({"type": "image"} for _ in frames), {"type": "text", "text": text}]
        inputs = self.inputs([{"role": "user", "content": content}], frames)
        ids = inputs["input_ids"].as_numpy()[0].tolist()
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(ids) + count)
        generator = genai.Generator(self.model, parameters)
        generator.set_inputs(inputs)
        while not generator.is_done():
            generator.generate_next_token()
        return ids, generator.get_sequence(0)[len(ids) :].tolist()


def live_tokens(model, text, frames=None, count=64):
    """The same of the live model."""
    factor = model.processor.config.vision.cell_size
    images = None if frames is None else frames[None]
    size = (2 * factor, 3 * factor)
    ids = model.processor(images, [text], resize=size)["input_ids"][0].tolist()
    found = model.generate(images, [text], resize=size, max_new_tokens=count)
    tokens = found.token_ids[0].tolist()
    return ids, tokens[:-1] if found.finish_reasons[0] == "eos" else tokens


@presets
def test_64_of_64_tokens_are_the_live_models(folders, preset):
    """With an image of the exported size, of others, with several, and with none."""
    model, folder, *_ = folders(preset)
    runtime, factor, counts = Runtime(folder), FACTORS[preset], []
    for text, images, size in (
        ("Pick up the red block.", 1, (2 * factor, 3 * factor)),
        ("Pick up the red block.", 1, (50, 70)),
        ("What is the robot doing? 机器人 é", 2, (50, 70)),
        ("go", 3, (120, 310)),
        ("Describe the image.", 0, None),
    ):
        frames = photos(1, images, *size)[0] if images else None
        found = runtime.generate(text, () if frames is None else frames)
        assert found == live_tokens(model, text, frames), (text, images, size)
        counts.append(len(found[1]))
    assert counts.count(64) >= 4


@presets
def test_the_folder_was_run_before_it_appeared(folders, preset):
    _, folder, manifest, _ = folders(preset)
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert manifest["target"] == "genai" and manifest["parts"] == ["vision", "embedding", "text"]
    assert set(manifest["deviation"]) == {*manifest["parts"], "call"} and "onnxruntime-genai" in manifest["versions"]
    assert all(each["measured"] <= WRITTEN for each in manifest["deviation"].values())
    assert manifest["deviation"]["call"]["measured"] > 0


def test_half_precision_is_as_near_to_float32_as_the_live_model(folders):
    _, folder, manifest, _ = folders("tiny", "float16")
    for name in ("vision", "text", "call"):
        assert 1e-5 < manifest["deviation"][name]["measured"] <= manifest["deviation"][name]["bound"]
    ids, tokens = Runtime(folder).generate("go", photos(1, 1, 50, 70)[0], count=8)
    assert len(ids) > 6 and len(tokens) <= 8


@pytest.mark.parametrize(
    "source", [(56, 84), (50, 70), (480, 640), (40, 300), (200, 40), (100, 70), (720, 200)], ids=str
)
def test_pixels_are_those_of_the_live_processor(folders, tmp_path, source):
    """Which follows Pillow: since 13 that begins with the rows of some sizes, and the runtime's copy of it does not."""
    model, folder, *_ = folders("tiny")
    changed = shutil.copytree(folder, tmp_path / "changed")
    write_config_files(changed, model, request_of(model, source))
    frames = photos(1, 2, *source)[0]
    inputs = Runtime(changed).inputs([{"role": "user", "content": [{"type": "image"}] * 2}], frames)
    pixels = torch.from_numpy(inputs["pixel_values"].as_numpy())
    own = detached(model)
    features = PatchesProgram(own, (2, 3))(pixels)
    assert_equal_to(features, VisionProgram(own, source, (56, 84))(frames[None])[0].flatten(0, 2), WRITTEN)


def test_generation_follows_the_checkpoints_penalty_and_end_tokens(folders, tmp_path, monkeypatch):
    model, folder, *_ = folders("tiny")
    frames, found = photos(1, 1, 50, 70)[0], []
    changed = shutil.copytree(folder, tmp_path / "changed")

    def both():
        write_config_files(changed, model, request_of(model))
        theirs, live = Runtime(changed).generate("go", frames)[1], live_tokens(model, "go", frames)[1]
        assert theirs == live
        return theirs

    plain = both()
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    found = both()
    assert found != plain
    end = next(token for token in found[3:] if token not in found[:3])
    monkeypatch.setattr(model.generation_config, "eos_token_ids", (end, 500))
    assert both() == found[: found.index(end)]


def test_a_pad_token_that_prompts_hold_is_not_the_runtimes(folders, tmp_path, monkeypatch):
    """It would mask each end of a turn."""
    model, folder, *_ = folders("tiny")
    monkeypatch.setattr(model.processor.prompts, "pad_token_id", model.processor.prompts.tokenizer.eos_token_id)
    changed = shutil.copytree(folder, tmp_path / "changed")
    write_config_files(changed, model, request_of(model))
    assert Runtime(changed).generate("go") == live_tokens(model, "go")


def test_added_tokens_are_read_as_the_live_processor_reads_them(folders, sisters, tmp_path):
    _, folder, *_ = folders("tiny")
    model = load(sisters("tiny"))
    assert model.add_tokens(["<act_1>", "<act_2>"]) == 2
    changed = shutil.copytree(folder, tmp_path / "changed")
    write_config_files(changed, model, request_of(model))
    text = "<act_2> then <act_1><act_1> é 漢字 🤖\n\n  x"
    ids = model.processor(None, [text])["input_ids"][0].tolist()
    inputs = Runtime(changed).inputs([{"role": "user", "content": text}], ())
    assert inputs["input_ids"].as_numpy()[0].tolist() == ids


def test_texts_of_one_length_run_as_a_batch(folders):
    model, folder, *_ = folders("tiny")
    runtime = Runtime(folder)
    rows = [runtime.inputs([{"role": "user", "content": text}], ())["input_ids"].as_numpy() for text in "ab"]
    assert rows[0].shape == rows[1].shape
    parameters = genai.GeneratorParams(runtime.model)
    parameters.set_search_options(max_length=rows[0].shape[1] + 16, batch_size=2)
    generator = genai.Generator(runtime.model, parameters)
    generator.append_tokens(np.concatenate(rows).astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for sample, text in enumerate("ab"):
        expected = live_tokens(model, text, count=16)[1]
        assert generator.get_sequence(sample)[rows[0].shape[1] :].tolist()[: len(expected)] == expected


# --- what the exporter's own check sees ---


@pytest.fixture
def write_again(folders, monkeypatch):
    """In place of ONNX's exporter: the graphs that were written before."""
    model, folder, *_ = folders("tiny")

    def write(part, path, opset):
        for suffix in ("", ".data"):
            shutil.copyfile(folder / f"{path.name}{suffix}", path.with_name(f"{path.name}{suffix}"))

    monkeypatch.setattr(onnx_files, "write", write)
    return lambda out, **more: export(model, out, "genai", "50x70:56x84", **{"cameras": 2, **more})


def test_other_pixels_are_not_left(write_again, tmp_path, monkeypatch):
    right = config_files.processor_config

    def wrong(model, request):
        content = right(model, request)
        content["processor"]["transforms"][-2]["operation"]["attrs"]["mean"][0] += 0.01
        return content

    monkeypatch.setattr(config_files, "processor_config", wrong)
    with pytest.raises(ExportError, match="call deviates from the live model"):
        write_again(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_token_id": 7}, "call deviates"),
        ({"vision_start_token_id": 7}, "call deviates"),
        ({"type": "none"}, "call could not be run: Unsupported model_type"),
    ],
    ids=str,
)
def test_a_config_that_the_runtime_reads_otherwise_is_not_left(write_again, tmp_path, monkeypatch, changed, words):
    right = config_files.genai_config
    monkeypatch.setattr(
        config_files, "genai_config", lambda model: (content := right(model)) | {"model": content["model"] | changed}
    )
    with pytest.raises(ExportError, match=words):
        write_again(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_read_as_other_tokens_are_not_left(write_again, folders, tmp_path, monkeypatch):
    prompts = folders("tiny").model.processor.prompts
    encode = prompts.encode
    monkeypatch.setattr(prompts, "encode", lambda *arguments: [*encode(*arguments)[:-1], 7])
    with pytest.raises(ExportError, match="call could not be run: onnxruntime-genai reads a prompt of"):
        write_again(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_chat_template_that_looks_at_its_text_goes_along(write_again, folders, tmp_path, monkeypatch):
    """A string cannot say what its prompts are; the check takes a plain one."""
    prompts = folders("tiny").model.processor.prompts
    template = prompts.chat_template.replace("content['text']", "content['text'] | trim")
    assert template != prompts.chat_template
    monkeypatch.setattr(prompts, "chat", None)
    prompts.chat_template = template
    manifest = write_again(tmp_path / "out")
    assert manifest["deviation"]["call"]["measured"] <= WRITTEN
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_an_export_leaves_the_live_model_as_it_was(write_again, folders, tmp_path):
    model, frames = folders("tiny").model, photos(1, 1, 56, 84)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expected = model(frames, ["go"], resize=None).last_hidden_state
    write_again(tmp_path / "out")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(frames, ["go"], resize=None).last_hidden_state, expected)


def test_the_command_exports(write_again, sisters, tmp_path, capsys):
    words = ["--model", str(sisters("tiny").folder), "--target", "genai", "--frames", "50x70:56x84", "--cameras", "2"]
    assert command.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "call " in capsys.readouterr().out and (tmp_path / "out" / "genai_config.json").is_file()
