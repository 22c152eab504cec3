"""Bad input is refused before any work, a failure leaves nothing behind, and the command says why in a line."""

import copy
import errno
import functools
import json
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.export import __main__ as command
from qwen_batched.export import api, engine, export, onnx_files, request, verification
from qwen_batched.export.api import ExportError
from qwen_batched.export.manifest_reading import FORMAT
from qwen_batched.export.parts import Parts
from qwen_batched.export.programs import detached
from qwen_batched.export.request import ExportRequest, read_frames, read_range
from qwen_batched.export.tracing import trace
from tests.export.conftest import load
from tests.support import relative_error

pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
GOOD = {"target": "onnx", "frames": "56x56"}


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"target": "tensorrt"}, ValueError, "target must be one of"),
        ({"frames": "56"}, ValueError, "height x width"),
        ({"frames": "56x57"}, ValueError, "multiples of 28"),
        ({"frames": "480x640:200x224"}, ValueError, "multiples of 28"),
        ({"frames": (56,)}, ValueError, "a size or two"),
        ({"frames": "999999x99999:28x28"}, ValueError, "at most"),
        ({"frames": "27x28:28x28"}, ValueError, "at least 28 x 28"),
        ({"cameras": 0}, ValueError, "cameras"),
        ({"cameras": "2"}, ValueError, "cameras"),
        ({"batch": "8-1"}, ValueError, "from the least to the most"),
        ({"batch": "0-4"}, ValueError, "batch"),
        ({"batch": "many"}, ValueError, "1-8 or 8"),
        ({"sequence": 4}, ValueError, "more than the 4 tokens"),
        ({"sequence": 10**9}, ValueError, "at most"),
        ({"sequence": "long"}, ValueError, "sequence must be"),
        ({"frames_dtype": "int8"}, ValueError, "frames_dtype must be"),
        ({"opset": 17}, ValueError, "opset"),
        ({"opset": 24}, ValueError, "from 18 to 23"),
        ({"cameras": 1100}, ValueError, "at most 4096 tokens, and 1100 images"),
        ({"parts": ["head"]}, ValueError, "parts must be some of"),
        ({"parts": []}, ValueError, "parts must be some of"),
        ({"parts": "vision"}, ValueError, "parts must be some of"),
        ({"parts": ["call"]}, ValueError, "parts must be some of"),
        ({"parts": ["vision", "vision"]}, ValueError, "each once"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(live, tmp_path, changed, error, words):
    with pytest.raises(error, match=words):
        export(live("tiny"), tmp_path / "out", **{**GOOD, **changed})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"parts": ["vision"]}, "parts must be all three with target 'genai'"),
        ({"parts": ["cached_decoder"]}, "parts must be some of"),
        ({"frames_dtype": "float32"}, "frames_dtype must be uint8 with target 'genai', got float32"),
        ({"sequence": 64}, "sequence must be dynamic with target 'genai', got 64"),
        ({"frames": "56x57"}, "multiples of 28"),
        ({"opset": 17}, "opset"),
    ],
    ids=str,
)
def test_what_onnxruntime_genai_leaves_no_choice_of_is_refused(live, tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        export(live("tiny"), tmp_path / "out", **{**GOOD, "target": "genai", **changed})
    assert list(tmp_path.iterdir()) == []


def test_models_that_onnxruntime_genai_does_not_run_are_refused(sisters, live, tmp_path, monkeypatch):
    sister, out, given = sisters("tiny"), tmp_path / "out", {**GOOD, "target": "genai"}
    with pytest.raises(ValueError, match=r"model_type of qwen2_5_vl, qwen3_vl, got qwen2_vl$"):
        export(live("qwen2-vl-tiny"), out, **given)
    with pytest.raises(ValueError, match=r"needs the package onnxruntime_genai: pip install 'qwen_batched\[genai\]'"):
        monkeypatch.setattr(request.importlib.util, "find_spec", lambda name: name != "onnxruntime_genai" or None)
        export(live("tiny"), out, **given)
    monkeypatch.setattr(request.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"one of float32, float16, got torch\.bfloat16"):
        export(sister.load(resample_backend="pillow", dtype="bfloat16"), out, **given)
    with pytest.raises(ValueError, match="opset from 18 to 22"):
        export(sister.load(resample_backend="pillow", dtype="float16"), out, **given, opset=23)
    with pytest.raises(ValueError, match="resample_backend='pillow'"):
        export(sister.load(resample_backend="torchvision"), out, **given)
    with pytest.raises(ValueError, match="lm_head=False"):
        export(sister.load(resample_backend="pillow", lm_head=False), out, **given)
    assert list(tmp_path.iterdir()) == []


def test_models_that_a_target_cannot_hold_are_refused(sisters, live, tmp_path, monkeypatch):
    sister, out = sisters("tiny"), tmp_path / "out"
    with pytest.raises(TypeError, match="must be a QwenBatchedVL"):
        export(torch.nn.Linear(1, 1), out, **GOOD)
    with pytest.raises(ValueError, match=r"one of float32, float16, got torch\.bfloat16"):
        export(sister.load(resample_backend="pillow", dtype="bfloat16"), out, **GOOD)
    with pytest.raises(ValueError, match="opset from 18 to 22"):
        export(sister.load(resample_backend="pillow", dtype="float16"), out, **GOOD, opset=23)
    with pytest.raises(ValueError, match="resample_backend='pillow'"):
        export(sister.load(resample_backend="torchvision"), out, **GOOD)
    with pytest.raises(ValueError, match="lm_head=False"):
        export(sister.load(resample_backend="pillow", lm_head=False), out, **GOOD)
    hooked = sister.load(resample_backend="pillow")
    hooked.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="unmodified, got PaddedLinear at model"):
        export(hooked, out, **GOOD)
    for target, package in (("onnx", "onnxscript"), ("onnx", "onnxruntime")):
        with monkeypatch.context() as patch:
            patch.setattr(request.importlib.util, "find_spec", lambda name, missing=package: name != missing or None)
            with pytest.raises(ValueError, match=f"needs the package {package}"):
                export(live("tiny"), out, **{**GOOD, "target": target})
    with monkeypatch.context() as patch:
        patch.setattr(request.shutil, "which", lambda name: None)
        with pytest.raises(ValueError, match=r"C\+\+ compiler"):
            export(live("tiny"), out, **{**GOOD, "target": "engine"})
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_refused(sisters, tmp_path, monkeypatch):
    from peft import LoraConfig, inject_adapter_in_model

    model = sisters("tiny").load(resample_backend="pillow")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    monkeypatch.setattr(request.importlib.util, "find_spec", lambda name: True)
    for target in ("onnx", "genai"):
        with pytest.raises(ValueError, match="adapters must be merged"):
            export(model, tmp_path / "out", **{**GOOD, "target": target})
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_in_the_program_and_one_that_stays_beside_its_layers_is_refused(sisters, tmp_path):
    """`merge_adapter` adds the update to the weights and keeps peft's layers, `merge_and_unload` leaves none."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load(sisters("tiny"), num_layers=1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    part = ExportRequest.of(base, "engine", "56x56", 1, 2, None, "uint8", 18, ("call",))
    arguments = Parts(detached(base), part).arguments("call", 2)
    with torch.no_grad():
        programs = [Parts(detached(model), part).part("call").program for model in (base, adapted.model)]
        plain, live = (program(*arguments.values()) for program in programs)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"merged, by merge_and_unload, before an export, got one at .*qkv$"):
        export(adapted.model, tmp_path / "out", **GOOD)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    request_ = ExportRequest.of(merged, "engine", "56x56", 1, 2, None, "uint8", 18, ("call",))
    program = trace(Parts(detached(merged), request_).part("call")).module()
    found, mask = program(*arguments.values()), arguments["attention_mask"] != 0
    assert relative_error(found[mask], live[mask]) <= 1e-5 < 1e-2 < relative_error(found[mask], plain[mask])


def test_a_folder_that_holds_something_is_left_alone(live, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("a")
    for out in (tmp_path, tmp_path / "kept"):
        with pytest.raises(ValueError, match="new or an empty folder"):
            export(live("tiny"), out, **GOOD)
    with pytest.raises(ValueError, match="out must be in a folder"):
        export(live("tiny"), tmp_path / "kept" / "out", **GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(request.os.path, "ismount", lambda path: path.name == "out")
        (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="the mount point"):
            export(live("tiny"), tmp_path / "out", **GOOD)
    with monkeypatch.context() as patch:  # whoever is there would be nowhere afterwards
        patch.chdir(tmp_path / "out")
        with pytest.raises(ValueError, match="got the current one"):
            export(live("tiny"), ".", **GOOD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out"]


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_leads_to_where_the_export_is_written(live, tmp_path, monkeypatch, target_exists):
    write_exactly(monkeypatch, live("tiny"))
    real, link = tmp_path / "real", tmp_path / "link"
    if target_exists:
        real.mkdir()
    link.symlink_to(real)
    export(live("tiny"), link, **GOOD, parts=["vision"])
    assert link.is_symlink() and (real / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_autocast_around_an_export_does_not_reach_it(live, tmp_path, monkeypatch):
    """The program is traced outside it, and autocast is as before afterwards."""
    write_exactly(monkeypatch, live("tiny"))
    dtypes, x = [], torch.eye(2)
    monkeypatch.setattr(onnx_files, "write", lambda part, path, opset: dtypes.append((x @ x).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        export(live("tiny"), tmp_path / "out", **GOOD, parts=["vision"])
        assert torch.is_autocast_enabled("cpu")
    assert dtypes == [torch.float32]


def test_exports_from_several_threads_follow_each_other(live, tmp_path, monkeypatch):
    """Side by side they fail: PyTorch's compilers set what is of the whole process."""
    write_exactly(monkeypatch, live("tiny"))
    at_work, most = threading.Semaphore(1), []

    def write(part, path, opset):
        most.append(at_work.acquire(blocking=False))
        time.sleep(0.1)
        at_work.release()

    monkeypatch.setattr(onnx_files, "write", write)
    with ThreadPoolExecutor(3) as pool:
        [*pool.map(lambda name: export(live("tiny"), tmp_path / name, **GOOD, parts=["vision"]), "abc")]
    assert most == [True] * 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_removes_the_parents_that_were_made(live, tmp_path, monkeypatch, error):
    def write(part, path, opset):
        path.write_bytes(b"half")
        raise error

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(onnx_files, "write", write)
    with pytest.raises(error):
        export(live("tiny"), tmp_path / "there" / "a" / "b" / "out", **GOOD)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_full_disk_is_seen_before_and_leaves_nothing_after(live, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(request.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(ValueError, match="GiB free"):
            export(live("tiny"), tmp_path / "out", **GOOD)

    def write(part, path, opset):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_files, "write", write)
    with pytest.raises(OSError, match="No space"):
        export(live("tiny"), tmp_path / "out", **GOOD)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_temporary_files_with_no_room_for_a_compilation_is_refused(live, tmp_path, monkeypatch):
    """Together with what is written, where both are on one disk."""
    model, usage = live("tiny"), {}
    given = {"target": "engine", "frames": "56x56", "parts": ["vision"]}
    weights = sum(p.numel() * p.element_size() for p in model.visual.parameters())
    room = {1: 1.2 * weights, 2: 2.4 * weights, 3: 3.6 * weights}  # of one copy, two, three
    out, temporary = tmp_path / "a" / "out", tmp_path / "temporary"
    out.parent.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(request.shutil, "disk_usage", lambda path: SimpleNamespace(free=usage[path]))
    monkeypatch.setattr(engine, "write", lambda part, path: pytest.fail("written"))
    for free, words in ((room[3] - 9, r"temporary must have .* GiB free, got "), (room[3], "written")):
        usage |= {out.parent: room[1], temporary: free}
        with pytest.raises((ValueError, pytest.fail.Exception), match=words):
            export(model, out, **given)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        export(model, out, **given)
    assert not list(out.parent.iterdir()) and not list(temporary.iterdir())


def test_the_command_says_the_end_of_a_long_reason(checkpoint, tmp_path, capsys, monkeypatch):
    """A compiler's command comes first."""
    reason = f"g++ {'-I/include ' * 400}\n\nfatal error: No space left on device\n"
    monkeypatch.setattr(command, "export_live", lambda *_: (_ for _ in ()).throw(ExportError(reason)))
    given = ["--model", str(checkpoint), "--target", "engine", "--frames", "56x56", "--out", str(tmp_path / "out")]
    assert command.main(given) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("export: g++ -I") and printed.endswith("No space left on device\n")
    assert printed.count("\n") == 1 and len(printed) < 1100


def write_exactly(monkeypatch, model, shift=0.0):
    """In place of ONNX: graphs of the live vision transformer, whose first value is moved."""

    def open_graph(path):
        def run(arguments):
            main = model.encode_images(arguments["frames"], resize=None).flatten(2, 3).clone()
            main.view(-1)[0] += shift * main.norm()
            return [main]

        return run

    monkeypatch.setattr(onnx_files, "write", lambda part, path, opset: path.write_bytes(b""))
    monkeypatch.setattr(onnx_files, "open_graph", open_graph)


@pytest.mark.parametrize("shift", [1e-3, float("nan")], ids=str)
def test_what_deviates_is_not_left(live, tmp_path, monkeypatch, shift):
    """Even where a single value is no number."""
    write_exactly(monkeypatch, live("tiny"), shift)
    with pytest.raises(ExportError, match="vision deviates"):
        export(live("tiny"), tmp_path / "out", **GOOD, parts=["vision"])
    assert list(tmp_path.iterdir()) == []
    write_exactly(monkeypatch, live("tiny"))
    assert export(live("tiny"), tmp_path / "out", **GOOD, parts=["vision"])["deviation"]["vision"]["measured"] == 0


@pytest.mark.parametrize("shift", [0, 1e-3])
def test_the_command_holds_no_weights_while_what_was_written_runs(checkpoint, tmp_path, capsys, monkeypatch, shift):
    """A large model and its graph would not fit side by side. float64 decides, for which the model is loaded again."""
    loaded, alive = [], []
    real = QwenBatchedVL.from_pretrained

    def load(*arguments, **options):
        model = real(*arguments, **options)
        loaded.append(weakref.ref(model.visual.patch_embed.proj.weight))
        return model

    def open_graph(path):
        alive.append([each for each in loaded if each() is not None])
        expected = real(checkpoint, device="cpu", resample_backend="pillow")
        return lambda arguments: [
            expected.encode_images(arguments["frames"], resize=None).flatten(2, 3).detach() * (1 + shift)
        ]

    monkeypatch.setattr(QwenBatchedVL, "from_pretrained", load)
    monkeypatch.setattr(onnx_files, "write", lambda part, path, opset: path.write_bytes(b""))
    monkeypatch.setattr(onnx_files, "open_graph", open_graph)
    arguments = ["--frames", "56x56", "--target", "onnx", "--parts", "vision", "--dtype", "float32", "--batch", "2"]
    code = command.main(["--model", str(checkpoint), "--out", str(tmp_path / "out"), *arguments])
    printed = capsys.readouterr().err
    assert code == (2 if shift else 0) and ("vision deviates" in printed) == bool(shift), printed
    assert alive == [[]] and len(loaded) == (2 if shift else 1)


def test_weights_that_change_between_two_parts_are_refused(checkpoint, tmp_path, capsys, monkeypatch):
    real, loaded = QwenBatchedVL.from_pretrained, []

    def load(*arguments, **options):
        model = real(*arguments, **options)
        loaded.append(model.lm_head.weight.detach().add_(len(loaded)))
        return model

    monkeypatch.setattr(QwenBatchedVL, "from_pretrained", load)
    monkeypatch.setattr(onnx_files, "write", lambda part, path, opset: path.write_bytes(b""))
    monkeypatch.setattr(onnx_files, "open_graph", lambda path: lambda arguments: [])
    monkeypatch.setattr(api, "measure", lambda *_: verification.Deviation(0.0, 1.0, "live model"))
    out = tmp_path / "out"
    code = command.main(["--model", str(checkpoint), "--target", "onnx", "--frames", "56x56", "--out", str(out)])
    assert code == 2 and "changed while they were exported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 1])
def test_no_number_in_any_result_is_a_deviation(place):
    expected = [torch.ones(2, 3, 4), torch.ones(2, 5)]
    values = [x.clone() for x in expected]
    assert verification.relative_l2(values, expected) == 0
    values[place].view(-1)[-1] = torch.nan
    assert not verification.relative_l2(values, expected) <= 1
    values[place] = values[place][..., :-1]
    assert not verification.relative_l2(values, expected) <= 1


def test_onnxruntime_is_imported_without_its_usage_data(tmp_path, monkeypatch):
    """It reads the variable once, when it is imported."""
    import onnxruntime  # so that it is what the modules hold again afterwards

    (tmp_path / "onnxruntime.py").write_text("import os\nraise ImportError(os.environ['ORT_DISABLE_TELEMETRY'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, onnxruntime.__name__)
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    with pytest.raises(ImportError, match=r"^1$"):
        onnx_files.open_graph(tmp_path / "vision.onnx")
    assert "ORT_DISABLE_TELEMETRY" not in os.environ


def test_an_exporter_that_fails_is_named(live, tmp_path, monkeypatch):
    def write(part, path, opset):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnx_files, "write", write)
    with pytest.raises(ExportError, match="vision could not be written as onnx: no such operator"):
        export(live("tiny"), tmp_path / "out", **GOOD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--frames", "56x57"],
        ["--frames", "56x56", "--batch", "0"],
        ["--frames", "56x56", "--cameras", "x"],
        ["--frames", "56x56", "--opset", "3"],
        ["--frames", "56x56", "--dtype", "int8"],
        ["--frames", "56x56", "--model", "no/such-folder"],
        ["--frames", "56x56", "--target", "trt"],
        ["--frames", "56x56", "--target", "genai", "--parts", "vision"],
        ["--frames", "56x56", "--target", "genai", "--frames-dtype", "float16"],
        ["--frames", "56x56", "--device", "nothing"],
    ],
    ids=str,
)
def test_the_command_says_why_in_a_line(checkpoint, tmp_path, capsys, arguments):
    given = ["--model", str(checkpoint), "--target", "onnx", "--out", str(tmp_path / "out"), *arguments]
    try:
        code = command.main(given)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and printed.startswith("export: ") and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def engine_manifest(part):
    """What a reader needs of it, of a part that takes frames and ids."""
    shapes = {
        "frames": ["batch", 2, 3, 4, 6],
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    arguments = {name: {"dtype": "int64", "shape": shape} for name, shape in shapes.items()}
    made = {"format": FORMAT, "target": "engine", "arguments": {part: arguments}, "device_type": "cpu"}
    made |= {"device": engine.device_kind(torch.device("cpu")), "versions": {"torch": torch.__version__}}
    return made | {"batch": [1, 8], "cameras": 2, "grid": [1, 3], "image_token_id": 9, "vocabulary_size": 10}


def onnx_manifest():
    made = {"format": FORMAT, "target": "onnx", "parts": ["vision", "cached_decoder"], "prompt": [1], "cameras": 2}
    made |= {"frames": {"source": [4, 6], "dtype": "uint8"}, "batch": [1, 8], "grid": [1, 3], "image_token_id": 9}
    return made | {"pad_token_id": 0, "eos_token_ids": [1], "repetition_penalty": 1.0, "renumbered": {}}


def load_engine_call(folder):
    engine.load_engine(folder, "call")


def load_onnx(folder):
    from qwen_batched.export.run_onnx import OnnxModel

    OnnxModel(folder)


@pytest.mark.parametrize(("load", "made"), [(load_engine_call, engine_manifest("call")), (load_onnx, onnx_manifest())])
def test_a_manifest_that_lacks_what_its_reader_needs_is_refused_before_anything_is_loaded(
    load, made, tmp_path, monkeypatch
):
    """One of an older version, and a damaged one."""
    monkeypatch.setattr(engine, "open_package", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("loaded"))
    path, text = tmp_path / "manifest.json", json.dumps(made)

    def refused(content, words):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            load(tmp_path)
        assert "\n" not in str(error.value)

    refused(None, f"exported with --target {made['target']}, and holds no manifest.json$")
    for content in ("", text[: len(text) // 2], "nothing", "[" * 100_000):
        refused(content, r"manifest\.json must be JSON, got .*: export it again$")
    path.write_bytes(b"\xff\xfe\x00")
    refused(None, r"manifest\.json must be JSON, got .*: export it again$")
    for content in ([], None, {"target": "genai"}):
        refused(json.dumps(content), f"--target {made['target']}, got ")
    refused(json.dumps(made | {"format": FORMAT + 1}), f"must be of format {FORMAT}, got {FORMAT + 1}: export it again")
    older = {name: value for name, value in made.items() if name not in ("vocabulary_size", "pad_token_id")}
    refused(json.dumps(older | {"format": 1}), f"must be of format {FORMAT}, got 1: export it again")
    for name in set(made) - {"target", "prompt"}:
        refused(
            json.dumps({each: value for each, value in made.items() if each != name}), rf"\b{name}\b.*export it again$"
        )
        refused(json.dumps(made | {name: None}), rf"\b{name}\b.*, got None(Type)?: export it again$")
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        path.write_text(text)
        load(tmp_path)


def test_a_part_whose_arguments_lack_their_shapes_is_refused(tmp_path):
    for harmed, words in (({"frames": {"dtype": "uint8"}}, r"call\.frames\.shape as list"), (None, "call as dict")):
        made = engine_manifest("call") | {"arguments": {"call": harmed}}
        (tmp_path / "manifest.json").write_text(json.dumps(made))
        with pytest.raises(ValueError, match=rf"must have arguments\.{words}, got NoneType: export it again$"):
            engine.load_engine(tmp_path, "call")


def test_packages_for_another_pytorch_or_device_are_refused(tmp_path):
    for changed, words in (
        ({"versions": {"torch": "1.0"}}, "made for PyTorch 1.0"),
        ({"device": "NVIDIA X"}, "made for device NVIDIA X"),
        ({"arguments": {"decoder": {}}}, "must hold the part 'vision', got decoder$"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(engine_manifest("vision") | changed))
        with pytest.raises(ValueError, match=words):
            engine.load_engine(tmp_path, "vision")


def test_a_call_has_features_for_all_its_image_tokens(tmp_path, monkeypatch):
    """A package would repeat the last feature for more, and knows no ids beyond its embeddings."""
    made = engine_manifest("call")
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    monkeypatch.setattr(engine, "open_package", lambda path, for_graphs: lambda arguments: [*arguments])
    call = engine.load_engine(tmp_path, "call")

    def run(counts, masked=0, first=1):
        ids = torch.tensor([[first] + [9] * count + [1] * (8 - count) for count in counts])
        mask = torch.ones_like(ids)
        mask[:, 1 : 1 + masked] = 0
        frames = torch.ones(len(ids), 2, 3, 4, 6).long()
        return call({"frames": frames, "input_ids": ids, "attention_mask": mask})

    for counts, masked in (([6], 0), ([0, 3, 6], 0), ([7], 1)):
        assert run(counts, masked) == [*made["arguments"]["call"]]
    for counts in ([7], [6, 5], [1], [0, 8]):
        with pytest.raises(ValueError, match="3 image tokens for each of at most 2 images, got "):
            run(counts)
    for unknown in (10, -1):
        with pytest.raises(ValueError, match="input_ids must be from 0 to 9, got"):
            run([6], first=unknown)


def test_frames_and_ranges_are_read_in_each_of_their_forms():
    assert read_frames("480x640:224x252") == read_frames(((480, 640), (224, 252))) == ((480, 640), (224, 252))
    assert read_frames("224x252") == read_frames((224, 252)) == ((224, 252), (224, 252))
    assert read_range("1-8") == read_range((1, 8)) == (1, 8)
    assert read_range("8") == read_range(8) == (8, 8)


def test_float64_decides_where_rounding_alone_exceeds_the_bound(live, monkeypatch):
    """Weights with massive channels round by more than 1e-5; an error still shows, being more than rounding is."""
    model = detached(live("tiny"))
    request_ = ExportRequest.of(model, "engine", "56x56", 1, 2, None, "uint8", 18, ("decoder",))
    parts = Parts(model, request_)
    cases = verification.live_cases("decoder", parts, [2])

    def found(shift=0.0):
        written = [[x * (1 + shift) for x in case.live] for case in cases]
        arguments = [case.arguments for case in cases]
        exact = functools.partial(verification.exact_results, "decoder", parts, arguments)
        return verification.measure(cases, written, parts.dtype, exact)

    assert found().measured_from == "live model"
    monkeypatch.setattr(verification, "FLOAT32_BOUND", -1.0)
    assert found().measured_from == "float64" and 0 < found().measured <= found().bound < 1e-5 and found().is_within
    assert not found(1e-4).is_within
