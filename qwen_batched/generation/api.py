"""`generate`: of frames and texts, in this package's form, and of transformers' batch, as transformers gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwen_batched.arguments import integer, shown
from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.generation.arguments import INERT, GenerationArguments, read_arguments
from qwen_batched.generation.loop import generate_texts
from qwen_batched.generation.rules import AllowedTokens, Rules
from qwen_batched.generation.sampling import Sampling
from qwen_batched.inputs.batch import Batch, FeatureMaps, Features
from qwen_batched.inputs.checks import Resize, check_room
from qwen_batched.inputs.prepared import MARKER
from qwen_batched.inputs.request import Request
from qwen_batched.inputs.transformers_batch import INERT as FORWARD_INERT
from qwen_batched.inputs.transformers_batch import NAMES, TransformersBatch
from qwen_batched.model.pipeline import Wanted
from qwen_batched.outputs import GenerateOutput
from qwen_batched.runtime.cuda_graphs import Check, deferring_checks
from qwen_batched.runtime.idle_autocast import without_idle_autocast

if TYPE_CHECKING:  # which imports much that few calls need
    from transformers.generation import GenerateDecoderOnlyOutput

# Entries of a transformers' batch, among the arguments of its `generate`.
BATCH_NAMES = ({*NAMES} - {"labels"}) | (FORWARD_INERT.keys() - INERT.keys())
NEW_TOKENS = 128  # where a call of frames and texts says nothing


class Generative:
    """A model that generates text: what `QwenBatchedVL` adds to its `forward`."""

    @without_idle_autocast
    def generate(
        self,
        images: Tensor | Sequence[Tensor] | None = None,
        texts: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        camera_mask: Tensor | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        stream: Callable[[list[str]], None] | None = None,
        progress: bool = False,
        cuda_graph: bool = True,
        system: str | None = None,
        allowed_tokens: AllowedTokens | None = None,
        logprobs: bool = False,
        stop: str | Sequence[str] | None = None,
        num_return_sequences: int = 1,
        inputs_embeds: Tensor | None = None,
        image_features: FeatureMaps | Features | None = None,
        **batch: Any,
    ) -> GenerateOutput | Tensor | GenerateDecoderOnlyOutput:
        """New text for each sample.

        The checkpoint's end tokens and repetition penalty (generation_config.json) apply, as in transformers; how
        tokens are drawn is said here only. Any other setting there that would change transformers' tokens is refused. A
        sample whose logits are not finite ends with the finish reason "invalid" and leaves the others as they are.

        A batch of transformers' processor in place of images and texts, `generate(**batch)`, gives what transformers'
        `generate` gives: (B, S + N) token ids, prompts first, with `pad_token_id` behind a sample's end token. What the
        call leaves out is then what generation_config.json says: tokens are drawn where it says `do_sample`.

        Of embeddings without `input_ids` it gives the new tokens alone, (B, N), as transformers does.

        Args:
            images, texts, camera_mask, template, resize, system, inputs_embeds, image_features: As for `forward`.
            max_new_tokens: At least 1; None for 128.
            temperature: 0 (or None) takes the likeliest token; above 0 tokens are drawn.
            top_k: Draw among the k likeliest tokens; 0 (or None) for all.
            top_p: Draw among the fewest likeliest tokens whose probabilities reach p, in (0, 1]; None for 1.
            seed: Makes draws reproducible.
            stream: Takes new text as it comes, one string for each sample, "" where there is none, for each token on a
                CPU and for every few on a GPU. Joined, a sample's are its text.
            progress: Shows a progress bar on stderr.
            cuda_graph: False runs every step without a CUDA graph.
            allowed_tokens: The ids that may be chosen, as a list or as bool (vocabulary,); or for each new token such a
                list, or bool (max_new_tokens, vocabulary). End tokens only where listed. None for all. A tensor on a
                GPU is read back, once.
            logprobs: Return each token's log probability: the log softmax of the logits after `allowed_tokens` and the
                repetition penalty, before temperature, top-k and top-p.
            stop: A sample ends when its text contains this string, or one of several, before which its text is cut.
            num_return_sequences: Draw so many results of each prompt, side by side; above 1 only with a temperature.
            **batch: A batch of transformers' processor, and what its `generate` takes: `do_sample`, `eos_token_id`,
                `pad_token_id`, `min_new_tokens`, `max_length`, `repetition_penalty`, `generation_config`,
                `return_dict_in_generate`; others at the values at which they change nothing. Or a batch that
                `processor(images, texts, max_new_tokens=...)` prepared.

        Raises:
            TypeError, ValueError: An argument is not as described, prompt and new tokens together exceed the model's
                maximum, or generation_config.json has a setting that is not supported. Nothing was done.
        """
        self._check_lm_head()
        config = GenerationConfig.of(self.generation_config)
        config.check()
        if stream is not None and not callable(stream):
            raise TypeError(f"stream must be None or a function of a list of str, got {shown(stream)}")
        batch |= {"inputs_embeds": inputs_embeds, "image_features": image_features}
        batch = {name: value for name, value in batch.items() if value is not None}
        layout = {"camera_mask": camera_mask, "template": template, "resize": resize, "system": system}
        run = partial(self._generate, stream=stream, progress=progress, cuda_graph=cuda_graph)
        if MARKER not in batch and ("input_ids" in batch or (texts is None and "inputs_embeds" in batch)):
            if logprobs or stop is not None:
                raise ValueError("logprobs and stop need images and texts: of a batch only token ids are returned")
            options = {name: batch.pop(name) for name in batch.keys() - BATCH_NAMES}
            options |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
            options["num_return_sequences"] = num_return_sequences if num_return_sequences != 1 else None
            call = self._read(images, texts, batch, **layout)
            pad, length = self.processor.prompts.pad_token_id, call.shape[1]
            chosen = read_arguments(options, config, pad, length, integer(seed))
            return self._generate_ids(call, chosen, config, allowed_tokens, run)
        sampling = Sampling(
            0.0 if temperature is None else temperature,
            0 if top_k is None else integer(top_k),
            1.0 if top_p is None else top_p,
            integer(seed),
        )
        steps = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        given = allowed_tokens, logprobs, stop, num_return_sequences
        rules = Rules.read(self.config.text.vocab_size, config, steps, sampling, *given)
        call = self._read(images, texts, batch, max_new_tokens=rules.max_new_tokens, **layout)
        if isinstance(call, Batch):
            most = self.config.text.max_position_embeddings
            check_room(call.attention_mask.shape[1], rules.max_new_tokens, most)
        return run(call, sampling, rules)

    def _generate_ids(
        self,
        call: TransformersBatch,
        chosen: GenerationArguments,
        config: GenerationConfig,
        allowed_tokens: AllowedTokens | None,
        run: Callable[..., GenerateOutput],
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What transformers returns: prompts and new tokens, (B, S + N)."""
        check_room(call.shape[1], chosen.max_new_tokens, self.config.text.max_position_embeddings)
        rules = Rules.read(
            self.config.text.vocab_size,
            config,
            chosen.max_new_tokens,
            chosen.sampling,
            allowed_tokens,
            num_return_sequences=chosen.num_return_sequences,
            end_tokens=chosen.end_tokens,
            min_new_tokens=chosen.min_new_tokens,
            repetition_penalty=chosen.repetition_penalty,
        )
        new = run(call, chosen.sampling, rules).token_ids
        sequences = pad_sequence(new, batch_first=True, padding_value=chosen.pad_token_id)
        if call.input_ids is not None:
            prompts = call.input_ids.to(self.device).repeat_interleave(rules.num_return_sequences, dim=0)
            sequences = torch.cat((prompts, sequences), dim=1)
        if not chosen.return_dict:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)

    def _generate(
        self,
        call: Request | Batch | TransformersBatch,
        sampling: Sampling,
        rules: Rules,
        stream: Callable[[list[str]], None] | None,
        progress: bool,
        cuda_graph: bool,
    ) -> GenerateOutput:
        caller, wanted = self._caller(cuda_graph), Wanted((), "post", "last")

        def generate(checks: list[Check] | None) -> GenerateOutput:
            prefilled = self._calls.prefill(caller, call, wanted, checks)
            with self._calls.decoding(caller, prefilled, sampling, rules, checks) as (decoding, run):
                return generate_texts(decoding, run, self.processor.prompts, rules, stream=stream, progress=progress)

        # A bar that is shown cannot be taken back.
        return generate(None) if progress else deferring_checks(generate)
