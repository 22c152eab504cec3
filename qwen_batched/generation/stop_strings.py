"""The strings at which a sample ends: found in its text while that grows, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_batched.generation.text_stream import TextStream
from qwen_batched.inputs.prompt import PromptEncoder


class StopStrings:
    """Watches the texts of a batch for any of some strings."""

    def __init__(self, prompts: PromptEncoder, strings: Sequence[str], samples: int) -> None:
        self._strings, self._longest = strings, max(map(len, strings))
        self._streams = [TextStream(prompts, 1) for _ in range(samples)]
        self._texts = [""] * samples  # the text so far, whole characters only
        self._ends: list[int | None] = [None] * samples  # where in the text a stop string begins
        self._sent = [0] * samples

    def ends_with(self, sample: int, token: int) -> bool:
        """Takes the next token of a sample: whether it completes a stop string."""
        before = len(self._texts[sample])
        self._texts[sample] += self._streams[sample].pieces([[token]])[0]
        text, start = self._texts[sample], max(before - self._longest + 1, 0)
        found = [place for string in self._strings if (place := text.find(string, start)) >= 0]
        if found:
            self._ends[sample] = min(found)
        return len(found) > 0

    def pieces(self) -> list[str]:
        """The new text of each sample, but for what may become a stop string."""
        return [self._send(sample, text, self._safe(sample)) for sample, text in enumerate(self._texts)]

    def rest(self, texts: Sequence[str]) -> list[str]:
        """What is left of the final texts."""
        return [self._send(sample, text, len(text)) for sample, text in enumerate(texts)]

    def cut(self, texts: Sequence[str]) -> list[str]:
        """Texts up to where a stop string begins."""
        return [text if end is None else text[:end] for text, end in zip(texts, self._ends, strict=True)]

    def _safe(self, sample: int) -> int:
        """How much of a text will stay, whatever comes."""
        text, end = self._texts[sample], self._ends[sample]
        if end is not None:
            return end
        begun = (size for size in range(min(self._longest - 1, len(text)), 0, -1) if self._begins_one(text[-size:]))
        return len(text) - next(begun, 0)

    def _begins_one(self, ending: str) -> bool:
        return any(string.startswith(ending) for string in self._strings)

    def _send(self, sample: int, text: str, stop: int) -> str:
        start = self._sent[sample]
        self._sent[sample] = max(start, stop)
        return text[start:stop]
