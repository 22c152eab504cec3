"""Attention heads that prefer near tokens and the sink, by their projections' weights and biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What heads read of the stream: the sink's channel, and one that is the same on every token and stands for biases.
SINK, CONSTANT = 1, 2
SINK_SIZE = 5.0  # of the sink's channel behind a norm; the constant's is 1

# Of a token itself above far ones, by network, and of the sink above all others; in a head of strength 1.
VISION_LOCAL, TEXT_LOCAL, SINK_SCORE = 10.0, 6.0, 10.0
SINK_QUERY = 4.0  # length of the queries' bias towards the sink
STRENGTH_DEVIATION = 0.5  # of the logarithms of heads' strengths
# Of a head's rotary pairs: those that tell tokens near each other apart, and those that turn next to nothing.
FAST_SHARE, SLOW_SHARE = 0.2, 0.125

# Where heads are normalised, lengths count beside that of a projection's random part. A score is then at most
# `NORMED_SCORE`; the constant's preferences are as long as the random part, the sink's key is longer.
NORMED_SCORE, NORMED_KEY_SINK = 20.0, 4.0
NORMED_DEVIATION = 0.5  # of the logarithms of the heads' norms' weights


@dataclass(frozen=True)
class Lengths:
    """Of what is added to queries and keys."""

    near: float  # of queries and keys, towards near tokens
    query_sink: float  # of queries, towards the sink
    key_sink: float = 0.0  # of the sink's key


@dataclass(frozen=True)
class Heads:
    """A network's attention heads. A rotary pair p of a head is its components p and p + size / 2."""

    queries: int  # how many heads queries have
    keys: int  # how many heads keys have
    size: int  # of a head
    lengths: Lengths
    fast: Sequence[int]  # pairs that turn by much from a token to the next
    # Pairs that turn so little that a score hardly depends on the distance; none where there is no sink.
    slow: Sequence[int]
    has_bias: bool  # of queries and keys; else the column of the constant channel stands for it

    @classmethod
    def of_vision(cls, heads: int, size: int) -> Heads:
        """The vision tower's. Half of a head's pairs turn with the row, half with the column; the first are fastest."""
        axis = size // 4
        fast = range(math.ceil(FAST_SHARE * axis))
        lengths = Lengths(near=math.sqrt(VISION_LOCAL * math.sqrt(size)), query_sink=SINK_QUERY)
        return cls(heads, heads, size, lengths, [*fast, *(axis + pair for pair in fast)], slow=(), has_bias=True)

    @classmethod
    def of_text(cls, queries: int, keys: int, size: int, fast: int, has_bias: bool) -> Heads:
        """The decoder's; without biases its heads are normalised. `fast` pairs are the fastest."""
        slow, length = range(size // 2 - math.ceil(SLOW_SHARE * (size // 2)), size // 2), math.sqrt(size)
        lengths = Lengths(near=length, query_sink=length, key_sink=NORMED_KEY_SINK * length)
        if has_bias:
            lengths = Lengths(math.sqrt(TEXT_LOCAL * length), SINK_QUERY, SINK_SCORE * length / SINK_QUERY)
        return cls(queries, keys, size, lengths, range(fast), slow, has_bias)

    def shape(self, layer: str, leaf: str, values: Tensor, generator: torch.Generator) -> None:
        """Puts preferences of near tokens and of the sink into a layer's weight or bias."""
        near, sink = self._direction(self.fast, generator), self._direction(self.slow, generator)
        strengths = torch.empty(2, self.queries, 1).normal_(0, STRENGTH_DEVIATION, generator=generator).exp()
        lengths = self.lengths
        near_of_queries, sink_of_queries = (x.repeat_interleave(self.queries // self.keys, 0) for x in (near, sink))
        of_queries = strengths[0] * lengths.near * near_of_queries + strengths[1] * lengths.query_sink * sink_of_queries
        of_keys = lengths.near * near
        preferences = {"qkv": (of_queries, of_keys), "q_proj": (of_queries,), "k_proj": (of_keys,)}
        if layer in preferences and leaf == ("bias" if self.has_bias else "weight"):
            flat = torch.cat([part.flatten() for part in preferences[layer]])
            if self.has_bias:
                values[: len(flat)] += flat
            else:
                values[:, CONSTANT] = flat
        if (layer, leaf) == ("k_proj", "weight"):
            values[:, SINK] = lengths.key_sink / SINK_SIZE * sink.flatten()
        if (layer, leaf) == ("v_proj", "weight"):
            values[:, SINK] = 0

    def shape_norm(self, values: Tensor, generator: torch.Generator) -> None:
        """Makes weights of the norm of a head's queries or keys lognormal."""
        values.normal_(0, NORMED_DEVIATION, generator=generator).exp_()
        values *= math.sqrt(NORMED_SCORE / math.sqrt(self.size)) / values.square().mean().sqrt()

    def _direction(self, pairs: Sequence[int], generator: torch.Generator) -> Tensor:
        """A unit vector for each key head, (keys, size), spread evenly over these pairs at random phases."""
        phases = torch.empty(self.keys, self.size // 2).uniform_(0, 2 * math.pi, generator=generator)
        chosen = torch.zeros(self.size // 2)
        chosen[list(pairs)] = 1 / math.sqrt(max(1, len(pairs)))
        return torch.cat((chosen * phases.cos(), chosen * phases.sin()), dim=-1)
