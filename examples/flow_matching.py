"""Flow matching of action chunks, and a small task for it: what flow_head.py and layer_expert.py have in common.

In: a policy that says with which velocity noisy actions move. Out: its loss, its action chunks, its training.

A gripper hovers near one of the coloured cubes of `reaching_task.py`; its wrist camera sees the cube. A chunk of
actions is the straight way there, in metres from where the gripper is.

At time t from 0 to 1 the noisy actions are x_t = (1 - t) * noise + t * actions, so that their velocity is
actions - noise: the straight path of flow matching (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023,
arXiv:2209.03003), in the direction of the pi0 paper (Black et al. 2024, arXiv:2410.24164). openpi's code runs t from 1
to 0. As there, early times are drawn more often: what the frame shows matters most while the actions are noise.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable

import torch
from reaching_task import COLOURS, Batch, Scene, random_place, render, to_tensor, wrist_above
from torch import Tensor, nn

from qwen_batched import BatchedVL, QwenBatchedVL
from qwen_batched.testing import write_checkpoint

CAMERAS = ("wrist",)
PROMPT = "{text} {images}"
CELLS = 2  # rows and columns of image tokens of a frame
HORIZON = 8  # actions of a chunk
SIGHT = 0.24  # metres from the gripper, along x and y, within which the wrist camera sees all of a cube
EULER_STEPS = 10

Velocity = Callable[[Tensor, Tensor], Tensor]  # of noisy actions (B, HORIZON, 2) at times (B,)


# ------------------------------------------------------------------------------------------------------------ the task


def draw_batch(rng: random.Random, samples: int) -> Batch:
    """What a data loader over a LeRobotDataset gives with `delta_timestamps` for HORIZON actions."""
    scenes = [_draw_scene(rng) for _ in range(samples)]
    frames = [render(scene.cubes, wrist_above(scene.gripper)) for scene in scenes]
    names, ways = zip(*map(_name_and_way, scenes), strict=True)
    steps = torch.arange(1, HORIZON + 1)[:, None] / HORIZON
    return {
        "observation.images.wrist": torch.stack([to_tensor(frame) for frame in frames]),
        "action": torch.tensor(ways)[:, None] * steps,  # (B, HORIZON, 2)
        "task": [f"reach the {name} cube" for name in names],
    }


def _draw_scene(rng: random.Random) -> Scene:
    x, y = gripper = random_place(rng)
    cube = x + rng.uniform(-SIGHT, SIGHT), y + rng.uniform(-SIGHT, SIGHT)
    return Scene({rng.choice(sorted(COLOURS)): cube}, gripper, wrist_works=True)


def _name_and_way(scene: Scene) -> tuple[str, tuple[float, float]]:
    ((name, (x, y)),) = scene.cubes.items()
    return name, (x - scene.gripper[0], y - scene.gripper[1])


# ------------------------------------------------------------------------------------------------------------ the flow


class NoisyActions(nn.Module):
    """Noisy actions (B, HORIZON, 2) at times (B,) to embeddings (B, HORIZON, width)."""

    FREQUENCIES = 32

    def __init__(self, width: int) -> None:
        super().__init__()
        self.action = nn.Linear(2, width)
        self.step = nn.Parameter(0.1 * torch.randn(HORIZON, width))
        self.time = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        waves = torch.logspace(0, 3, self.FREQUENCIES, device=times.device) * times[:, None]
        time_BD = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        return self.action(noisy) + self.step + time_BD[:, None]


def scaled(batch: Batch) -> Tensor:
    """The actions in units of `SIGHT`, which makes them about as large as the noise."""
    return batch["action"] / SIGHT


def flow_loss(policy: nn.Module, batch: Batch) -> Tensor:
    """The mean squared error of `policy(batch, noisy, times)`, at one time for each sample."""
    actions = scaled(batch)
    noise = torch.randn_like(actions)
    times = 1 - torch.rand(len(actions), device=actions.device) ** (2 / 3)  # 1 - Beta(1.5, 1)
    noisy = noise.lerp(actions, times[:, None, None])
    return (policy(batch, noisy, times) - (actions - noise)).square().mean()


def integrate(velocity: Velocity, noise: Tensor, steps: int = EULER_STEPS) -> Tensor:
    """Actions (B, HORIZON, 2), in units of `SIGHT`, by Euler steps from `noise` at time 0 to time 1."""
    noisy = noise
    for step in range(steps):
        noisy = noisy + velocity(noisy, torch.full((len(noise),), step / steps, device=noise.device)) / steps
    return noisy


# ------------------------------------------------------------------------------------------------- the command line


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or hub id (default: a tiny one with random weights)")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=128, help="samples to measure on (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="cpu, cuda, ... (default: cuda if there is one)")
    return parser


def load_backbone(name: str | None, device: torch.device | None, num_layers: int | None = None) -> QwenBatchedVL:
    """A checkpoint in float32 without its output projection; without a name, a tiny one to be trained from nothing."""
    options = {"dtype": torch.float32, "device": device, "lm_head": False, "num_layers": num_layers}
    if name is not None:
        return BatchedVL.from_pretrained(name, **options)
    vision = {"depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "deepstack_visual_indexes": [0]}
    text = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 320, "head_dim": 32}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "mrope_section": [6, 5, 5]}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(folder, "qwen3-vl-tiny", vision=vision, text=text)
        backbone = BatchedVL.from_pretrained(checkpoint, **options)
    # Made-up norms and biases are large and of either sign, to find faults; training starts from ones and zeros.
    for key, parameter in backbone.named_parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, float("norm" in key and key.endswith("weight")))
    return backbone


def frame_size(backbone: QwenBatchedVL) -> tuple[int, int]:
    """What frames are resized to, for CELLS x CELLS image tokens."""
    vision = backbone.config.vision
    side = CELLS * vision.patch_size * vision.spatial_merge_size
    return side, side


def train(policy: nn.Module, args: argparse.Namespace) -> list[float]:
    """The losses of all steps."""
    device = policy.backbone.device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    rng = random.Random(f"training {args.seed}")
    losses, start = [], time.perf_counter()
    for step in range(args.steps):
        loss = flow_loss(policy, on_device(draw_batch(rng, args.batch_size), device))
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            recent = losses[-50:]
            print(f"step {step + 1:4d}  loss {sum(recent) / len(recent):.3f}  {time.perf_counter() - start:.0f} s")
    return losses


def held_out_batch(args: argparse.Namespace, device: torch.device) -> Batch:
    return on_device(draw_batch(random.Random(f"held out {args.seed}"), args.held_out), device)


def held_out_error(policy: nn.Module, batch: Batch) -> float:
    """How far from the cube the chunks of `policy.act(batch, noise)` end, in centimetres, on average."""
    wanted = batch["action"]
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).to(wanted.device)
    actions = SIGHT * policy.act(batch, noise)
    return 100 * (actions - wanted)[:, -1].norm(dim=1).mean().item()


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
