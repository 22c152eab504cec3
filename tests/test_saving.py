"""Saving: all or nothing, one thing once, and nothing that is not the checkpoint's is touched (trap 36)."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_batched import QwenBatchedVL, TensorProcessor
from qwen_batched.checkpoint.atomic_save import JOURNAL, LOCK, NEW, OLD, STAGING, recover, replacing, write_file
from qwen_batched.checkpoint.folder import is_checkpoint_file
from qwen_batched.testing import write_checkpoint
from tests.fuzz.interrupted import result
from tests.processes import ROOT, run_python

MAX_PIXELS = 8 * 784


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of the same shape that differ in everything that a folder says."""
    root = tmp_path_factory.mktemp("models")
    return {
        "A": QwenBatchedVL.from_pretrained(write_checkpoint(root / "A", seed=1), device="cpu", max_pixels=MAX_PIXELS),
        "B": QwenBatchedVL.from_pretrained(write_checkpoint(root / "B", seed=2), device="cpu"),
    }


@pytest.fixture
def old(tmp_path):
    """A folder with an old checkpoint, in shards."""
    return write_checkpoint(tmp_path / "folder", seed=3, shards=2)


def load(folder, **options):
    return QwenBatchedVL.from_pretrained(folder, device="cpu", **options)


def files(folder):
    """Contents by path below the folder, of folders None; where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def make(path, content=b"old"):
    """A file; a folder with a file in it where the name has no ending."""
    if path.suffix:
        path.write_bytes(content)
    else:
        path.mkdir()
        (path / "inside.jinja").write_bytes(content)


def assert_same_model(folder, model):
    again = load(folder)
    for (name, mine), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert again.processor.image == model.processor.image
    assert again.processor.prompts.chat_template == model.processor.prompts.chat_template
    assert again.generation_config == model.generation_config


# --- a folder means one thing ---

CONTRADICTING = {
    "chat_template.jinja": b"other {{ messages }}",
    "chat_template.json": b'{"chat_template": "other"}',
    "additional_chat_templates": b"other",
    "processor_config.json": b'{"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 784}}}',
    "preprocessor_config.json": b'{"min_pixels": 784, "max_pixels": 784}',
    "video_preprocessor_config.json": b'{"size": {"shortest_edge": 784, "longest_edge": 784}}',
    "generation_config.json": b'{"repetition_penalty": 9.0, "eos_token_id": 1}',
    "added_tokens.json": b'{"<other>": 5}',
    "special_tokens_map.json": b'{"eos_token": "<other>"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"other",
    "tekken.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"a b",
    "hf_quant_config.json": b"{}",
    "config.json": b'{"model_type": "other"}',
    "model.safetensors": b"other",
    "model.fp16.safetensors": b"other",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00009.safetensors"}}',
    "model.safetensors.index.fp16.json": b"{}",
    "model-00001-of-00009.safetensors": b"other",
    "model-00001-of-00009.fp16.safetensors": b"other",
    "pytorch_model.bin": b"other",
    "pytorch_model-00001-of-00002.bin": b"other",
    "pytorch_model.bin.index.json": b"{}",
}
FOREIGN = [
    *("README.md", "optimizer.pt", "training_args.bin", "trainer_state.json", "scheduler.pt", "rng_state.pth"),
    *("checkpoint-500", "global_step5", "runs", "modeling_mine.py", "adapter_config.json", "adapter_model.safetensors"),
    *("optimizer.safetensors", "model.safetensors.backup.txt", "my_model.safetensors", "model_ema.safetensors"),
    *("pytorch_model_fsdp.bin", ".gitattributes", "norm_stats.json"),
]


@given(
    before=st.sets(st.sampled_from([*CONTRADICTING, *FOREIGN]), max_size=12),
    linked=st.sets(st.sampled_from([*CONTRADICTING, *FOREIGN]), max_size=4),
    name=st.sampled_from(["A", "B"]),
)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_a_folder_held_it_then_holds_the_saved_checkpoint_and_the_foreign_files(
    models, tmp_path_factory, before, linked, name
):
    root = tmp_path_factory.mktemp("saved")
    folder, behind, fresh = root / "folder", root / "behind", root / "fresh"
    folder.mkdir(), behind.mkdir()
    for file in before | linked:
        make((behind if file in linked else folder) / file, CONTRADICTING.get(file, b"foreign"))
    for file in linked:
        (folder / file).symlink_to(Path("..", "behind", file))
    kept, targets = {path: x for path, x in files(folder).items() if Path(path).parts[0] in FOREIGN}, files(behind)
    models[name].save_pretrained(folder)
    models[name].save_pretrained(fresh)
    assert files(folder) == files(fresh) | kept
    assert files(behind) == targets
    shutil.rmtree(root)


def test_files_that_are_no_part_of_a_checkpoint_are_told_apart():
    names = {*FOREIGN, *(f"{name}.{file}" for name in FOREIGN for file in CONTRADICTING)}
    names |= {f"{file}.txt" for file in CONTRADICTING}
    assert [name for name in names if is_checkpoint_file(name)] == []


def image_sizes(folder):
    """The limits that our reader and transformers' take from a folder."""
    theirs = transformers.AutoImageProcessor.from_pretrained(folder).size
    ours = TensorProcessor.from_pretrained(folder).image
    return (ours.min_pixels, ours.max_pixels), (theirs["shortest_edge"], theirs["longest_edge"])


