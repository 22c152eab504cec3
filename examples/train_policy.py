"""Trains a small visuomotor policy end to end on a task that is rendered here, and draws what it has learnt.

With a small model of random weights, so that nothing is downloaded; minutes on a CPU:
    python examples/train_policy.py
On several GPUs, with the real model:
    torchrun --nproc-per-node 8 examples/train_policy.py --model Qwen/Qwen2.5-VL-3B-Instruct --bf16
With a frozen vision transformer, which runs once for a fixed set of scenes; later runs read its features from a file:
    python examples/train_policy.py --cached-features features
"""

import argparse
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from feature_cache import cached_features, digest
from PIL import Image, ImageDraw, ImageFont
from reaching_task import CAMERAS, CUBES, EDGE, FRONT, SIDE, Batch, Sample, draw_samples, make_batch, reached
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from qwen_batched import QwenBatchedVL
from qwen_batched.integrations.lerobot import from_lerobot
from qwen_batched.testing import write_checkpoint

SAMPLES_PER_BATCH = 48  # where there are no gradients
CACHED_SCENES = 256


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if args.cached_features is not None and args.scenes is None:
        args.scenes = CACHED_SCENES
    device = join_processes(args.device)
    torch.manual_seed(args.seed)
    try:
        policy = Policy(load_backbone(args.model)).to(device)
        policy.backbone.visual.requires_grad_(not (args.freeze_vision or args.cached_features))
        training_set = load_training_set(policy.backbone, args)
    except (OSError, ValueError) as error:  # a model that can't be had, features of another one
        parser.error(" ".join(str(error).split()))
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    report(f"model     {args.model or 'a small one with random weights'}, {trained / 1e6:.1f} M parameters to train")

    samples = draw_samples(random.Random(f"held out {args.seed}"), args.held_out)
    held_out = batches_of(samples)
    before = success(policy, held_out)
    report(f"held out  {len(samples)} samples; before training {before:.1%} end above the cube that is meant\n")

    start = time.perf_counter()
    losses = train(policy, args, training_set)
    seconds = time.perf_counter() - start
    check_processes_agree(policy)

    after = success(policy, held_out)
    report(f"\ntraining             {len(losses)} steps in {seconds:.0f} s, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    report(f"held-out success     {before:.1%} before training, {after:.1%} after")
    report(f"without the wrist    {success(policy, without_wrist(held_out)):.1%}, the camera left out of the batch")
    report(f"told of another cube {success(policy, misled(samples)):.1%}: the instruction is needed")
    if rank() == 0:
        draw_results(losses, samples, predict(policy, held_out), f"{before:.0%} -> {after:.0%}").save(args.output)
        report(f"\npicture   {args.output.resolve()}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """A batch in LeRobot's form -> actions (B, 2), in metres."""

    CELLS = (SIDE // 28) ** 2  # image tokens of a frame
    TEMPLATE = "{text} {images}"  # images last, so that their tokens can attend to the instruction

    def __init__(self, backbone: QwenBatchedVL) -> None:
        super().__init__()
        width = backbone.config.text.hidden_size
        self.backbone = backbone
        self.norm = nn.LayerNorm(width)
        self.cell = nn.Embedding(len(CAMERAS) * self.CELLS, width)
        self.look = nn.MultiheadAttention(width, num_heads=8, batch_first=True)
        self.act = nn.Sequential(nn.Linear(width + 2, 256), nn.GELU(), nn.Linear(256, 2))

    def forward(self, batch: Batch) -> Tensor:
        out = self.backbone(**arguments(batch), template=self.TEMPLATE, resize=None)
        hidden_BSD = self.norm(out.last_hidden_state)
        # The last token, which has seen all others, looks at the image tokens, which are told where they are.
        nth_BS = (out.image_mask.cumsum(dim=1) - 1) % self.CELLS
        places_BSD = hidden_BSD + self.cell(nth_BS + self.CELLS * out.camera_ids.clamp(min=0))
        seen_B1D, _ = self.look(
            hidden_BSD[:, -1:], places_BSD, places_BSD, key_padding_mask=~out.image_mask, need_weights=False
        )
        return self.act(torch.cat([seen_B1D[:, 0], batch["observation.state"]], dim=1))


def arguments(batch: Batch) -> dict[str, object]:
    """What the backbone takes of a batch: its frames, or their features where it has them."""
    if "image_features" not in batch:
        return from_lerobot(batch, CAMERAS)
    return {"images": None, "texts": batch["task"]} | {key: batch[key] for key in ("image_features", "camera_mask")}


def load_backbone(name: str | None) -> QwenBatchedVL:
    """A checkpoint in float32 without its output projection; without a name, a small one with random weights."""
    if name is not None:
        return QwenBatchedVL.from_pretrained(name, dtype=torch.float32, device="cpu", lm_head=False)
    with tempfile.TemporaryDirectory() as folder:
        # Two blocks learn from nothing much faster than the depth that pretrained weights need.
        vision = {"depth": 2, "hidden_size": 96, "num_heads": 4, "intermediate_size": 192, "fullatt_block_indexes": [1]}
        text = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 320, "mrope_section": [4, 6, 6]}
        return load_backbone(str(write_checkpoint(folder, "tiny", vision=vision, text=text)))


# ------------------------------------------------------------------------------------------------------------ training


def load_training_set(backbone: QwenBatchedVL, args: argparse.Namespace) -> Batch | None:
    """This process's `args.scenes` scenes as one batch, with features for frames where they are cached.

    None without `args.scenes`: scenes are then drawn as they are needed.
    """
    if args.scenes is None:
        return None
    batch = make_batch(draw_samples(random.Random(scenes_of(args)), args.scenes))
    if args.cached_features is None:
        return batch

    frames = {key: x for key, x in batch.items() if key.startswith("observation.images")}
    origin = {
        "model": digest(backbone.visual),
        "frames": digest(frames),
        "precision": "bf16" if args.bf16 else "float32",
    }
    path = args.cached_features / f"features-{rank()}-of-{processes()}.safetensors"
    features = {
        "image_features": cached_features(path, origin, lambda: run_tower(backbone, batch, args.bf16)),
        "camera_mask": from_lerobot(batch, CAMERAS)["camera_mask"],
    }
    return {key: x for key, x in batch.items() if key not in frames} | features


@torch.no_grad()
def run_tower(backbone: QwenBatchedVL, batch: Batch, bf16: bool) -> Tensor:
    """Image features (B, V, h, w, D), on the host."""
    found = []
    for rows in torch.arange(len(batch["task"])).split(SAMPLES_PER_BATCH):
        given = from_lerobot(on_device(rows_of(batch, rows.tolist()), backbone.device), CAMERAS)
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=bf16):
            features = backbone.encode_images(given["images"], camera_mask=given["camera_mask"], resize=None)
        found.append(features.cpu())
    return torch.cat(found)


def training_batches(training_set: Batch | None, args: argparse.Namespace) -> Iterator[Batch]:
    """Batches without end: of new scenes, or of the training set's, in another order each time."""
    rng = random.Random(scenes_of(args))  # every process has scenes of its own
    while training_set is None:
        yield make_batch(draw_samples(rng, args.batch_size))
    while True:
        order = rng.sample(range(args.scenes), args.scenes)
        for start in range(0, args.scenes, args.batch_size):
            scenes = order[start : start + args.batch_size]
            yield rows_of(training_set, [CUBES * scene + cube for scene in scenes for cube in range(CUBES)])


def scenes_of(args: argparse.Namespace) -> str:
    return f"training {args.seed} {rank()}"


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    return {key: x[rows] if isinstance(x, Tensor) else [x[row] for row in rows] for key, x in batch.items()}


def train(policy: Policy, args: argparse.Namespace, training_set: Batch | None = None) -> list[float]:
    """The losses of all steps, each the mean over processes."""
    device = policy.backbone.device
    model = DistributedDataParallel(policy, find_unused_parameters=False) if dist.is_initialized() else policy
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    batches = training_batches(training_set, args)

    losses = []
    with tqdm(range(args.steps), desc="training", unit="step", disable=rank() > 0) as progress:
        for _ in progress:
            batch = on_device(next(batches), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                actions = model(batch)
            # Squared below 5 cm, absolute above: cubes that can't be told apart yet do not drown the others.
            loss = nn.functional.smooth_l1_loss(actions.float(), batch["action"], beta=0.05)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, args.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(sum_over_processes(loss.detach()).item() / processes())
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def learning_rate(step: int, steps: int, warmup: int = 20) -> float:
    """Between 0 and 1: up in a line, down along a cosine."""
    return min((step + 1) / warmup, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------- measuring


def batches_of(samples: Sequence[Sample]) -> list[Batch]:
    return [make_batch(samples[i : i + SAMPLES_PER_BATCH]) for i in range(0, len(samples), SAMPLES_PER_BATCH)]


def without_wrist(batches: Sequence[Batch]) -> list[Batch]:
    return [{key: value for key, value in batch.items() if "wrist" not in key} for batch in batches]


def misled(samples: Sequence[Sample]) -> list[Batch]:
    """Instructions that name another cube of the same scene, and the actions that were right before."""
    told = batches_of([sample.misled() for sample in samples])
    return [{**batch, "task": other["task"]} for batch, other in zip(batches_of(samples), told, strict=True)]


@torch.no_grad()
def predict(policy: Policy, batches: Sequence[Batch]) -> Tensor:
    device = policy.backbone.device
    return torch.cat([policy(on_device(batch, device)).float().cpu() for batch in batches])


def success(policy: Policy, batches: Sequence[Batch]) -> float:
    """The share of samples that end above the right cube; the processes take turns with the batches."""
    mine = batches[rank() :: processes()]
    hits, total = torch.zeros(2, device=policy.backbone.device)
    for batch in mine:
        right = reached(predict(policy, [batch]), batch["action"])
        hits, total = hits + right.sum(), total + len(right)
    hits, total = sum_over_processes(torch.stack([hits, total])).tolist()
    return hits / total


# ----------------------------------------------------------------------------------------------------------- processes


def join_processes(device: torch.device | None) -> torch.device:
    """This process's device. Under torchrun, which sets LOCAL_RANK, it also meets the others."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def check_processes_agree(policy: Policy) -> None:
    """Raises `RuntimeError` unless every process has come to the same weights."""
    if not dist.is_initialized():
        return
    checksum = torch.stack([parameter.double().sum() for parameter in policy.parameters()])
    checksums = [torch.zeros_like(checksum) for _ in range(processes())]
    dist.all_gather(checksums, checksum)
    if not all(torch.equal(other, checksum) for other in checksums):
        raise RuntimeError("the processes have come to different weights")
    report(f"\nprocesses {processes()}, all with the same weights")


def report(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------- the picture


def draw_results(losses: Sequence[float], samples: Sequence[Sample], actions: Tensor, caption: str) -> Image.Image:
    """The loss on the left; on the right what the front camera sees, the predicted places marked in it."""
    margin, line, tile, columns, rows = 16, 20, 168, 4, 2
    chart = (420, rows * (tile + line + margin) - margin)
    picture = Image.new("RGB", (chart[0] + columns * (tile + margin) + 2 * margin, chart[1] + 2 * margin), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)

    picture.paste(draw_losses(losses, chart, f"held-out success {caption}", font), (margin, margin))
    spread = range(0, len(samples), max(1, len(samples) // (columns * rows) + 1))
    for i, chosen in enumerate(spread):
        left = chart[0] + 2 * margin + i % columns * (tile + margin)
        top = margin + i // columns * (tile + line + margin)
        sample, (dx, dy) = samples[chosen], actions[chosen].tolist()
        draw.text((left, top), sample.instruction, "black", font)
        frame = sample.scene.frames["front"].resize((tile, tile), Image.Resampling.NEAREST)
        x, y = sample.scene.gripper
        column, row = (tile * part for part in FRONT.project((x + dx, y + dy, EDGE)))
        mark_place(ImageDraw.Draw(frame), column, row)
        picture.paste(frame, (left, top + line))
    return picture


def mark_place(draw: ImageDraw.ImageDraw, column: float, row: float, size: int = 8) -> None:
    for width, colour in ((5, "white"), (2, "black")):
        draw.line([(column - size, row - size), (column + size, row + size)], fill=colour, width=width)
        draw.line([(column - size, row + size), (column + size, row - size)], fill=colour, width=width)


def draw_losses(
    losses: Sequence[float], size: tuple[int, int], caption: str, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """Every step's loss in grey and its running mean in blue, on a logarithmic scale."""
    chart = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(chart)
    left, right, top, bottom = 50, size[0] - 10, 24, size[1] - 24
    low = math.floor(math.log10(min(losses)))
    high = max(low + 1, math.ceil(math.log10(max(losses))))

    def point(step: int, loss: float) -> tuple[float, float]:
        across = step / max(1, len(losses) - 1)
        up = (math.log10(loss) - low) / (high - low)
        return left + (right - left) * across, bottom - (bottom - top) * up

    for power in range(low, high + 1):
        _, y = point(0, 10.0**power)
        draw.line([(left, y), (right, y)], fill=(220, 220, 220))
        draw.text((4, y - 8), f"{10.0**power:g}", "black", font)
    means, mean = [], losses[0]
    for loss in losses:
        mean += 0.1 * (loss - mean)
        means.append(mean)
    for curve, colour, width in ((losses, (190, 190, 190), 1), (means, (9, 132, 227), 3)):
        draw.line([point(step, loss) for step, loss in enumerate(curve)], fill=colour, width=width)
    draw.text((left, 2), f"loss    {caption}", "black", font)
    draw.text((left, bottom + 4), f"{len(losses)} steps", "black", font)
    return chart


# -------------------------------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Trains a visuomotor policy end to end on rendered scenes.")
    parser.add_argument("--model", help="hub id or local folder (default: a small one with random weights)")
    parser.add_argument("--steps", type=positive, default=700, help="optimiser steps (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=16, help="scenes per step and process, each with three instructions"
    )
    parser.add_argument("--held-out", type=positive, default=128, help="scenes to measure on (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--freeze-vision", action="store_true", help="as --cached-features does: train the rest")
    parser.add_argument("--scenes", type=positive, help="train on so many scenes, again and again (default: new ones)")
    parser.add_argument("--cached-features", type=Path, metavar="FOLDER", help="keep the scenes' image features there")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; the weights stay float32")
    parser.add_argument("--output", type=Path, default="policy.png", help="the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and of the head's weights")
    parser.add_argument("--device", type=torch.device, help="cpu, cuda, ... (default: cuda if there is one)")
    return parser


def positive(number: str) -> int:
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return int(number)


if __name__ == "__main__":
    main()
