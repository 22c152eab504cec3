"""Float32 logits -> one token for each sample: greedy, or drawn."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_batched.arguments import shown


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature)
    top_k: int = 0  # draw among the k likeliest tokens; 0 for all
    # Draw among the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751); 1 for
    # all.
    top_p: float = 1.0
    seed: int | None = None  # makes draws reproducible; None for a new seed at every call

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
        if type(self.top_k) is not int or type(self.seed) not in (int, type(None)):
            both = f"{shown(self.top_k)} and {shown(self.seed)}"
            raise TypeError(f"top_k must be an int and seed an int or None, got {both}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0 <= self.temperature <= sys.float_info.max or self.top_k < 0 or not 0 < self.top_p <= 1:
            expected = "temperature must be finite and at least 0, top_k at least 0 and top_p in (0, 1]"
            raise ValueError(f"{expected}, got {self.temperature}, {self.top_k}, {self.top_p}")

    def uniforms(self, batch: int, steps: int, device: torch.device) -> Tensor | None:
        """A float64 number in [0, 1) for each token to draw, (batch, steps); None where none is drawn."""
        if self.temperature == 0:
            return None
        generator = None if self.seed is None else torch.Generator(device).manual_seed(self.seed)
        # Step by step, so that more steps leave the numbers of the first ones alone.
        return torch.rand(steps, batch, generator=generator, device=device, dtype=torch.float64).t()

    def choose(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """One token (B,) from float32 logits (B, vocabulary); `uniform` (B,) says where in the distribution.

        From logits that are not finite comes any token, but always one of the vocabulary.
        """
        if uniform is None:
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
        probabilities = ordered.double().softmax(dim=-1)
        cumulative = probabilities.cumsum(dim=-1)
        place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)
        # The product may round up to the whole; of NaN nothing is above 0.
        last = ((probabilities > 0).sum(dim=-1) - 1).clamp(min=0)
        return tokens.gather(1, torch.minimum(place, last)[:, None])[:, 0]
