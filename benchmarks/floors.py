"""The vision tower and the first decoder blocks beside their floor and transformers, for policies that take these.

    python benchmarks/floors.py [--preset qwen3-vl-2b] [--num-layers 16] [--size 256] [--model FOLDER] [--commit HASH]

bfloat16, random weights unless --model names a checkpoint; frames are uint8 on the GPU, of the nearest size that the
model takes as it is. The floor is what any implementation must do in the same precision: the matrix products alone, in
one CUDA graph, and the tower's attention by PyTorch's fastest kernel alone. transformers is given pixels ready made and
prompts laid out beforehand, in its default configuration and with torch's variable-length attention in the tower.

Whole calls are timed one by one from an idle GPU to an idle GPU, as a control loop waits for them, and so are their
products; the last line is JSON.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import peers
import runs
import torch
import torch.nn.functional as F
import whole_peers
from measure import INSTRUCTION, Work, captured, note
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import step, without_gradients

from qwen_batched.checkpoint.config import VisionConfig

ATTENTION = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Shapes:
    """`sides`: of square frames for the tower; `images`: how many; `batches` and `cameras`: of whole calls."""

    fitted: ClassVar = ("sides",)
    preset: str
    sides: tuple[int, ...]
    images: int
    calls: tuple[tuple[int, int], ...]
    training: tuple[int, int]


REAL = Shapes("qwen3-vl-2b", (448, 256), 64, ((1, 1), (1, 3), (64, 3)), (16, 2))
SMOKE = Shapes("qwen3-vl-tiny", (64, 32), 2, ((1, 1), (2, 2)), (2, 1))


def tower_attention(config: VisionConfig, work: Work, like: Tensor, backend: SDPBackend) -> Callable[[], object]:
    """The replay of attention over whole images in every block of the tower, and nothing else."""
    tokens = work.size[0] * work.size[1] // config.patch_size**2
    shape = (work.images, tokens, config.num_heads, config.hidden_size // config.num_heads)
    q = torch.randn(shape, dtype=like.dtype, device=like.device).transpose(1, 2)

    def run() -> None:
        with sdpa_kernel(backend):
            for _ in range(config.depth):
                F.scaled_dot_product_attention(q, q, q)

    return captured(run) if like.device.type == "cuda" else run


def attention_floors(run: runs.Run, work: Work) -> dict[str, Callable[[], object]]:
    """By PyTorch's kernels that take these shapes."""
    on_cpu = run.device.type == "cpu"
    found = {}
    for name, backend in ({"math": SDPBackend.MATH} if on_cpu else ATTENTION).items():
        call = run.attempt(
            f"{name} attention", partial(tower_attention, run.model.config.vision, work, run.like, backend)
        )
        found |= {} if call is None else {f"attention alone, {name}": call}
    return found


def measure_tower(run: runs.Run, side: int, towers: dict[str, torch.nn.Module]) -> None:
    work, vision = Work(run.shapes.images, 1, (side, side)), run.model.config.vision
    calls = {
        "ours": measure.Rotation(
            lambda frames: run.model.encode_images(frames, resize=None), measure.random_frames(work, 3, run.device)
        ),
        "products alone": peers.products(vision, peers.passes_of(vision, work), run.like),
        **attention_floors(run, work),
    }
    inputs = peers.random_inputs(vision, work, run.like, 1)
    for name, tower in towers.items():
        calls[f"transformers, {name}"] = partial(peers.default_tower(tower), inputs[0])
    report(run, f"vision tower, {work}", calls, measure.device_times)


