"""A prompt that the decoder has run once, and tokens that run behind it as often as one likes: `prefill`, `extend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import TextConfig
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import FeatureMaps, Features
from qwen_batched.inputs.checks import Resize, can_read, describe_tensor
from qwen_batched.inputs.prepared import EARLIER_NAMES
from qwen_batched.inputs.prepared import NAMES as PREPARED_NAMES
from qwen_batched.inputs.pytree_nodes import register_node
from qwen_batched.inputs.transformers_batch import INERT, NAMES
from qwen_batched.model.attention import KVCache
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.pipeline import Prefilled
from qwen_batched.outputs import VLOutput
from qwen_batched.runtime.host_copies import to_device
from qwen_batched.runtime.idle_autocast import without_idle_autocast
from qwen_batched.training.api import Trainable


class PromptCache:
    """A prompt's keys and values, for `extend` of the model that made it. It never changes.

    Attributes:
        output: The prompt's `VLOutput`, as `forward` returns it but without logits: hidden states, masks, positions.
    """

    def __init__(self, prefilled: Prefilled, owner: object) -> None:
        self.output: VLOutput = prefilled.output
        self.owner = owner  # stands for the model as it is placed now
        # Of B samples, a sample's tokens first: keys (L, B, C, K, E), rotated, values, lengths (B,), the position of
        # the next token (B,); and the prompt's mask (B, C), apart from the output's and the batch's, which callers own.
        keys, mask = prefilled.keys_LBCKE, prefilled.output.attention_mask.clone()
        self.tensors = (*prefilled[1:], F.pad(mask, (0, keys.shape[2] - mask.shape[1])))

    @property
    def shape(self) -> tuple[int, int]:
        """B samples, padded to S tokens."""
        return tuple(self.output.attention_mask.shape)

    def __repr__(self) -> str:
        batch, length = self.shape
        return f"PromptCache(batch={batch}, length={length}, layers={len(self.tensors[0])})"


@dataclass(frozen=True, eq=False)
class Suffix:
    """T tokens behind each of B prompts. To PyTorch's pytrees its tensors are children, all else is the structure."""

    tokens: Tensor  # embeddings (B, T, D), or int64 ids (B, T); like the others on the host or on `device`
    position_ids: Tensor | None  # int64 (3, B, T); None for those that follow the prompt
    attention_mask: Tensor | None  # bool (B, T), (B, C + T), (B, T, T) or (B, T, C + T)
    causal: bool
    is_checked: bool  # whether the host has seen the ids
    device: torch.device  # where it runs


BATCH_NAMES = {*PREPARED_NAMES, *EARLIER_NAMES, *NAMES, *INERT}  # entries of batches that `prefill` takes
FACTS = ("causal", "is_checked", "device")


register_node(Suffix, FACTS)


def read_suffix(
    tokens: Tensor,
    position_ids: Tensor | None,
    causal: bool,
    attention_mask: Tensor | None,
    cache: PromptCache,
    text: TextConfig,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Suffix:
    """A checked suffix; raises `TypeError` or `ValueError` where it does not fit behind the cached prompts."""
    batch, length = cache.shape
    named = {"embeds_or_ids": tokens, "position_ids": position_ids, "attention_mask": attention_mask}
    for name, value in named.items():
        if value is None and name != "embeds_or_ids":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(value)}")
        checks.check_plain(name, value)
        checks.check_device(name, value, device)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {shown(causal)}")
    is_ids, is_checked = tokens.dtype in (torch.int64, torch.int32), True
    if is_ids:
        if tokens.ndim != 2 or len(tokens) != batch or tokens.numel() == 0:
            raise ValueError(f"ids must be int64 ({batch}, T) to fit the cache, got {describe_tensor(tokens)}")
        tokens, is_checked, rows = tokens.long(), can_read(tokens), text.vocab_size
        if is_checked and (int(tokens.min()) < 0 or int(tokens.max()) >= rows):
            raise ValueError(f"ids must be from 0 to {rows - 1}, got {int(tokens.min())} to {int(tokens.max())}")
    else:
        size = tokens.shape[1] if tokens.ndim == 3 else "T"
        checks.check_embeds("embeds_or_ids", tokens, (batch, size), text.hidden_size, dtype)
    count = tokens.shape[1]
    checks.check_room(length, count, text.max_position_embeddings)
    if position_ids is not None:
        shapes = ((batch, count), (3, batch, count), (4, batch, count))
        if tuple(position_ids.shape) not in shapes or position_ids.dtype not in (torch.int64, torch.int32):
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"position_ids must be int64 {expected}, got {describe_tensor(position_ids)}")
        given = position_ids.expand(3, -1, -1) if position_ids.ndim == 2 else position_ids[-3:]
        position_ids = given.long()
    if attention_mask is not None:
        attention_mask = _read_mask(attention_mask, batch, length, count)
        if attention_mask.shape[-1] > count:  # of the prompt too
            room = cache.tensors[-1].shape[1] - length
            attention_mask = torch.cat(
                (F.pad(attention_mask[..., :length], (0, room)), attention_mask[..., length:]), -1
            )
    return Suffix(tokens, position_ids, attention_mask, causal, is_checked, device)