@given(
    stored=st.tuples(st.sampled_from([None, 16 * 784, 64 * 784]), st.sampled_from([None, 25 * 784, 81 * 784])).filter(
        any
    ),
    asked=st.sampled_from([None, 9 * 784, 36 * 784]),
)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_after_a_folder_that_says_two_sizes_the_saved_one_says_one(tmp_path_factory, stored, asked):
    nested, flat = stored
    folder = write_checkpoint(tmp_path_factory.mktemp("twice") / "folder")
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    for name, size, wrap in (
        ("preprocessor_config.json", flat, lambda x: x),
        ("processor_config.json", nested, lambda x: {"processor_class": "Qwen2_5_VLProcessor", "image_processor": x}),
    ):
        limits = {"min_pixels": 784, "max_pixels": size, "size": {"shortest_edge": 784, "longest_edge": size}}
        if size is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_text(json.dumps(wrap(preprocessor | limits)))
    model = load(folder, max_pixels=asked)
    model.save_pretrained(folder)
    ours, theirs = image_sizes(folder)
    assert ours == theirs == (model.processor.image.min_pixels, model.processor.image.max_pixels)
    assert asked is None or ours[1] == asked
    shutil.rmtree(folder)


def test_the_tokenizer_alone_finds_the_same_template_as_the_processor(tmp_path):
    folder = write_checkpoint(tmp_path / "folder")
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"].replace("helpful", "useful")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template != template  # it reads another file
    model = load(folder)
    assert model.processor.prompts.chat_template == template
    model.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == template
    assert load(folder).processor.prompts.chat_template == template


