"""The same work given as frames and texts, as a prepared batch and as a batch of transformers' processor.

    python benchmarks/batches.py [--preset 3b] [--model FOLDER] [--num-layers N] [--commit HASH]

bfloat16, random weights unless --model names a checkpoint; uint8 frames of 8 x 8 merged cells on the GPU, logits of all
tokens. All calls are replayed graphs, timed one by one in turns, from an idle GPU to an idle GPU. The batches' pixels
are ready made; of transformers' batch the grids are on the host or on the GPU. Waits are those of a trace of two calls.
Results must be equal to the last bit. The last line is JSON.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import runs
import torch
from measure import INSTRUCTION, Goal, Work, note
from torch import Tensor
from waits import traced_waits

MUST = 1.05  # of the time of frames and texts


@dataclass(frozen=True)
class Shapes:
    """`cells`: of a frame's side; `calls`: samples and cameras."""

    fitted: ClassVar = ()
    preset: str
    cells: int
    calls: tuple[tuple[int, int], ...]


REAL = Shapes("3b", 8, ((1, 1), (1, 3), (8, 3)))
SMOKE = Shapes("tiny", 2, ((1, 1), (2, 2)))


def as_transformers(run: runs.Run, prepared: dict) -> dict[str, Tensor]:
    """What transformers' processor would give for a prepared batch, its grids on the host."""
    vision, pixels = run.model.config.vision, prepared["pixel_values"]
    cells = run.shapes.cells
    plan = run.model.visual.plan(cells, cells, run.device)
    pixels_IMAP = pixels.flatten(0, 1).unflatten(1, (-1, vision.cell_patches))
    side = cells * vision.spatial_merge_size
    return {
        "input_ids": prepared["input_ids"],
        "attention_mask": prepared["attention_mask"].long(),
        "pixel_values": pixels_IMAP.index_select(1, plan.raster_order.flatten()).flatten(0, 2),
        "image_grid_thw": torch.tensor([[1, side, side]] * pixels.shape[0] * pixels.shape[1]),
    }


def measure_calls(run: runs.Run, batch: int, cameras: int) -> None:
    side = run.shapes.cells * run.model.config.vision.cell_size
    work, texts = Work(batch, cameras, (side, side)), [INSTRUCTION] * batch
    frames = measure.random_frames(work, 1, run.device)[0]
    prepared = run.model.processor(frames, texts, resize=None, device=run.device, dtype=run.model.dtype)
    theirs = as_transformers(run, prepared)
    calls = {
        "ours": partial(run.model, frames, texts, resize=None, logits="all"),
        "prepared batch": partial(run.model, **prepared, logits="all"),
        "transformers', grid on the host": partial(run.model, **theirs),
        "transformers', grid on the GPU": partial(
            run.model, **theirs | {"image_grid_thw": theirs["image_grid_thw"].to(run.device)}
        ),
    }
    title = f"B={batch}, {cameras} x {side}"
    note(title)
    want = calls["ours"]().logits
    run.wrong += [f"{title}: {name}" for name, call in calls.items() if not torch.equal(call().logits, want)]
    times = run.times(calls, seconds=1.0, take=measure.single_times, most=400)
    runs.print_beside_ours(title, times)
    waits = {name: traced_waits(call, run.device) for name, call in calls.items()}
    for name, found in waits.items():
        print(f"waits in two calls, {name}: {found or 'none'}", flush=True)
    ratio = times["transformers', grid on the host"]["median"] / times["ours"]["median"]
    run.goals.append(Goal(f"{title}: transformers' batch over frames and texts", ratio, MUST, None, "x"))
    run.report[title] = {"times": times, "waits": waits}
    measure.release(run.device)


def run_all(options: Namespace, temporary: str) -> int:
    shapes = SMOKE if options.smoke else REAL
    options.preset = options.preset or shapes.preset
    run, _ = runs.Run.begin(options, shapes, temporary)
    with torch.inference_mode():
        for batch, cameras in shapes.calls:
            measure_calls(run, batch, cameras)
    return run.finish("batches")


if __name__ == "__main__":
    runs.main(runs.whole_model_parser(__doc__), run_all)
