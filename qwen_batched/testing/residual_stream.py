"""The residual stream of a network with massive channels, and the norms and MLPs that read and write it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_batched.testing.peaked_heads import CONSTANT, SINK, SINK_SIZE, Heads
from qwen_batched.testing.presets import Config
from qwen_batched.testing.weights import vision_widths

# The decoder's channel that marks <|im_start|>; in both streams, the massive ones besides the sink's.
MARK, MASSIVE = 0, slice(2, 5)
WRITER = 1  # the block that writes the massive channels; where there is only one, that one

# Largest channel over the median after the last block, where it is least; each channel over the next larger one; the
# sink's own channel over the largest.
LAST_RATIO, DECLINE, SINK_RATIO = 200.0, 0.85, 3.0
MEDIAN = 0.6745  # of a normal distribution's absolute values, over its deviation
MARK_SIZE, CONSTANT_SIZE = 8.0, 2.0  # the embeddings' mark, and their constant channel where heads have no biases

NORM_DEVIATION = 0.5  # of the logarithms of norms' weights
# An ordinary channel's deviation behind a norm that divides by massive ones. These are constant, so that the norm no
# longer keeps the others at bay: at 1 they would grow from block to block without end.
DAMPED = 0.7
SILENT = 0.05  # behind the final norm: a tied head would else prefer the marked token


@dataclass(frozen=True)
class Growth:
    """What a sub-layer adds to an ordinary channel's variance, as measured; where norms are damped, a share of it."""

    variance: float
    damped_share: float


TEXT_GROWTH = Growth(0.65, 0.45)
# By activation, which tells towers with RMS norm from those with LayerNorm, whose biases are not damped.
VISION_GROWTH = {"silu": Growth(1.2, 0.45), "quick_gelu": Growth(1.3, 0.8), "gelu_pytorch_tanh": Growth(1.3, 0.8)}

BLOCK = r"(?:visual\.blocks|model\.layers)\.(\d+)\."
_BLOCK_NORM = re.compile(BLOCK + r"(norm1|norm2|input_layernorm|post_attention_layernorm)\.weight")
_DEEP_NORM = re.compile(r"visual\.deepstack_merger_list\.(\d+)\.norm\.weight")


@dataclass(frozen=True)
class Writers:
    """An MLP's units that write the massive channels."""

    most: int  # how many; no more than half of the MLP's
    gain: float  # of what a unit sees, over a random unit's
    offset: float  # of its bias
    output: float  # about what a unit then gives, on average
    signs: tuple[int, int, int]  # of the massive channels


# By activation. A unit whose gate and up are the same number g gives g * silu(g), which is about g * g / 2 on average
# and never much below zero; one without a gate whose bias is large gives what it sees.
GATED = Writers(most=512, gain=4.0, offset=0.0, output=4.0**2 / 2, signs=(1, 1, 1))
# Those are in networks with LayerNorm, whose mean the channels should hardly move.
UNGATED = Writers(most=8, gain=16.0, offset=64.0, output=64.0, signs=(1, -1, -1))
WRITERS = {"silu": GATED, "quick_gelu": UNGATED, "gelu_pytorch_tanh": UNGATED}


@dataclass(frozen=True)
class Stream:
    """The residual stream of one of the two networks, and what reads and writes it.

    How large channels are is an estimate by the number of sub-layers before: attention and MLP are one each.
    """

    width: int
    depth: int
    mlp_width: int
    heads: Heads
    writers: Writers
    growth: Growth
    has_sink: bool
    deep: tuple[int, ...] = ()  # blocks whose outputs are merged besides the last one's

    @classmethod
    def of_vision(cls, config: Config) -> Stream:
        """The vision tower's."""
        width, mlp_width, _ = vision_widths(config)
        heads = Heads.of_vision(config["num_heads"], width // config["num_heads"])
        writers, growth = WRITERS[config["hidden_act"]], VISION_GROWTH[config["hidden_act"]]
        deep = tuple(config.get("deepstack_visual_indexes", ()))
        return cls(width, config["depth"], mlp_width, heads, writers, growth, has_sink=False, deep=deep)

    @classmethod
    def of_text(cls, config: Config, has_bias: bool) -> Stream:
        """The decoder's. The fastest pairs are the temporal ones, by which an image's tokens are all alike.

        Where sections are interleaved, the fastest ones are of all three axes.
        """
        width, queries = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim", width // queries)
        heads = Heads.of_text(queries, config["num_key_value_heads"], size, config["mrope_section"][0], has_bias)
        depth, mlp_width, writers = config["num_hidden_layers"], config["intermediate_size"], WRITERS["silu"]
        return cls(width, depth, mlp_width, heads, writers, TEXT_GROWTH, has_sink=True)

    def shape_norm(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Makes a norm's weights lognormal, and such that ordinary and massive channels are alike behind it.

        A norm of joined patches has the weights of `width` channels for each.
        """
        block, deep = _BLOCK_NORM.fullmatch(name), _DEEP_NORM.fullmatch(name)
        if block:
            before = 2 * int(block[1]) + block[2].startswith(("norm2", "post"))
        else:
            before = 2 * (self.deep[int(deep[1])] + 1 if deep else self.depth)
        values.normal_(0, NORM_DEVIATION, generator=generator).exp_()
        values /= values.square().mean().sqrt()
        for patch in values.view(-1, self.width):
            self._level(patch, before)
        if self.has_sink:
            values[MARK] = 1.0 if block else SILENT
            values[SINK] = SINK_SIZE * self._rms(before, at_sink=True) / self._sink
        if not self.heads.has_bias:
            constant = self._magnitudes[0] if before > self._undamped else CONSTANT_SIZE
            values[CONSTANT] = (1.0 if block else SILENT) * self._rms(before) / constant

    def _level(self, values: Tensor, before: int) -> None:
        """Makes ordinary and massive channels alike behind a norm."""
        if before > self._undamped:
            massive = values[MASSIVE] * self._rms(before) / torch.tensor(self._magnitudes)
            values *= DAMPED * self._rms(before) / self._deviation(before)
            values[MASSIVE] = massive

    def shape_mlp(self, block: int, layer: str, leaf: str, values: Tensor, gate: Callable[[], Tensor]) -> None:
        """Makes units of the writer write the massive channels, and one unit of the first block the sink.

        `values` are changed; `gate` makes the random ones of the gate, or those of the first layer where none is gated.
        """
        writers, is_last = self.writers, layer in ("down_proj", "fc2", "linear_fc2")
        units = min(writers.most, self.mlp_width // 2)
        if block == self._writer and not is_last:
            values[:units] = writers.gain * gate()[:units]
            if leaf == "bias":
                values[:units] += writers.offset
        elif block == self._writer and leaf == "weight":
            values[:, :units] *= 0.1
            written = torch.tensor(self._magnitudes) * torch.tensor(writers.signs)
            values[MASSIVE, :units] = (written / (units * writers.output))[:, None]
        if block == 0 and self.has_sink:
            mark = MARK_SIZE / math.sqrt(self._deviation(1) ** 2 + MARK_SIZE**2 / self.width)  # behind the norm
            if is_last:
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
        return math.sqrt(self.growth.variance * (1 + before - damped + self.growth.damped_share * damped))

    def _rms(self, before: int, at_sink: bool = False) -> float:
        """What a norm divides by after so many sub-layers."""
        channels = self._magnitudes if before > self._undamped else []
        if at_sink and before > 1:
            channels = [*channels, self._sink]
        return math.sqrt(self._deviation(before) ** 2 + sum(value**2 for value in channels) / self.width)
