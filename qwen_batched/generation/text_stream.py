"""Generated tokens -> text, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from qwen_batched.inputs.prompt import PromptEncoder


class TextStream:
    """The text of generated tokens, piece by piece: a character comes when all its tokens are there."""

    def __init__(self, prompts: PromptEncoder, batch: int) -> None:
        self._prompts = prompts
        self._decoders = [DecodeStream(skip_special_tokens=True) for _ in range(batch)]
        self._ids: list[list[int]] = [[] for _ in range(batch)]
        self._sent = [""] * batch

    def pieces(self, new: Sequence[Sequence[int]]) -> list[str]:
        """The text that is complete with the `new` tokens of each sample."""
        pieces = []
        for index, (row, decoder) in enumerate(zip(new, self._decoders, strict=True)):
            parts = [decoder.step(self._prompts.tokenizer.backend_tokenizer, token) for token in row]
            pieces.append("".join(part for part in parts if part is not None))
            self._ids[index] += row
            self._sent[index] += pieces[-1]
        return pieces

    def rest(self) -> list[str]:
        """What no further token will complete: broken characters, as `PromptEncoder.decode` shows them."""
        texts = map(self._prompts.decode, self._ids)
        return [text[len(sent) :] for text, sent in zip(texts, self._sent, strict=True)]
