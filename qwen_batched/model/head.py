"""Hidden states -> those that logits are made of, and the loss of answers without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.inputs.sequence import NO_LABEL
from qwen_batched.training.checkpointing import recompute

# With a vocabulary of 151936, float32 logits of so many tokens take 0.3 GB; fewer would leave the product idle.
TOKENS_PER_CHUNK = 512


def last_tokens(x_BSD: Tensor, attention_mask: Tensor) -> Tensor:
    """The last real token's row of each sample, (B, D), whichever side the padding is on."""
    slots_S = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last_B = (attention_mask * slots_S).amax(dim=1)
    return x_BSD.gather(1, last_B[:, None, None].expand(-1, 1, x_BSD.shape[-1]))[:, 0]


def answer_loss(
    hidden_BSD: Tensor,
    attention_mask: Tensor,
    labels_BS: Tensor,
    answer_tokens: int,
    logits: Callable[[Tensor], Tensor],
    reduction: str = "mean",
) -> Tensor:
    """Mean (or "sum") of the cross entropy, in float32, of a batch's labels, each predicted from the token before it.

    Logits are made a chunk of tokens at a time, by `logits`, (T, D) to (T, vocabulary), and made again in the backward
    pass. `labels_BS` are `NO_LABEL` where there is nothing to learn; `answer_tokens`, A, is no fewer than there are
    labels: the host's count of them, so that nothing is read back. Returns a scalar; 0 where there are no labels.
    """
    # The places b * S + s of all labels first, in ascending order.
    places_A = torch.argsort((labels_BS == NO_LABEL).flatten().to(torch.uint8), stable=True)[:answer_tokens]
    before_A = (places_A - 1).clamp(min=0)
    has_before_A = attention_mask.flatten().index_select(0, before_A) & (places_A % labels_BS.shape[1] > 0)
    labels_A = labels_BS.flatten().index_select(0, places_A).masked_fill(~has_before_A, NO_LABEL)
    hidden_AD = hidden_BSD.flatten(0, 1).index_select(0, before_A)

    def loss_of_chunk(hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
        logits_TW = logits(hidden_TD)
        logits_TW = logits_TW.to(torch.promote_types(logits_TW.dtype, torch.float32))
        return F.cross_entropy(logits_TW, labels_T, ignore_index=NO_LABEL, reduction="sum")

    chunks = zip(hidden_AD.split(TOKENS_PER_CHUNK), labels_A.split(TOKENS_PER_CHUNK), strict=True)
    losses = [recompute(loss_of_chunk, *chunk) for chunk in chunks]
    total = torch.stack(losses).sum()
    return total if reduction == "sum" else total / (labels_A != NO_LABEL).sum().clamp(min=1)