def test_what_transformers_video_processor_reads_is_kept(tmp_path):
    folder = write_checkpoint(tmp_path / "folder")
    video = {"size": {"shortest_edge": 784, "longest_edge": 7840}, "fps": 3}
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": video}))
    load(folder, max_pixels=MAX_PIXELS).save_pretrained(folder)
    assert json.loads((folder / "video_preprocessor_config.json").read_text()) == video
    assert not (folder / "processor_config.json").exists()


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize(
    "said", [{}, {"dtype": "float64"}, {"torch_dtype": "float64"}, {"dtype": "float64", "torch_dtype": "float64"}]
)
def test_a_saved_config_says_the_dtype_and_the_depth_wherever_it_says_them(tmp_path, layout, said):
    folder = write_checkpoint(tmp_path / "folder", config_layout=layout)
    config = json.loads((folder / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    sections = [config, config["vision_config"], *([config["text_config"]] if layout == "nested" else [])]
    for section in sections:
        section.update(said)
    config |= {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "fine_tuner": {"note": [1, 2]}}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, dtype=torch.bfloat16, num_layers=2)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    text = saved.get("text_config", saved)
    assert saved["fine_tuner"] == {"note": [1, 2]}
    for section in (saved, text, saved["vision_config"]):
        dtypes = {section[name] for name in ("dtype", "torch_dtype") if name in section}
        assert dtypes == {"bfloat16"} or (section is not saved and not said)
        assert section.get("num_hidden_layers", 2) == 2
        assert len(section.get("layer_types", "ab")) == 2
    assert text["num_hidden_layers"] == 2
    again = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert again.get_text_config().num_hidden_layers == 2
    assert load(tmp_path / "saved").dtype == torch.bfloat16


def test_an_adapter_beside_the_checkpoint_stays_and_is_warned_of(models, old, caplog):
    models["A"].save_pretrained(old)
    assert not caplog.records
    (old / "adapter_config.json").write_text("{}")
    models["A"].save_pretrained(old)
    assert (old / "adapter_config.json").read_text() == "{}"
    assert "has an adapter" in caplog.text


def test_a_head_explicitly_tied_is_saved_with_its_own_name(tmp_path):
    model = load(write_checkpoint(tmp_path / "folder", tied=False))
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").lm_head.weight, model.model.embed_tokens.weight)


# --- all or nothing ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
@pytest.mark.parametrize("part", ["weights", "describing files"])
def test_an_exception_in_the_middle_leaves_the_old_checkpoint_and_nothing_else(models, old, monkeypatch, error, part):
    before = files(old)
    stop = mock.Mock(side_effect=error)
    if part == "weights":
        monkeypatch.setattr("qwen_batched.qwen_batched_VL_model.save_weights", stop)
    else:
        monkeypatch.setattr("qwen_batched.checkpoint.folder.write_file", stop)
    with pytest.raises(error):
        models["A"].save_pretrained(old)
    assert stop.called and files(old) == before
    with pytest.raises(error):
        models["A"].save_pretrained(old.parent / "new" / "folder")
    assert not (old.parent / "new").exists()


def test_saving_over_the_folder_that_the_model_came_from(tmp_path):
    folder = write_checkpoint(tmp_path / "folder", shards=3)
    model = load(folder, num_layers=2)
    for _ in range(2):
        model.save_pretrained(folder)
        assert_same_model(folder, model)


def test_a_link_to_the_folder_stays_a_link(models, old):
    link = old.parent / "link"
    link.symlink_to("folder")
    models["A"].save_pretrained(link)
    assert os.readlink(link) == "folder"
    assert_same_model(old, models["A"])


def test_a_hub_like_folder_of_links_gets_files_and_its_blobs_stay(models, old):
    blobs, snapshot = old.parent / "blobs", old.parent / "snapshots" / "0"
    old.rename(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    before = files(blobs)
    models["A"].save_pretrained(snapshot)
    assert files(blobs) == before
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert_same_model(snapshot, models["A"])


def test_a_folder_in_the_place_of_a_file_gives_way(models, tmp_path):
    (tmp_path / "config.json" / "x").mkdir(parents=True)
    models["A"].save_pretrained(tmp_path)
    assert_same_model(tmp_path, models["A"])


def test_files_keep_their_modes_and_new_ones_are_as_readable_as_any(models, old):
    for path in old.iterdir():
        path.chmod(0o640)
    models["A"].save_pretrained(old)
    (old.parent / "any").touch()
    usual = (old.parent / "any").stat().st_mode & 0o777
    expected = {"model.safetensors": usual, "chat_template.jinja": usual}  # there were shards, and a .json
    assert {path.name: path.stat().st_mode & 0o777 for path in old.iterdir()} == {
        path.name: expected.get(path.name, 0o640) for path in old.iterdir()
    }


@pytest.mark.parametrize(
    ("folder", "error"), [("", ValueError), (b"folder", TypeError), (3, TypeError), (None, TypeError)]
)
def test_what_names_no_folder_is_refused(models, tmp_path, monkeypatch, folder, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        models["A"].save_pretrained(folder)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_refused_and_stays(models, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is not a folder"):
        models["A"].save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        models["A"].save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_files_that_grow_no_further_raise_an_os_error_that_names_the_file(models, old):
    """Of all sizes, by the system's own limit: each file in turn is the first that is too long."""
    models["A"].save_pretrained(old.with_name("whole"))
    sizes = {path.stat().st_size for path in old.with_name("whole").iterdir()}
    before = files(old)

    def save_in_too_little():
        named = set()
        for size in sizes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match="File too large") as error:
                models["A"].save_pretrained(old)
            folder, name = os.path.split(error.value.filename)
            assert folder == str(old) and files(old) == before
            named.add(name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return named

    named = result(save_in_too_little)
    assert len(sizes) > 5 and "model.safetensors" in named and "tokenizer.json" in named


@pytest.mark.slow
def test_each_sync_that_fails_leaves_the_old_checkpoint_whole(models, old, monkeypatch):
    before, fsync = files(old), os.fsync
    for number in range(100):
        calls = 0

        def failing(file, number=number):
            nonlocal calls
            calls += 1
            if calls == number + 1:
                raise OSError(errno.EIO, "Input/output error")
            fsync(file)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            models["A"].save_pretrained(old)
        except OSError as error:
            assert error.filename and str(old) in error.filename
            assert files(old) == before
        else:
            break
    monkeypatch.undo()
    assert number > 10
    assert_same_model(old, models["A"])


@pytest.mark.slow
def test_killed_saves_leave_the_old_or_the_new_checkpoint():
    done = run_python("tests.fuzz.kill_while_saving", "--count", 4, "--seed", 0, "--layouts", "crowded")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(int(line.split()[1]) for line in done.stdout.splitlines()) == 4, done.stdout


# --- the mechanism, at every step ---


@pytest.mark.slow
def test_a_kill_or_a_full_disk_at_any_step_leaves_all_old_or_all_new_files():
    command = [sys.executable, "-m", "tests.fuzz.kill_at_every_step", "4"]  # small: it forks a thousand times
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("killed", "full"):
        assert f"{what}, found new" in done.stdout and f"{what}, found old" in done.stdout, done.stdout


def staged(folder, lines, new=(), old=(), journal=None):
    """Makes what a killed save would leave."""
    for part, names in ((NEW, new), (OLD, old)):
        (folder / STAGING / part).mkdir(parents=True)
        for name in names:
            (folder / STAGING / part / name).write_text("staged")
    (folder / STAGING / JOURNAL).write_text(json.dumps(lines) if journal is None else journal)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", ".", "..", STAGING, "a/b", "a\0b", 3, None])
def test_a_journal_reaches_no_file_outside_of_the_folder(old, name):
    (old.parent / "outside").write_text("mine")
    before = files(old)
    staged(old, [[name, None, None]])
    with pytest.raises(ValueError, match=JOURNAL):
        load(old)
    shutil.rmtree(old / STAGING)
    assert files(old) == before and (old.parent / "outside").read_text() == "mine"


LONG = json.dumps([["a" * 5000, None, None]])  # no file system has such names
HALF = '[["\\ud800", null, null]]'


@pytest.mark.parametrize("journal", ["", "{", "[" * 100000, "{}", "[1]", "[[]]", '"x"', '[["a", 1]]', LONG, HALF])
def test_a_journal_that_is_none_is_refused_by_name_and_the_next_save_clears_it_away(models, old, journal):
    staged(old, [], journal=journal)
    with pytest.raises(ValueError, match=JOURNAL):
        load(old)
    models["A"].save_pretrained(old)
    assert_same_model(old, models["A"])
    assert not (old / STAGING).exists()


@pytest.mark.parametrize("name", [LOCK, JOURNAL])
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_what_is_no_file_in_the_staging_folder_is_never_waited_for(models, old, name, kind):
    staged(old, [["config.json", None, None]])
    path = old / STAGING / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**40)
    with contextlib.suppress(ValueError):
        load(old)
    with pytest.raises(OSError, match=LOCK) if (name, kind) == (LOCK, "folder") else contextlib.nullcontext():
        models["A"].save_pretrained(old)
        assert_same_model(old, models["A"])


@pytest.mark.parametrize("part", [".", NEW, OLD, JOURNAL])
def test_links_in_the_place_of_the_staging_folders_are_not_followed(old, part):
    outside = old.parent / "outside"
    outside.mkdir()
    staged(outside, [["config.json", None, [6, 0]]], new=["config.json"])
    (outside / STAGING).rename(outside / "staging")
    before = files(outside)
    if part == ".":
        (old / STAGING).symlink_to(outside / "staging")
    else:
        (old / STAGING).mkdir()
        for name in (NEW, OLD, JOURNAL):
            if name == part:
                (old / STAGING / name).symlink_to(outside / "staging" / name)
            elif name == JOURNAL:
                shutil.copy(outside / "staging" / name, old / STAGING / name)
            else:
                (old / STAGING / name).mkdir()
    with pytest.raises(ValueError, match=STAGING):
        load(old)
    assert files(outside) == before


def test_a_folder_changed_after_a_kill_is_not_completed_over_the_change(old):
    mark = [1, 1]
    staged(old, [["config.json", mark, [6, 2]]], new=["config.json"])
    before = files(old)
    with pytest.raises(ValueError, match=r"config\.json has been changed since"):
        load(old)
    assert files(old) == before


def test_a_killed_save_in_a_folder_that_cannot_be_written_is_said_in_a_sentence(old, monkeypatch):
    staged(old, [["new.json", None, None]])
    refuse = mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    for name in ("unlink", "rename", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(ValueError, match="load the folder once where it can be written"):
        load(old)


def test_what_a_save_killed_before_its_renames_left_does_not_hinder_reading_a_read_only_folder(old, monkeypatch):
    staged(old, [], new=["config.json"])
    (old / STAGING / JOURNAL).unlink()
    expected = load(shutil.copytree(old, old.parent / "copy"))
    assert not (old.parent / "copy" / STAGING).exists()
    refuse = mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    for name in ("unlink", "rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    assert_same_model(old, expected)
    assert refuse.called


# --- side by side ---


def test_a_save_waits_for_another_of_the_same_folder(tmp_path):
    order, inside = [], threading.Event()

    def save(name):
        with replacing(tmp_path, lambda file: True, "config.json") as new:
            order.append(f"{name} in")
            write_file(new / f"{name}.json", b"{}")
            inside.set()
            if name == "first":
                second.start()
                second.join(0.5)
            order.append(f"{name} out")

    second = threading.Thread(target=save, args=["second"])
    save("first")
    second.join()
    assert order == ["first in", "first out", "second in", "second out"]
    assert [path.name for path in tmp_path.iterdir()] == ["second.json"]


def test_a_folder_is_read_as_it_was_while_a_save_is_under_way(models, old, monkeypatch):
    expected, save_weights = load(old), QwenBatchedVL.save_pretrained.__globals__["save_weights"]

    def and_read(*arguments):
        save_weights(*arguments)
        assert_same_model(old, expected)

    monkeypatch.setattr("qwen_batched.qwen_batched_VL_model.save_weights", and_read)
    models["A"].save_pretrained(old)
    assert_same_model(old, models["A"])


@pytest.mark.parametrize("part", ["model", "visual", "decoder"])
def test_a_folder_saved_over_while_it_is_loaded_is_never_a_mixture(models, old, monkeypatch, part):
    from qwen_batched import BatchedDecoder, BatchedVisionTransformer
    from qwen_batched.checkpoint import weights

    reader = {"model": QwenBatchedVL, "visual": BatchedVisionTransformer, "decoder": BatchedDecoder}[part]
    read, saved = weights._read, []

    def and_save(tensor):
        if not saved:
            saved.append(True)
            models["A"].save_pretrained(old)
            models["A"].save_pretrained(old)
            for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
                shutil.copy(old / "model.safetensors", old / shard)  # so that nothing but the values would differ
        return read(tensor)

    monkeypatch.setattr(weights, "_read", and_save)
    with pytest.raises(ValueError, match="saved over while it was loaded"):
        reader.from_pretrained(old, device="cpu")
    assert saved


@pytest.mark.slow
def test_a_process_that_loads_while_another_saves_finds_one_model_whole(models, old):
    models["A"].save_pretrained(old.parent / "A")
    models["B"].save_pretrained(old.parent / "B")
    models["A"].save_pretrained(old)
    saving = os.fork()
    if saving == 0:
        try:
            for name in 8 * "BA":
                models[name].save_pretrained(old)
            os._exit(0)
        finally:
            os._exit(1)
    whole, ended = 0, (0, 0)
    while ended == (0, 0):
        ended = os.waitpid(saving, os.WNOHANG)
        try:
            again = load(old)
        except ValueError as error:
            assert "saved over while it was loaded" in str(error), error
        else:
            name = "A" if again.processor.image.max_pixels == MAX_PIXELS else "B"
            assert all(torch.equal(x, models[name].state_dict()[key]) for key, x in again.state_dict().items())
            whole += 1
    assert whole and ended == (saving, 0)
    assert_same_model(old, models["A"])


def test_without_a_killed_save_recovering_changes_nothing(old):
    before = files(old)
    recover(old)
    assert files(old) == before
