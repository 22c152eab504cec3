"""The state of a batch between two tokens, and the step from one to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_batched.generation.rules import Rules
from qwen_batched.generation.sampling import Sampling
from qwen_batched.inputs.batch import Batch
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.attention import KVCache
from qwen_batched.model.embedding import embed
from qwen_batched.model.head import last_tokens
from qwen_batched.model.pipeline import Network
from qwen_batched.runtime.host_copies import h2d

# Stands for a token in `Decoding.tokens` where a sample's logits were not finite. No token has this id.
INVALID = -1


class Decoding:
    """A batch between two tokens. All its state is in tensors that stay where they are, and no step reads one back."""

    @torch.inference_mode(False)  # a graph captured outside inference mode may not change what was made inside
    @torch.no_grad()
    def __init__(self, network: Network, batch: Batch, sampling: Sampling, rules: Rules) -> None:
        """Runs the prompts, each once, and chooses the first token of each result, R = B * num_return_sequences."""
        visual, self._decoder, self._head = network
        self._sampling, self._rules = sampling, rules
        samples, length = batch.attention_mask.shape
        copies, steps = rules.num_return_sequences, rules.max_new_tokens
        text, device, mask = self._decoder.config, batch.attention_mask.device, batch.attention_mask
        inputs_embeds, deep, _ = embed(visual, self._decoder, batch)
        heads, capacity = (text.num_key_value_heads, text.head_dim), length + steps
        cache = KVCache(text.num_hidden_layers, samples, capacity, *heads, inputs_embeds)
        positions = batch.rope_positions.transpose(0, 1)
        options = {"tokens": batch.tokens, "deep_features": deep, "is_padded": batch.is_padded}
        hidden_BSD = self._decoder(inputs_embeds, positions, mask, cache=cache, **options)[0]
        logits_BW = self._logits(last_tokens(hidden_BSD, mask))
        seen_BW = None
        if rules.repetition_penalty != 1:
            seen_BW = torch.zeros_like(logits_BW)
            if batch.input_ids is not None:
                seen_BW.scatter_add_(1, batch.input_ids, mask.float())
            seen_BW = seen_BW > 0
        positions_B = batch.rope_positions.amax(dim=(1, 2))
        if copies > 1:
            logits_BW, positions_B = (x.repeat_interleave(copies, dim=0) for x in (logits_BW, positions_B))
            seen_BW = None if seen_BW is None else seen_BW.repeat_interleave(copies, dim=0)
            cache.repeat_samples(copies)
        results = samples * copies
        self._cache, self._positions_R, self._seen_RW = cache, positions_B, seen_BW
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._uniforms_RN = sampling.uniforms(results, steps, device)
        # Filled from the left by one column a step, the first when made; a sample goes on after its end token.
        # `INVALID` where its logits were not all finite.
        self.tokens = torch.zeros(results, steps, dtype=torch.int64, device=device)
        # The log probability of each, of the distribution before temperature, top-k and top-p; None where not wanted.
        self.logprobs = torch.zeros(results, steps, device=device) if rules.logprobs else None
        # What the next step reads: always ids of the vocabulary, since indexing by any other ends a CUDA process.
        self._token_R = torch.zeros(results, dtype=torch.int64, device=device)
        self._invalid = torch.full((), INVALID, device=device)
        self._forbidden_NW = None if rules.allowed is None else h2d(device, ~rules.allowed)
        self._ends_E = None
        if rules.min_new_tokens and rules.end_tokens:
            ends = [token for token in set(rules.end_tokens) if token < logits_BW.shape[1]]
            self._ends_E = h2d(device, torch.tensor(ends, dtype=torch.int64, device="cpu"))
        self._append(logits_BW)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for each sample."""
        embeds_BD = self._decoder.embed_tokens(self._token_R)
        hidden_BD = self._decoder.step(embeds_BD, self._positions_R.expand(3, -1), self._cache)
        self._append(self._logits(hidden_BD))

    @property
    def modules(self) -> list[nn.Module]:
        """Whose parameters a step reads."""
        return [self._decoder, self._head]

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return apply_linear(self._head, hidden_BD).float()

    def _append(self, logits_RW: Tensor) -> None:
        # One pass: a sum is finite where every logit is. In float64, so that large logits do not overflow it.
        is_finite_R = logits_RW.sum(dim=-1, dtype=torch.float64).abs() < torch.inf
        logits_RW = self._ruled(logits_RW)
        uniform_R = None if self._uniforms_RN is None else self._uniforms_RN.index_select(1, self._column)[:, 0]
        self._token_R.copy_(self._sampling.choose(logits_RW, uniform_R))
        self.tokens.index_copy_(1, self._column, torch.where(is_finite_R, self._token_R, self._invalid)[:, None])
        if self.logprobs is not None:
            logprobs_R1 = logits_RW.log_softmax(dim=-1).gather(1, self._token_R[:, None])
            self.logprobs.index_copy_(1, self._column, logprobs_R1)
        if self._seen_RW is not None:
            self._seen_RW.scatter_(1, self._token_R[:, None], True)
        self._column += 1
        self._positions_R += 1

    def _ruled(self, logits_RW: Tensor) -> Tensor:
        """The logits with the repetition penalty, and -inf for what may not be chosen now."""
        rules = self._rules
        if self._seen_RW is not None:
            penalty = rules.repetition_penalty
            penalised_RW = torch.where(logits_RW > 0, logits_RW / penalty, logits_RW * penalty)
            logits_RW = torch.where(self._seen_RW, penalised_RW, logits_RW)
        if self._forbidden_NW is not None:
            forbidden_NW = self._forbidden_NW
            if len(forbidden_NW) > 1:
                forbidden_NW = forbidden_NW.index_select(0, self._column)
            logits_RW = logits_RW.masked_fill(forbidden_NW, -torch.inf)
        if self._ends_E is not None:
            ends_RE = logits_RW.index_select(1, self._ends_E)
            ends_RE = ends_RE.masked_fill(self._column < rules.min_new_tokens, -torch.inf)
            logits_RW = logits_RW.index_copy(1, self._ends_E, ends_RE)
        return logits_RW
