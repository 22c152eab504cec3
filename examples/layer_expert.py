"""A small action expert of its own that attends to the keys and values of some of the backbone's decoder blocks.

    python examples/layer_expert.py     # a tiny model, trained from nothing in a minute on a CPU
    python examples/layer_expert.py --model Qwen/Qwen2.5-VL-3B-Instruct --blocks 8 17 26 --lr 1e-5    # on a GPU

As in pi0 and RDT2 the expert is narrower than the backbone, and each of its blocks attends to what one block of the
backbone has made of the prompt. Both are trained together: gradients reach the backbone through its keys and values. To
act, the backbone runs once, and only the expert in each of ten Euler steps. Prints the gradients' norms, and the error
on held-out samples before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from flow_matching import (
    CAMERAS,
    PROMPT,
    NoisyActions,
    argument_parser,
    flow_loss,
    frame_size,
    held_out_batch,
    held_out_error,
    integrate,
    load_backbone,
    train,
)
from reaching_task import Batch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qwen_batched import QwenBatchedVL
from qwen_batched.integrations.lerobot import from_lerobot
from qwen_batched.outputs import VLOutput

WIDTH = 64


class ExpertBlock(nn.Module):
    """Attention to the prompt and to all actions, then an MLP: (B, T, WIDTH) to (B, T, WIDTH)."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_size = num_kv_heads, head_size
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (num_heads + 2 * num_kv_heads) * head_size)
        self.out = nn.Linear(num_heads * head_size, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, keys_BSKE: Tensor, values_BSKE: Tensor, mask_BS: Tensor) -> Tensor:
        heads_BTHE = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_size))
        kv_heads = self.num_kv_heads
        q, own_k, own_v = heads_BTHE.split([heads_BTHE.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
        k, v = torch.cat([keys_BSKE, own_k], dim=1), torch.cat([values_BSKE, own_v], dim=1)
        # Keys of the prompt are rotated by where they stand, and these queries are not: they ask from place 0.
        visible = torch.cat([mask_BS, mask_BS.new_ones(x.shape[:2])], dim=1)[:, None, None]  # without padding
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        seen = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class LayerExpert(nn.Module):
    """A batch in LeRobot's form and noisy actions to their velocity."""

    def __init__(self, backbone: QwenBatchedVL, blocks: Sequence[int]) -> None:
        """`blocks`: which decoder blocks of the backbone the expert's blocks attend to, zero-based, in their order."""
        super().__init__()
        text = backbone.config.text
        self.backbone, self.blocks = backbone, tuple(blocks)
        self.resize = frame_size(backbone)
        self.embed = NoisyActions(WIDTH)
        self.expert = nn.ModuleList(
            ExpertBlock(text.num_attention_heads, text.num_key_value_heads, text.head_dim) for _ in blocks
        )
        self.velocity = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, batch: Batch, noisy: Tensor, times: Tensor) -> Tensor:
        """Velocities (B, HORIZON, 2) of noisy actions (B, HORIZON, 2) at times (B,), with gradients."""
        return self.velocity_given(self.look(batch), noisy, times)

    @torch.no_grad()
    def act(self, batch: Batch, noise: Tensor) -> Tensor:
        """The chunk (B, HORIZON, 2) that `noise` becomes. The backbone runs once."""
        seen = self.look(batch)
        return integrate(lambda noisy, times: self.velocity_given(seen, noisy, times), noise)

    def look(self, batch: Batch) -> VLOutput:
        """The backbone's output, with keys and values (B, S, K, E) of the chosen blocks."""
        given = from_lerobot(batch, CAMERAS)
        return self.backbone(**given, template=PROMPT, resize=self.resize, keys_values=self.blocks)

    def velocity_given(self, seen: VLOutput, noisy: Tensor, times: Tensor) -> Tensor:
        x = self.embed(noisy, times)
        for block, (keys_BSKE, values_BSKE) in zip(self.expert, seen.keys_values, strict=True):
            x = block(x, keys_BSKE, values_BSKE, seen.attention_mask)
        return self.velocity(x)


def gradient_norms(policy: LayerExpert, batch: Batch) -> dict[str, float]:
    """Of the tower's, the decoder's and the expert's parameters, after one backward pass."""
    flow_loss(policy, batch).backward()
    parts = {"tower": policy.backbone.visual, "decoder": policy.backbone.model, "expert": policy.expert}
    norms = {name: _norm(part.parameters()) for name, part in parts.items()}
    policy.zero_grad()
    return norms


def _norm(parameters: Iterable[Tensor]) -> float:
    return torch.stack([x.grad.norm() for x in parameters if x.grad is not None] or [torch.zeros(())]).norm().item()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1], help="decoder blocks (default: 0 1)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model, args.device, num_layers=max(args.blocks) + 1)
    policy = LayerExpert(backbone, args.blocks).to(backbone.device)
    held_out = held_out_batch(args, backbone.device)
    norms = ", ".join(f"{name} {norm:.2g}" for name, norm in gradient_norms(policy, held_out).items())
    print(f"gradient norms  {norms}")
    before = held_out_error(policy, held_out)
    losses = train(policy, args)
    print(f"loss            {losses[0]:.3f} -> {sum(losses[-20:]) / len(losses[-20:]):.3f}, the mean of the last steps")
    print(f"held-out error  {before:.1f} cm before training, {held_out_error(policy, held_out):.1f} cm after")


if __name__ == "__main__":
    main()
