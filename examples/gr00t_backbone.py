"""The backbone of GR00T N1.7 and LeRobot's groot policy: Cosmos-Reason2-2B's first decoder blocks, before the norm.

    python examples/gr00t_backbone.py                                     # a tiny model with made-up weights
    python examples/gr00t_backbone.py --model nvidia/Cosmos-Reason2-2B    # the real one, on a GPU

Prints the shapes of what the policy's action head takes, and how long a call takes once its shape has come before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_batched import BatchedVL
from qwen_batched.testing import write_checkpoint

SELECT_LAYER = 16  # of N1.7's checkpoints; LeRobot's smaller ones take 12


class Backbone(nn.Module):
    """Frames and instructions to the hidden states that the action head attends to."""

    def __init__(self, name: str | Path, select_layer: int = SELECT_LAYER, **options: object) -> None:
        """Takes `BatchedVL.from_pretrained`'s options; blocks above `select_layer` and the head are not loaded."""
        super().__init__()
        self.model = BatchedVL.from_pretrained(name, num_layers=select_layer, lm_head=False, **options)

    def set_trainable_parameters(self, tune_llm: bool, tune_visual: bool) -> None:
        """Says which of the two networks are trained."""
        self.model.model.requires_grad_(tune_llm)
        self.model.visual.requires_grad_(tune_visual)

    def forward(self, frames: Tensor, texts: list[str], view_mask: Tensor | None = None) -> dict[str, Tensor]:
        """One row of hidden states for each token of the prompt.

        Args:
            frames: (B, T, V, 3, H, W) of T time steps with V views, oldest first; uint8, or floating in 0..1.
            texts: B instructions.
            view_mask: Bool (B, T, V), False where a view is missing.

        Returns:
            `backbone_features` (B, S, D) before the final norm; `backbone_attention_mask` and `image_mask`, bool
            (B, S).
        """
        mask = None if view_mask is None else view_mask.flatten(1, 2)
        out = self.model(frames.flatten(1, 2), texts, camera_mask=mask, norm="pre")
        return {
            "backbone_features": out.last_hidden_state,
            "backbone_attention_mask": out.attention_mask,
            "image_mask": out.image_mask,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or hub id")
    parser.add_argument("--select-layer", type=int, default=SELECT_LAYER)
    parser.add_argument("--calls", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name, layers = options.model, options.select_layer
        if name is None:
            name, layers = write_checkpoint(Path(folder) / "tiny", "qwen3-vl-tiny", image={"min_pixels": 32 * 32}), 3
        backbone = Backbone(name, layers).eval()
    size = 256 if options.model else 64
    frames = torch.randint(0, 256, (1, 2, 2, 3, size, size), dtype=torch.uint8)
    times = []
    with torch.inference_mode():
        for _ in range(options.calls + 3):
            start = time.perf_counter()
            found = backbone(frames, ["pick up the apple and place it on the plate"])
            found["backbone_features"].sum().item()  # waits
            times.append(1e3 * (time.perf_counter() - start))
    for key, value in found.items():
        print(f"{key:24s} {tuple(value.shape)} {value.dtype}")
    print(f"{statistics.median(times[3:]):.1f} ms a call on {backbone.model.device}")


if __name__ == "__main__":
    main()
