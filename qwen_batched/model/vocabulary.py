"""What a model makes of its vocabulary: tokens that are added to it, its embedding's rows, and logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from qwen_batched.arguments import as_int
from qwen_batched.inputs import checks
from qwen_batched.inputs.vocabulary import Vocabulary, check_new_tokens
from qwen_batched.linear.apply import apply_linear
from qwen_batched.training.api import Trainable
from qwen_batched.training.resized_rows import check_resizable, resized

OTHER_DTYPE = {torch.float32: torch.float64}


class WithVocabulary(Trainable):
    """A model whose `processor` has a tokenizer; its `checkpoint` is what `save_pretrained` writes."""

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Adds tokens to the tokenizer, which texts, targets and templates then have, and rows to the embedding.

        The tokenizer's `add_tokens` and transformers' `resize_token_embeddings` in one: the embedding, and the output
        projection where it is not tied, grow to the tokenizer's length, and spare rows that the checkpoint has are used
        first. `save_pretrained` writes the tokens too. Add them before an adapter is put on and before an optimiser is
        made.

        Args:
            new_tokens: Strings, or `tokenizers.AddedToken` with flags. Added tokens that are there already are left
                alone.
            special_tokens: Whether decoded texts leave them out.

        Returns:
            How many were added, as the tokenizer counts them.

        Raises:
            TypeError, ValueError: A token is neither, or the embedding cannot be resized. Nothing was changed.
        """
        prompts = self.processor.prompts
        known = prompts.tokenizer.get_added_vocab()
        # The tokenizer would give one that is there the flags of the new one.
        tokens = [token for content, token in check_new_tokens(new_tokens).items() if content not in known]
        trial, added = prompts.tokenizer, 0
        if tokens:
            trial = copy.deepcopy(trial)
            added = trial.add_tokens(tokens, special_tokens=special_tokens)
        extended = prompts.extended(trial)
        self._resize(max(self.config.text.vocab_size, extended.size))
        if tokens:
            prompts.tokenizer.add_tokens(tokens, special_tokens=special_tokens)
        self._take(extended)
        return added

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Module:
        """Gives the embedding, and the output projection where it is not tied, another number of rows.

        As transformers' method of this name. New rows are drawn close around the mean of the others (covariance times
        1e-9); rows are taken off the end. Tokens that were added to `processor.prompts.tokenizer` itself are read in
        texts from then on, and saved.

        Args:
            new_num_tokens: How many rows; None for as many as there are.
            pad_to_multiple_of: Rounds the number up; None leaves it. With both None nothing is resized.

        Returns:
            The embedding.

        Raises:
            TypeError, ValueError: A number is not as described, a token that the model writes itself would lose its
                row, or the layers are wrapped, sharded or quantised. Nothing was changed.
        """
        rows = self.config.text.vocab_size
        if new_num_tokens is not None:
            rows = as_int("new_num_tokens", new_num_tokens, 1)
        if pad_to_multiple_of is not None:
            rows += -rows % as_int("pad_to_multiple_of", pad_to_multiple_of, 1)
        extended = self.processor.prompts.extended(self.processor.prompts.tokenizer)
        self._resize(rows)
        self._take(extended)
        return self.get_input_embeddings()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., D) after the final norm.

        Raises:
            TypeError, ValueError: The output projection was left out, or the hidden states are not the model's.
        """
        self._check_lm_head()
        checks.check_hidden_states(hidden_states, self.model.embed_tokens.weight)
        return apply_linear(self.lm_head, hidden_states)

    def _resize(self, rows: int) -> None:
        """Changes the parameters and what the configs say of them; rows that are there stay as they are."""
        if rows == self.config.text.vocab_size:
            return
        shape = self.config.shape
        config = replace(shape, text=replace(shape.text, vocab_size=rows))
        ends = self.checkpoint.generation_config().eos_token_ids
        config.check_embedded("the ids of images, padding and ends", *self.processor.prompts.written_ids(), *ends)
        layers = {"embed_tokens": self.model.embed_tokens}
        if self.lm_head is not None and not self.has_tied_head:
            layers["lm_head"] = self.lm_head
        if self.shares_weights:
            raise ValueError("the parameters are a model's of transformers: resize that one, then share it anew")
        for name, layer in {**layers, "lm_head": self.lm_head}.items():
            check_resizable(name, layer)
        new = {name: resized(layer.weight, rows) for name, layer in layers.items()}
        for name, layer in layers.items():
            # The same parameter, for optimisers, hooks and the head that shares it. Of another dtype in between,
            # for autograd to forget its shape, which the graphs of earlier losses keep.
            weight = layer.weight
            weight.grad = None
            weight.data = weight.data.new_empty(0, dtype=OTHER_DTYPE.get(weight.dtype, torch.float32))
            weight.data = new[name]
        self.model.embed_tokens.num_embeddings = rows
        if self.lm_head is not None:
            self.lm_head.out_features = rows
        self.config.text = self.model.config = replace(self.config.text, vocab_size=rows)
        self.processor.config.text = replace(self.processor.config.text, vocab_size=rows)

    def _take(self, extended: Vocabulary) -> None:
        prompts = self.processor.prompts
        if extended is not prompts.vocabulary:
            prompts.take(extended)
            state = prompts.tokenizer.backend_tokenizer.to_str
            self.checkpoint = self.checkpoint.with_added_tokens(extended.entries, state)

    def _check_lm_head(self) -> None:
        if not self.has_lm_head:
            raise ValueError("logits, targets and generation need the output projection: load with lm_head=True")
