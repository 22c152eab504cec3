"""The extraction as a command: kills, many frames, and the rate beside `encode_images`' own.

    python benchmarks/extraction.py kills [--kills 20]               # on a CPU
    python benchmarks/extraction.py frames [--frames 100000]         # on a CPU
    python benchmarks/extraction.py rate [--model FOLDER] [--frames 20000] [--gpus 4] [--folder DISK] [--data FOLDER]
    python benchmarks/extraction.py --smoke                          # all three, tiny, on the CPU

Data sets are LeRobot v3 folders that are written here, with two cameras. The last line is JSON.

kills: SIGKILL at random moments, then the same command, until so many kills; what it wrote is compared with what an
undisturbed one writes, and no shard may change its time of modification once it is indexed. Redone is what is encoded
again: less than a shard after each kill.
frames: memory of the process at each tenth of the way, and the time of reading a frame at random, warm.
rate: images a second from h264 and AV1, pooled and not, beside `encode_images` on frames in memory, and the disk's own
rate; memory of the GPU at each tenth of the time. The rate is that of the progress bar between a fifth and 95% of the
frames; beside it stands the whole command's, which loads the model first.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import runs
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.extract import main as extract
from qwen_batched.extraction import FeatureDataset
from qwen_batched.extraction.encoding import Encoder
from qwen_batched.extraction.manifest import read_manifest
from tests.extraction import logged, written

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("kills", "frames", "rate")
BESIDE = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
ENVIRONMENT = {**BESIDE, "OMP_NUM_THREADS": "1"}  # of many small commands
SHARD = 20  # frames, where commands are killed
RATIO, SCALING, READ_MS = 0.95, 3.8, 2.0  # what must be reached


def kills(folder: Path, model: str, count: int, episodes: int) -> dict[str, object]:
    """Kills a command `count` times, as often anew as it takes."""
    sizes, kinds = ((28, 56), (28, 56)), ("video", "video")
    data = written.write_v3(folder / "data", (40,) * episodes, kinds, sizes)
    command = written.arguments(data, folder / "whole", model, "--shard-frames", SHARD, "--decoders", 1)
    assert extract(command) == 0
    whole, moments, done, rounds = written.contents(folder / "whole"), random.Random(1), 0, 0
    costs: list[tuple[int, int]] = []  # frames that were encoded again after a kill, and of how many shards
    wrong: list[str] = []
    while done < count:
        out, log, rounds = folder / f"out{rounds}", folder / f"log{rounds}", rounds + 1
        command[1] = str(out)
        marks: dict[str, int] = {}
        while True:
            before = logged.encoded(log)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.extraction.logged", str(log), *command],
                env=ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while process.poll() is None and not _has_claim(out, process.pid):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.5))
            if done < count:
                process.send_signal(signal.SIGKILL)
            process.wait()
            now = {file.name: file.stat().st_mtime_ns for file in (out / "index").glob("part-*")}
            wrong += [f"{name} was done twice" for name, mark in marks.items() if now.get(name) != mark]
            marks = now
            again = [batch for batch in logged.encoded(log) - before if batch in before]
            if before:
                costs.append((sum(frames for _, _, frames in again), len({part for part, _, _ in again})))
            if process.returncode == 0:
                break
            done += 1
        if written.contents(out) != whole:
            wrong.append(f"round {rounds} wrote other bytes")
        shutil.rmtree(out)
    most = max(frames for frames, _ in costs)
    if most > SHARD:
        wrong.append(f"{most} frames were encoded again after a kill, more than a shard's {SHARD}")
    return {
        "kills": done,
        "rounds": rounds,
        "frames_of_a_shard": SHARD,
        "frames_redone": sum(frames for frames, _ in costs),
        "most_frames_at_a_kill": most,
        "most_shards_that_they_are_of": max(parts for _, parts in costs),
        "wrong": wrong,
    }


def _has_claim(out: Path, pid: int) -> bool:
    return any(_is_of(claim, pid) for claim in (out / "claims").glob("part-*"))


def _is_of(claim: Path, pid: int) -> bool:
    try:
        return f'"pid": {pid},' in claim.read_text()
    except FileNotFoundError:  # given back meanwhile
        return False


def frames(folder: Path, model: str, count: int) -> dict[str, object]:
    """Extracts `count` frames of tiny images, watches memory, and reads at random."""
    episode = min(1000, count // 4)
    data = written.write_v3(
        folder / "data", (episode,) * (count // episode), ("video", "video"), ((28, 56), (28, 56)), files=1
    )
    command = written.arguments(data, folder / "out", model, "--batch-size", 64)
    started = time.perf_counter()
    memory = {}

    def look(pid: int, done: int | None, total: int | None) -> None:
        status = "" if done is None else Path(f"/proc/{pid}/status").read_text()
        if rss := re.search(r"VmRSS:\s+(\d+)", status):
            memory[done * 10 // count] = round(int(rss[1]) / 1024)

    _watch(command, folder, ENVIRONMENT, look, every=0.2)
    seconds = time.perf_counter() - started
    cache, picks, times = FeatureDataset(folder / "out"), random.Random(0), []
    places = [picks.randrange(len(cache)) for _ in range(2000)]
    for _ in range(2):  # the second is warm
        times = []
        for place in places:
            before = time.perf_counter()
            cache[place]
            times.append(1000 * (time.perf_counter() - before))
    times.sort()
    read = {"median_ms": times[1000], "p99_ms": times[1980], "most_ms": times[-1]}
    wrong = [] if len(cache) == count else [f"{len(cache)} frames of {count}"]
    shutil.rmtree(folder / "out")
    return {"frames": count, "seconds": seconds, "memory_mib": memory, "read": read, "wrong": wrong}


def rate(
    folder: Path,
    data_folder: Path,
    model: str,
    count: int,
    size: tuple[int, int],
    device: str,
    gpus: int,
    codecs: Sequence[str],
) -> dict[str, object]:
    """Images a second of the command, beside the encoder's own; data sets that are there are taken."""
    found: dict[str, object] = {"wrong": []}
    side = "x".join(map(str, size))
    for codec in codecs:
        data = data_folder / codec
        if not data.exists():
            written.write_v3(data, (count // 8,) * 4, ("video", "video"), (size, size), codec, files=1)
        for pool in ("mean", "none"):
            command = [str(data), str(folder / "out"), "--model", model, "--pool", pool, "--resize", side]
            command += ["--device", device.partition(":")[0], "--dtype", "auto", "--batch-size", "32"]
            for processes in (1, gpus) if gpus > 1 and pool == "mean" else (1,):
                torch.cuda.empty_cache()
                shutil.rmtree(folder / "out", ignore_errors=True)
                name = f"{codec}_{pool}_{processes}"
                text, steady, found[f"{name}_memory_mib"] = _run([*command, "--gpus", str(processes)], folder, device)
                whole = found[f"{name}_with_loading"] = float(re.search(r", ([\d.]+) a second", text)[1])
                images = found[name] = 2 * steady
                measure.note(
                    f"{codec}, pool {pool}, {processes} processes: {images:.1f} images a second, "
                    f"{whole:.1f} with loading"
                )
    manifest = read_manifest(folder / "out")
    encoder = Encoder(QwenBatchedVL.from_pretrained(model, device=device).requires_grad_(False), manifest)
    images = torch.randint(0, 256, (32, 2, 3, *size), dtype=torch.uint8)
    images = images.pin_memory() if device != "cpu" else images
    for repeats in (3, 20 if device != "cpu" else 1):
        measure.synchronize(torch.device(device))
        started = time.perf_counter()
        for _ in range(repeats):
            encoder.model.encode_images(images, resize=size)
        measure.synchronize(torch.device(device))
        found["encode_images"] = repeats * 64 / (time.perf_counter() - started)
    found["disk_mb_s"] = _disk_rate(folder)
    return found


def _run(arguments: list[str], folder: Path, device: str) -> tuple[str, float, list[int]]:
    """What the command prints, its frames a second, and the first GPU's memory in use at each tenth of the time."""
    used, progress = [], []

    def look(_: int, done: int | None, total: int | None) -> None:
        if device != "cpu":
            free, there = torch.cuda.mem_get_info()
            used.append((there - free) // 2**20)
        if done is not None and 0.2 <= done / total <= 0.95 and (not progress or progress[-1][1] != done):
            progress.append((time.perf_counter(), done))

    text = _watch(arguments, folder, BESIDE, look, every=0.1)
    steady = statistics.linear_regression(*zip(*progress, strict=True)).slope if len(progress) > 1 else math.nan
    return text, steady, [used[len(used) * i // 10] for i in range(10)] if used else []


def _watch(
    arguments: Sequence[object],
    folder: Path,
    environment: Mapping[str, str],
    look: Callable[[int, int | None, int | None], None],
    every: float,
) -> str:
    """Runs the command and returns what it prints; its progress bar goes to a file.

    Every so many seconds `look` is called with its process id, the frames done and all frames, None before the bar.
    """
    bar = folder / "bar"
    with bar.open("w") as shown:
        process = subprocess.Popen(
            [sys.executable, "-m", "qwen_batched.extract", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=shown,
            text=True,
        )
        while process.poll() is None:
            steps = re.findall(r"(\d+)/(\d+) \[", bar.read_text()[-400:])
            look(process.pid, *(map(int, steps[-1]) if steps else (None, None)))
            time.sleep(every)
    text = process.stdout.read()
    assert process.returncode == 0, (arguments, bar.read_text()[-2000:])
    return text


def _disk_rate(folder: Path, megabytes: int = 512) -> float:
    data, path = os.urandom(2**20), folder / "disk"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return megabytes * 2**20 / 1e6 / seconds


def main() -> int:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="*", metavar="PART", help="kills, frames or rate")
    add("--model", help="of rate; random weights of the 3B model by default")
    add("--kills", type=int, default=20)
    add("--frames", type=int)
    add("--gpus", type=int, default=1)
    add("--folder", type=Path, help="where data and features go; a temporary folder by default")
    add("--data", type=Path, help="where data sets of rate are, or are written and stay; in --folder by default")
    add("--codecs", nargs="+", choices=sorted(written.CODECS), default=[*written.CODECS], help="of rate")
    add("--commit")
    add("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        print("SMOKE RUN: tiny shapes on the CPU. It tests the benchmark; its numbers mean nothing.")
    asked = options.part or list(PARTS if options.smoke else PARTS[:2])
    device = torch.device("cpu" if options.smoke or "rate" not in asked else "cuda")
    report = measure.environment("extraction", device, options.commit) | {"smoke": options.smoke}
    goals, wrong = [], []
    with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        tiny = str(runs.written(folder / "tiny", "tiny", torch.float32))
        if "kills" in asked:
            report["kills"] = kills(
                folder / "kills", tiny, 2 if options.smoke else options.kills, 4 if options.smoke else 8
            )
        if "frames" in asked:
            report["frames"] = frames(folder / "frames", tiny, 400 if options.smoke else options.frames or 100_000)
            read = report["frames"]["read"]["median_ms"]
            goals.append(measure.Goal("random read of a frame, warm", read, READ_MS, None, "ms", at_least=False))
        if "rate" in asked:
            model = tiny if options.smoke else options.model or str(runs.written(folder / "3b", runs.PRESET))
            size = (28, 56) if options.smoke else (448, 448)
            count = 64 if options.smoke else options.frames or 20_000
            (folder / "rate").mkdir()
            data = options.data or folder / "rate"
            codecs = [codec for codec in options.codecs if written.has_encoder(codec)]
            found = report["rate"] = rate(folder / "rate", data, model, count, size, str(device), options.gpus, codecs)
            for codec in codecs:
                ratio = found[f"{codec}_mean_1"] / found["encode_images"]
                goals.append(measure.Goal(f"{codec}, pooled, of encode_images", ratio, RATIO, None, "x", at_least=True))
                if options.gpus > 1 and f"{codec}_mean_{options.gpus}" in found:
                    ratio = found[f"{codec}_mean_{options.gpus}"] / found[f"{codec}_mean_1"]
                    goals.append(
                        measure.Goal(f"{codec}, {options.gpus} GPUs, of one", ratio, SCALING, None, "x", at_least=True)
                    )
    for part in asked:
        wrong += report[part]["wrong"]
    return measure.finish(report, [] if options.smoke else goals, {}, wrong, claims=not options.smoke)


if __name__ == "__main__":
    sys.exit(main())
