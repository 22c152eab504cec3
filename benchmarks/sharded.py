"""A training step of a model sharded by FSDP2 beside the same under DDP, over NCCL.

    torchrun --nproc-per-node 2 benchmarks/sharded.py --model FOLDER [--batch 16] [--steps 10]

Real shapes of the checkpoint, bfloat16: forward and backward of --batch samples a GPU, two views 224x224, all
parameters, no optimiser. FSDP2 shards `model.blocks`, one by one and in groups, and then the model. Every process
measures from barrier to barrier; the medians of rank 0 are printed, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import INSTRUCTION
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from qwen_batched import QwenBatchedVL

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))

    def load() -> QwenBatchedVL:
        model = QwenBatchedVL.from_pretrained(options.model, dtype=torch.bfloat16, device=f"cuda:{rank}", lm_head=False)
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
    if rank == 0:
        for name, value in found.items():
            print(f"{name:28s} {value:8.2f}")
        print(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
