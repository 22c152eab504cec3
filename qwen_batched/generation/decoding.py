"""The state of a batch between two tokens, and the step from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.generation.rules import Rules
from qwen_batched.generation.sampling import Sampling
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.attention import KVCache
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.decoder_inputs import round_up
from qwen_batched.model.pipeline import Prefilled
from qwen_batched.runtime.host_copies import h2d

# Stands for a token in `Decoding.tokens` where a sample's logits were not finite. No token has this id.
INVALID = -1
CAPACITY_STEPS, LEAST_CAPACITY = 4, 128  # of caches: room costs memory, and no time
LEAST_STEPS = 32  # that there is room for; beyond it for the next power of two


@dataclass(frozen=True)
class StepRules:
    """What of `Rules` shapes a step."""

    repetition_penalty: float
    min_new_tokens: int
    end_tokens: tuple[int, ...]  # that may not be chosen before
    logprobs: bool


@dataclass(frozen=True)
class DecodingKind:
    """What shapes the state of a decoding and its step: generations of one kind can follow each other in one state."""

    results: int  # R
    capacity: int  # tokens that the cache holds for each
    room: int  # new tokens that there is room for
    vocabulary: int
    depth: int  # decoder blocks
    heads: tuple[int, int]  # of keys and values: how many, and their size
    dtype: torch.dtype  # of keys and values
    device: torch.device
    sampling: Sampling  # without its seed
    rules: StepRules
    allowed_rows: int  # of the mask of allowed tokens; 0 without

    @classmethod
    def of(cls, prefilled: Prefilled, sampling: Sampling, rules: Rules) -> DecodingKind:
        """That of a generation behind these prompts."""
        keys, (samples, vocabulary) = prefilled.keys_LBCKE, prefilled.output.logits.shape
        room = max(LEAST_STEPS, 1 << (rules.max_new_tokens - 1).bit_length())
        rows = 0 if rules.allowed is None else 1 if len(rules.allowed) == 1 else room
        fewest = rules.min_new_tokens if rules.end_tokens else 0
        return cls(
            samples * rules.num_return_sequences,
            round_up(keys.shape[2] + room, CAPACITY_STEPS, LEAST_CAPACITY),
            room,
            vocabulary,
            len(keys),
            (keys.shape[3], keys.shape[4]),
            keys.dtype,
            keys.device,
            replace(sampling, seed=None),
            StepRules(rules.repetition_penalty, fewest, rules.end_tokens if fewest else (), rules.logprobs),
            rows,
        )


class Decoding:
    """A batch between two tokens. All its state is in tensors that stay where they are, and no step reads one back."""

    @torch.inference_mode(False)  # a graph captured outside inference mode may not change what was made inside
    @torch.no_grad()
    def __init__(self, decoder: Decoder, head: nn.Module, kind: DecodingKind) -> None:
        """Makes the state; `begin` fills it."""
        self._decoder, self._head, self.kind = decoder, head, kind
        self.token = object()  # stands for this state among the keys of graphs
        results, device, rules = kind.results, kind.device, kind.rules
        like = torch.empty(0, dtype=kind.dtype, device=device)
        self._cache = KVCache(kind.depth, results, kind.capacity, *kind.heads, like)
        # What grows by one at each step: the column of the next token, and each result's position.
        self._counts = torch.zeros(1 + results, dtype=torch.int64, device=device)
        self._column, self._positions_R = self._counts[:1], self._counts[1:]
        # What the next step reads: always ids of the vocabulary, since indexing by any other ends a CUDA process.
        self._token_R = torch.zeros(results, dtype=torch.int64, device=device)
        self._invalid = torch.full((), INVALID, device=device)
        self._tokens_RN = torch.zeros(results, kind.room, dtype=torch.int64, device=device)
        self._logprobs_RN = torch.zeros(results, kind.room, device=device) if rules.logprobs else None
        self._uniforms_RN = self._seen_RW = self._forbidden_NW = self._ends_E = None
        if kind.sampling.temperature > 0:
            self._uniforms_RN = torch.zeros(results, kind.room, dtype=torch.float64, device=device)
        if rules.repetition_penalty != 1:
            self._seen_RW = torch.zeros(results, kind.vocabulary, dtype=torch.bool, device=device)
        if kind.allowed_rows:
            self._forbidden_NW = torch.zeros(kind.allowed_rows, kind.vocabulary, dtype=torch.bool, device=device)
        if rules.end_tokens:
            ends = [token for token in set(rules.end_tokens) if token < kind.vocabulary]
            self._ends_E = h2d(device, torch.tensor(ends, dtype=torch.int64, device="cpu"))
        self._steps = 0
        self._last_use: torch.cuda.Event | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, decoder: Decoder, head: nn.Module, prefilled: Prefilled, sampling: Sampling, rules: Rules) -> None:
        """Begins behind prompts, each run once, with the first token of each result."""
        self._decoder, self._head, self._steps = decoder, head, rules.max_new_tokens
        copies, cache, length = rules.num_return_sequences, self._cache, prefilled.keys_LBCKE.shape[2]

        def each(x: Tensor, dim: int = 0) -> Tensor:
            return x if copies == 1 else x.repeat_interleave(copies, dim=dim)

        for stored, prompt in ((cache.keys_LBCKE, prefilled.keys_LBCKE), (cache.values_LBCKE, prefilled.values_LBCKE)):
            stored[:, :, :length] = each(prompt, dim=1)
            stored[:, :, length:] = 0  # what the last generation left there may not be finite
        cache.lengths.copy_(each(prefilled.lengths))
        cache.tickets.zero_()
        self._positions_R.copy_(each(prefilled.next_positions) - 1)
        self._column.zero_()
        uniforms_RN = sampling.uniforms(self.kind.results, self._steps, self.kind.device)
        if uniforms_RN is not None:
            self._uniforms_RN[:, : self._steps] = uniforms_RN
        if self._seen_RW is not None:
            self._seen_RW.copy_(each(_tokens_of(prefilled)))
        if rules.allowed is not None:
            self._forbidden_NW[: len(rules.allowed)] = h2d(self.kind.device, ~rules.allowed)
        self._append(each(prefilled.output.logits))

    def lend(self) -> None:
        """Whatever comes now on this thread's stream waits for what the last generation left running on its own."""
        if self._last_use is not None:
            torch.cuda.current_stream(self.kind.device).wait_event(self._last_use)

    def give_back(self) -> None:
        """The generation ends here; its last steps may still run."""
        if self.kind.device.type == "cuda":
            self._last_use = torch.cuda.current_stream(self.kind.device).record_event()

    def wait(self) -> None:
        """Returns when the device is through with the last generation: then the memory may be someone else's."""
        if self._last_use is not None:
            self._last_use.synchronize()

    @property
    def tokens(self) -> Tensor:
        """Int64 (R, max_new_tokens), filled from the left by one column a step; a sample goes on after its end token.

        `INVALID` where its logits were not all finite.
        """
        return self._tokens_RN[:, : self._steps]

    @property
    def logprobs(self) -> Tensor | None:
        """(R, max_new_tokens), the log probability of each, before temperature, top-k and top-p; None if not wanted."""
        return None if self._logprobs_RN is None else self._logprobs_RN[:, : self._steps]

    @property
    def nbytes(self) -> int:
        """Of the cache, which is most of it."""
        return self._cache.keys_LBCKE.nbytes + self._cache.values_LBCKE.nbytes

    @torch.no_grad()
    def step(self) -> None:
        """One more token for each sample."""
        embeds_BD = self._decoder.embed_tokens(self._token_R)
        hidden_BD = self._decoder.step(embeds_BD, self._positions_R.expand(3, -1), self._cache)
        self._append(apply_linear(self._head, hidden_BD))

    def run(self, steps: int) -> None:
        """So many more tokens for each sample."""
        for _ in range(steps):
            self.step()

    @property
    def modules(self) -> list[nn.Module]:
        """Whose parameters a step reads."""
        return [self._decoder, self._head]

    def _append(self, logits_RW: Tensor) -> None:
        forbidden_1W = self._forbidden()
        likeliest_R, is_finite_R = ops.likeliest_token(logits_RW, forbidden_1W)
        if self._takes_likeliest:
            self._token_R.copy_(likeliest_R)
        else:
            logits_RW = self._ruled(logits_RW.float(), forbidden_1W)
            uniform_R = None if self._uniforms_RN is None else self._uniforms_RN.index_select(1, self._column)[:, 0]
            self._token_R.copy_(self.kind.sampling.choose(logits_RW, uniform_R))
        self._tokens_RN.index_copy_(1, self._column, torch.where(is_finite_R, self._token_R, self._invalid)[:, None])
        if self._logprobs_RN is not None:
            logprobs_R1 = logits_RW.log_softmax(dim=-1).gather(1, self._token_R[:, None])
            self._logprobs_RN.index_copy_(1, self._column, logprobs_R1)
        if self._seen_RW is not None:
            self._seen_RW.scatter_(1, self._token_R[:, None], True)
        self._counts += 1

    @property
    def _takes_likeliest(self) -> bool:
        """Whether the next token is the likeliest of those allowed, and nothing else of the logits is asked for."""
        others = self._uniforms_RN, self._logprobs_RN, self._seen_RW, self._ends_E
        return all(tensor is None for tensor in others)

    def _forbidden(self) -> Tensor | None:
        """Bool (1, vocabulary), what may not be chosen now; None without such a rule."""
        if self._forbidden_NW is None or len(self._forbidden_NW) == 1:
            return self._forbidden_NW
        return self._forbidden_NW.index_select(0, self._column)

    def _ruled(self, logits_RW: Tensor, forbidden_1W: Tensor | None) -> Tensor:
        """The logits with the repetition penalty, and -inf for what may not be chosen now."""
        rules = self.kind.rules
        if self._seen_RW is not None:
            penalty = rules.repetition_penalty
            penalised_RW = torch.where(logits_RW > 0, logits_RW / penalty, logits_RW * penalty)
            logits_RW = torch.where(self._seen_RW, penalised_RW, logits_RW)
        if forbidden_1W is not None:
            logits_RW = logits_RW.masked_fill(forbidden_1W, -torch.inf)
        if self._ends_E is not None:
            ends_RE = logits_RW.index_select(1, self._ends_E)
            ends_RE = ends_RE.masked_fill(self._column < rules.min_new_tokens, -torch.inf)
            logits_RW = logits_RW.index_copy(1, self._ends_E, ends_RE)
        return logits_RW


def _tokens_of(prefilled: Prefilled) -> Tensor:
    """Bool (B, vocabulary), which tokens a prompt holds; of embeddings nobody knows."""
    output = prefilled.output
    held_BW = torch.zeros_like(output.logits, dtype=torch.float32)
    if output.input_ids is not None:
        held_BW.scatter_add_(1, output.input_ids, output.attention_mask.float())
    return held_BW > 0
