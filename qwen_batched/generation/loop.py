"""The loop over steps: tokens reach the host some at a time, which finds where each sample ends and tells its text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_batched.generation.decoding import INVALID, Decoding
from qwen_batched.generation.rules import Rules
from qwen_batched.generation.stop_strings import StopStrings
from qwen_batched.generation.text_stream import TextStream
from qwen_batched.inputs.prompt import PromptEncoder
from qwen_batched.outputs import GenerateOutput

# A GPU runs so many steps before the host looks at their tokens, and so many more while it looks.
STEPS_PER_POLL = 8


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
    run: Callable[[int], None],
    prompts: PromptEncoder,
    rules: Rules,
    stream: Callable[[list[str]], None] | None = None,
    progress: bool = False,
) -> GenerateOutput:
    """Runs a batch to its end.

    `run` is `decoding.run`, or the same by a graph. `stream` takes the text that has come since its last call, a string
    for each sample; none after a sample's end, and none that may be the beginning of a stop string.
    """
    samples, total = decoding.tokens.shape
    ends = Ends(prompts, rules, samples)
    pieces = TextStream(prompts, samples) if stream is not None and ends.stops is None else None
    with tqdm(total=total, desc="tokens", disable=not progress) as bar:
        for new in _token_chunks(decoding.tokens, run):
            fresh = ends.take(new)
            bar.update(len(new[0]))
            if stream is not None:
                stream(ends.stops.pieces() if pieces is None else pieces.pieces(fresh))
            if "length" not in ends.reasons:
                break
    texts = [prompts.decode(row) for row in ends.rows]
    if ends.stops is not None:
        texts = ends.stops.cut(texts)
    if stream is not None:
        stream(ends.stops.rest(texts) if pieces is None else pieces.rest())
    lengths = [len(row) for row in ends.rows]
    return GenerateOutput(
        texts=texts,
        token_ids=_first(decoding.tokens, lengths),
        finish_reasons=ends.reasons,
        logprobs=None if decoding.logprobs is None else _first(decoding.logprobs, lengths),
    )


class Ends:
    """The tokens of each sample as lists, up to and including that which ends it, and why it ended."""

    def __init__(self, prompts: PromptEncoder, rules: Rules, samples: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(samples)]
        self.reasons = ["length"] * samples  # so far; see `GenerateOutput`
        self.stops = StopStrings(prompts, rules.stop, samples) if rules.stop else None
        self._end_tokens = frozenset(rules.end_tokens)

    def take(self, new: list[list[int]]) -> list[list[int]]:
        """Appends `new` tokens; returns those of each sample that count, none after its end."""
        fresh: list[list[int]] = [[] for _ in new]
        for sample, row in enumerate(new):
            if self.reasons[sample] == "length":
                fresh[sample], self.reasons[sample] = self._until_end(sample, row)
                self.rows[sample] += fresh[sample]
        return fresh

    def _until_end(self, sample: int, new: list[int]) -> tuple[list[int], str]:
        for index, token in enumerate(new):
            if token == INVALID:
                return new[:index], "invalid"
            if self.stops is not None and self.stops.ends_with(sample, token):
                return new[: index + 1], "stop"
            if token in self._end_tokens:
                return new[: index + 1], "eos"
        return new, "length"


def _first(values_RN: Tensor, lengths: list[int]) -> list[Tensor]:
    """The first values of each row, in memory of their own."""
    return [row[:length].clone() for row, length in zip(values_RN, lengths, strict=True)]


def _token_chunks(tokens_BN: Tensor, run: Callable[[int], None]) -> Iterator[list[list[int]]]:
    """Tokens as they reach the host, some columns at a time; a GPU is already at the next chunk meanwhile."""
    on_gpu, total = tokens_BN.is_cuda, tokens_BN.shape[1]
    width = STEPS_PER_POLL if on_gpu else 1
    copies: deque[HostCopy] = deque()
    for start in range(0, total, width):
        stop = min(start + width, total)
        run(stop - max(start, 1))  # the first column is there
        copies.append(HostCopy(tokens_BN[:, start:stop]))
        if len(copies) > on_gpu:
            yield copies.popleft().rows()
    yield from (copy.rows() for copy in copies)
