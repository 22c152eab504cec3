"""How far exports are from the live model at four sizes, and the memory that one of a 3B tower takes, on a CPU.

    python benchmarks/export.py deviation [--targets onnx engine] [--sizes 224x224 252x308] [--preset small]
    python benchmarks/export.py memory [--preset 3b]

`deviation` exports a model that never ran before for each target and size, in float32 and with frames of 480x640, and
prints what the exporter measured with 1 and with 8 samples. `memory` exports the vision part alone for 672x672 with the
command, and prints the most memory that all its processes held at the same moment. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import Goal, environment, finish, note, print_table

from qwen_batched import QwenBatchedVL
from qwen_batched.export import export
from qwen_batched.testing import PRESETS, write_checkpoint

GIB = 2**30
SIZES = ("224x224", "252x252", "140x168", "252x308")  # the last three have cut windows
PARTS = ("vision", "decoder", "cached_decoder")
BOUND = 2e-6  # relative L2 in float32
SECONDS, BYTES = 300.0, 6e9  # of an export of a 3B tower
SMOKE = {"vision": {"depth": 2, "fullatt_block_indexes": [1]}}  # what the tiny preset has for a smoke run
POLL = 0.05  # seconds between two looks at the memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("deviation", "memory"))
    parser.add_argument("--targets", nargs="+", choices=("onnx", "engine"), default=["onnx", "engine"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxW", help="what frames are resized to")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="small for deviations, 3b for memory")
    parser.add_argument("--weights", default="random", help="of the checkpoint, or trained-like")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, and no claims")
    options = parser.parse_args()
    if options.what == "memory" and not Path("/proc/self/status").exists():
        parser.error("needs Linux: memory is read from /proc")
    report = environment("export", torch.device("cpu")) | vars(options) | {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        run = measure_deviation if options.what == "deviation" else measure_memory
        return run(options, report, Path(temporary))


def measure_deviation(options: argparse.Namespace, report: dict[str, object], temporary: Path) -> int:
    preset = "tiny" if options.smoke else options.preset or "small"
    stored = SMOKE if options.smoke else {}
    folder = write_checkpoint(temporary / "checkpoint", preset, weights=options.weights, **stored)
    sizes = ("56x84",) if options.smoke else options.sizes
    rows, worst = [], 0.0
    for target in options.targets:
        for size in sizes:
            note(f"{target} {size}")
            model = QwenBatchedVL.from_pretrained(folder, device="cpu", resample_backend="pillow")
            out = temporary / f"{target}-{size}"
            manifest = export(model, out, target, f"480x640:{size}", cameras=2, batch=(1, 8), parts=options.parts)
            found = {name: each["measured"] for name, each in manifest["deviation"].items()}
            worst = max(worst, *found.values())
            rows.append((target, size, *(f"{found[name]:.1e}" for name in options.parts)))
            report |= {f"{target} {size}": found, "versions": manifest["versions"]}
    print_table(("target", "resized to", *options.parts), rows)
    wrong = [f"relative L2 {worst:.1e}, more than {BOUND:.0e}"] if worst > BOUND else []
    goals = [Goal("relative L2 from the live model, at most", worst, BOUND)]
    return finish(report, [] if options.smoke else goals, {}, wrong, not options.smoke)


def measure_memory(options: argparse.Namespace, report: dict[str, object], temporary: Path) -> int:
    preset = "tiny" if options.smoke else options.preset or "3b"
    stored = SMOKE if options.smoke else {"dtype": torch.bfloat16, "text": {"num_hidden_layers": 1}}
    folder = write_checkpoint(temporary / "checkpoint", preset, weights=options.weights, **stored)
    size = "56x84" if options.smoke else "672x672"
    command = [sys.executable, "-m", "qwen_batched.export", "--model", folder, "--target", "onnx", "--batch", "1"]
    command += ["--frames", f"480x640:{size}", "--parts", "vision", "--dtype", "float32", "--out", temporary / "out"]
    started = time.perf_counter()
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(resident_bytes(each) for each in descendants(process.pid)))
        time.sleep(POLL)
    seconds = time.perf_counter() - started
    print(process.stdout.read().decode(), end="")
    print(f"{seconds:.0f} s, and at most {peak / 1e9:.2f} GB ({peak / GIB:.2f} GiB) in all processes together")
    wrong = [f"the export ended with {process.returncode}"] if process.returncode else []
    goals = [Goal("time", seconds, SECONDS, unit="s"), Goal("memory", peak / 1e9, BYTES / 1e9, unit="GB")]
    report |= {"seconds": seconds, "peak_bytes": peak}
    if not wrong:
        report["versions"] = json.loads((temporary / "out" / "manifest.json").read_text())["versions"]
    return finish(report, [] if options.smoke else goals, {}, wrong, not options.smoke)


def descendants(process: int) -> list[int]:
    """The process and all that it started, and they."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return found


def resident_bytes(process: int) -> int:
    """What a process holds in memory, pages of mapped files included."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


if __name__ == "__main__":
    sys.exit(main())
