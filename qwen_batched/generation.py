"""Prompt embeddings -> new tokens: the choice of each token, the state between two tokens, and the loop over them."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwen_batched.arguments import shown
from qwen_batched.inputs.batch import Batch
from qwen_batched.inputs.prompt import PromptEncoder, TextStream
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.attention import KVCache
from qwen_batched.model.embedding import embed
from qwen_batched.model.head import last_tokens
from qwen_batched.model.pipeline import Network
from qwen_batched.outputs import GenerateOutput

# A GPU runs so many steps before the host looks at their tokens, and so many more while it looks.
STEPS_PER_POLL = 8
# Stands for a token in `Decoding.tokens` where a sample's logits were not finite. No token has this id.
INVALID = -1


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


class Decoding:
    """A batch between two tokens. All its state is in tensors that stay where they are, and no step reads one back."""

    @torch.inference_mode(False)  # a graph captured outside inference mode may not change what was made inside
    @torch.no_grad()
    def __init__(
        self, network: Network, batch: Batch, max_new_tokens: int, sampling: Sampling, repetition_penalty: float
    ) -> None:
        """Runs the prompts and chooses the first token of each.

        The `repetition_penalty` (Keskar et al. 2019, arXiv:1909.05858) looks at the prompts too; 1 is none.
        """
        visual, self._decoder, self._head = network
        self._sampling, self._penalty = sampling, repetition_penalty
        samples, length = batch.input_ids.shape
        text, device, mask = self._decoder.config, batch.input_ids.device, batch.attention_mask
        inputs_embeds, deep, _ = embed(visual, self._decoder, batch)
        heads, capacity = (text.num_key_value_heads, text.head_dim), length + max_new_tokens
        self._cache = KVCache(text.num_hidden_layers, samples, capacity, *heads, inputs_embeds)
        self._positions_B = batch.rope_positions.amax(dim=(1, 2))
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._uniforms_BN = sampling.uniforms(samples, max_new_tokens, device)
        # Filled from the left by one column a step, the first when made; a sample goes on after its end token.
        # `INVALID` where its logits were not all finite.
        self.tokens = torch.zeros(samples, max_new_tokens, dtype=torch.int64, device=device)
        # What the next step reads: always ids of the vocabulary, since indexing by any other ends a CUDA process.
        self._token_B = torch.zeros(samples, dtype=torch.int64, device=device)
        self._invalid = torch.full((), INVALID, device=device)
        positions = batch.rope_positions.transpose(0, 1)
        options = {"tokens": batch.tokens, "deep_features": deep, "is_padded": batch.is_padded}
        hidden_BSD = self._decoder(inputs_embeds, positions, mask, cache=self._cache, **options)[0]
        logits_BW = self._logits(last_tokens(hidden_BSD, mask))
        self._seen_BW: Tensor | None = None
        if repetition_penalty != 1:
            counts_BW = torch.zeros_like(logits_BW).scatter_add_(1, batch.input_ids, mask.float())
            self._seen_BW = counts_BW > 0
        self._append(logits_BW)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for each sample."""
        embeds_BD = self._decoder.embed_tokens(self._token_B)
        hidden_BD = self._decoder.step(embeds_BD, self._positions_B.expand(3, -1), self._cache)
        self._append(self._logits(hidden_BD))

    @property
    def modules(self) -> list[nn.Module]:
        """Whose parameters a step reads."""
        return [self._decoder, self._head]

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return apply_linear(self._head, hidden_BD).float()

    def _append(self, logits_BW: Tensor) -> None:
        # One pass: a sum is finite where every logit is. In float64, so that large logits do not overflow it.
        is_finite_B = logits_BW.sum(dim=-1, dtype=torch.float64).abs() < torch.inf
        if self._seen_BW is not None:
            penalised_BW = torch.where(logits_BW > 0, logits_BW / self._penalty, logits_BW * self._penalty)
            logits_BW = torch.where(self._seen_BW, penalised_BW, logits_BW)
        uniform_B = None if self._uniforms_BN is None else self._uniforms_BN.index_select(1, self._column)[:, 0]
        self._token_B.copy_(self._sampling.choose(logits_BW, uniform_B))
        self.tokens.index_copy_(1, self._column, torch.where(is_finite_B, self._token_B, self._invalid)[:, None])
        if self._seen_BW is not None:
            self._seen_BW.scatter_(1, self._token_B[:, None], True)
        self._column += 1
        self._positions_B += 1


