"""The command: features are those of the model on the same batches, whatever was interrupted and whoever shares."""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from qwen_batched import Features
from qwen_batched.extract import main
from qwen_batched.extraction.shards import PartWriter
from qwen_batched.extraction.sources.opening import open_source
from qwen_batched.extraction.sources.source import Run
from qwen_batched.extraction.worker import UNWRITTEN, Worker
from qwen_batched.testing import write_checkpoint
from tests.extraction import logged, written
from tests.extraction.written import TASKS, arguments, contents, write_images
from tests.processes import ROOT, run_python
from tests.support import assert_equal_to

LENGTHS = (7, 5, 9)


def frames_of(lerobot):
    """The data set's frames, as a list of cameras (frames, 3, H, W)."""
    source = open_source(str(lerobot))
    runs = [Run(episode, 0, length) for episode, length in enumerate(LENGTHS)]
    cameras = [torch.stack([torch.tensor(x) for x in source.frames(name, runs)]) for name in source.cameras]
    return [camera.permute(0, 3, 1, 2).contiguous() for camera in cameras]


def test_features_are_bitwise_those_of_the_model_on_the_same_batches(extracted, lerobot, load):
    model, frames = load(), frames_of(lerobot)
    texts = [TASKS[episode % 2] for episode, length in enumerate(LENGTHS) for _ in range(length)]
    stored = {name: load_file(extracted / f"features/{name}/part-00000.safetensors") for name in ("hidden-1", "last")}
    features = [
        load_file(extracted / f"features/image_features/{camera}/part-00000.safetensors")["rows"]
        for camera in ("front", "wrist")
    ]
    assert len(features[0]) == sum(LENGTHS)
    with torch.no_grad():
        for first in range(0, sum(LENGTHS), 4):  # the last batch has one frame
            batch = [camera[first : first + 4] for camera in frames]
            found = model.encode_images(batch)
            for x, y in zip(found, features, strict=True):
                assert torch.equal(x, y[first : first + 4])
            out = model(None, texts[first : first + 4], image_features=found, layers=(1, -1))
            for name, x in zip(("hidden-1", "last"), out.hidden_states, strict=True):
                rows, mask = stored[name]["rows"][first : first + 4], stored[name]["mask"][first : first + 4]
                assert torch.equal(rows[mask], x[out.attention_mask]) and not rows[~mask].any()
        for frame in (0, 6, 20):
            alone = model.encode_images([camera[frame : frame + 1] for camera in frames])
            for x, y in zip(alone, features, strict=True):
                assert_equal_to(y[frame : frame + 1], x)


