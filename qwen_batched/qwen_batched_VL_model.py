"""QwenBatchedVL: camera frames and texts -> hidden states, image features, logits or new text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_batched.checkpoint import Checkpoint
from qwen_batched.config import GenerationConfig, QwenVLConfig
from qwen_batched.generation import Sampling, generate_tokens, last_tokens
from qwen_batched.model.inputs import (
    Resize,
    check_batch,
    check_batch_names,
    check_chunk_size,
    check_norm,
    resolve_layers,
)
from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder, BatchedVisionTransformer
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.outputs import GenerateOutput, VLOutput
from qwen_batched.runtime.cuda_graphs import CudaGraphs
from qwen_batched.weights import HEAD_NAME, build_on_meta, load_weights, save_weights, unread_layers

Features = Tensor | list[Tensor]


class QwenBatchedVL(nn.Module):
    """Qwen2.5-VL for a batch of samples, each with the frames of the same cameras and a text.

    Attributes:
        processor: Frames and texts to tensors.
        visual: The vision transformer.
        model: The decoder.
        lm_head: The output projection; None where it is tied to the embeddings or was left out.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        processor: TensorProcessor,
        checkpoint: Checkpoint,
        lm_head: bool = True,
    ) -> None:
        """Builds the modules with fresh weights; `from_pretrained` is the usual way.

        Args:
            config: The model's shape.
            processor: Prepares its inputs.
            checkpoint: Where both come from; `save_pretrained` writes its files back.
            lm_head: Whether there is an output projection.
        """
        super().__init__()
        self.config = config
        self.processor = processor
        self.checkpoint = checkpoint
        self.generation_config = GenerationConfig.from_dict(checkpoint.generation or {}, checkpoint.config)
        self.visual = BatchedVisionTransformer(config.vision)
        self.model = BatchedDecoder(config.text)
        self.has_lm_head = lm_head
        separate_head = lm_head and not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False) if separate_head else None
        self._graphs = CudaGraphs()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        num_layers: int | None = None,
        lm_head: bool = True,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> QwenBatchedVL:
        """Loads a checkpoint, tensor by tensor, straight to `device` in `dtype`.

        Args:
            name: A hub id, or a folder in the hub's layout.
            dtype: Of the parameters; "auto" for the checkpoint's own.
            device: None for CUDA where there is any, else the CPU.
            num_layers: Keep only the first N decoder blocks; the others are not read from disk. None for all.
            lm_head: False leaves the output projection out; then there are no logits and no generation.
            padding_side: "left" or "right", of shorter prompts.
            min_pixels: Least pixels of a resized image; None for the checkpoint's own.
            max_pixels: Most pixels of a resized image; None for the checkpoint's own.

        Raises:
            ValueError: There is no such checkpoint, it is damaged or incomplete, or it is of a kind that this package
                does not implement.
        """
        checkpoint = Checkpoint.open(name)
        stored = QwenVLConfig.from_dict(checkpoint.config)
        config = stored if num_layers is None else stored.truncated(num_layers)
        processor = TensorProcessor.from_checkpoint(checkpoint, padding_side, min_pixels, max_pixels)
        model = build_on_meta(lambda: cls(config, processor, checkpoint, lm_head))
        names = dict(model.named_parameters())
        unread = unread_layers(names, config.text.num_hidden_layers, stored.text.num_hidden_layers)
        load_weights(
            model,
            checkpoint.folder,
            dtype=config.dtype if dtype == "auto" else dtype,
            device=device,
            skip=lambda name: unread(name) or name == HEAD_NAME,
            tied_head=lm_head and config.tie_word_embeddings,
        )
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that transformers, vLLM and `from_pretrained` load.

        Raises:
            ValueError: The output projection was left out, and transformers would put random weights in its place.
        """
        if not (self.has_lm_head or self.config.tie_word_embeddings):
            raise ValueError(
                "a model loaded with lm_head=False cannot be saved: its checkpoint would lack lm_head.weight"
            )
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        image = self.processor.image
        files = self.checkpoint.describing(
            num_layers=self.config.text.num_hidden_layers,
            dtype=self.dtype,
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
        )
        files.save(folder)
        save_weights(self, folder)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.model.embed_tokens.weight.dtype

    def forward(
        self,
        images: Tensor | Sequence[Tensor] | None = None,
        texts: Sequence[str] | None = None,
        camera_mask: Tensor | None = None,
        layers: Sequence[int] = (-1,),
        norm: str = "post",
        logits: str | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        **batch: Tensor | list[Tensor],
    ) -> VLOutput:
        """Hidden states of a batch.

        Args:
            images: (B, V, 3, H, W), RGB, on the model's device or the host; uint8 means 0..255, a floating dtype 0..1.
                Or V tensors (B, 3, H_i, W_i) when cameras differ in size. Or None for text alone.
            texts: B strings. Whatever they contain is text and never a control token.
            camera_mask: Bool (B, V), False where a camera is absent for a sample: its pixels change nothing, and the
                sample's hidden states are those of a call with only its present cameras.
            layers: Indices as of transformers' `hidden_states`: 0 the input embeddings, k the output of decoder block
                k, the last (or -1) after the final norm. Blocks above the highest are not run.
            norm: "pre" leaves the final norm out of the last layer.
            logits: None, "last" for the last token of each sample, "all".
            template: "chat", "plain", or a layout with `{images}` and `{text}`.
            resize: "hf" for the checkpoint's own rule, (height, width) for an exact size, None where the frames
                already have a size that the model takes.
            **batch: In place of images and texts, what `processor(images, texts, ...)` returned.

        Raises:
            TypeError, ValueError: An argument is not as described. Nothing was done.
        """
        wanted = self._check_outputs(layers, norm, logits)
        batch = self._prepare(images, texts, camera_mask, template, resize, batch)
        inputs_embeds, features = self._embed(batch)
        if logits is not None:
            wanted = [*wanted, self.config.text.num_hidden_layers]
        attention_mask = batch["attention_mask"]
        hidden_states = self.model(
            inputs_embeds, batch["position_ids"], attention_mask, wanted, norm, token_index=batch["token_index"]
        )
        scores = None
        if logits is not None:
            last = hidden_states.pop()
            last = last if norm == "post" else self.model.norm(last)[0]
            scores = self.logits(last_tokens(last, attention_mask) if logits == "last" else last)
        return VLOutput(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            image_mask=batch["feature_index"] >= 0,
            camera_ids=batch["camera_ids"],
            position_ids=batch["position_ids"],
            input_ids=batch["input_ids"],
            image_features=features,
            logits=scores,
        )

    def encode_images(
        self,
        images: Tensor | Sequence[Tensor],
        layers: Sequence[int] | None = None,
        camera_mask: Tensor | None = None,
        resize: Resize = "hf",
        chunk_size: int | None = None,
        cuda_graph: bool = True,
    ) -> Features | list[Features]:
        """Image features without the decoder.

        On a GPU, with gradients off, the second call of a shape is captured as a CUDA graph that later calls replay.
        Results are the same, and never overwritten by a later call.

        Args:
            images: As for `forward`.
            layers: None for the merged features that the decoder sees. Or block indices of the vision transformer
                (0 the first block, -1 the last): these blocks' outputs; later blocks are not run.
            camera_mask: As for `forward`; an absent camera's features are zero.
            resize: As for `forward`.
            chunk_size: Most images per pass through the vision transformer; None for about 16384 patches. Smaller
                passes need less memory. Results do not depend on it.
            cuda_graph: False never captures and never replays. Nor are graphs made of a model with hooks, wrapped
                layers or a processor of another class.

        Returns:
            (B, V, h, w, D), row-major, h = resized height / 28; a list of V tensors (B, h, w, D) when the cameras'
            grids differ. With `layers`, a list with one such item per layer, of patches: (B, V, 2h, 2w, C).

        Raises:
            TypeError, ValueError: An argument is not as described. Nothing was done.
            torch.OutOfMemoryError: The batch does not fit; the model stays usable.
        """
        if layers is not None:
            resolve_layers(layers, self.config.vision.depth)
        check_chunk_size(chunk_size)
        if images is None:
            raise TypeError("encode_images needs images, got None")
        device, dtype = self.device, self.dtype
        self.processor.check_images(images, camera_mask, resize, device)
        masks = () if camera_mask is None else (self.processor.mask_on_device(camera_mask, device),)

        def encode(*inputs: Tensor) -> Features | list[Features]:
            frames, mask = (inputs[:-1], inputs[-1]) if masks else (inputs, None)
            images = frames[0] if one_size else frames
            batch = self.processor(images, None, mask, resize=resize, device=device, dtype=dtype)
            return self.visual(**batch, layers=layers, chunk_size=chunk_size)

        one_size = isinstance(images, Tensor)
        inputs = (*((images,) if one_size else images), *masks)
        try:
            if not cuda_graph or device.type != "cuda" or type(self.processor) is not TensorProcessor:
                return encode(*inputs)
            arguments = repr((one_size, len(masks), layers, resize, chunk_size))
            key = (arguments, dtype, self.processor, self.processor.image)
            return self._graphs.run(self.visual, key, encode, *inputs, device=device)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self._graphs.clear()
        # Raised out here, where nothing holds on to what the failed call had on the GPU.
        sizes = ", ".join(str(tuple(frames.shape)) for frames in inputs[: len(inputs) - len(masks)])
        raise torch.OutOfMemoryError(
            f"encode_images ran out of memory for images {sizes} with chunk_size={chunk_size}; a smaller chunk_size "
            f"(images per pass) needs less. {reason}"
        )

    def _apply(self, *arguments: Any, **keywords: Any) -> QwenBatchedVL:
        """`.to()` and the like: the graphs' memory must not stay behind."""
        self._graphs.clear()
        return super()._apply(*arguments, **keywords)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., D) after the final norm.

        Raises:
            ValueError: The output projection was left out.
        """
        self._check_lm_head()
        if self.lm_head is None:
            return F.linear(hidden_states, self.model.embed_tokens.weight)
        return self.lm_head(hidden_states)

    def generate(
        self,
        images: Tensor | Sequence[Tensor] | None,
        texts: Sequence[str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        camera_mask: Tensor | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        stream: Callable[[list[str]], None] | None = None,
        progress: bool = False,
    ) -> GenerateOutput:
        """New text for each sample.

        The checkpoint's end tokens and repetition penalty (generation_config.json) apply, as in transformers; how
        tokens are drawn is said here alone.

        Args:
            images: As for `forward`.
            texts: As for `forward`.
            max_new_tokens: At least 1.
            temperature: 0 takes the likeliest token; above 0 tokens are drawn.
            top_k: Draw among the k likeliest tokens; 0 for all.
            top_p: Draw among the fewest likeliest tokens whose probabilities reach p, in (0, 1].
            seed: Makes draws reproducible.
            camera_mask: As for `forward`.
            template: As for `forward`.
            resize: As for `forward`.
            stream: Takes new text as it comes, one string for each sample, "" where there is none; joined, a sample's
                are its text. Called for each token on a CPU and for every few on a GPU.
            progress: Shows a progress bar on stderr.

        Raises:
            TypeError, ValueError: An argument is not as described, or prompt and new tokens together exceed the
                model's maximum. Nothing was done.
        """
        self._check_lm_head()
        sampling = Sampling(temperature, top_k, top_p, seed)
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")
        if stream is not None and not callable(stream):
            raise TypeError(f"stream must be None or a function of a list of str, got {stream!r}")
        batch = self._prepare(images, texts, camera_mask, template, resize, {}, max_new_tokens)
        with torch.no_grad():
            inputs_embeds, _ = self._embed(batch)
        prompts = self.processor.prompts
        text_stream = prompts.stream(len(texts))
        tokens, rows = generate_tokens(
            self.model,
            self.logits,
            inputs_embeds,
            batch["input_ids"],
            batch["position_ids"],
            batch["attention_mask"],
            batch["token_index"],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            config=self.generation_config,
            stream=None if stream is None else lambda new: stream(text_stream.pieces(new)),
            progress=progress,
        )
        if stream is not None:
            stream(text_stream.rest())
        return GenerateOutput(
            texts=[prompts.decode(row) for row in rows],
            token_ids=tokens,
            finish_reasons=["eos" if row[-1] in self.generation_config.eos_token_ids else "length" for row in rows],
        )

    def _prepare(
        self,
        images: Tensor | Sequence[Tensor] | None,
        texts: Sequence[str] | None,
        camera_mask: Tensor | None,
        template: str,
        resize: Resize,
        batch: dict[str, Tensor | list[Tensor]],
        max_new_tokens: int = 0,
    ) -> dict[str, Tensor | list[Tensor]]:
        """The processor's batch, made here or given."""
        if not batch:
            if texts is None:
                raise TypeError("texts must be a list of str, got None")
            return self.processor(
                images,
                texts,
                camera_mask,
                template=template,
                resize=resize,
                device=self.device,
                dtype=self.dtype,
                max_new_tokens=max_new_tokens,
            )
        check_batch_names(batch)
        if images is not None or texts is not None:
            raise ValueError("give either images and texts or a processor's batch, got both")
        if camera_mask is not None or template != "chat" or resize != "hf":
            raise ValueError("camera_mask, template and resize shape a batch when the processor makes it, not later")
        vision = self.config.vision
        check_batch(batch, vision.patch_dim, vision.cell_patches)
        return {name: _to_device(value, self.device) for name, value in batch.items()}

    def _embed(self, batch: dict[str, Tensor | list[Tensor]]) -> tuple[Tensor, Features | None]:
        """Input embeddings (B, S, D) with each image token's feature in its place, and the features."""
        if "pixel_values" not in batch:
            return self.model.embed_tokens(batch["input_ids"]), None
        features = self.visual(batch["pixel_values"], batch["raster_order"], batch.get("camera_present"))
        by_camera = [features.flatten(1, 3)] if isinstance(features, Tensor) else [x.flatten(1, 2) for x in features]
        features_BMD = torch.cat(by_camera, dim=1)
        embeds_BSD = self.model.embed_tokens(batch["input_ids"])
        index_BS1 = batch["feature_index"][..., None]
        placed_BSD = features_BMD.gather(1, index_BS1.clamp(min=0).expand(-1, -1, features_BMD.shape[-1]))
        return torch.where(index_BS1 >= 0, placed_BSD.to(embeds_BSD.dtype), embeds_BSD), features

    def _check_outputs(self, layers: Sequence[int], norm: str, logits: str | None) -> list[int]:
        """`layers` as indices from 0, where what is asked for can be given."""
        check_norm(norm)
        if logits not in (None, "last", "all"):
            raise ValueError(f"logits must be None, 'last' or 'all', got {logits!r}")
        if logits is not None:
            self._check_lm_head()
        return resolve_layers(layers, self.config.text.num_hidden_layers + 1)

    def _check_lm_head(self) -> None:
        if not self.has_lm_head:
            raise ValueError("logits and generation need the output projection: load with lm_head=True")


def _to_device(value: Tensor | Sequence[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return [_to_device(item, device) for item in value]
