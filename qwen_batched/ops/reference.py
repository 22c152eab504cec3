"""Every fused operation in plain PyTorch: the specification, and what runs where there is no kernel.

Arithmetic is in float32 (float64 for float64 inputs) and rounds to the input's dtype once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.ops.resize import resize, widen
from qwen_batched.ops.segments import Run, Segments

NO_TOKEN = -1  # no token, no camera, no feature


def add_norm(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds `update` to the residual stream and normalises the sum: LayerNorm with a bias, RMSNorm without.

    Ba et al. 2016 (arXiv:1607.06450), Zhang and Sennrich 2019 (arXiv:1910.07467). `update` and `residual` (..., D), the
    latter None at the start, where the former is the stream; `weight` and `bias` (D,). Returns the normalised stream,
    and the stream itself, both (..., D).
    """
    stream = update if residual is None else residual + update
    x = widen(stream)
    if bias is not None:
        normed = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
        return normed.to(stream.dtype), stream
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * widen(weight)).to(stream.dtype), stream


def add_norm_backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    for_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `add_norm`, from those of its results (`grad_stream` None for zeros) and from its stream.

    Returns (..., D), of the update and of the residual alike; and (D,), of the weight and of the bias, (0,) where they
    are not wanted or there is none.
    """
    x, grad = widen(stream), widen(grad_normed)
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit, scaled = x * scale, grad * weight
    out = scaled - unit * (scaled * unit).mean(-1, keepdim=True)
    out = scale * (out if bias is None else out - scaled.mean(-1, keepdim=True))
    out = out if grad_stream is None else out + grad_stream
    of_weight, of_bias = weight.new_empty(0), weight.new_empty(0)
    if for_weight:
        of_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
    if for_weight and bias is not None:
        of_bias = grad.flatten(0, -2).sum(0).to(bias.dtype)
    return out.to(stream.dtype), of_weight, of_bias


def swiglu(
    gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """SiLU(gate + gate_bias) * (up + up_bias), (..., F) (Shazeer 2020, arXiv:2002.05202).

    `gate` and `up` (..., F), or `gate` alone is both, (..., 2F); the biases (F,), both or none.
    """
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    x, y = widen(gate), widen(up)
    if gate_bias is not None:
        x, y = x + gate_bias, y + up_bias
    return (F.silu(x) * y).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    """The gradient of `swiglu` without biases: (..., F) and its inputs to (..., 2F), the gate's and the up's."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    grad, x, y = widen(grad), widen(gate), widen(up)
    share = torch.sigmoid(x)
    grad_gate = grad * y * share * (1 + x * (1 - share))
    return torch.cat((grad_gate, grad * x * share), dim=-1).to(gate.dtype)


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """Rotary embedding and attention within each segment of each image, (I, P, D).

    Args:
        qkv: (I, P, 3 * D), the packed projection: all queries, then all keys, then all values.
        cos, sin: (P, E / 2) float32, rotation of the first and second half of a head against each other.
        segments: Of an image's P tokens. Windows are segments; so is the whole image.
        num_heads: N; E = D / N.
    """
    heads = qkv.unflatten(-1, (3, num_heads, -1))
    turned = rotate(heads[:, :, :2], cos[:, None, None], sin[:, None, None])
    q_IPNE, k_IPNE, v_IPNE = *turned.unbind(2), heads[:, :, 2]
    outs = [_attend_run(q_IPNE, k_IPNE, v_IPNE, run) for run in segments.runs]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_run(q_IPNE: Tensor, k_IPNE: Tensor, v_IPNE: Tensor, run: Run) -> Tensor:
    """Attention within the equal segments of one run, as one dense batch: (I, run.count * run.length, D)."""
    images, _, heads, size = q_IPNE.shape
    segmented, tokens = (images * run.count, run.length, heads, size), run.count * run.length
    parts = [x.narrow(1, run.start, tokens).reshape(segmented).transpose(1, 2) for x in (q_IPNE, k_IPNE, v_IPNE)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(images, tokens, heads * size)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, updates: Sequence[LowRankUpdate] = ()) -> Tensor:
    """(..., D) to (..., F), with `weight` (F, D) and `bias` (F,), and what adapters add to that."""
    product = out = F.linear(x, weight, bias)
    for update in updates:
        low = F.linear(x[..., : update.a.shape[1]].to(update.a.dtype), update.a)
        added = F.linear(low, update.b) * update.scaling
        out = out + F.pad(added, (update.start, out.shape[-1] - update.columns.stop))
    return out.to(product.dtype)