def test_the_index_has_every_frame_of_every_camera_once_with_its_timestamp(extracted):
    rows = pq.read_table(extracted / "index/part-00000.parquet").to_pylist()
    want = [
        (episode, frame, camera)
        for episode, length in enumerate(LENGTHS)
        for frame in range(length)
        for camera in ("front", "wrist")
    ]
    assert [(row["episode"], row["frame"], row["camera"]) for row in rows] == want
    assert all(abs(row["timestamp"] - row["frame"] / 10) < 1e-6 for row in rows)
    assert [row["row"] for row in rows] == [place // 2 for place in range(len(rows))]
    assert {row["shard"] for row in rows} == {"part-00000.safetensors"}


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_a_family_with_deep_features_keeps_them_and_pools_are_means(lerobot, tmp_path, pool):
    folder = write_checkpoint(tmp_path / "model", "qwen3-vl-tiny")
    out = tmp_path / "out"
    what = ("--what", "image_features", "last", "--cameras", "front", "--resize", "64x96")
    assert main(arguments(lerobot, out, folder, "--pool", pool, "--dtype", "bfloat16", *what)) == 0
    from qwen_batched import QwenBatchedVL

    model = QwenBatchedVL.from_pretrained(folder, dtype="bfloat16", device="cpu").requires_grad_(False)
    images = frames_of(lerobot)[0][:4, None]
    found = model.encode_images(images, resize=(64, 96), deepstack=True)
    out_of_model = model(None, [TASKS[0]] * 4, image_features=found)
    want = [found.main[:, 0], *(deep[:, 0] for deep in found.deep)]
    last = out_of_model.last_hidden_state
    if pool == "mean":
        want = [want[0].float().mean((1, 2)).bfloat16()]
        kept = out_of_model.attention_mask.unsqueeze(-1)
        last = (last.float() * kept).sum(1).div(kept.sum(1)).bfloat16()
    names = ["image_features", *(f"deepstack-{i}" for i in range(len(want) - 1))]
    assert sorted(path.name for path in (out / "features").iterdir()) == sorted([*names, "last"])
    for name, x in zip(names, want, strict=True):
        assert torch.equal(load_file(out / f"features/{name}/front/part-00000.safetensors")["rows"][:4], x)
    stored = load_file(out / "features/last/part-00000.safetensors")["rows"][:4]
    assert torch.equal(stored if pool == "mean" else stored[:, -last.shape[1] :], last)
    assert isinstance(found, Features)


@pytest.fixture(scope="module")
def whole(videos, checkpoint, tmp_path_factory):
    """What an extraction of `videos` writes that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(videos, out, checkpoint, "--shard-frames", 20)) == 0
    found = contents(out)
    assert sum(name.startswith("index/") for name in found) == 16
    return found


def test_verify_compares_rows_and_finds_one_that_was_changed(videos, checkpoint, whole, tmp_path, capsys):
    out = tmp_path / "out"
    for name, data in whole.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    command = arguments(videos, out, checkpoint, "--shard-frames", 20)
    assert main([*command, "--verify", "40"]) == 0
    assert "0 differ" in capsys.readouterr().out
    for part in (out / "features").rglob("*.safetensors"):
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    assert main([*command, "--verify", "40"]) == 1
    assert "differs" in capsys.readouterr().err


def has_claim(out, pid, part="part-*"):
    for claim in (out / "claims").glob(part):
        with contextlib.suppress(FileNotFoundError):  # given back meanwhile
            if f'"pid": {pid},' in claim.read_text():
                return True
    return False


def fork(log, command, prepare=lambda: None, output=os.devnull):
    """The command in a fork of this process, which has no imports to wait for. What it prints goes to `output`."""

    def run():
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        prepare()
        code = logged.run(log, command)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def frames_redone(log):
    """How many were encoded again."""
    return sum((times - 1) * frames for (_, _, frames), times in logged.encoded(log).items())


KILLS, FRAMES, BATCH = 20, 20, 4  # FRAMES of a shard


@pytest.mark.slow
@pytest.mark.parametrize("decoders", [1, 3])
def test_a_kill_costs_less_than_a_shard_and_the_command_then_writes_the_same_bytes(
    videos, checkpoint, whole, tmp_path, decoders
):
    """20 of them at random moments. What is encoded again are the batches that were between encoder and disk."""
    moments, kills, rounds, costs = random.Random(decoders), 0, 0, []
    while kills < KILLS:
        out, log, rounds = tmp_path / f"out{rounds}", tmp_path / f"log{rounds}", rounds + 1
        command = arguments(videos, out, checkpoint, "--shard-frames", FRAMES, "--decoders", decoders)
        marks, code, redone = {}, None, 0
        while code != 0:
            process = fork(log, command)
            while process.exitcode is None and not has_claim(out, process.pid):
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.3))
            if kills < KILLS:
                process.kill()
            process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            now = {file.name: file.stat().st_mtime_ns for file in (out / "index").glob("part-*")}
            assert all(now[name] == mark for name, mark in marks.items())  # what is published stays as it is
            marks = now
            costs.append(frames_redone(log) - redone)
            redone += costs[-1]
        assert contents(out) == whole
        assert len(logged.encoded(log)) == 320 / BATCH
        shutil.rmtree(out)
    assert max(costs) <= min(UNWRITTEN * BATCH, FRAMES), costs


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_a_kill_at_any_step_of_publishing_costs_no_batch_and_leaves_no_file(checkpoint, tmp_path, form):
    """Nor as rows move up into the places of those that were skipped."""
    data = written.write_images(tmp_path / "data", (5, 4))
    for broken in ("scene0/001.png", "scene1/000.png", "scene1/001.png", "scene1/002.png", "scene1/003.png"):
        (data / broken).write_bytes(b"")
    more = (
        "--batch-size",
        2,
        "--on-error",
        "skip",
        *(("--pool", "mean", "--format", form) if form == "parquet" else ()),
    )
    whole = tmp_path / "whole"
    assert main(arguments(data, whole, checkpoint, *more)) == 1
    steps, code, costs = 0, 9, []
    while code == 9:  # until it comes to the end
        out, log, steps = tmp_path / f"out{steps}", tmp_path / f"log{steps}", steps + 1
        command = arguments(data, out, checkpoint, *more)
        process = fork(log, command, functools.partial(die_at, steps))
        process.join()
        code = process.exitcode
        assert logged.run(log, command) == 1 and contents(out) == contents(whole)
        costs.append(frames_redone(log))
    assert code == 1 and steps > 15 and not any(costs), costs


@pytest.mark.slow
def test_drafts_that_lost_something_are_not_taken_over(videos, checkpoint, tmp_path):
    """As those of a machine that lost power: what its journal says was written is not there, or is not what was."""
    more = ("--shard-frames", FRAMES, "--decoders", 1, "--limit", 2 * FRAMES)
    assert main(arguments(videos, tmp_path / "whole", checkpoint, *more)) == 0
    whole = contents(tmp_path / "whole")
    command = arguments(videos, tmp_path / "out", checkpoint, *more)
    process = fork(tmp_path / "log", command, functools.partial(die_at, 1))  # all of the first part is in its drafts
    process.join()
    assert process.exitcode == 9
    for number, damage in enumerate(DAMAGE):
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        shutil.copytree(tmp_path / "out", out)
        drafts = sorted((out / "features").rglob(".part-00000.safetensors.*"))
        (journal,) = (out / "index").glob(".part-00000.jsonl.*")
        entries = len(journal.read_text().splitlines())
        assert len(drafts) == 2 and entries == FRAMES / BATCH
        again = DAMAGE[damage](drafts[1], journal)
        command[1] = str(out)
        assert logged.run(log, command) == 0 and contents(out) == whole, damage
        assert sum(part == "part-00000" for part, _, _ in logged.encoded(log)) == again, damage


def change(path, place, data):
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        file.write(data)


# What is damaged, and how many of 5 batches must be encoded again for it.
DAMAGE = {
    "nothing": lambda draft, journal: 0,
    "the last batch of a draft is gone": lambda draft, journal: os.truncate(draft, draft.stat().st_size - 1) or 1,
    "it is other": lambda draft, journal: change(draft, -1, b"\x55") or 1,
    "a draft is gone": lambda draft, journal: draft.unlink() or 5,
    "a draft is empty": lambda draft, journal: os.truncate(draft, 0) or 5,
    "the journal is gone": lambda draft, journal: journal.unlink() or 5,
    "the journal is cut": lambda draft, journal: os.truncate(journal, journal.stat().st_size - 1) or 1,
    "the journal has holes": lambda draft, journal: change(journal, 10, bytes(20)) or 5,
}


@pytest.mark.slow
def test_a_process_that_stood_still_and_goes_on_beside_who_took_its_parts_changes_nothing(
    videos, checkpoint, whole, tmp_path
):
    for number in range(4):
        out = tmp_path / f"out{number}"
        command = arguments(videos, out, checkpoint, "--shard-frames", FRAMES, "--claim-expiry", 1)
        first = fork(tmp_path / "log", command)
        while first.exitcode is None and not has_claim(out, first.pid):
            time.sleep(0.002)
        time.sleep(0.05 * number)
        os.kill(first.pid, signal.SIGSTOP)
        second, patience = fork(tmp_path / "log", command), time.monotonic() + 5
        while second.exitcode is None and not has_claim(out, second.pid) and time.monotonic() < patience:
            time.sleep(0.002)  # for good, if the first stands still with the lock on claims
        time.sleep(0.9 + 0.2 * number)  # its claims expire meanwhile
        os.kill(first.pid, signal.SIGCONT)
        for process in (first, second):
            process.join()
            assert process.exitcode == 0
        assert contents(out) == whole


@pytest.mark.slow
def test_a_process_that_stood_still_before_it_took_a_part_over_leaves_it_to_who_did_meanwhile(
    videos, checkpoint, whole, tmp_path
):
    """What another process is writing by then is not what a killed one has left."""
    out, begun = tmp_path / "out", tmp_path / "begun"
    command = arguments(videos, out, checkpoint, "--shard-frames", FRAMES, "--claim-expiry", 1)
    with contextlib.ExitStack() as stack:
        first = fork(tmp_path / "log", command, functools.partial(stand_still_before_taking_over, begun))
        stack.callback(first.kill)  # or this one would wait for it, whatever fails
        wait_for(lambda: has_claim(out, first.pid) and state_of(first) == "T")
        (claim,) = (out / "claims").glob("part-*")
        (draft,) = drafts_of_part(out, claim.name)
        second = fork(tmp_path / "log", command, functools.partial(finish_behind, begun))
        stack.callback(second.kill)
        wait_for(lambda: has_claim(out, second.pid, claim.name) and {draft}.isdisjoint(drafts_of_part(out, claim.name)))
        os.kill(first.pid, signal.SIGCONT)
        for process in (first, second):
            process.join()
            assert process.exitcode == 0
    assert contents(out) == whole


def wait_for(condition, patience=60):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def state_of(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0]


def drafts_of_part(out, name):
    """Of its first stream: one of each process that has begun it."""
    return [*(out / "features/image_features/front").glob(f".{name}.*")]


def stand_still_before_taking_over(begun):
    """Stops the process once, with a claim, before it looks at what others have left; `begun` is made thereafter."""
    take_over, begin = PartWriter.take_over, Worker._begin

    def stopped(writer, *given):
        if not begun.exists():
            os.kill(os.getpid(), signal.SIGSTOP)
        return take_over(writer, *given)

    def told(worker, part):
        begin(worker, part)
        begun.touch()

    PartWriter.take_over, Worker._begin = stopped, told


def finish_behind(begun):
    """Parts are finished once `begun` is there."""
    finish = PartWriter.finish

    def later(writer):
        wait_for(begun.exists)
        finish(writer)

    PartWriter.finish = later


def die_at(steps):
    """Ends the process before this one of the steps by which its part is published."""
    left = [steps]

    def counted(function):
        def step(*given, **options):
            if threading.current_thread().name.startswith("publisher"):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
            return function(*given, **options)

        return step

    for name in ("replace", "fsync", "truncate", "pread", "unlink", "pwrite", "close"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.slow
def test_two_commands_at_once_share_the_work_and_end_together(videos, checkpoint, whole, tmp_path):
    command = arguments(videos, tmp_path / "out", checkpoint, "--shard-frames", 20, "--decoders", 1)
    both = [fork(tmp_path / "log", command, output=tmp_path / f"printed{i}") for i in range(2)]
    for process in both:
        process.join(timeout=200)
    texts = [(tmp_path / f"printed{i}").read_text() for i in range(2)]
    assert [process.exitcode for process in both] == [0, 0], texts
    images = [int(text.split("in this run ")[1].split()[0]) for text in texts]
    assert sum(images) == 640, images  # each frame of each camera was computed once
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_processes_of_one_command_one_killed_and_of_torchrun_write_the_same_bytes(videos, checkpoint, whole, tmp_path):
    command = arguments(videos, tmp_path / "local", checkpoint, "--shard-frames", 20, "--gpus", 2, "--decoders", 1)
    process = fork(tmp_path / "log", command, output=tmp_path / "printed")
    holder = None
    while holder is None:  # a worker dies as it works
        with contextlib.suppress(FileNotFoundError):  # given back meanwhile
            claims = [claim.read_text() for claim in (tmp_path / "local/claims").glob("part-*")]
            holder = next((json.loads(claim)["pid"] for claim in claims if claim.endswith("}")), None)
        assert process.exitcode is None
        time.sleep(0.002)
    os.kill(holder, signal.SIGKILL)
    process.join(timeout=200)
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 0 and "died with exit code -9; the others take its part" in printed, printed
    assert contents(tmp_path / "local") == whole
    command = arguments(videos, tmp_path / "ranks", checkpoint, "--shard-frames", 20, "--engine", "torchrun")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = [*launch, "-m", "qwen_batched.extract", *command]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "ranks") == whole


BOTH = """
import json, os, sys
import ray
from qwen_batched.extract import main
shutdown, calls = ray.shutdown, []
ray.shutdown = lambda: calls.append(ray.is_initialized())
codes = [main(command) for command in json.loads(sys.argv[1])]
shutdown()
print(codes, calls)
"""


@pytest.mark.slow
def test_actors_of_ray_write_the_same_bytes(videos, checkpoint, whole, tmp_path):
    """In Ray of the command's own, which it ends; and in one that there is, which it leaves to others."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray")
    data = write_images(tmp_path / "data", (3, 3))
    (data / "scene1/001.png").write_bytes(b"nothing")
    commands = [
        arguments(videos, tmp_path / "out", checkpoint, "--shard-frames", 20, "--engine", "ray", "--gpus", 2),
        arguments(data, tmp_path / "other", checkpoint, "--shard-frames", 3, "--engine", "ray", "--gpus", 1),
    ]
    (tmp_path / "both_commands.py").write_text(BOTH)  # the second finds what the first has started
    done = run_python(tmp_path / "both_commands.py", json.dumps(commands))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[0, 1] [True]", done.stdout + done.stderr
    assert contents(tmp_path / "out") == whole
    assert json.loads((tmp_path / "out/manifest.json").read_text())["threads"] == 1
    assert "Traceback" not in done.stderr
    assert f"frame 1: {data / 'scene1/001.png'}" in done.stderr.splitlines()[-1]
