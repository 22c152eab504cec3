"""Counts the Python calls of an eager forward: what the host does where there is no CUDA graph.

    python benchmarks/python_calls.py [--preset tiny] [--device cpu]

The second call of `QwenBatchedVL.forward` without gradients, as cProfile counts it: in all and by module.
A count, not a time: it is the same at every run.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from collections import Counter
from pathlib import Path

import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import PRESETS, write_checkpoint


def profile(model: QwenBatchedVL) -> pstats.Stats:
    frames = torch.zeros(2, 2, 3, 112, 140, dtype=torch.uint8, device=model.device)
    texts = ["pick up the red cube", "open the drawer"]
    profiler = cProfile.Profile()
    with torch.no_grad():
        model(frames, texts, cuda_graph=False)
        profiler.enable()
        model(frames, texts, cuda_graph=False)
        profiler.disable()
    return pstats.Stats(profiler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="of any family")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = QwenBatchedVL.from_pretrained(
            write_checkpoint(Path(folder) / "model", arguments.preset), device=arguments.device
        )
        stats = profile(model)
    by_module: Counter[str] = Counter()
    for (file, _, _), (_, calls, *_) in stats.stats.items():
        inside = "/qwen_batched/" in file
        by_module[file.rpartition("/qwen_batched/")[2] if inside else "elsewhere"] += calls
    package = sum(calls for module, calls in by_module.items() if module != "elsewhere")
    for module, calls in by_module.most_common():
        print(f"{calls:8d}  {module}")
    print(f"{stats.total_calls:8d}  in all, {package} of them in the package")


if __name__ == "__main__":
    main()