class HostCopy:
    """A chunk of a batch's tokens on their way to the host."""

    def __init__(self, tokens_BN: Tensor) -> None:
        self._tokens_BN = tokens_BN.to("cpu", non_blocking=True)
        self._arrival = None
        if tokens_BN.is_cuda:
            self._arrival = torch.cuda.current_stream(tokens_BN.device).record_event()

    def rows(self) -> list[list[int]]:
        """The tokens of each sample; waits until they are here."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tokens_BN.tolist()


def generate_texts(
    decoding: Decoding,
    step: Callable[[], None],
    prompts: PromptEncoder,
    end_tokens: Collection[int],
    stream: Callable[[list[str]], None] | None = None,
    progress: bool = False,
) -> GenerateOutput:
    """As `generate_tokens`, and the text of the tokens; `stream` takes text."""
    pieces = TextStream(prompts, len(decoding.tokens))
    of_tokens = None if stream is None else lambda new: stream(pieces.pieces(new))
    tokens, rows, reasons = generate_tokens(decoding, step, end_tokens, of_tokens, progress)
    if stream is not None:
        stream(pieces.rest())
    return GenerateOutput(texts=[prompts.decode(row) for row in rows], token_ids=tokens, finish_reasons=reasons)


def generate_tokens(
    decoding: Decoding,
    step: Callable[[], None],
    end_tokens: Collection[int],
    stream: Callable[[list[list[int]]], None] | None = None,
    progress: bool = False,
) -> tuple[list[Tensor], list[list[int]], list[str]]:
    """The new tokens of each sample, up to and including its end token, or up to where its logits are not finite.

    `step` is `decoding.step`, or its graph. `stream` takes the tokens that have come since its last call, B lists; none
    after a sample's end token. Returns B int64 vectors on the decoder's device, the same as lists, and B finish reasons
    (see `GenerateOutput`).
    """
    batch, total = decoding.tokens.shape
    rows: list[list[int]] = [[] for _ in range(batch)]
    reasons = ["length"] * batch
    with tqdm(total=total, desc="tokens", disable=not progress) as bar:
        for new in _token_chunks(decoding.tokens, step):
            fresh: list[list[int]] = [[] for _ in range(batch)]
            for index, row in enumerate(new):
                if reasons[index] == "length":
                    fresh[index], reasons[index] = _until_end(row, end_tokens)
                    rows[index] += fresh[index]
            bar.update(len(new[0]))
            if stream is not None:
                stream(fresh)
            if "length" not in reasons:
                break
    tokens = [decoding.tokens[index, : len(row)].clone() for index, row in enumerate(rows)]
    return tokens, rows, reasons


def _token_chunks(tokens_BN: Tensor, step: Callable[[], None]) -> Iterator[list[list[int]]]:
    """Tokens as they reach the host, some columns at a time; a GPU is already at the next chunk meanwhile."""
    on_gpu, total = tokens_BN.is_cuda, tokens_BN.shape[1]
    width = STEPS_PER_POLL if on_gpu else 1
    copies: deque[HostCopy] = deque()
    for start in range(0, total, width):
        stop = min(start + width, total)
        for _ in range(max(start, 1), stop):  # the first column is there
            step()
        copies.append(HostCopy(tokens_BN[:, start:stop]))
        if len(copies) > on_gpu:
            yield copies.popleft().rows()
    yield from (copy.rows() for copy in copies)


def _until_end(new: list[int], end_tokens: Collection[int]) -> tuple[list[int], str]:
    """`new` up to and including its first end token, or up to an invalid one; and the finish reason so far."""
    for index, token in enumerate(new):
        if token == INVALID:
            return new[:index], "invalid"
        if token in end_tokens:
            return new[: index + 1], "eos"
    return new, "length"
