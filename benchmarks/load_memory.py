"""Peak host memory, bytes read and time of loading a sharded checkpoint on the CPU.

    python benchmarks/load_memory.py --size-gb 2 [--preset 3b]

Writes a checkpoint of a preset's widths, of any family, and as many decoder blocks as fill `--size-gb`, loads it in
fresh processes, and compares each peak with what it may be: the parameters plus twice the largest tensor. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.checkpoint import weights
from qwen_batched.families import FAMILIES
from qwen_batched.testing import PRESETS, write_checkpoint

GB = 10**9
STORED_DTYPE = torch.bfloat16
VOCAB_SIZE = 32768  # an embedding of 134 MB: the published 622 MB would make the limit a lenient one
DEPTH, BLOCK_INDEXES = 2, ("fullatt_block_indexes", "deepstack_visual_indexes")  # of the vision tower
CASES = {
    "all": {},
    "all, to float32": {"dtype": torch.float32},
    "num_layers = half": {"num_layers": "half"},
    "vision tower alone": {"vision_only": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0, help="least size of the checkpoint in GB (1e9 bytes)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3b")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--tmp", type=Path, default=None, help="where the checkpoint is written; None: the system's")
    if not Path("/proc/self/status").exists():
        parser.error("needs Linux: memory is read from /proc/self/status")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    with tempfile.TemporaryDirectory(dir=args.tmp) as tmp:
        started = time.perf_counter()
        folder = write(Path(tmp) / "checkpoint", args.preset, args.size_gb, args.shards)
        stored = weights.find_tensors(folder, FAMILIES[PRESETS[args.preset].family].keys)
        summary = {
            "checkpoint_bytes": sum(map(stored_bytes, stored.values())),
            "largest_tensor_bytes": max(map(stored_bytes, stored.values())),
            "shards": len({tensor.file for tensor in stored.values()}),
            "num_layers": stored_layers(folder),
        }
        print(
            f"{summary['checkpoint_bytes'] / GB:.2f} GB in {summary['shards']} shards, {summary['num_layers']} decoder "
            f"blocks, largest tensor {summary['largest_tensor_bytes'] / GB:.3f} GB, written in "
            f"{time.perf_counter() - started:.0f} s"
        )
        write_checkpoint(Path(tmp) / "warm_up")
        results = {case: measure_in_fresh_process(folder, case) for case in CASES}
    passed = all(result["passed"] for result in results.values())
    print_table(results)
    numbers = {
        **summary,
        "results": results,
        "half_reads": results["num_layers = half"]["bytes_read"] / results["all"]["bytes_read"],
        "passed": passed,
    }
    print(json.dumps(environment() | numbers))
    sys.exit(not passed)


def write(folder: Path, preset: str, size_gb: float, shards: int) -> Path:
    """A checkpoint of at least `size_gb`: the preset's blocks, as many as it takes."""
    text = PRESETS[preset].text
    width, mlp_width, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    projected = text.get("head_dim", width // heads) * (heads + text["num_key_value_heads"])
    block_bytes = (2 * width * projected + 3 * width * mlp_width) * STORED_DTYPE.itemsize
    rest_bytes = VOCAB_SIZE * width * STORED_DTYPE.itemsize
    layers = max(2, int(-(-(size_gb * GB - rest_bytes) // block_bytes)))
    layers += layers % 2
    return write_checkpoint(
        folder,
        preset,
        dtype=STORED_DTYPE,
        shards=shards,
        tied=True,
        text={"vocab_size": VOCAB_SIZE, "num_hidden_layers": layers},
        vision={"depth": DEPTH} | {name: [DEPTH - 1] for name in BLOCK_INDEXES if name in PRESETS[preset].vision},
        special_token_start=VOCAB_SIZE - 64,
    )


def stored_layers(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return config.get("text_config", config)["num_hidden_layers"]


def stored_bytes(tensor: weights.StoredTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def vision_tower_of(folder: Path) -> Any:
    """The class of its family."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    return importlib.import_module(f"qwen_batched.model.modeling_{family}_batched").BatchedVisionTransformer


def measure_in_fresh_process(folder: Path, case: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder), case]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(folder: Path, case: str) -> dict[str, float]:
    """Loads once; called in a process that has done nothing else."""
    options = dict(CASES[case])
    if options.get("num_layers") == "half":
        options["num_layers"] = stored_layers(folder) // 2
    load = vision_tower_of(folder) if options.pop("vision_only", False) else QwenBatchedVL
    # The tokenizer's libraries are imported at first use.
    QwenBatchedVL.from_pretrained(folder.parent / "warm_up", device="cpu")
    bytes_read = 0
    read_one = weights._read

    def read(tensor: weights.StoredTensor) -> torch.Tensor:
        nonlocal bytes_read
        bytes_read += stored_bytes(tensor)
        return read_one(tensor)

    weights._read = read
    drop_page_cache(folder)
    resident_before, disk_before = proc_value("status", "VmRSS") * 1024, proc_value("io", "read_bytes")
    peak_before = proc_value("status", "VmHWM") * 1024
    started = time.perf_counter()
    model = load.from_pretrained(folder, device="cpu", **options)
    seconds = time.perf_counter() - started
    # Not getrusage's ru_maxrss: a process inherits its parent's, which has just written the checkpoint.
    peak = proc_value("status", "VmHWM") * 1024
    if peak <= peak_before:
        raise RuntimeError(f"imports alone peaked at {peak_before} bytes: take a larger --size-gb")
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    limit = sum(sizes) + 2 * max(sizes)
    return {
        "parameter_bytes": sum(sizes),
        "peak_bytes": peak - resident_before,
        "limit_bytes": limit,
        "bytes_read": bytes_read,
        "disk_bytes": proc_value("io", "read_bytes") - disk_before,  # with read-ahead; 0 on a memory file system
        "seconds": seconds,
        "passed": peak - resident_before <= limit,
    }


def drop_page_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def proc_value(file: str, name: str) -> int:
    """A number of /proc/self, 0 where the system does not tell."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def print_table(results: dict[str, dict[str, float]]) -> None:
    print(
        f"{'load':<20} {'parameters':>11} {'peak':>9} {'limit':>9} {'tensors read':>13} {'from disk':>10} {'time':>8}"
    )
    for case, result in results.items():
        columns = [f"{result[name] / GB:.3f}" for name in ("parameter_bytes", "peak_bytes", "limit_bytes")]
        read, disk = (f"{result[name] / GB:.3f}" for name in ("bytes_read", "disk_bytes"))
        verdict = "pass" if result["passed"] else "FAIL"
        print(
            f"{case:<20} {columns[0]:>11} {columns[1]:>9} {columns[2]:>9} {read:>13} {disk:>10} "
            f"{result['seconds']:>6.1f} s  {verdict}"
        )
    print("sizes in GB (1e9 bytes); peak: above what the process held before loading")


def environment() -> dict[str, str]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {
        "benchmark": "load_memory",
        "python": platform.python_version(),
        **packages,
        "commit": git.stdout.strip() or "unknown",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    main()
