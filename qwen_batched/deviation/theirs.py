"""The stages of a case as transformers computes them, one sample at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_batched.deviation import stages as names
from qwen_batched.deviation.cases import Case
from qwen_batched.deviation.stages import Stages
from qwen_batched.transformers_reference import TransformersReference

Receive = Callable[[str, Tensor], None]


def run_theirs(
    reference: TransformersReference,
    case: Case,
    sample: int,
    stages: Stages,
    new_tokens: int,
    receive: Receive,
    pixels: Tensor | None = None,
) -> Tensor | None:
    """Runs one sample and passes on every stage as soon as it is there, so that no more than one must be kept.

    `receive` takes a stage's name and its tokens (T, width). `pixels` are patches for the networks, in place of what
    transformers' image processor makes of the frames. Returns the scores (tokens, vocabulary) by which each new token
    was chosen; None where there are none.
    """
    inputs = reference.processor_inputs(case.frames(sample), case.texts[sample], resize_on_gpu=True)
    grid, dtype = inputs["image_grid_thw"], reference.model.dtype
    receive(names.PIXELS, inputs["pixel_values"].to(dtype))
    if pixels is not None:
        inputs["pixel_values"] = pixels

    def raster(values: Tensor) -> Tensor:
        return torch.cat([image.flatten(0, 1) for image in reference.raster_patches(values, grid)])

    # What the hooks pass on, the run itself does not return.
    text_rows = inputs["input_ids"][0] != reference.model.config.image_token_id
    hooks = [
        reference.visual.patch_embed.register_forward_hook(lambda _, args, output: receive(names.PATCHES, output)),
        reference.model.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, text_rows],)),
    ]
    for block in stages.vision_blocks:
        hook = _hook(names.vision_stage(block), lambda stage, output: receive(stage, raster(output)))
        hooks.append(reference.visual.blocks[block].register_forward_hook(hook))
    for layer in stages.decoder_blocks:
        if layer:
            hook = _hook(names.decoder_stage(layer), lambda stage, output: receive(stage, output[0]))
            hooks.append(reference.decoder.layers[layer - 1].register_forward_hook(hook))
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        output = reference.run(**inputs)
    receive(names.FEATURES, torch.cat(output.image_features))
    receive(names.TOKENS, inputs["input_ids"][0])
    receive(names.POSITIONS, output.position_ids[:, 0])
    if 0 in stages.decoder_blocks:
        receive(names.decoder_stage(0), output.hidden_states[0][0])
    receive(names.FINAL, output.hidden_states[-1][0])
    receive(names.LOGITS, output.logits[0])
    del output
    if not new_tokens:
        return None
    tokens, scores = reference.greedy_with_scores(inputs, new_tokens)
    receive(names.GREEDY, tokens)
    return scores


def _hook(stage: str, receive: Receive) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        # Decoder layers return a tuple before transformers 5.
        receive(stage, output if isinstance(output, Tensor) else output[0])

    return hook
