"""What a generation may choose and where it ends, read from a user's arguments before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_batched.arguments import as_int, shown
from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.generation.sampling import Sampling
from qwen_batched.inputs.checks import check_plain, check_unicode, describe_tensor

AllowedTokens = Sequence[int] | Sequence[Sequence[int]] | Tensor
_LISTS = (list, tuple, range)


@dataclass(frozen=True, eq=False)
class Rules:
    """Of one generation. Make it with `read`."""

    max_new_tokens: int
    end_tokens: tuple[int, ...] = ()  # any of them ends a sample
    repetition_penalty: float = 1.0  # Keskar et al. 2019, arXiv:1909.05858; looks at prompts too; 1 for none
    # Bool (1, vocabulary), or (max_new_tokens, vocabulary) for each step: what may be chosen; None for all.
    allowed: Tensor | None = None
    min_new_tokens: int = 0  # until a sample has so many tokens, no end token is chosen
    stop: tuple[str, ...] = ()  # a sample ends when its text holds one of them
    logprobs: bool = False  # whether each chosen token's log probability is kept
    num_return_sequences: int = 1  # results of each prompt

    @classmethod
    def read(
        cls,
        vocabulary: int,
        config: GenerationConfig,
        max_new_tokens: object,
        sampling: Sampling,
        allowed_tokens: AllowedTokens | None = None,
        logprobs: object = False,
        stop: str | Sequence[str] | None = None,
        num_return_sequences: object = 1,
        end_tokens: Sequence[int] | None = None,
        min_new_tokens: object = 0,
        repetition_penalty: float | None = None,
    ) -> Rules:
        """Takes arguments as of `QwenBatchedVL.generate`; `end_tokens` and `repetition_penalty` are None for the
        checkpoint's, of its `config`.

        Raises `TypeError` or `ValueError` where one is not as described, or some step is left without a token.
        """
        steps = as_int("max_new_tokens", max_new_tokens, 1)
        fewest = as_int("min_new_tokens", min_new_tokens, 0)
        copies = as_int("num_return_sequences", num_return_sequences, 1)
        if copies > 1 and sampling.temperature == 0:
            same = "without draws all are the same"
            raise ValueError(f"num_return_sequences must be 1 with temperature=0, got {copies}: {same}")
        if not isinstance(logprobs, bool):
            raise TypeError(f"logprobs must be a bool, got {shown(logprobs)}")
        given = config.eos_token_ids if end_tokens is None else end_tokens
        ends = tuple(as_int("an end token", token, 0) for token in given)
        allowed = None if allowed_tokens is None else _read_allowed(allowed_tokens, vocabulary, steps)
        if allowed is not None:
            _check_some_allowed(allowed, [token for token in ends if token < vocabulary], fewest)
        penalty = config.repetition_penalty if repetition_penalty is None else repetition_penalty
        return cls(steps, ends, penalty, allowed, fewest, _read_stop(stop), logprobs, copies)


def _read_allowed(allowed: AllowedTokens, vocabulary: int, steps: int) -> Tensor:
    """`allowed_tokens` as a bool tensor, see `Rules.allowed`."""
    if isinstance(allowed, Tensor):
        check_plain("allowed_tokens", allowed)
        if allowed.dtype != torch.bool or tuple(allowed.shape) not in ((vocabulary,), (steps, vocabulary)):
            shapes = f"({vocabulary},) or (max_new_tokens, vocabulary) = ({steps}, {vocabulary})"
            raise ValueError(f"allowed_tokens as a tensor must be bool {shapes}, got {describe_tensor(allowed)}")
        return allowed.view(-1, vocabulary)
    if not isinstance(allowed, _LISTS):
        kinds = "a list of token ids, a list of one such list for each new token, or a bool tensor"
        raise TypeError(f"allowed_tokens must be {kinds}, got {shown(allowed)}")
    if len(allowed) == 0:
        raise ValueError("allowed_tokens must hold at least one token, got none")
    rows = allowed if isinstance(allowed[0], _LISTS) else [allowed]
    if rows is allowed and len(rows) != steps:
        raise ValueError(f"allowed_tokens must have a list for each of {steps} new tokens, got {len(rows)} lists")
    mask = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device="cpu")
    for step, row in enumerate(rows):
        if not isinstance(row, _LISTS):
            raise TypeError(f"allowed_tokens must hold a list of ids for each new token, got {shown(row)}")
        ids = [as_int("an allowed token", token, 0, vocabulary - 1) for token in row]
        mask[step, torch.tensor(ids, dtype=torch.int64, device="cpu")] = True
    return mask


def _check_some_allowed(allowed: Tensor, end_tokens: Sequence[int], min_new_tokens: int) -> None:
    """A mask on a GPU is read back here, once in a generation."""
    free = allowed
    if min_new_tokens and end_tokens:
        ends = torch.tensor(end_tokens, dtype=torch.int64, device=allowed.device)
        free = allowed.index_fill(1, ends, False)
        free = free if len(free) == 1 else torch.cat((free[:min_new_tokens], allowed[min_new_tokens:]))
    if not free.any(dim=1).all():
        step = free.any(dim=1).int().argmin()
        few = f", of which the first {min_new_tokens} may be no end token" if min_new_tokens else ""
        raise ValueError(f"allowed_tokens must allow a token at every step{few}, got none at step {step}")


def _read_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"stop must be None, a str or a list of str, got {shown(stop)}")
    if len(strings) == 0 or "" in strings:
        raise ValueError(f"stop must hold strings that are not empty, got {shown(stop)}")
    for string in strings:
        check_unicode("stop", string)
    return tuple(strings)