def _read_mask(mask: Tensor, batch: int, length: int, count: int) -> Tensor:
    given = mask
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    shapes = ((batch, count), (batch, length + count), (batch, count, count), (batch, count, length + count))
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"attention_mask must be {expected} to fit the cache, got {describe_tensor(given)}")
    if mask.dtype.is_complex or (mask.dtype.is_floating_point and mask.ndim == 3):
        # One that is added to scores says the opposite of one that is 1 for what may be seen.
        raise ValueError(f"attention_mask must be bool, or of integers, not 0 to be seen, got {mask.dtype}")
    return mask if mask.dtype == torch.bool else mask != 0


def run_suffix(
    decoder: Decoder,
    suffix: Suffix,
    keys_LBCKE: Tensor,
    values_LBCKE: Tensor,
    lengths: Tensor,
    next_positions: Tensor,
    prompt_mask: Tensor,
) -> Tensor:
    """Last hidden states (B, T, D) of tokens behind a prompt; NaN for samples with ids that have no embedding."""
    suffix = to_device(suffix, suffix.device)
    embeds, mask, positions, is_valid_B = suffix.tokens, suffix.attention_mask, suffix.position_ids, None
    if not embeds.dtype.is_floating_point:
        ids, rows = embeds, decoder.config.vocab_size
        if not suffix.is_checked:
            is_valid_B = ((ids >= 0) & (ids < rows)).all(dim=1)
            ids = ids.clamp(0, rows - 1)
        embeds = decoder.embed_tokens(ids)
    batch, count = embeds.shape[:2]
    is_token = None if mask is None or mask.ndim != 2 else mask[:, -count:]
    if is_token is not None:
        embeds = embeds.masked_fill(~is_token[..., None], 0)  # of what it holds a NaN would survive a weight of 0
    if positions is None:
        if is_token is None:
            is_token = torch.ones(batch, count, dtype=torch.bool, device=embeds.device)
        steps = is_token.long().cumsum(1).sub(1).clamp(min=0)
        positions = (next_positions[:, None] + steps).expand(3, -1, -1)
    causal = suffix.causal and (mask is None or mask.ndim == 2)
    visible = None if mask is None else _visible(mask, prompt_mask, count)
    hidden = decoder.extend(embeds, positions, KVCache.holding(keys_LBCKE, values_LBCKE, lengths), causal, visible)
    return hidden if is_valid_B is None else hidden.masked_fill(~is_valid_B[:, None, None], torch.nan)


def _visible(mask: Tensor, prompt_mask: Tensor, count: int) -> Tensor:
    """A suffix's mask as bool (B, T, C + T), the prompt's places as the cache has them: its tokens first."""
    batch, length = prompt_mask.shape
    of_prompt, of_suffix = mask[..., :-count], mask[..., -count:]
    if mask.ndim == 2:
        # What is padding sees itself too: it must see something.
        itself = torch.eye(count, dtype=torch.bool, device=mask.device)
        of_suffix = of_suffix[:, None] | itself
        of_prompt = of_prompt[:, None].expand(-1, count, -1)
    if of_prompt.shape[-1] == 0:
        of_prompt = torch.ones(batch, count, length, dtype=torch.bool, device=mask.device)
    else:
        tokens_first_BS = torch.argsort((~prompt_mask).to(torch.uint8), dim=1, stable=True)
        of_prompt = of_prompt.gather(2, tokens_first_BS[:, None].expand(-1, count, -1))
    return torch.cat((of_prompt, of_suffix), dim=2)


