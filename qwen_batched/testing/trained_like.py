"""Made-up weights whose activations look like a trained model's, where those of random weights do not.

Random weights give streams without outliers and attention that is nearly flat, and rounding to bfloat16 is kind to
both. These weights start from the random ones and have what trained models have, by the mechanisms of trained models:

- **Massive channels** (arXiv:2402.17762): after block `WRITER`, a few channels of the residual stream are 1e2 to 1e3
  times the median, on every token, in the vision tower and in the decoder. Units of that block's MLP write them, so
  that its hidden activations have outliers too: gated ones, whose gate and up are the same, or, in an MLP without a
  gate, a few with a large bias (`Writers`).
- **Norms that are not uniform**: their weights are lognormal, large where the norm divides by massive channels, and
  small on those channels.
- **Attention that is peaked**: queries and keys prefer near tokens, by way of the rotary embedding, in some heads more
  than in others. In the decoder <|im_start|>, the first token, has a massive channel of its own, and most heads look at
  it: an attention sink (arXiv:2309.17453), whose values are small. Biases do it (`peaked_heads.py`). A decoder without
  them has a channel that is the same on every token, from the embeddings on, and the heads' norms make it count.

They are not a trained model's: features and texts mean nothing. How far apart two implementations are on them is like a
trained model's in kind, and need not be in size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from qwen_batched.testing.peaked_heads import CONSTANT
from qwen_batched.testing.presets import Config
from qwen_batched.testing.residual_stream import BLOCK, CONSTANT_SIZE, MARK, MARK_SIZE, WRITER, Stream
from qwen_batched.testing.weights import Shape, random_generator, random_tensor

_MLP = re.compile(BLOCK + r"mlp\.(gate_proj|up_proj|down_proj|(?:linear_)?fc[12])\.(weight|bias)")
_ATTENTION = re.compile(BLOCK + r"(?:self_)?attn\.(qkv|q_proj|k_proj|v_proj)\.(weight|bias)")
_HEAD_NORM = re.compile(BLOCK + r"self_attn\.[qk]_norm\.weight")
_NORM = re.compile(
    BLOCK + r"(?:norm[12]|input_layernorm|post_attention_layernorm)\.weight"
    r"|visual\.(?:merger|deepstack_merger_list\.\d+)\.(?:ln_q|norm)\.weight|model\.norm\.weight"
)
_FEATURES = re.compile(r"visual\.(merger|deepstack_merger_list\.\d+)\.(?:mlp\.2|linear_fc2)\.(weight|bias)")
# Besides embeddings and features, nothing before the sink is written may write the mark, and nothing before the massive
# channels the constant one.
_BEFORE_SINK = "model.layers.0.self_attn.o_proj.weight"
_BEFORE_MASSIVE = re.compile(rf"model\.layers\.[0-{WRITER}]\.(?:self_attn\.o_proj|mlp\.down_proj)\.weight")


def trained_like_tensors(
    shapes: Mapping[str, Shape], seed: int, text: Config, vision: Config, sink_token: int
) -> Callable[[str], Tensor]:
    """Returns what makes the float32 tensor of a published name; `sink_token` is the id of <|im_start|>."""
    has_bias = "model.layers.0.self_attn.q_proj.bias" in shapes
    tower, decoder = Stream.of_vision(vision), Stream.of_text(text, has_bias)

    def make(name: str) -> Tensor:
        values = random_tensor(name, shapes[name], seed)
        stream = tower if name.startswith("visual.") else decoder
        if not has_bias and _BEFORE_MASSIVE.fullmatch(name):
            values[CONSTANT] = 0
        if name == "model.embed_tokens.weight":
            values[sink_token, MARK] = MARK_SIZE
            if not has_bias:
                values[:, CONSTANT] = CONSTANT_SIZE
        elif features := _FEATURES.fullmatch(name):
            values[MARK] = 0
            if not has_bias:
                values[CONSTANT] = CONSTANT_SIZE if features.groups() == ("merger", "bias") else 0
        elif name == _BEFORE_SINK:
            values[MARK] = 0
        elif _HEAD_NORM.fullmatch(name):
            stream.heads.shape_norm(values, random_generator(f"trained-like/{name}", seed))
        elif _NORM.fullmatch(name):
            stream.shape_norm(name, values, random_generator(f"trained-like/{name}", seed))
        elif mlp := _MLP.fullmatch(name):
            gate = name.replace("up_proj", "gate_proj")  # of gated units that write, up is a copy
            stream.shape_mlp(int(mlp[1]), mlp[2], mlp[3], values, lambda: random_tensor(gate, shapes[gate], seed))
        elif attention := _ATTENTION.fullmatch(name):
            # Biases of queries and keys, and the keys' weights, fit each other: all come from the block's own draws.
            generator = random_generator(f"trained-like/{name[: attention.start(2)]}", seed)
            stream.heads.shape(attention[2], attention[3], values, generator)
        return values

    return make