def add_low_rank(out: Tensor, low: Tensor, factor: Tensor, scaling: float) -> None:
    """Adds `scaling * low @ factor` to `out` in place, (T, R) and (R, F) to (T, F); rounds once, at the end."""
    out.add_(low @ factor, alpha=scaling)


def mixed_product(x: Tensor, y: Tensor, scaling: float, turned: bool) -> Tensor:
    """`scaling * x @ y` in the dtype of `y`, which is wider: (I, K) and (K, R) to (I, R), or to (R, I) if `turned`."""
    out = scaling * (x.to(y.dtype) @ y)
    return out.t().contiguous() if turned else out


def swiglu_linear(
    x: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
) -> Tensor:
    """`swiglu` of the two halves of one product: (..., D) to (..., F), with `gate_up` (2F, D)."""
    return swiglu(*linear(x, gate_up, None, updates).chunk(2, dim=-1), gate_bias, up_bias)


def mrope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    slots: Tensor | None = None,
    rows: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotates the queries and keys of a packed projection, and puts each token where attention wants it.

    Args:
        qkv: (T, (N + 2K) * E): the heads of all queries, then of the keys, then of the values.
        cos, sin: (T, E / 2), from `mrope_tables`; or (P, E / 2), P dividing T: every P tokens begin the table anew.
        num_kv_heads: K.
        slots: Int64 (T,), the row of each token; None where tokens stand as they come.
        rows: How many rows there are; T where `slots` is None.
        q_norm, k_norm: (E,), weights of an RMSNorm of each query's and each key's head, before they are rotated, with
            `eps`; both or none.

    Returns:
        (rows, (N + 2K) * E), zero in rows without a token.
    """
    heads = qkv.unflatten(-1, (-1, 2 * cos.shape[-1]))
    cos, sin = _for_all_tokens(cos, sin, len(qkv))
    turning, values = widen(heads[..., :-num_kv_heads, :]), heads[..., -num_kv_heads:, :]
    if q_norm is not None:
        turning = _unit_heads(turning, eps)[0] * _head_weights(turning, num_kv_heads, q_norm, k_norm)
    turned = rotate(turning, cos[:, None], sin[:, None]).to(qkv.dtype)
    out = torch.cat((turned, values), dim=-2).flatten(-2)
    return out if slots is None else out.new_zeros(rows, out.shape[-1]).index_copy(0, slots, out)


def mrope_backward(
    grad: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    slots: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    for_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `mrope`, from that of its result and, with norms, its `qkv`.

    Returns (T, (N + 2K) * E), and (E,) of each norm's weight, (0,) where it is not wanted.
    """
    grad = grad if slots is None else grad.index_select(0, slots)
    heads = grad.unflatten(-1, (-1, 2 * cos.shape[-1]))
    cos, sin = _for_all_tokens(cos, sin, len(grad))
    of_turned, of_values = widen(heads[..., :-num_kv_heads, :]), heads[..., -num_kv_heads:, :]
    of_turning = rotate(of_turned, cos[:, None], -sin[:, None])
    of_q_norm, of_k_norm = grad.new_empty(0), grad.new_empty(0)
    if q_norm is not None:
        unit, scale = _unit_heads(widen(qkv.unflatten(-1, heads.shape[-2:])[..., :-num_kv_heads, :]), eps)
        if for_weight:
            of_weights = of_turning * unit
            of_q_norm = of_weights[..., :-num_kv_heads, :].flatten(0, -2).sum(0).to(q_norm.dtype)
            of_k_norm = of_weights[..., -num_kv_heads:, :].flatten(0, -2).sum(0).to(k_norm.dtype)
        scaled = of_turning * _head_weights(unit, num_kv_heads, q_norm, k_norm)
        of_turning = scale * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return torch.cat((of_turning.to(grad.dtype), of_values), dim=-2).flatten(-2), of_q_norm, of_k_norm


