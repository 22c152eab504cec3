"""An exported engine's vision part beside this library's own CUDA graph, in one run on one GPU.

    python benchmarks/engine.py [--preset 3b] [--model FOLDER] [--works batch loop call] [--commit HASH]

bfloat16, random weights unless --model names a checkpoint; uint8 frames on the GPU, of the size that the model sees.
`batch` is 64 frames of 448x448, in a package of 1 to 64 samples; `loop` is one sample of three frames of 224x224. Its
features are compared with float32 by the exporter, which refuses what is further away than the live model allows.
  ours    `encode_images`, which replays a CUDA graph
  engine  the package, called from Python; and the same captured in a CUDA graph
A batch is timed by GPU events, a loop's call by itself from an idle GPU to an idle GPU. A process of its own tells how
long a package takes from loading to its first result. `call`, a loop's frames and a prompt to hidden states, is only
loaded. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import runs
import torch
from measure import Goal, Work, note

from qwen_batched.export import export, load_engine

LOAD = """
import json, sys, time
import torch
from qwen_batched.export import load_engine
folder, part, sizes, device = json.loads(sys.argv[1])
arguments = {}
for name, like in json.load(open(f"{folder}/manifest.json"))["arguments"][part].items():
    shape = [sizes.get(size, size) for size in like["shape"]]
    arguments[name] = torch.ones(shape, dtype=getattr(torch, like["dtype"]), device=device)
begin = time.perf_counter()
result, *_ = load_engine(folder, part)(arguments)
result.cpu()
print(time.perf_counter() - begin)
"""
LOAD_MUST = {"batch": 3.0, "loop": 3.0, "call": 15.0}  # seconds
SEQUENCE = 241  # tokens of `call`, three images of 64 among them


@dataclass(frozen=True)
class Shapes:
    """By name: the work, and the most samples of its package. A `call` has no more samples than are asked for."""

    fitted: ClassVar = ()
    works: dict[str, tuple[Work, int]]


FULL = Shapes(
    {"batch": (Work(64, 1, (448, 448)), 64), "loop": (Work(1, 3, (224, 224)), 8), "call": (Work(1, 3, (224, 224)), 1)}
)
SMOKE = Shapes(
    {"batch": (Work(2, 1, (56, 56)), 2), "loop": (Work(1, 2, (28, 56)), 2), "call": (Work(1, 2, (28, 56)), 1)}
)
MUST = {"batch": (1.25, 1.1), "loop": (1.3, 1.15)}  # times our own graph's time, and the aim


def measure_work(run: runs.Run, name: str, temporary: str) -> None:
    work, most = run.shapes.works[name]
    size, folder = runs.fit(work.size, run.model.config.vision.cell_size), Path(temporary) / name
    work = Work(work.batch, work.cameras, size)
    begin, part = time.perf_counter(), "call" if name == "call" else "vision"
    manifest = export(
        *(run.model, folder, "engine", (size, size)),
        cameras=work.cameras,
        batch=(1, most),
        sequence=SEQUENCE if part == "call" else None,
        parts=[part],
    )
    deviation = manifest["deviation"][part]
    note(f"{name}: exported in {time.perf_counter() - begin:.0f} s, relative L2 {deviation}")
    times = {} if part == "call" else time_vision(run, name, work, folder)
    described = json.dumps([str(folder), part, {"batch": work.batch}, str(run.device)])
    done = subprocess.run([sys.executable, "-c", LOAD, described], capture_output=True, text=True, check=True)
    seconds = float(done.stdout.splitlines()[-1])
    run.goals.append(Goal(f"{name}: load to first result", seconds, LOAD_MUST[name], None, "s"))
    run.report[name] = {"times": times, "deviation": deviation, "load_seconds": seconds}


def time_vision(run: runs.Run, name: str, work: Work, folder: Path) -> dict[str, Any]:
    """A vision package beside `encode_images`: what `Run.times` gives."""
    frames = measure.random_frames(work, 1, run.device)[0]
    package = load_engine(folder, "vision", for_graphs=True)

    def engine() -> torch.Tensor:
        return package({"frames": frames})[0]

    def ours() -> torch.Tensor:
        return run.model.encode_images(frames, resize=None)

    calls: dict[str, Any] = {"ours": ours, "engine": engine}
    if run.device.type == "cuda":
        calls["engine, CUDA graph"] = measure.captured(engine)
    take = measure.single_times if name == "loop" else measure.device_times
    times = run.times(calls, take=take)
    runs.print_beside_ours(f"vision, {work}", times)
    fastest = min(row["median"] for other, row in times.items() if other != "ours")
    run.goals.append(Goal(f"{name}: engine over our graph", fastest / times["ours"]["median"], *MUST[name], "x"))
    return times


@torch.no_grad()
def run_all(options: Namespace, temporary: str) -> int:
    run, _ = runs.Run.begin(options, SMOKE if options.smoke else FULL, temporary)
    for name in options.works:
        run.attempt(name, lambda name=name: measure_work(run, name, temporary))
    return run.finish("engine")


if __name__ == "__main__":
    parser = runs.whole_model_parser(__doc__)
    parser.add_argument("--works", nargs="+", choices=list(LOAD_MUST), default=list(LOAD_MUST))
    runs.main(parser, run_all)
