"""In: the frames and the text of one sample.
Out: what transformers' own Qwen2.5-VL makes of them: hidden states, logits, image features, rope positions.

The yardstick of this package: unbatched, unpadded, and free of this package's own code. It runs with transformers 4.51
to 5.x except for versions known to be wrong; what differs between them is in the small functions at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch import Tensor, nn

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """No TF32, which cuDNN's convolutions use unless told otherwise.

    transformers' patch embedding is such a convolution: with TF32 its "float32" features are off by 8e-5.
    """
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


# (first release, last release, what is wrong with them)
KNOWN_WRONG_RELEASES = (
    ((4, 53), (4, 55), "their text positions are wrong"),
    ((5, 3, 0), (5, 5, 3), "they multiply the temporal position of still images by tokens_per_second"),
)


def check_reference_version(version: str = transformers.__version__) -> None:
    """Raises `RuntimeError` for transformers releases whose Qwen2.5-VL is known to be wrong, and says what is."""
    release = Version(version).release
    for first, last, reason in KNOWN_WRONG_RELEASES:
        # Compared at the length of each bound, so that 4.55 covers every 4.55.x.
        if first <= release[: len(first)] and release[: len(last)] <= last:
            span = f"{'.'.join(map(str, first))} to {'.'.join(map(str, last))}"
            raise RuntimeError(f"transformers {version} cannot be the reference: {span} are refused, {reason}")


@dataclass(frozen=True)
class ReferenceOutput:
    """What transformers computed for one sample of S tokens."""

    # L + 1 times (1, S, D): the input embeddings, then every decoder block's output, of which the last one is after the
    # final norm.
    hidden_states: tuple[Tensor, ...]
    logits: Tensor  # (1, S, vocabulary)
    image_features: list[Tensor]  # for each image (h * w, D), cells in raster order
    position_ids: Tensor  # (3, 1, S), temporal, height and width


class TransformersReference:
    """transformers' model, tokenizer and image processor of one checkpoint. All three may be used directly."""

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any) -> None:
        check_reference_version()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.visual, self.decoder = _networks(model)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str = "sdpa",
        resample_backend: str | None = None,
    ) -> TransformersReference:
        """Loads a checkpoint folder or hub id; `resample_backend` is "pillow", "torchvision" or transformers' choice.

        In float64, transformers still does norms and some of the rotary arithmetic in float32. Raises `RuntimeError`
        for a release known to be wrong, `ValueError` where it would fill in weights that the checkpoint lacks.
        """
        check_reference_version()
        # Every stored weight is a float32 number; widened on the device, float64 takes no more of the host's memory.
        stored_as = torch.float32 if dtype == torch.float64 else dtype
        model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, attn_implementation=attn_implementation, output_loading_info=True, **{_DTYPE: stored_as}
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{folder} lacks {len(missing)} tensors, {missing[0]} first")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = model.to(device).eval()
        if dtype != stored_as:
            for parameter in model.parameters():  # and no buffer: rotary frequencies are float32 in every dtype
                parameter.data = parameter.data.to(dtype)
        return cls(model, tokenizer, _image_processor(folder, resample_backend))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def resizes_on_gpu(self) -> bool:
        """Whether `processor_inputs` can resize on the model's device: with torchvision, on a GPU."""
        return self.device.type == "cuda" and self.resample_backend == "torchvision"

    @property
    def resample_backend(self) -> str:
        """The library that resizes frames: "pillow" or "torchvision"."""
        return _resample_backend(self.image_processor)

    def processor_inputs(
        self, frames: Sequence[Tensor], text: str, template: str = "chat", resize_on_gpu: bool = False
    ) -> dict[str, Tensor]:
        """Returns what a transformers user would pass to the model: `run(**inputs)` and `greedy(inputs)` take it.

        As for any such user, a control token's name inside `text` becomes that control token.

        Args:
            frames: One uint8 image (3, H, W) for each camera.
            template: "chat" (the checkpoint's), "plain" (text first, then the images), or a string with {images}
                and {text} in it.
            resize_on_gpu: Whether the image processor gets tensors on the model's GPU, where it can take them, in place
                of PIL images. It then rounds once, and not between the two passes of a resize.

        Returns:
            input_ids (1, S), and with frames also pixel_values (patches, patch size) and image_grid_thw (images, 3).
        """
        prompt = self.prompt(len(frames), text, template)
        if not frames:
            return {"input_ids": self._token_ids(prompt)}
        images = self._processed(frames, resize_on_gpu and self.resizes_on_gpu)
        grid = images["image_grid_thw"]
        cells = grid.prod(-1) // self.image_processor.merge_size**2
        return {
            "input_ids": self._token_ids(_with_image_tokens(prompt, cells.tolist())),
            "pixel_values": images["pixel_values"].to(self.device),
            "image_grid_thw": grid.to(self.device),
        }

    def prompt(self, n_images: int, text: str, template: str = "chat") -> str:
        """Returns the prompt with one image token for each image, as it is before those are multiplied."""
        image = VISION_START + IMAGE_PAD + VISION_END
        if template == "chat":
            content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        if template == "plain":
            return " ".join([text] + [image] * n_images)
        if "{images}" not in template or "{text}" not in template:
            raise ValueError(f"expected 'chat', 'plain' or a string with {{images}} and {{text}}, got {template!r}")
        # The text goes in last: it may hold "{images}" itself.
        return template.replace("{images}", image * n_images).replace("{text}", text)

    @torch.no_grad()
    @without_tf32()
    def run(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None
    ) -> ReferenceOutput:
        """Runs one sample: ids (1, S) and patches as `processor_inputs` returns them; None: no image."""
        _check_one_sample(input_ids)
        inputs = self._model_inputs(input_ids, pixel_values, image_grid_thw)
        seen_positions: list[Tensor] = []
        seen_features: list[Tensor] = []
        # Recorded on the way instead of computed again: these are the values that made the hidden states.
        with (
            self.decoder.rotary_emb.register_forward_pre_hook(lambda _, args: seen_positions.append(args[1])),
            self.visual.register_forward_hook(lambda _, args, output: seen_features.append(_merged(output))),
        ):
            output = self.model(**inputs, output_hidden_states=True, use_cache=False)
        features: list[Tensor] = []
        if seen_features:
            cells = image_grid_thw.prod(-1) // self.visual.spatial_merge_size**2
            features = list(seen_features[0].split(cells.tolist()))
        return ReferenceOutput(tuple(output.hidden_states), output.logits, features, seen_positions[0])

    def greedy(self, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """Returns the most likely continuation of one sample, 1-D, its end token included."""
        return self.greedy_with_scores(inputs, max_new_tokens)[0]

    @torch.no_grad()
    @without_tf32()
    def greedy_with_scores(self, inputs: dict[str, Tensor], max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns the most likely continuation, and the scores (tokens, vocabulary) by which it was chosen."""
        input_ids = inputs["input_ids"]
        _check_one_sample(input_ids)
        returned = {"output_scores": True, "return_dict_in_generate": True}
        output = self.model.generate(
            **self._model_inputs(**inputs), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **returned
        )
        return output.sequences[0, input_ids.shape[1] :], torch.cat(output.scores)

    @torch.no_grad()
    @without_tf32()
    def final_hidden_states(self, samples: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Of samples (`processor_inputs`) with images as one batch, padded on the left: each (S, D), unpadded."""
        ids = [sample["input_ids"][0] for sample in samples]
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        inputs = self._model_inputs(
            torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in ids]),
            *(torch.cat([sample[name] for sample in samples]) for name in ("pixel_values", "image_grid_thw")),
        )
        own = [torch.arange(longest, device=self.device) >= longest - len(row) for row in ids]
        inputs["attention_mask"] = torch.stack(own).to(inputs["attention_mask"].dtype)
        output = self.model(**inputs, output_hidden_states=True, use_cache=False)
        return [rows[mask] for rows, mask in zip(output.hidden_states[-1], own, strict=True)]

    @torch.no_grad()
    @without_tf32()
    def vision_block_outputs(
        self, pixel_values: Tensor, image_grid_thw: Tensor, blocks: Sequence[int]
    ) -> list[list[Tensor]]:
        """Returns for each of the blocks, for each image, its output (grid height, grid width, C) in raster order."""
        seen: dict[int, Tensor] = {}

        def keep(index: int) -> Any:
            return lambda module, args, output: seen.__setitem__(index, output)

        with contextlib.ExitStack() as hooks:
            for index in blocks:
                hooks.enter_context(self.visual.blocks[index].register_forward_hook(keep(index)))
            self.visual(pixel_values.to(self.device, self.visual.dtype), grid_thw=image_grid_thw.to(self.device))
        return [self.raster_patches(seen[index], image_grid_thw) for index in blocks]

    def raster_patches(self, windowed: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
        """Patches (T, C) of still images in the window order of the vision blocks: each image's (height, width, C)."""
        merge = self.visual.spatial_merge_size
        window = self.visual.window_size // merge // self.visual.patch_size
        images = windowed.split(image_grid_thw.prod(-1).tolist())
        return [
            _raster_order(image, height, width, merge, window)
            for image, (_, height, width) in zip(images, image_grid_thw.tolist(), strict=True)
        ]

    def _processed(self, frames: Sequence[Tensor], on_device: bool) -> Any:
        if not on_device:
            return self.image_processor(images=[_as_pil(frame) for frame in frames], return_tensors="pt")
        tensors = [frame.to(self.device) for frame in frames]
        return self.image_processor(images=tensors, return_tensors="pt", device=self.device)

    def _token_ids(self, prompt: str) -> Tensor:
        return self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(self.device)

    def _model_inputs(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None
    ) -> dict[str, Tensor]:
        input_ids = input_ids.to(self.device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if pixel_values is None:
            return inputs
        inputs["pixel_values"] = pixel_values.to(self.device)
        inputs["image_grid_thw"] = image_grid_thw.to(self.device)
        # Since 5, positions are computed only where the processor's mm_token_type_ids (1 on image tokens) are given.
        # Without them transformers numbers an image's tokens like text, and does not complain.
        if _RELEASE >= (5,):
            inputs["mm_token_type_ids"] = (input_ids == self.model.config.image_token_id).int()
        return inputs


def _raster_order(windowed: Tensor, height: int, width: int, merge: int, window: int) -> Tensor:
    """Turns one still image's patches (height * width, C) from window order to (height, width, C).

    The order is the model's definition, written out here because every transformers version has it elsewhere: cells of
    merge x merge patches, by window, then by row and column within the window.
    """
    rows, columns = torch.arange(height // merge), torch.arange(width // merge)
    window_of_cell = (rows[:, None] // window) * width + columns // window
    cell_order = window_of_cell.flatten().argsort(stable=True)
    cells = torch.empty_like(windowed).view(len(cell_order), -1)
    cells[cell_order.to(windowed.device)] = windowed.reshape(len(cell_order), -1)
    blocks = cells.view(height // merge, width // merge, merge, merge, -1)
    return blocks.transpose(1, 2).reshape(height, width, -1)


def _as_pil(frame: Tensor) -> Image.Image:
    if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != 3:
        raise ValueError(f"expected a uint8 frame (3, H, W), got {frame.dtype} {tuple(frame.shape)}")
    return Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())


def _with_image_tokens(prompt: str, counts: list[int]) -> str:
    pieces = prompt.split(IMAGE_PAD)
    if len(pieces) != len(counts) + 1:
        raise ValueError(f"the prompt has {len(pieces) - 1} image tokens for {len(counts)} images")
    return pieces[0] + "".join(IMAGE_PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True))


def _check_one_sample(input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"the reference runs one sample at a time: expected ids (1, S), got {tuple(input_ids.shape)}")


# --- what differs between transformers versions ---

_RELEASE = Version(transformers.__version__).release
_DTYPE = "dtype" if _RELEASE >= (4, 56) else "torch_dtype"


def _networks(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Vision tower and decoder, both inside `model.model` since 4.52."""
    return (model.model.visual, model.model.language_model) if _RELEASE >= (4, 52) else (model.visual, model.model)


def _merged(visual_output: Any) -> Tensor:
    """Since 5, the vision tower returns an object that holds the merged cells, before the plain tensor of them."""
    return visual_output if isinstance(visual_output, Tensor) else visual_output.pooler_output


def _image_processor(folder: str | Path, resample_backend: str | None) -> Any:
    """That of a library, which without torchvision is Pillow whatever is asked for, or transformers' own choice."""
    if resample_backend is None:
        choice = {}
    elif _RELEASE >= (5, 4):
        choice = {"backend": "pil" if resample_backend == "pillow" else resample_backend}
    else:
        choice = {"use_fast": resample_backend == "torchvision"}
    return transformers.AutoImageProcessor.from_pretrained(folder, **choice)


def _resample_backend(image_processor: Any) -> str:
    """Since 5.4 an image processor names its backend; before, those of torchvision had a name of their own."""
    if _RELEASE >= (5, 4):
        uses_torchvision = image_processor.backend == "torchvision"
    else:
        uses_torchvision = type(image_processor).__name__.endswith("Fast")
    return "torchvision" if uses_torchvision else "pillow"