def _for_all_tokens(cos: Tensor, sin: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Tables (tokens, E / 2) of those that begin anew every so many tokens."""
    if 0 < cos.shape[0] < tokens:
        return cos.repeat(tokens // cos.shape[0], 1), sin.repeat(tokens // sin.shape[0], 1)
    return cos, sin


def _unit_heads(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Heads (..., E) with a root mean square of 1, and what they were multiplied by."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def _head_weights(x: Tensor, num_kv_heads: int, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    """(N + K, E), in the dtype of the queries' and keys' heads `x`."""
    queries = x.shape[-2] - num_kv_heads
    return torch.cat((q_norm.expand(queries, -1), k_norm.expand(num_kv_heads, -1))).to(x.dtype)


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tickets: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One more token of each sample, (B, N * E): rotates it, stores its key and value, attends to all tokens so far.

    Args:
        qkv: (B, (N + 2K) * E), as in `mrope`, with its norms; `cos` and `sin` (B, E / 2).
        keys, values: (B, C, K, E), of the tokens so far, keys rotated; take the new ones.
        lengths: Int64 (B,), how many tokens each sample has so far; below C.
        tickets: Int32 (B * K,), zero before and after: what the kernel's programs share, not used here.
    """
    batch, capacity, num_kv_heads, head_dim = keys.shape
    heads = mrope(qkv, cos, sin, num_kv_heads, None, None, q_norm, k_norm, eps).unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    samples = torch.arange(batch, device=qkv.device)
    # Under autocast keys and values come in another dtype than the cache has.
    keys[samples, lengths], values[samples, lengths] = k.to(keys.dtype), v.to(values.dtype)
    visible = torch.arange(capacity, device=qkv.device) <= lengths[:, None]
    return causal_attention(q[:, None], keys, values, visible)[:, 0]


def mrope_tables(position_ids: Tensor, inv_freq: Tensor, sections: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of multimodal rope (Qwen2-VL, arXiv:2409.12191, section 2.1), sectioned layout.

    Of the frequencies `inv_freq` (E / 2,) float32, the first `sections[0]` turn with the temporal position, the next
    with the height, the last with the width: `position_ids` (3, ...), integers. Returns each (..., E / 2) float32.
    """
    axes = zip(position_ids.to(inv_freq.dtype), inv_freq.split(sections), strict=True)
    angles = torch.cat([positions[..., None] * freqs for positions, freqs in axes], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of GPT-NeoX."""
    first, second = widen(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), (B, S, N * E).

    `q` (B, S, N, E), `k` and `v` (B, C, K, E), K dividing N. `visible` is None for causal attention, where C = S,
    or bool (B, C), the keys that every query of a sample may see.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # PyTorch's float32 GPU kernels do not know grouped heads and would fall back to S x S scores in memory.
    grouped = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and visible is None
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = None if visible is None else visible[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gives each image token of the prompts as many places as its camera's image has cells.

    Rope positions are those of transformers' `get_rope_index` for still images (Qwen2-VL, arXiv:2409.12191, section
    2.1): a text token advances by 1 on all three axes; an image keeps its first position in time, adds its row and its
    column on the other axes, and the text after it goes on at first + max(h, w).

    Args:
        prompts: Int64 (B, U), one image token for each camera that the sample has; `NO_TOKEN` fills up the rows.
        grids: Int64 (V, 2), height and width in merged cells of each camera's image.
        camera_mask: Bool (B, V), False where a camera is absent; None where none is.
        image_token_id, pad_token_id: The token that stands for an image; what fills the ids on padding.
        length, left: S, no less than the longest sequence; whether padding stands on the left.

    Returns:
        The fields of `model.sequence.Sequences`, in its order.
    """
    batch, cameras = prompts.shape[0], grids.shape[0]
    # A text token is a grid of 1 x 1, at index `cameras`: then text and images follow one rule.
    grids = F.pad(grids, (0, 0, 0, 1), value=1)
    heights, widths = grids.unbind(1)
    camera_BU = _camera_of_token(prompts == image_token_id, camera_mask, batch, cameras)
    is_token_BU = prompts != NO_TOKEN
    cells_BU = (heights * widths)[camera_BU] * is_token_BU
    advance_BU = torch.maximum(heights, widths)[camera_BU] * is_token_BU
    ends_BU = cells_BU.cumsum(1)
    totals_B1 = ends_BU[:, -1:]

    slots_BS = torch.arange(length, device=prompts.device).expand(batch, -1)
    if left:
        slots_BS = slots_BS - (length - totals_B1)
    mask_BS = (slots_BS >= 0) & (slots_BS < totals_B1)
    source_BS = torch.searchsorted(ends_BU, slots_BS.contiguous(), right=True).clamp_(max=prompts.shape[1] - 1)

    camera_BS = camera_BU.gather(1, source_BS)
    cell_BS = slots_BS - (ends_BU - cells_BU).gather(1, source_BS)
    first_BS = (advance_BU.cumsum(1) - advance_BU).gather(1, source_BS)
    width_BS = widths[camera_BS]
    positions = torch.stack((first_BS, first_BS + cell_BS // width_BS, first_BS + cell_BS % width_BS))
    first_feature = (heights * widths).cumsum(0) - heights * widths
    is_image_BS = mask_BS & (camera_BS < cameras)
    return (
        prompts.gather(1, source_BS).masked_fill(~mask_BS, pad_token_id),
        mask_BS,
        positions.masked_fill(~mask_BS, 0),
        camera_BS.masked_fill(~is_image_BS, NO_TOKEN),
        (first_feature[camera_BS] + cell_BS).masked_fill(~is_image_BS, NO_TOKEN),
    )


def _camera_of_token(is_image_BU: Tensor, camera_mask: Tensor | None, batch: int, cameras: int) -> Tensor:
    """The camera of each token (B, U): the sample's j-th image is its j-th present camera; `cameras` for text."""
    order = torch.arange(cameras + 1, device=is_image_BU.device).expand(batch, -1)
    if camera_mask is not None:
        present_first = torch.argsort((~camera_mask).to(torch.uint8), dim=1, stable=True)
        order = torch.cat((present_first, order[:, -1:]), dim=1)
    # .long() first: on CUDA, PyTorch 2.11 leaves the cumulative sum of a single bool a bool.
    image_BU = (is_image_BU.long().cumsum(1) - 1).masked_fill(~is_image_BU, cameras)
    return order.gather(1, image_BU)


def frames_to_patches(
    frames: Tensor,
    height: int,
    width: int,
    resize_tables: Sequence[Tensor] | None,
    scale: float,
    mean: Tensor,
    std: Tensor,
    window_order: Tensor,
    patch_size: int,
    merge: int,
    repeat: int,
    dtype: torch.dtype,
    resample_backend: str,
) -> Tensor:
    """Camera frames (I, 3, H, W) to patches (I, P, 3 * repeat * patch_size**2) of `dtype`.

    `resize.resize` to `height` x `width`, then `patchify`; see there for the other arguments.

    Args:
        resize_tables: Those of `geometry.resize_axis`, the width's two and the height's two, from which a kernel
            resizes; None where the frames have their size, or no kernel is to resize them. Not used here.
    """
    pixels = resize(frames, height, width, resample_backend)
    return patchify(pixels, scale, mean, std, window_order, patch_size, merge, repeat).to(dtype)


def patchify(
    pixels: Tensor,
    scale: float,
    mean: Tensor,
    std: Tensor,
    window_order: Tensor,
    patch_size: int,
    merge: int,
    repeat: int,
) -> Tensor:
    """Normalises frames and cuts them into the vision transformer's patches, in window order.

    Args:
        pixels: (I, 3, H, W), floating; H and W are multiples of `patch_size * merge`.
        scale: Brings `pixels` to 0..1.
        mean, std: (3, 1, 1), of pixels in 0..1.
        window_order: (M,) the raster index of the merged cell at each place, from `VisionPlan`.
        patch_size, merge: Side of a patch in pixels, and of a merged cell in patches.
        repeat: Temporal patch size; a still image is repeated over it.

    Returns:
        (I, P, 3 * repeat * patch_size**2). Inside a merged cell patches are in raster order; inside a patch, values are
        ordered by channel, time, row, column.
    """
    pixels = (pixels * scale - mean) / std
    cells = rearrange(
        pixels, "i c (h mh ph) (w mw pw) -> i (h w) (mh mw) c ph pw", mh=merge, mw=merge, ph=patch_size, pw=patch_size
    )
    cells = cells.index_select(1, window_order)[:, :, :, :, None]
    return cells.expand(-1, -1, -1, -1, repeat, -1, -1).flatten(1, 2).flatten(2)
