"""Two commits of this package beside each other on one GPU, in alternating processes: clocks drift for both alike.

    git worktree add ../before COMMIT
    python benchmarks/before_after.py --before ../before [--model FOLDER | --preset 3b] [--rounds 5]

Each process loads the model in bfloat16 and measures, the device idle before and after each call:
- a control loop's call (one sample, three cameras 480x640 in pinned host memory, to 224x224, 20 words) from its CUDA
  graph and without one, and the host's share of the latter: the time until the call returns;
- 16 images of 448x448 through the vision transformer, and a step of generation;
- a training step, forward and backward, of 8 samples with two views 224x224: all parameters, and the sum of its
  kernels' times; and LoRA on the decoder's linear layers, 16 samples, where peft is installed.
The distance of each commit from itself, between its own processes, says how large a difference means nothing. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import INSTRUCTION, LORA_LAYERS

REPOSITORY = Path(__file__).resolve().parents[1]
NEW_TOKENS = 64


def median_ms(call: Callable[[], object], times: int, wait: bool = True) -> float:
    """Of so many calls; without `wait`, until the call returns, whatever the device still has to do."""
    import torch

    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        found.append(1e3 * ((time.perf_counter() if wait else returned) - start))
    return statistics.median(found)


def measure(folder: str) -> dict[str, float]:
    """Milliseconds by what was measured, of the package that this process imports."""
    import torch

    from qwen_batched import QwenBatchedVL

    torch.manual_seed(0)
    model = QwenBatchedVL.from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    frames = torch.randint(0, 256, (1, 3, 3, 480, 640), dtype=torch.uint8).pin_memory()
    images = torch.randint(0, 256, (16, 1, 3, 448, 448), dtype=torch.uint8, device="cuda")

    def control(cuda_graph: bool = True) -> object:
        return model(frames, [INSTRUCTION], template="plain", resize=(224, 224), cuda_graph=cuda_graph)

    def generate(tokens: int) -> object:
        return model.generate(frames, [INSTRUCTION], max_new_tokens=tokens, template="plain", resize=(224, 224))

    with torch.inference_mode():
        for call in (
            control,
            lambda: control(False),
            lambda: model.encode_images(images),
            lambda: generate(NEW_TOKENS),
        ):
            for _ in range(4):
                call()
        found = {
            "control loop": median_ms(control, 300),
            "the same without a graph": median_ms(lambda: control(False), 60),
            "the host's share of that": median_ms(lambda: control(False), 60, wait=False),
            "16 x 448x448, vision": median_ms(lambda: model.encode_images(images), 20),
        }
        long, short = (median_ms(lambda n=n: generate(n), 8) for n in (NEW_TOKENS, NEW_TOKENS // 2))
    found["step of generation"] = (long - short) / (NEW_TOKENS - NEW_TOKENS // 2)
    return found | training(model)


def training(model: Any) -> dict[str, float]:
    """The same of training steps; gradients are let go of, there is no optimiser."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def step_of(adapted: Any, batch: int) -> Callable[[], None]:
        frames = torch.randint(0, 256, (batch, 2, 3, 224, 224), dtype=torch.uint8, device="cuda")

        def step() -> None:
            out = adapted(frames, [INSTRUCTION] * batch, template="plain", resize=None)
            out.last_hidden_state.float().square().mean().backward()
            for parameter in adapted.parameters():
                parameter.grad = None

        for _ in range(4):
            step()
        return step

    step = step_of(model.train(), 8)
    found = {"training step": median_ms(step, 20)}
    with profile(activities=[ProfilerActivity.CUDA]) as events:
        step()
        torch.cuda.synchronize()
    found["sum of its kernels"] = sum(event.self_device_time_total for event in events.key_averages()) / 1e3
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return found
    config = LoraConfig(r=16, target_modules=LORA_LAYERS)
    return found | {"LoRA step": median_ms(step_of(get_peft_model(model, config), 16), 20)}


def run(checkout: Path, model: str) -> dict[str, float]:
    """The same in a process of its own, with the package of `checkout`."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", "--model", model],
        env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
        cwd=checkout,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--model", help="a checkpoint folder; None: one is written, with random weights")
    parser.add_argument("--preset", default="3b", help="of what is written, any family's that both commits know")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(options, options.model or checkpoint_of(options.preset, temporary))


def checkpoint_of(preset: str, temporary: str) -> str:
    """The folder of a new bfloat16 checkpoint, for both commits."""
    sys.path.insert(1, str(REPOSITORY))  # not in a child, whose PYTHONPATH names its package
    from runs import written

    return str(written(f"{temporary}/checkpoint", preset))


def compare(options: argparse.Namespace, model: str) -> None:
    """Runs and prints."""
    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for _ in range(options.rounds):
        for name, checkout in (("before", options.before.resolve()), ("after", REPOSITORY)):
            found[name].append(run(checkout, model))
            print(name, found[name][-1], flush=True)
    report = {}
    print(f"{'ms, median of processes':28s} {'before':>9s} {'after':>9s} {'ratio':>7s}   spread of before, after")
    for what in found["before"][0]:
        before, after = ([each[what] for each in found[name]] for name in ("before", "after"))
        medians = statistics.median(before), statistics.median(after)
        spreads = [(max(x) - min(x)) / statistics.median(x) for x in (before, after)]
        report[what] = {"before": medians[0], "after": medians[1], "ratio": medians[1] / medians[0], "spreads": spreads}
        print(
            f"{what:28s} {medians[0]:9.3f} {medians[1]:9.3f} {medians[1] / medians[0]:7.3f}   "
            f"{spreads[0]:.1%}, {spreads[1]:.1%}"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