def measure_calls(run: runs.Run, batch: int, cameras: int, towers: dict, reference: object) -> None:
    """Whole calls, before the final norm; the products are those of the tower and of the decoder's tokens."""
    config = run.model.config
    size = runs.fit((run.options.size,) * 2, config.vision.cell_size)
    work = Work(batch, cameras, size)
    texts, frames = [INSTRUCTION] * batch, measure.random_frames(work, 3, run.device)
    prepared = run.model.processor(frames[0], texts, resize=None, device=run.device, dtype=run.model.dtype)
    tower = peers.products(config.vision, peers.passes_of(config.vision, work), run.like)
    decoder = whole_peers.products(config.text, prepared["input_ids"].numel(), run.like)

    def products() -> None:
        tower()
        decoder()

    calls = {
        "ours": measure.Rotation(lambda one: run.model(one, texts, resize=None, norm="pre"), frames),
        "products alone": products,
        **attention_floors(run, work),
    }
    prompts = whole_peers.Prompts.of(prepared, config.vision)
    pixels = peers.random_inputs(config.vision, work, run.like, 1)[0].pixels
    for name, visual in towers.items():
        calls[f"transformers, {name}"] = partial(whole_peers.whole_model(reference, visual, prompts), pixels)
    title = f"B={batch}, {cameras} x {size[0]}, {config.text.num_hidden_layers} blocks, S = "
    report(run, title + str(prepared["input_ids"].shape[1]), calls, measure.single_times)


def measure_training(run: runs.Run, towers: dict, reference: object) -> None:
    """Forward and backward of all parameters."""
    (batch, cameras), cell = run.shapes.training, run.model.config.vision.cell_size
    size = runs.fit((run.options.size,) * 2, cell)
    work, texts = Work(batch, cameras, size), [INSTRUCTION] * batch
    frames = measure.random_frames(work, 1, run.device)[0]
    prepared = run.model.processor(frames, texts, resize=None, device=run.device, dtype=run.model.dtype)
    pixels = peers.random_inputs(run.model.config.vision, work, run.like, 1)[0].pixels
    prompts = whole_peers.Prompts.of(prepared, run.model.config.vision)

    def stepped(module: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return without_gradients(partial(step, forward), module.requires_grad_(True).parameters())

    calls = {"ours": stepped(run.model, lambda: run.model(frames, texts, resize=None).last_hidden_state)}
    for name, visual in towers.items():
        visual.requires_grad_(True)
        theirs = whole_peers.whole_model(reference, visual, prompts)
        calls[f"transformers, {name}"] = stepped(reference.model, partial(theirs, pixels))
    report(run, f"training step, B={batch}, {cameras} x {size[0]}", calls, measure.single_times)


def report(run: runs.Run, title: str, calls: dict[str, Callable[[], object]], take: Callable) -> None:
    note(title)
    times = run.times(calls, seconds=0.5, take=take, most=100)
    runs.print_beside_ours(title, times)
    floors = {name: row["median"] for name, row in times.items() if "alone" in name}
    attention = [ms for name, ms in floors.items() if "attention" in name]
    if floors:
        floor = floors["products alone"] + min(attention, default=0.0)
        ours = times["ours"]["median"]
        print(
            f"products over ours {floors['products alone'] / ours:.3f}, with attention {floor / ours:.3f}\n", flush=True
        )
    run.report[title] = times
    measure.release(run.device)


def run_all(options: Namespace, temporary: str) -> int:
    shapes = SMOKE if options.smoke else REAL
    options.preset = options.preset or shapes.preset
    options.size = options.size or shapes.sides[-1]
    run, folder = runs.Run.begin(options, shapes, temporary)
    run.model.requires_grad_(False)
    reference = whole_peers.load(folder, options.num_layers, "pre", dtype=run.model.dtype, device=run.device)
    towers = {"default": reference.visual}
    varlen = None if options.smoke else run.attempt("varlen", partial(peers.with_varlen_attention, reference.visual))
    towers |= {} if varlen is None else {"varlen": varlen}
    with torch.no_grad():
        for side in shapes.sides:
            measure_tower(run, side, towers)
        for batch, cameras in shapes.calls:
            measure_calls(run, batch, cameras, towers, reference)
    measure_training(run, {name: tower for name, tower in towers.items() if name == "varlen"}, reference)
    return run.finish("floors")


def main() -> None:
    parser = runs.whole_model_parser(__doc__)
    parser.add_argument("--size", type=int, help="side of the frames of whole calls, in pixels; None: 256")
    runs.main(parser, run_all)


if __name__ == "__main__":
    main()