class WithPromptCache(Trainable):
    """A model whose prompts can be kept, with tokens run behind them."""

    @without_idle_autocast
    def prefill(
        self,
        images: Tensor | Sequence[Tensor] | None = None,
        texts: Sequence[str] | str | None = None,
        camera_mask: Tensor | None = None,
        layers: Sequence[int] = (-1,),
        norm: str = "post",
        template: str = "chat",
        resize: Resize = "hf",
        cuda_graph: bool = True,
        system: str | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: FeatureMaps | Features | None = None,
        **batch: Any,
    ) -> PromptCache:
        """Runs a prompt once, and keeps its keys and values for `extend`. No gradients.

        On a GPU the second prompt of a shape is captured as a CUDA graph, as in `forward`.

        Args:
            images, texts, camera_mask, layers, norm, template, resize, cuda_graph, system, inputs_embeds,
                image_features: As for `forward`. All decoder blocks are run, whatever the layers.
            **batch: A prepared batch or one of transformers', as for `forward`.

        Returns:
            The cache; its `output` is what `forward` returns for the prompt, without logits.

        Raises:
            TypeError, ValueError: An argument is not as described, or gradients are wanted: of embeddings or features,
                or of parameters of a model in training mode. Raised before any work.
        """
        given = {name for name, value in batch.items() if value is not None}
        if unexpected := sorted(given - BATCH_NAMES):
            raise TypeError(f"prefill() got an unexpected argument {unexpected[0]!r}")
        self._check_no_gradient("prefill", inputs_embeds, *_pytree.tree_leaves(image_features))
        batch |= {"inputs_embeds": inputs_embeds, "image_features": image_features}
        options = {"camera_mask": camera_mask, "template": template, "resize": resize, "system": system}
        call = self._read(images, texts, batch, **options)
        wanted = self._check_wanted(layers, norm, None, has_targets=batch.get("labels") is not None)
        return PromptCache(self._calls.prefill(self._caller(cuda_graph), call, wanted), self._placement)

    @without_idle_autocast
    def extend(
        self,
        cache: PromptCache,
        embeds_or_ids: Tensor,
        position_ids: Tensor | None = None,
        causal: bool = True,
        attention_mask: Tensor | None = None,
        cuda_graph: bool = True,
    ) -> Tensor:
        """Last hidden states of tokens behind a prompt, (B, T, D), after the final norm. The cache does not change.

        Each call starts from the prompt again: ten steps of a denoising loop are ten calls with one cache. No
        gradients: in training run the whole sequence through `forward`, with `inputs_embeds`. On a GPU the second call
        of a shape is captured as a CUDA graph.

        Args:
            cache: What `prefill` of this model returned for B prompts, padded to S. Parameters must be as they were.
            embeds_or_ids: Embeddings (B, T, D), or int64 token ids (B, T), on the host or on the model's device.
            position_ids: Rope positions, int64 (B, T), (3, B, T) or (4, B, T) as transformers takes them; None for
                those that follow each prompt's, padding of `attention_mask` left out.
            causal: Whether a new token sees the new ones before it and itself; otherwise it sees all of them. All see
                the whole prompt.
            attention_mask: Bool or integers. (B, T), False on padding among the new tokens; or (B, S + T), of the
                prompt too. Or, in place of `causal`, what each new token sees: (B, T, T) of the new ones, or
                (B, T, S + T) of the prompt too, where the batch has it; with (B, 1, ...) as transformers writes it.
                What stands on padding is finite and means nothing.
            cuda_graph: False never captures and never replays.

        Raises:
            TypeError: An argument is of another type.
            ValueError: The cache is not of this model, or the model was moved since; shapes or ids do not fit; prompt
                and new tokens exceed the model's maximum; or gradients are wanted. Raised before any work.
        """
        if not isinstance(cache, PromptCache):
            raise TypeError(f"cache must be what prefill returned, got {shown(cache)}")
        if cache.owner is not self._placement:
            raise ValueError("the cache is of another model, or the model was moved since: call prefill again")
        text, device = self.config.text, self.device
        rows = embeds_or_ids, position_ids, causal, attention_mask
        suffix = read_suffix(*rows, cache, text, device, self._embedding_dtype())
        self._check_no_gradient("extend", embeds_or_ids)
        return self._calls.extend(self._caller(cuda_graph), cache, suffix)

    def _check_no_gradient(self, name: str, *tensors: object) -> None:
        if not torch.is_grad_enabled():
            return
        is_trained = self.training and any(parameter.requires_grad for parameter in self.parameters())
        if is_trained or any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            raise ValueError(f"{name} gives no gradients: call it under torch.no_grad(), or forward with inputs_embeds")
