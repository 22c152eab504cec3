"""Made-up weights whose activations look like a trained model's, where those of random weights do not.

Random weights give streams without outliers and attention that is nearly flat, and rounding to bfloat16 is kind to
both. These weights start from the random ones and have what trained models have, by the mechanisms of trained models:

- **Massive channels** (arXiv:2402.17762): after block `WRITER`, a few channels of the residual stream are 1e2 to 1e3
  times the median, on every token, in the vision tower and in the decoder. Gated units of that block's MLP, whose gate
  and up are the same, write them, so that its hidden activations have outliers too.
- **Norms that are not uniform**: their weights are lognormal, large where the norm divides by massive channels, and
  small on those channels.
- **Attention that is peaked**: biases of queries and keys prefer near tokens, by way of the rotary embedding, in some
  heads more than in others. In the decoder <|im_start|>, the first token, has a massive channel of its own, and most
  heads look at it: an attention sink (arXiv:2309.17453), whose values are small.

They are not a trained model's: features and texts mean nothing. How far apart two implementations are on them is like a
trained model's in kind, and need not be in size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_batched.testing.presets import Config
from qwen_batched.testing.weights import Shape, random_generator, random_tensor

# The decoder's channels that mark <|im_start|> and that are its sink; then, in both streams, the massive ones.
MARK, SINK, MASSIVE = 0, 1, slice(2, 5)
WRITER = 1  # the block that writes the massive channels; where there is only one, that one

# Largest channel over the median after the last block, where it is least; each channel over the next larger one; the
# sink's own channel over the largest.
LAST_RATIO, DECLINE, SINK_RATIO = 200.0, 0.85, 3.0
MEDIAN = 0.6745  # of a normal distribution's absolute values, over its deviation
# Units that write the channels; the deviation of what they see, half of whose square is their mean.
MOST_UNITS, UNIT_GAIN = 512, 4.0

NORM_DEVIATION = 0.5  # of the logarithms of norms' weights
# An ordinary channel's deviation behind a norm that divides by massive ones. These are constant, so that the norm no
# longer keeps the others at bay: at 1 they would grow from block to block without end.
DAMPED = 0.7
# What a sub-layer adds to an ordinary channel's variance, as measured; where norms are damped, this share of it.
VISION_VARIANCE, TEXT_VARIANCE, DAMPED_SHARE = 1.2, 0.65, 0.45

# Of a token itself above far ones, by network, and of the sink above all others; in a head of strength 1.
VISION_LOCAL, TEXT_LOCAL, SINK_SCORE = 10.0, 6.0, 10.0
STRENGTH_DEVIATION = 0.5  # of the logarithms of heads' strengths
# Of a head's rotary pairs: those that tell tokens near each other apart, and those that turn next to nothing.
FAST_SHARE, SLOW_SHARE = 0.2, 0.125
MARK_SIZE, SINK_SIZE, SINK_QUERY = 8.0, 5.0, 4.0  # the embedding's mark; the sink behind a norm; the queries' bias

_BLOCK = r"(?:visual\.blocks|model\.layers)\.(\d+)\."
_NORM = re.compile(_BLOCK + r"(norm1|norm2|input_layernorm|post_attention_layernorm)\.weight")
_MLP = re.compile(_BLOCK + r"mlp\.(gate|up|down)_proj\.(weight|bias)")
_ATTENTION = re.compile(_BLOCK + r"(?:self_)?attn\.(qkv|q_proj|k_proj|v_proj)\.(weight|bias)")
_FINAL_NORMS = ("visual.merger.ln_q.weight", "model.norm.weight")
# Besides the embedding, nothing before the sink is written may write the mark.
_UNMARKED = ("visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias", "model.layers.0.self_attn.o_proj.weight")


def trained_like_tensors(
    shapes: Mapping[str, Shape], seed: int, text: Config, vision: Config, sink_token: int
) -> Callable[[str], Tensor]:
    """Returns what makes the float32 tensor of a published name; `sink_token` is the id of <|im_start|>."""
    tower, decoder = _Stream.of_vision(vision), _Stream.of_text(text)

    def make(name: str) -> Tensor:
        values = random_tensor(name, shapes[name], seed)
        stream = tower if name.startswith("visual.") else decoder
        if name == "model.embed_tokens.weight":
            values[sink_token, MARK] = MARK_SIZE
        elif name in _UNMARKED:
            values[MARK] = 0
        elif _NORM.fullmatch(name) or name in _FINAL_NORMS:
            stream.shape_norm(name, values, random_generator(f"trained-like/{name}", seed))
        elif mlp := _MLP.fullmatch(name):
            gate = name.replace("up_proj", "gate_proj")  # of the units that write, up is a copy
            stream.shape_mlp(int(mlp[1]), mlp[2], mlp[3], values, lambda: random_tensor(gate, shapes[gate], seed))
        elif attention := _ATTENTION.fullmatch(name):
            # Biases of queries and keys, and the keys' weights, fit each other: all come from the block's own draws.
            generator = random_generator(f"trained-like/{name[: attention.start(2)]}", seed)
            stream.heads.shape(attention[2], attention[3], values, generator)
        return values

    return make


@dataclass(frozen=True)
class _Heads:
    """A network's attention heads. A rotary pair p of a head is its components p and p + size / 2."""

    queries: int  # how many heads queries have
    keys: int  # how many heads keys have
    size: int  # of a head
    local: float  # score of a token itself above far ones
    fast: Sequence[int]  # pairs that turn by much from a token to the next
    # Pairs that turn so little that a score hardly depends on the distance; none where there is no sink.
    slow: Sequence[int]

    def shape(self, layer: str, leaf: str, values: Tensor, generator: torch.Generator) -> None:
        """Puts preferences of near tokens and of the sink into a layer's weight or bias."""
        near, sink = self._direction(self.fast, generator), self._direction(self.slow, generator)
        strengths = torch.empty(2, self.queries, 1).normal_(0, STRENGTH_DEVIATION, generator=generator).exp()
        length = math.sqrt(self.local * math.sqrt(self.size))
        near_of_queries, sink_of_queries = (x.repeat_interleave(self.queries // self.keys, 0) for x in (near, sink))
        query_bias = strengths[0] * length * near_of_queries + strengths[1] * SINK_QUERY * sink_of_queries
        biases = {"qkv": (query_bias, length * near), "q_proj": (query_bias,), "k_proj": (length * near,)}
        if leaf == "bias" and layer in biases:
            bias = torch.cat([part.flatten() for part in biases[layer]])
            values[: len(bias)] += bias
        if (layer, leaf) == ("k_proj", "weight"):
            values[:, SINK] = SINK_SCORE * math.sqrt(self.size) / (SINK_SIZE * SINK_QUERY) * sink.flatten()
        if (layer, leaf) == ("v_proj", "weight"):
            values[:, SINK] = 0

    def _direction(self, pairs: Sequence[int], generator: torch.Generator) -> Tensor:
        """A unit vector for each key head, (keys, size), spread evenly over these pairs at random phases."""
        phases = torch.empty(self.keys, self.size // 2).uniform_(0, 2 * math.pi, generator=generator)
        chosen = torch.zeros(self.size // 2)
        chosen[list(pairs)] = 1 / math.sqrt(max(1, len(pairs)))
        return torch.cat((chosen * phases.cos(), chosen * phases.sin()), dim=-1)


@dataclass(frozen=True)
class _Stream:
    """The residual stream of one of the two networks, and what reads and writes it.

    How large channels are is an estimate by the number of sub-layers before: attention and MLP are one each.
    """

    width: int
    depth: int
    mlp_width: int
    heads: _Heads
    variance: float
    has_sink: bool

    @classmethod
    def of_vision(cls, config: Config) -> _Stream:
        """The vision tower's. Half of a head's pairs turn with the row, half with the column; the first are fastest."""
        heads, size = config["num_heads"], config["hidden_size"] // config["num_heads"]
        axis = size // 4
        fast = range(math.ceil(FAST_SHARE * axis))
        pairs = [*fast, *(axis + pair for pair in fast)]
        attention = _Heads(heads, heads, size, VISION_LOCAL, pairs, slow=())
        width, mlp_width = config["hidden_size"], config["intermediate_size"]
        return cls(width, config["depth"], mlp_width, attention, VISION_VARIANCE, has_sink=False)

    @classmethod
    def of_text(cls, config: Config) -> _Stream:
        """The decoder's. The fastest pairs are the temporal ones, by which an image's tokens are all alike."""
        heads, width, mlp_width = config["num_attention_heads"], config["hidden_size"], config["intermediate_size"]
        pairs = width // heads // 2
        fast, slow = range(config["mrope_section"][0]), range(pairs - math.ceil(SLOW_SHARE * pairs), pairs)
        attention = _Heads(heads, config["num_key_value_heads"], 2 * pairs, TEXT_LOCAL, fast, slow)
        return cls(width, config["num_hidden_layers"], mlp_width, attention, TEXT_VARIANCE, has_sink=True)

    def shape_norm(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Makes a norm's weights lognormal, and such that ordinary and massive channels are alike behind it."""
        block = _NORM.fullmatch(name)
        before = 2 * self.depth if block is None else 2 * int(block[1]) + block[2].startswith(("norm2", "post"))
        values.normal_(0, NORM_DEVIATION, generator=generator).exp_()
        values /= values.square().mean().sqrt()
        if before > self._undamped:
            massive = values[MASSIVE] * self._rms(before) / torch.tensor(self._magnitudes)
            values *= DAMPED * self._rms(before) / self._deviation(before)
            values[MASSIVE] = massive
        if self.has_sink:
            values[MARK] = 1.0 if block else 0.05  # a tied head would else prefer the marked token
            values[SINK] = SINK_SIZE * self._rms(before, at_sink=True) / self._sink

    def shape_mlp(self, block: int, layer: str, leaf: str, values: Tensor, gate: Callable[[], Tensor]) -> None:
        """Makes units of the writer write the massive channels, and one unit of the first block the sink.

        A unit whose gate and up are the same number g gives g * silu(g), which is about g * g / 2 on average and never
        much below zero. `values` are changed; `gate` makes the gate's random ones.
        """
        units = min(MOST_UNITS, self.mlp_width // 2)
        if block == self._writer and layer != "down":
            values[:units] = UNIT_GAIN * gate()[:units]
        elif block == self._writer and leaf == "weight":
            values[:, :units] *= 0.1
            values[MASSIVE, :units] = (torch.tensor(self._magnitudes) / (units * UNIT_GAIN**2 / 2))[:, None]
        if block == 0 and self.has_sink:
            mark = MARK_SIZE / math.sqrt(self._deviation(1) ** 2 + MARK_SIZE**2 / self.width)  # behind the norm
            if layer == "down":
                values[:, units] = 0
                values[SINK, units] = self._sink / mark**2
            else:
                values[units] = 0
                values[units, MARK] = 1

    @property
    def _writer(self) -> int:
        return min(WRITER, self.depth - 1)

    @property
    def _undamped(self) -> int:
        """The sub-layers before the massive channels are there."""
        return 2 * self._writer + 1

    @property
    def _magnitudes(self) -> list[float]:
        """Of the massive channels."""
        largest = LAST_RATIO * MEDIAN * self._deviation(2 * self.depth)
        return [largest * DECLINE**index for index in range(MASSIVE.stop - MASSIVE.start)]

    @property
    def _sink(self) -> float:
        return SINK_RATIO * self._magnitudes[0]

    def _deviation(self, before: int) -> float:
        """Of an ordinary channel after so many sub-layers."""
        damped = max(0, before - self._undamped)
        return math.sqrt(self.variance * (1 + before - damped + DAMPED_SHARE * damped))

    def _rms(self, before: int, at_sink: bool = False) -> float:
        """What a norm divides by after so many sub-layers."""
        channels = self._magnitudes if before > self._undamped else []
        if at_sink and before > 1:
            channels = [*channels, self._sink]
        return math.sqrt(self._deviation(before) ** 2 + sum(value**2 for value in channels) / self.width)
