"""A flow-matching action head: the decoder runs over the prompt and, behind it, over a chunk of noisy actions.

    python examples/flow_head.py     # a tiny model, trained from nothing in a minute on a CPU
    python examples/flow_head.py --model Qwen/Qwen2.5-VL-3B-Instruct --lr 1e-5    # a real one, on a GPU

As in EO-1 the actions are tokens of the same decoder, and causal. In training the sequence is the prompt with the
actions, one forward with `inputs_embeds`. To act, the prompt runs once (`prefill`), and each of ten Euler steps runs
the actions alone behind it (`extend`). Prints how far the two are apart, and the error on held-out samples before and
after training.
"""

from __future__ import annotations

import torch
from flow_matching import (
    CAMERAS,
    HORIZON,
    PROMPT,
    NoisyActions,
    argument_parser,
    frame_size,
    held_out_batch,
    held_out_error,
    integrate,
    load_backbone,
    scaled,
    train,
)
from reaching_task import Batch
from torch import Tensor, nn

from qwen_batched import PromptCache, QwenBatchedVL
from qwen_batched.integrations.lerobot import from_lerobot

PLACEHOLDER = "<|box_end|>"  # any token that is no image: its embedding is replaced


class FlowHead(nn.Module):
    """A batch in LeRobot's form and noisy actions to their velocity."""

    def __init__(self, backbone: QwenBatchedVL) -> None:
        super().__init__()
        width = backbone.config.text.hidden_size
        self.backbone = backbone
        self.resize = frame_size(backbone)
        self.embed = NoisyActions(width)
        self.velocity = nn.Linear(width, 2)

    def forward(self, batch: Batch, noisy: Tensor, times: Tensor) -> Tensor:
        """Velocities (B, HORIZON, 2) of noisy actions (B, HORIZON, 2) at times (B,), with gradients."""
        layout = PROMPT + HORIZON * PLACEHOLDER
        given = self.backbone.processor(**from_lerobot(batch, CAMERAS), template=layout, resize=self.resize)
        prompt_BSD = self.backbone.get_input_embeddings()(given["input_ids"])[:, :-HORIZON]  # padding is on the left
        embeds_BSD = torch.cat([prompt_BSD, self.embed(noisy, times)], dim=1)
        out = self.backbone(**given, inputs_embeds=embeds_BSD)
        return self.velocity(out.last_hidden_state[:, -HORIZON:])

    @torch.no_grad()
    def act(self, batch: Batch, noise: Tensor) -> Tensor:
        """The chunk (B, HORIZON, 2) that `noise` becomes."""
        cache = self.prefill(batch)
        return integrate(lambda noisy, times: self.velocity_behind(cache, noisy, times), noise)

    def prefill(self, batch: Batch) -> PromptCache:
        return self.backbone.prefill(**from_lerobot(batch, CAMERAS), template=PROMPT, resize=self.resize)

    def velocity_behind(self, cache: PromptCache, noisy: Tensor, times: Tensor) -> Tensor:
        """As `forward`, without gradients and without running the prompt again."""
        return self.velocity(self.backbone.extend(cache, self.embed(noisy, times)))


@torch.no_grad()
def largest_difference(policy: FlowHead, batch: Batch) -> float:
    """Between the velocities that training and acting compute for the same noisy actions, at three times."""
    noisy, cache = torch.randn_like(scaled(batch)), policy.prefill(batch)
    times = [torch.full((len(noisy),), time, device=noisy.device) for time in (0.0, 0.5, 0.9)]
    pairs = [(policy(batch, noisy, time), policy.velocity_behind(cache, noisy, time)) for time in times]
    return max((one - other).abs().max().item() for one, other in pairs)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model, args.device)
    policy = FlowHead(backbone).to(backbone.device)
    held_out = held_out_batch(args, backbone.device)
    before = held_out_error(policy, held_out)
    losses = train(policy, args)
    print(f"loss            {losses[0]:.3f} -> {sum(losses[-20:]) / len(losses[-20:]):.3f}, the mean of the last steps")
    print(f"held-out error  {before:.1f} cm before training, {held_out_error(policy, held_out):.1f} cm after")
    difference = largest_difference(policy, held_out)
    print(f"velocities      one forward and prefill with extend differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
