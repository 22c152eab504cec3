"""Bad input and bad luck: a sentence each, exit code 2 before any work and 1 where work is missing; nothing is lost."""

import errno
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_batched.extract import main
from qwen_batched.extraction import FeatureDataset, shards
from qwen_batched.extraction.claims import Claims
from qwen_batched.extraction.syncing import check_renames
from qwen_batched.extraction.work import Part, cut, segments, work_list
from tests.extraction import written
from tests.extraction.test_extraction import LENGTHS
from tests.extraction.written import arguments, contents

WRONG = {
    "an unknown camera": (["--cameras", "head"], "front, wrist"),
    "what": (["--what", "everything"], "image_features, hidden:N or last"),
    "a layer by two names": (["--what", "hidden:1", "hidden:01"], "hidden:N"),
    "a layer": (["--what", "hidden:99"], "layer from 0 to"),
    "what twice": (["--what", "last", "last"], "different"),
    "pool": (["--pool", "max"], "none, mean"),
    "dtype": (["--dtype", "int8"], "bfloat16"),
    "resize": (["--resize", "big"], "HEIGHTxWIDTH"),
    "a size that the model does not take": (["--resize", "30x30"], "28"),
    "batch size": (["--batch-size", "0"], "batch_size"),
    "no number": (["--batch-size", "many"], "invalid int"),
    "gpus": (["--gpus", "0"], "gpus"),
    "engine": (["--engine", "cluster"], "local"),
    "torchrun": (["--engine", "torchrun"], "torchrun"),
    "an option": (["--fast"], "--fast"),
    "template": (["--what", "last", "--template", "{nothing}"], "template"),
    "a device without memory": (["--device", "meta"], "with memory"),
    "on error": (["--on-error", "pray"], "stop, skip"),
    "model": (["--model", "nowhere/at/all"], "nowhere"),
    "format": (["--format", "npy"], "safetensors, parquet"),
    "parquet of maps": (["--format", "parquet"], "pool must be mean, got none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_a_line_and_nothing_is_written(name, lerobot, checkpoint, tmp_path, capsys):
    more, word = WRONG[name]
    try:
        code = main(arguments(lerobot, tmp_path / "out", checkpoint, *more))
    except SystemExit as ended:
        code = ended.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and word in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_extraction_or_of_other_things_is_refused(lerobot, checkpoint, extracted, tmp_path, capsys):
    def refused(out, *more):
        code = main(arguments(lerobot, out, checkpoint, *more))
        return code == 2, capsys.readouterr().err

    before = contents(extracted)
    what = ("--what", "image_features", "hidden:1", "last")
    for more, word in (
        ((), "what"),
        ((*what, "--resize", "56x56"), "resize"),
        ((*what, "--batch-size", 5), "batch_size"),
        ((*what, "--dtype", "bfloat16"), "dtype"),
        ((*what, "--limit", 3), "limit"),
        ((*what, "--cameras", "front"), "data"),
        ((*what, "--pool", "mean", "--format", "parquet"), "pool"),
    ):
        is_refused, line = refused(extracted, *more)
        assert is_refused and f"its {word}" in line and "another folder" in line, line
    assert main(arguments(lerobot, extracted, checkpoint, *what)) == 0  # nothing is left to do
    assert contents(extracted) == before
    (tmp_path / "holiday.jpg").write_text("")
    capsys.readouterr()
    is_refused, line = refused(tmp_path)
    assert is_refused and f"an extraction's folder, got {tmp_path} with holiday.jpg" in line
    is_refused, line = refused("s3://bucket/out")
    assert is_refused and "renamed and synced, got s3:" in line


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_checkpoint_without_whole_weights_is_refused_before_the_folder_is_made(
    damage, lerobot, checkpoint, tmp_path, capsys
):
    """Else the folder would be that of a checkpoint that was being downloaded, and refuse the whole one."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    weights = model / "model.safetensors"
    weights.unlink() if damage == "gone" else os.truncate(weights, weights.stat().st_size - 1000)
    assert main(arguments(lerobot, tmp_path / "out", model)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_out_inside_of_a_data_set_that_is_looked_through_is_refused(lerobot, checkpoint, tmp_path, capsys):
    """Its index/ would be taken for a data set of tables the next time."""
    data = written.write_images(tmp_path / "data", (2,))
    (tmp_path / "link").symlink_to(data)
    for out in (data / "out", data, tmp_path / "link/out"):
        assert main(arguments(data, out, checkpoint)) == 2
        assert "OUT must not be inside of the data set" in capsys.readouterr().err
    assert os.listdir(data) == ["scene0"]
    shutil.copytree(lerobot, tmp_path / "lerobot")  # of which only meta/, data/ and videos/ are looked at
    command = arguments(tmp_path / "lerobot", tmp_path / "lerobot/features", checkpoint, "--limit", 1)
    assert main(command) == main(command) == 0


def test_repaired_data_are_another_data_set(checkpoint, tmp_path, capsys):
    data, out = written.write_images(tmp_path / "data", (2, 2)), tmp_path / "out"
    image = (data / "scene1/001.png").read_bytes()
    (data / "scene1/001.png").write_bytes(image[:60])
    command = arguments(data, out, checkpoint, "--on-error", "skip")
    assert main(command) == 1 and "repaired data need a new folder" in capsys.readouterr().err
    (data / "scene1/001.png").write_bytes(image)
    assert main(command) == 2 and "its data.sha256 is" in capsys.readouterr().err


def test_hidden_states_need_a_text(tmp_path, checkpoint, capsys):
    data = written.write_images(tmp_path / "data", (2,))
    assert main(arguments(data, tmp_path / "out", checkpoint, "--what", "last")) == 2
    assert "say --text" in capsys.readouterr().err
    assert main(arguments(data, tmp_path / "out", checkpoint, "--what", "last", "--text", "What is this?")) == 0
    assert FeatureDataset(tmp_path / "out")[1]["episode"] == "scene0"


def damage_video(lerobot, root, keep=0.4):
    shutil.copytree(lerobot, root)
    video = root / "videos/observation.images.front/chunk-000/file-000.mp4"
    data = video.read_bytes()
    place = data.index(b"mdat") + 4
    video.write_bytes(data[: int(place + (len(data) - place) * keep)] if keep else b"nothing")
    return video


def test_a_broken_video_is_named_and_stopped_at_or_skipped_and_counted(lerobot, checkpoint, tmp_path, capsys):
    video = damage_video(lerobot, tmp_path / "data", keep=0)
    out, skipping = tmp_path / "out", tmp_path / "skipping"
    rest = ("--shard-frames", 9, "--cameras", "front", "wrist")
    assert main(arguments(tmp_path / "data", out, checkpoint, *rest)) in (1, 2)
    err = capsys.readouterr().err
    assert str(video) in err and not list((out / "index").glob("*"))
    assert not [file for file in out.rglob(".*") if file.is_file()]
    assert main(arguments(tmp_path / "data", skipping, checkpoint, *rest, "--on-error", "skip")) == 1
    err = capsys.readouterr().err
    assert "12 skipped" in err and str(video) in err
    data = FeatureDataset(skipping)
    assert [(data[i]["episode"], data[i]["frame"]) for i in range(len(data))] == [(2, i) for i in range(9)]
    assert main(arguments(tmp_path / "data", skipping, checkpoint, *rest, "--on-error", "skip", "--verify")) == 0


def test_a_command_that_stopped_at_a_broken_frame_goes_on_without_it(checkpoint, tmp_path, capsys):
    data, out = written.write_images(tmp_path / "data", (3, 3)), tmp_path / "out"
    broken = data / "scene1/001.png"
    image = broken.read_bytes()
    broken.write_bytes(image[:20])
    command = arguments(data, out, checkpoint, "--shard-frames", 3, "--decoders", 1)
    assert main(command) == 1
    first = {name: x for name, x in contents(out).items() if "part-00000" in name}
    assert str(broken) in capsys.readouterr().err and len(first) == 2
    assert main([*command, "--on-error", "skip"]) == 1
    assert "1 skipped" in capsys.readouterr().err
    assert [contents(out)[name] for name in first] == [*first.values()]
    found = FeatureDataset(out)
    assert [(found[i]["episode"], found[i]["frame"]) for i in (3, 4)] == [("scene1", 0), ("scene1", 2)] and len(
        found
    ) == 5


def test_verify_takes_skipped_frames_as_they_are_and_names_those_that_are_lost(checkpoint, tmp_path, capsys):
    data, out = written.write_images(tmp_path / "data", (3, 3)), tmp_path / "out"
    image = (data / "scene1/002.png").read_bytes()
    (data / "scene1/001.png").write_bytes(b"nothing")
    command = arguments(data, out, checkpoint)
    assert main([*command, "--on-error", "skip"]) == 1
    assert main([*command, "--verify", "40"]) == 0
    assert "5 rows computed again, 0 differ" in capsys.readouterr().out
    (data / "scene1/002.png").write_bytes(bytes(len(image)))
    assert main([*command, "--verify", "40"]) == 1
    assert "episode scene1, frame 2 cannot be read now" in capsys.readouterr().err


def test_a_shard_that_is_gone_or_cut_short_is_written_again(checkpoint, tmp_path):
    """Its index says that it is done."""
    out = tmp_path / "out"
    command = arguments(written.write_images(tmp_path / "data"), out, checkpoint, "--shard-frames", 2)
    assert main(command) == 0
    before = contents(out)
    shards = sorted((out / "features").rglob("*.safetensors"))
    assert len(shards) == 3
    for damage in (
        lambda: shards[0].unlink(),
        lambda: os.truncate(shards[1], 1000),
        lambda: os.truncate(shards[2], 0),
        lambda: shards[0].write_bytes(b"\xff" * 500),
        lambda: shards[1].write_bytes(shards[1].read_bytes() + b"\0"),
        lambda: [file.unlink() for file in (out / "index").iterdir()],
        lambda: [os.truncate(file, size) for size, file in enumerate(sorted((out / "index").iterdir()))],
        lambda: [os.truncate(file, 100) for file in (out / "index").iterdir()],
    ):
        damage()
        assert main(command) == 0
        assert contents(out) == before


def test_frames_that_are_skipped_close_up_and_the_others_stay_as_they_are(lerobot, checkpoint, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(lerobot, root)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    images = table["observation.images.wrist"].to_pylist()
    small = written.png(written.frame(0, 0, 1, (56, 84)))
    images[2], images[9] = {"bytes": b"no image", "path": None}, {"bytes": small, "path": None}
    place = table.column_names.index("observation.images.wrist")
    kind = table.schema.field(place).type
    pq.write_table(table.set_column(place, "observation.images.wrist", pa.array(images, kind)), path)
    command = arguments(root, tmp_path / "out", checkpoint, "--what", "image_features", "last", "--batch-size", 1)
    assert main([*command, "--on-error", "skip"]) == 1
    err = capsys.readouterr().err
    assert "episode 0, frame 2" in err and "episode 1, frame 2" in err and "is of 56x84" in err and "2 skipped" in err
    found, whole = FeatureDataset(tmp_path / "out"), tmp_path / "whole"
    assert len(found) == sum(LENGTHS) - 2
    assert main(arguments(lerobot, whole, checkpoint, "--what", "image_features", "last", "--batch-size", 1)) == 0
    reference = FeatureDataset(whole)
    for index in range(len(found)):
        item = found[index]
        other = reference[reference.position(item["episode"], item["frame"])]
        assert all((x == y).all() for x, y in zip(item["image_features"], other["image_features"], strict=True))
        assert (item["last"] == other["last"]).all() and (item["last.mask"] == other["last.mask"]).all()
    assert main([*command, "--on-error", "skip", "--verify", "40"]) == 0


def test_a_full_disk_loses_nothing_and_the_command_goes_on(lerobot, checkpoint, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = arguments(lerobot, out, checkpoint, "--shard-frames", 5)
    assert main(arguments(lerobot, whole, checkpoint, "--shard-frames", 5)) == 0
    write, room = shards._write_at, [9]

    def with_little_room(file, data, place):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data, place)

    monkeypatch.setattr(shards, "_write_at", with_little_room)
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "part-0" in err and "the same command goes on" in err
    assert not [file for file in out.rglob(".*") if file.is_file()]
    assert not list((out / "claims").glob("part-*"))
    monkeypatch.setattr(shards, "_write_at", write)
    assert main(command) == 0
    assert contents(out) == contents(whole)


def test_a_file_system_without_renames_is_refused(tmp_path, monkeypatch):
    check_renames(tmp_path)
    assert not os.listdir(tmp_path)

    def no_rename(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(ValueError, match="renames files"):
        check_renames(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_dry_run_says_frames_and_bytes_and_writes_nothing(lerobot, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = arguments(lerobot, out, checkpoint, "--resize", "56x56", "--dry-run", "--images-per-second", 2)
    assert main(command) == 0
    width = json.loads((checkpoint / "config.json").read_text())["vision_config"]["out_hidden_size"]
    said = capsys.readouterr().out
    assert "21 frames in 3 episodes" in said and f"{21 * 2 * 4 * width * 4} bytes" in said
    assert f"{42 / 2 / 3600:.3f} CPU hours at 2.0" in said and not out.exists()


def test_images_of_several_sizes_and_damaged_ones_are_named(checkpoint, tmp_path, capsys):
    data = written.write_images(tmp_path / "data", (3, 2))
    Image.new("RGB", (56, 56)).save(data / "scene1/000.png")
    (data / "scene1/001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(arguments(data, tmp_path / "out", checkpoint)) == 1
    assert "is of 56x56" in capsys.readouterr().err
    assert main(arguments(data, tmp_path / "skipping", checkpoint, "--on-error", "skip")) == 1
    err = capsys.readouterr().err
    assert "001.png" in err and "2 skipped" in err and len(FeatureDataset(tmp_path / "skipping")) == 3


# --- the work list, claims ---


def test_the_work_list_has_every_frame_once_and_splits_no_episode_that_fits():
    lengths = [3, 4, 9, 25, 1, 1, 10, 2]
    episodes = [[name, length] for name, length in enumerate(lengths)]
    parts = work_list({"frames_of_a_shard": 10, "data": {"episodes": episodes}})
    found = [(run.episode, i) for part in parts for run in part.runs for i in range(run.start, run.stop)]
    assert found == [(episode, i) for episode, length in enumerate(lengths) for i in range(length)]
    assert all(0 < part.frames <= 10 for part in parts) and [part.number for part in parts] == list(range(len(parts)))
    for episode, length in enumerate(lengths):
        holders = [part.number for part in parts if any(run.episode == episode for run in part.runs)]
        assert len(holders) == (1 if length <= 10 else 3)
    part = Part(0, parts[0].runs)
    assert cut(part.runs, 2, 5) == [(0, 2, 3), (1, 0, 2)]
    assert [bounds for bounds in segments(Part(0, ((0, 0, 1000),) and parts[3].runs), 4)][-1][1] == parts[3].frames


def test_a_claim_is_anothers_until_it_expires_or_its_process_is_dead(tmp_path):
    first, second = Claims(tmp_path, 60), Claims(tmp_path, 60)
    assert first.take(["a", "b"], lambda _: False) == "a" and second.take(["a", "b"], lambda _: False) == "b"
    assert second.take(["a", "b"], lambda _: False) is None and first.take(["c"], lambda _: True) is None
    path = tmp_path / "claims/a"
    os.utime(path, (1, 1))
    assert second.take(["a"], lambda _: False) == "a" and second.is_mine("a") and not first.is_mine("a")
    os.utime(path, (1, 1))
    first.renew()  # of what is no longer its own
    assert path.stat().st_mtime == 1
    second.renew()
    assert path.stat().st_mtime > 1
    first.release("a")
    assert path.exists()
    path.write_text(json.dumps(second.owner | {"pid": 2**22 + 1}))  # above every process id
    assert first.take(["a"], lambda _: False) == "a"
    second.release_all()
    first.release_all()
    assert os.listdir(tmp_path / "claims") == ["lock"]
