"""A training step of a model sharded by FSDP2 beside the same under DDP, over NCCL.

    torchrun --nproc-per-node 2 benchmarks/sharded.py [--model FOLDER | --preset 3b] [--batch 16] [--steps 10]

Real shapes of the checkpoint, of any family, bfloat16: forward and backward of --batch samples a GPU, two views
224x224, all parameters, no optimiser. FSDP2 shards `model.blocks`, one by one and in groups, and then the model. Every
process measures from barrier to barrier; the medians of rank 0 are printed, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import INSTRUCTION
from runs import written
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import PRESETS

GROUPS = (1, 4, 8)


def step_ms(model: nn.Module, batch: int, steps: int) -> float:
    frames = torch.randint(0, 256, (batch, 2, 3, 224, 224), dtype=torch.uint8, device="cuda")
    found = []
    for _ in range(steps + 4):
        torch.cuda.synchronize()
        distributed.barrier()
        start = time.perf_counter()
        out = model(frames, [INSTRUCTION] * batch, template="plain", resize=None)
        out.last_hidden_state.float().square().mean().backward()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
        for parameter in model.parameters():
            parameter.grad = None
    return statistics.median(found[4:])


def checkpoint_of(preset: str, temporary: str) -> str:
    """The folder of a new checkpoint, which the first process writes for all."""
    folder = [str(written(f"{temporary}/checkpoint", preset)) if distributed.get_rank() == 0 else ""]
    distributed.broadcast_object_list(folder)
    return folder[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; None: one is written, with random weights")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3b", help="of what is written")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.model or checkpoint_of(options.preset, temporary), options, rank)
        distributed.barrier()  # the folder is the first process's
    if rank == 0:
        for name, value in found.items():
            print(f"{name:28s} {value:8.2f}")
        print(json.dumps(found))
    distributed.destroy_process_group()


def measure(folder: str, options: argparse.Namespace, rank: int) -> dict[str, float]:
    """Milliseconds a step under DDP and sharded, and how they compare."""

    def load() -> QwenBatchedVL:
        model = QwenBatchedVL.from_pretrained(folder, dtype=torch.bfloat16, device=f"cuda:{rank}", lm_head=False)
        return model.train()

    found = {}
    model = load()
    found["DDP"] = step_ms(DistributedDataParallel(model, gradient_as_bucket_view=True), options.batch, options.steps)
    for group in GROUPS:
        del model
        torch.cuda.empty_cache()
        model = load()
        for blocks in (model.visual.blocks, model.model.layers):
            for start in range(0, len(blocks), group):
                fully_shard(list(blocks[start : start + group]))
        name = f"FSDP2, blocks by {group}"
        found[name] = step_ms(fully_shard(model), options.batch, options.steps)
        found[f"{name}, over DDP"] = found[name] / found["DDP"]
    return found


if __name__ == "__main__":
    main()
