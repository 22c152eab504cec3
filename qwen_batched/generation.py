"""Prompt embeddings -> new tokens: the decode loop and the choice of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_batched.config import GenerationConfig
from qwen_batched.model.kv_cache import KVCache
from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature).
        top_k: Draw among the k likeliest tokens; 0 for all.
        top_p: Draw among the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020,
            arXiv:1904.09751); 1 for all.
        seed: Makes draws reproducible; None for a new seed at every call.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if type(self.top_k) is not int or type(self.seed) not in (int, type(None)):
            raise TypeError(f"top_k must be an int and seed an int or None, got {self.top_k!r} and {self.seed!r}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be finite and at least 0, top_k at least 0 and top_p in (0, 1], got "
                f"{self.temperature}, {self.top_k}, {self.top_p}"
            )

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of randomness; None for PyTorch's own."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token (B,) from float32 logits (B, vocabulary)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
        # From the likeliest down, in float64: whatever the temperature, that one stays 0 and nothing becomes NaN.
        ordered = ((ordered - ordered[:, :1]).double() / self.temperature).float()
        if self.top_k:
            ordered[:, self.top_k :] = -torch.inf
        if self.top_p < 1:
            likelier = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
            unlikely = likelier >= self.top_p
            unlikely[:, 0] = False  # the likeliest token always stays
            ordered = ordered.masked_fill(unlikely, -torch.inf)
        drawn = torch.multinomial(ordered.softmax(dim=-1), num_samples=1, generator=generator)
        return tokens.gather(1, drawn)[:, 0]


@torch.no_grad()
def generate_tokens(
    decoder: BatchedDecoder,
    head: Callable[[Tensor], Tensor],
    inputs_embeds: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    config: GenerationConfig,
) -> list[Tensor]:
    """The new tokens of each sample, up to and including its end token.

    Args:
        decoder: The language model.
        head: Hidden states (B, D) to logits (B, vocabulary).
        inputs_embeds: (B, S, D).
        input_ids: Int64 (B, S); the repetition penalty (Keskar et al. 2019, arXiv:1909.05858) looks at them.
        position_ids: Int64 (3, B, S).
        attention_mask: Bool (B, S).
        max_new_tokens: At least 1.
        sampling: How tokens are chosen.
        config: The checkpoint's end tokens and repetition penalty.

    Returns:
        B int64 vectors on the decoder's device.
    """
    batch, length = input_ids.shape
    text = decoder.config
    cache = KVCache(
        text.num_hidden_layers, batch, length + max_new_tokens, text.num_key_value_heads, text.head_dim, inputs_embeds
    )
    end_tokens = torch.tensor(config.eos_token_ids, dtype=torch.int64, device=input_ids.device)
    generator = sampling.generator(input_ids.device)
    hidden_BSD = decoder(inputs_embeds, position_ids, attention_mask, cache=cache)[0]
    hidden_BD = last_tokens(hidden_BSD, attention_mask)
    positions_B = position_ids.amax(dim=(0, 2)) + 1
    done_B = torch.zeros_like(positions_B, dtype=torch.bool)
    counts_BW: Tensor | None = None
    tokens: list[Tensor] = []
    for step in range(max_new_tokens):
        logits_BW = head(hidden_BD).float()
        if config.repetition_penalty != 1:
            if counts_BW is None:
                counts_BW = torch.zeros_like(logits_BW).scatter_add_(1, input_ids, attention_mask.float())
            else:
                counts_BW.scatter_add_(1, tokens[-1][:, None], torch.ones_like(logits_BW[:, :1]))
            logits_BW = _penalise(logits_BW, counts_BW > 0, config.repetition_penalty)
        tokens.append(sampling.choose(logits_BW, generator))
        done_B = done_B | torch.isin(tokens[-1], end_tokens)
        if step + 1 == max_new_tokens or bool(done_B.all()):
            break
        hidden_BD = decoder.step(
            decoder.embed_tokens(tokens[-1])[:, None], positions_B[None, :, None].expand(3, -1, 1), cache
        )
        positions_B = positions_B + 1
    return _up_to_end(torch.stack(tokens, dim=1), end_tokens)


def last_tokens(x_BSD: Tensor, attention_mask: Tensor) -> Tensor:
    """The last real token's row of each sample, (B, D), whichever side the padding is on."""
    slots_S = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last_B = (attention_mask * slots_S).amax(dim=1)
    return x_BSD.gather(1, last_B[:, None, None].expand(-1, 1, x_BSD.shape[-1]))[:, 0]


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _up_to_end(tokens_BS: Tensor, end_tokens: Tensor) -> list[Tensor]:
    is_end = torch.isin(tokens_BS, end_tokens)
    lengths = (is_end.cumsum(dim=1) - is_end.long() == 0).sum(dim=1).tolist()
    return [row[:length] for row, length in zip(tokens_BS, lengths, strict=True)]
