"""Speed on the CPU beside transformers: frames and text to hidden states, one sample, one camera, float32.

    python benchmarks/cpu_speed.py [--preset small] [--rounds 15]

A preset may be any family's; frames are then the nearest multiples of its merged cells.
Both sides run the whole call, processor included, on the same uint8 frames, in turns within each round, so that
whatever else the machine does hits both. Needs the transformers of constraints.txt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from runs import fit, written

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import PRESETS
from qwen_batched.transformers_reference import TransformersReference

SIZES = (
    (28, 28),
    (56, 56),
    (56, 308),
    (308, 56),
    (140, 140),
    (224, 224),
    (252, 252),
    (252, 308),
    (280, 280),
    (364, 364),
    (392, 392),
    (448, 448),
    (476, 644),
    (728, 1288),
)
TEXT = "pick up the red cube and put it into the box on the left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written(folder, options.preset, dtype=torch.float32)
        ours = QwenBatchedVL.from_pretrained(folder, device="cpu")
        theirs = TransformersReference.from_pretrained(folder)
    sizes = dict.fromkeys(fit(SIZES, ours.config.vision.cell_size))
    rows = [measure(ours, theirs, size, options.rounds) for size in sizes]
    report = {
        "benchmark": "cpu_speed",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "preset": options.preset,
        "rounds": options.rounds,
        "rows": rows,
        "slowest_ratio": max(row["ratio"] for row in rows),
    }
    print(json.dumps(report))


@torch.inference_mode()
def measure(ours: QwenBatchedVL, theirs: TransformersReference, size: tuple[int, int], rounds: int) -> dict:
    """Median times in ms, and the median over rounds of the ratio ours / theirs."""
    frames = torch.randint(0, 256, (1, 1, 3, *size), dtype=torch.uint8)

    def run_ours() -> torch.Tensor:
        return ours(frames, [TEXT]).last_hidden_state

    def run_theirs() -> torch.Tensor:
        inputs = theirs.processor_inputs([frames[0, 0]], TEXT)
        token_types = (inputs["input_ids"] == theirs.model.config.image_token_id).int()
        return theirs.model.model(**inputs, mm_token_type_ids=token_types, use_cache=False).last_hidden_state

    error = float((run_ours() - run_theirs()).norm() / run_theirs().norm())
    if not error <= 1e-5:
        raise SystemExit(f"{size}: results differ by {error:.1e}; no time is shown over a wrong result")
    pairs = [(milliseconds(run_ours), milliseconds(run_theirs)) for _ in range(rounds)]
    row = {
        "size": f"{size[0]}x{size[1]}",
        "ours_ms": round(statistics.median(a for a, _ in pairs), 2),
        "theirs_ms": round(statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "relative_l2": error,
    }
    print(
        f"{row['size']:>9}  ours {row['ours_ms']:8.1f} ms  transformers {row['theirs_ms']:8.1f} ms  {row['ratio']:.3f}"
    )
    return row


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
