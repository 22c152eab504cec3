"""The stages of a case as this package computes them, through the calls that its users make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qwen_batched.deviation import stages as names
from qwen_batched.deviation.cases import Case
from qwen_batched.deviation.stages import Stages
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.outputs import VLOutput
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

Receive = Callable[[str, int, Tensor], None]  # a stage, a sample, its tokens (T, width)

# On a GPU a call is captured the second time and replayed the third, which is what users get.
CALLS_UNTIL_REPLAYED = 3


@torch.inference_mode()
def run_ours(model: QwenBatchedVL, case: Case, stages: Stages, new_tokens: int, receive: Receive) -> None:
    """Runs the whole batch at once and passes on every stage of every sample, without padding."""
    images, texts = case.images, list(case.texts)
    samples = range(len(texts))

    def each(stage: str, values: Sequence[Tensor]) -> None:
        for sample in samples:
            receive(stage, sample, values[sample])

    cameras = camera_pixels(model.processor, case, model.device, model.dtype)
    each(names.PIXELS, _joined(cameras))
    each(names.PATCHES, _joined([model.visual.patch_embed(pixels) for pixels in cameras]))

    if stages.vision_blocks:
        outputs = model.encode_images(images, layers=stages.vision_blocks)
        for block, output in zip(stages.vision_blocks, outputs, strict=True):
            each(names.vision_stage(block), _tokens_of_images(output))
        del outputs

    out = call(model, case, layers=(0, -1))
    own = [out.attention_mask[sample] for sample in samples]
    each(names.FEATURES, _tokens_of_images(out.image_features))
    each(names.TOKENS, [out.input_ids[sample][own[sample]] for sample in samples])
    each(names.POSITIONS, [out.position_ids[:, sample][:, own[sample]] for sample in samples])

    if stages.decoder_blocks:
        outputs = model(images, texts, layers=stages.decoder_blocks, norm="pre", cuda_graph=False)
        for layer, states in zip(stages.decoder_blocks, outputs.hidden_states, strict=True):
            each(names.decoder_stage(layer), [states[sample][own[sample]] for sample in samples])
        del outputs

    each(names.FINAL, [out.last_hidden_state[sample][own[sample]] for sample in samples])
    for sample in samples:
        text = own[sample] & ~out.image_mask[sample]
        receive(names.LOGITS, sample, model.logits(out.last_hidden_state[sample][text]))
    if new_tokens:
        each(names.GREEDY, model.generate(images, texts, max_new_tokens=new_tokens).token_ids)


def call(model: QwenBatchedVL, case: Case, layers: Sequence[int] = (-1,)) -> VLOutput:
    """The call that users make, as it is after the first times."""
    for _ in range(CALLS_UNTIL_REPLAYED if model.device.type == "cuda" else 1):
        out = model(case.images, list(case.texts), layers=layers)
    return out


def camera_pixels(
    processor: TensorProcessor, case: Case, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Each camera's patches (B, P, patch_dim) in transformers' order: merged cells in raster order."""
    batch = processor(case.images, None, device=device, dtype=dtype)
    pixels, orders = batch["pixel_values"], batch["raster_order"]
    if isinstance(pixels, Tensor):
        pixels, orders = pixels.unbind(1), [orders] * pixels.shape[1]
    cell = processor.config.vision.cell_patches
    return [
        patches.unflatten(1, (-1, cell)).index_select(1, order[0].flatten()).flatten(1, 2)
        for patches, order in zip(pixels, orders, strict=True)
    ]


def _joined(cameras: Sequence[Tensor]) -> Tensor:
    """Tokens of all cameras back to back, (B, T, width)."""
    return torch.cat(list(cameras), dim=1)


def _tokens_of_images(output: Tensor | list[Tensor]) -> Tensor:
    """Maps (B, V, h, w, D), or one (B, h, w, D) for each camera, as tokens (B, T, D)."""
    if isinstance(output, Tensor):
        return output.flatten(1, 3)
    return _joined([camera.flatten(1, 2) for camera in output])
