"""QwenBatchedVL: camera frames and texts -> hidden states, image features, logits, new text or the loss of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_batched.arguments import as_int
from qwen_batched.calls import Call, Caller, Calls, check_no_gradient_in_a_capture, out_of_memory
from qwen_batched.checkpoint.atomic_save import replacing
from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.checkpoint.folder import CONFIG_FILE, Checkpoint, is_checkpoint_file, warn_of_adapter
from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.checkpoint.keys import EMBEDDING_NAME, HEAD_NAME, unread_layers
from qwen_batched.checkpoint.options import Device, ModelOptions, SaveOptions, read_options
from qwen_batched.checkpoint.weights import build_on_meta, load_weights, save_weights, whole_tensors
from qwen_batched.families import read_config
from qwen_batched.generation.api import Generative
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import FeatureMaps, Features
from qwen_batched.inputs.checks import Resize, check_given, is_text, resolve_layers
from qwen_batched.inputs.given import read_call
from qwen_batched.inputs.prepared import MARKER
from qwen_batched.inputs.transformers_batch import NAMES
from qwen_batched.linear.fused import pack
from qwen_batched.model.client_methods import ClientMethods
from qwen_batched.model.image_lists import WithImageLists
from qwen_batched.model.pipeline import Network, Wanted
from qwen_batched.model.prompt_cache import WithPromptCache
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.model.vocabulary import WithVocabulary
from qwen_batched.model.warmup import WithWarmup
from qwen_batched.outputs import VLOutput
from qwen_batched.runtime.fast_path import check_placement
from qwen_batched.runtime.idle_autocast import without_idle_autocast
from qwen_batched.training.model_config import ModelConfig
from qwen_batched.training.tied_head import embedding_weight


class QwenBatchedVL(Generative, WithPromptCache, WithImageLists, WithWarmup, WithVocabulary, ClientMethods):
    """A Qwen VL model for a batch of samples, each with the frames of the same cameras and a text.

    Attributes:
        processor: Frames and texts to tensors.
        visual: The vision transformer.
        model: The decoder.
        lm_head: The output projection, which shares the embedding's weight where the checkpoint ties them; None where
            it was left out.
    """

    def __init__(
        self,
        config: QwenVLConfig | ModelConfig,
        processor: TensorProcessor,
        checkpoint: Checkpoint,
        lm_head: bool = True,
    ) -> None:
        """Builds the modules with fresh weights; `from_pretrained` is the usual way.

        Args:
            config, processor: The model's shape, and what prepares its inputs.
            checkpoint: Where both come from; `save_pretrained` writes its files back.
            lm_head: Whether there is an output projection.
        """
        super().__init__(name_or_path=str(checkpoint.folder))
        config = config.shape if isinstance(config, ModelConfig) else config
        self.config = ModelConfig(config, checkpoint.config, self.name_or_path)
        self.processor, self.checkpoint = processor, checkpoint
        self.generation_config = checkpoint.generation_config()
        self.visual = self.family.build_vision(config)
        self.visual.plans = processor.plans  # the geometry of a size is built once for both
        self.model = self.family.build_decoder(config)
        self.has_lm_head = lm_head
        text, device = config.text, "meta" if config.tie_word_embeddings else None  # no memory for what is shared
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False, device=device) if lm_head else None
        self.tie_weights()
        self._calls = Calls()
        self._placement = object()  # another one once the model was moved, or copied

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = "auto",
        device: Device = None,
        num_layers: int | None = None,
        lm_head: bool = True,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resample_backend: str | None = None,
        added_tokens: Sequence[str] | None = None,
        **options: Any,
    ) -> QwenBatchedVL:
        """Loads a checkpoint, tensor by tensor, straight to `device` in `dtype`.

        Args:
            name: A hub id, or a folder in the hub's layout.
            dtype: Of the parameters, or its name ("bfloat16"); "auto" for the checkpoint's own.
            device: None for CUDA where there is any, else the CPU.
            num_layers: Keep only the first N decoder blocks; the others are not read from disk. None for all.
            lm_head: False leaves the output projection out; then there are no logits and no generation.
            padding_side: "left" or "right", of shorter prompts.
            min_pixels, max_pixels: Least and most pixels of a resized image; None for the checkpoint's own.
            resample_backend: "pillow" or "torchvision": which of transformers' two CPU image processors uint8 frames on
                a CPU equal (neither library is used); None for the one that transformers would use on this machine.
                `processor.resample_backend` says which. Frames on a GPU and floating frames do not depend on it.
            added_tokens: Which tokens that were added to the published vocabulary are read in texts, targets and
                `system`: tokens or patterns ("<action_*>"), () for none; None for all. Templates may use them all.
            **options: `revision`, `cache_dir`, `token` and `local_files_only` go to huggingface_hub. `torch_dtype`,
                `device_map` (one device), `attn_implementation`, `low_cpu_mem_usage` and `trust_remote_code` (False)
                are there for calls written for transformers, see `ModelOptions`.

        Raises:
            TypeError: An argument is unknown or of another type.
            ValueError: There is no such checkpoint, it is damaged or incomplete, or it is of a kind that this package
                does not implement.
        """
        chosen = read_options(ModelOptions, options)
        dtype, device = chosen.placement(dtype, device)
        checkpoint = Checkpoint.open(name, hub=chosen)
        stored = read_config(checkpoint)
        config = stored if num_layers is None else stored.truncated(num_layers)
        processor = TensorProcessor.from_checkpoint(
            checkpoint, padding_side, min_pixels, max_pixels, resample_backend, added_tokens
        )
        model = build_on_meta(lambda: cls(config, processor, checkpoint, lm_head), checkpoint.folder / CONFIG_FILE)
        names = dict(model.named_parameters())
        unread = unread_layers(names, config.text.num_hidden_layers, stored.text.num_hidden_layers)
        load_weights(
            model,
            checkpoint,
            model.family.keys,
            dtype=config.dtype if dtype == "auto" else dtype,
            device=device,
            skip=lambda name: unread(name) or name == HEAD_NAME,
            tied_head=lm_head and config.tie_word_embeddings,
        )
        model.tie_weights()
        model.name_or_path = model.config.name_or_path = str(name)
        model.eval()
        pack(model)
        return model

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Writes a folder that transformers, vLLM and `from_pretrained` load: all of it, or nothing.

        Everything is written beside what the folder holds, then renamed: the disk needs room for both. After a kill
        `from_pretrained` finds the old checkpoint or the new one. Files of an old checkpoint that are not written are
        removed; files that are no part of a checkpoint stay.

        Where merging an adapter has parted a tied head from its embedding, an untied checkpoint.

        Args:
            folder: Is made where there is none. Links in it are replaced; what they lead to stays as it is.
            state_dict: The whole tensors of a sharded model, as gathered by accelerate or `get_model_state_dict`; None
                for the model's own.
            **options: `is_main_process`, `max_shard_size` and `safe_serialization` (True) as in transformers.

        Raises:
            TypeError: An option is unknown.
            ValueError: The output projection was left out, and transformers would put random weights in its place. Or
                tensors are missing, unknown, of another shape, or sharded. Or the folder's name is empty or a file's.
            OSError: The disk is full, or a file cannot be written; it is named. The folder is as before.
        """
        chosen = read_options(SaveOptions, options, "save_pretrained")
        if not chosen.is_main_process:
            return
        if not (self.has_lm_head or self.config.tie_word_embeddings):
            lost = "its checkpoint would lack lm_head.weight"
            raise ValueError(f"a model loaded with lm_head=False cannot be saved: {lost}")
        tied = self.lm_head is None or self.has_tied_head
        config = replace(self.config.shape, tie_word_embeddings=tied)
        tensors = whole_tensors(
            self.state_dict() if state_dict is None else state_dict,
            lambda: type(self)(config, self.processor, self.checkpoint, self.has_lm_head),
        )
        image = self.processor.image
        checkpoint = self.checkpoint.describing(config, tensors[EMBEDDING_NAME].dtype, image, self.config.changes())
        settings = GenerationConfig.of(self.generation_config).settings
        if settings != self.checkpoint.generation_config().settings:
            checkpoint = replace(checkpoint, generation=dict(settings))
        with replacing(folder, stale=is_checkpoint_file, last=CONFIG_FILE) as staged:
            checkpoint.write(staged)
            named = {self.family.keys.saved_name(name): x for name, x in tensors.items()}
            save_weights(named, staged, chosen.max_shard_size)
        warn_of_adapter(Path(folder))

    @property
    def device(self) -> torch.device:
        """Where the parameters are. Raises `ValueError` where they are on several devices, or have no values."""
        device = embedding_weight(self.model.embed_tokens).device
        if device.type == "meta" or "hf_device_map" in vars(self):
            check_placement(device, vars(self).get("hf_device_map", {}))
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return embedding_weight(self.model.embed_tokens).dtype

    @without_idle_autocast
    def forward(
        self,
        images: Tensor | Sequence[Tensor] | None = None,
        texts: Sequence[str] | str | None = None,
        camera_mask: Tensor | None = None,
        layers: Sequence[int] = (-1,),
        norm: str = "post",
        logits: str | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        cuda_graph: bool = True,
        targets: Sequence[str] | str | None = None,
        system: str | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | list[Tensor] | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: FeatureMaps | Features | None = None,
        keys_values: Sequence[int] | None = (),
        **batch: Any,
    ) -> VLOutput | tuple[Any, ...]:
        """Hidden states of a batch, and the loss of its answers where there are `targets`.

        Gradients reach every parameter and floating frames. A frame that is not finite spoils its own sample, outputs
        and gradients of frames, and what all samples share: the loss and the gradients of parameters.

        On a GPU, with gradients off, the second call of a shape is captured as one CUDA graph, which later calls
        replay; `capture` does so ahead of time. Of more than 32 shapes the commonest have graphs. Results are the same,
        and never overwritten by a later call. In training, image features come from a graph where the vision
        transformer is frozen and the frames want no gradient.

        Args:
            images: (B, V, 3, H, W), RGB, on the model's device or the host; uint8 means 0..255, a floating dtype 0..1.
                Or V tensors (B, 3, H_i, W_i) when cameras differ in size. Or None for text alone.
            texts: B strings, or one where B is 1. Control tokens in them stay text; tokens that were added to the
                published vocabulary are read as such.
            camera_mask: Bool (B, V), False where a camera is absent for a sample: its pixels change nothing, and the
                sample's hidden states are those of a call with only its present cameras.
            layers: Indices as of transformers' `hidden_states`: 0 the input embeddings, k the output of decoder block
                k, the last (or -1) after the final norm. Blocks above the highest are not run.
            norm: "pre" leaves the final norm out of the last layer.
            logits: None, "last" for the last token of each sample, "all".
            template: "chat", "plain", or a layout with `{text}` and either `{images}` or one `{image}` for each camera.
            resize: "hf" for the checkpoint's own rule, (height, width) for an exact size, None where the frames
                already have a size that the model takes.
            cuda_graph: False never captures and never replays. Nor are graphs made of a model with hooks, wrapped
                layers or a processor of another class.
            targets: B strings, or one where B is 1, each sample's answer. It follows the generation prompt, with the
                end token of the chat template's turn, in other templates of the tokenizer; `loss` is that of these
                tokens alone. They are read like `texts`.
            system: Replaces the chat template's system text, and is text like `texts`; None for its own.
            input_ids, attention_mask, pixel_values, image_grid_thw, labels, position_ids, mm_token_type_ids:
                In place of images, texts and targets, a batch of transformers' processor, with labels and positions as
                its models take them: any turns, any number and sizes of images in each sample, padding on either side.
                Its `image_grid_thw` is read: on a GPU that is one wait, on the host none. The output is transformers':
                `logits` of all tokens, where there is an output projection, and their `loss` where there are labels. A
                label is predicted from the token before it; one that has none counts for nothing.
            logits_to_keep: Logits of so many places at the end; 0 for all. With labels it saves the memory of the rest.
            output_hidden_states: True for the hidden states of all layers, as a tuple.
            return_dict: False for a tuple of all that is not None.
            num_items_in_batch: The loss is the sum over the batch's labels divided by this, in place of their mean, as
                in transformers: for gradients that are accumulated over several batches.
            inputs_embeds: (B, S, D) in the model's dtype, in place of the embeddings of the tokens: whoever embeds
                states and actions writes them there. Image features still go to the image tokens' places. Of S and the
                places `processor(images, texts)` tells. With `position_ids` it needs no `input_ids`, and holds image
                features already.
            image_features: In place of images or `pixel_values`, what `encode_images` gave for them, now or before: the
                vision transformer does not run. Of a model with deep features `Features`, see there. With transformers'
                batch one (h, w, D) or (h * w, D) for each image, or what `get_image_features` gave.
            keys_values: Decoder blocks, 0 the first, whose keys and values are returned, gradients included; negative
                ones count from the end. Empty or None for none.
            **batch: The rest of what `processor(images, texts, ...)` returned, in place of images, texts and targets,
                or of some rows of it. What is on the host is checked; of what is on the GPU, a sample that does not fit
                becomes NaN. And what transformers' models take too, where it changes no result (`use_cache`).

        Raises:
            TypeError, ValueError: An argument is not as described, or gradients are wanted while a CUDA graph is
                captured. Raised before any work.
        """
        device = self.device
        if MARKER not in batch and is_text(attention_mask):  # by position, peft's classes for tasks call them so
            images, texts, input_ids, attention_mask = input_ids, attention_mask, None, None
            if camera_mask is None:
                camera_mask, inputs_embeds = inputs_embeds, None
        tensors = (input_ids, attention_mask, pixel_values, image_grid_thw, labels, position_ids, mm_token_type_ids)
        batch |= dict(zip(NAMES, (*tensors, inputs_embeds, image_features), strict=True))
        check_no_gradient_in_a_capture(self, device, images if pixel_values is None else pixel_values)
        is_transformers = texts is None and MARKER not in batch
        if output_hidden_states:
            layers = [*range(self.config.text.num_hidden_layers + 1)]
        if is_transformers and logits is None and self.has_lm_head:
            logits = as_int("logits_to_keep", logits_to_keep or 0, 0) or "all"
        wanted = self._check_wanted(layers, norm, logits, targets is not None or labels is not None, keys_values)
        if num_items_in_batch is not None:
            checks.check_item_count(num_items_in_batch)
            wanted = replace(wanted, loss="sum")
        options = {"camera_mask": camera_mask, "template": template, "resize": resize, "system": system}
        call = self._read(images, texts, batch, targets=targets, **options)
        out = self._calls.forward(self._caller(cuda_graph), call, wanted)
        if num_items_in_batch is not None and out.loss is not None:
            out.loss = out.loss / num_items_in_batch
        if output_hidden_states:
            out.hidden_states = tuple(out.hidden_states)
        return out.to_tuple() if return_dict is False else out

    @without_idle_autocast
    def encode_images(
        self,
        images: Tensor | Sequence[Tensor],
        layers: Sequence[int] | None = None,
        camera_mask: Tensor | None = None,
        resize: Resize = "hf",
        chunk_size: int | None = None,
        cuda_graph: bool = True,
        deepstack: bool = False,
    ) -> FeatureMaps | list[FeatureMaps] | Features:
        """Image features without the decoder.

        On a GPU, where no gradient is wanted, shapes get CUDA graphs as in `forward`.

        Args:
            images, resize, cuda_graph: As for `forward`.
            layers: None for the merged features that the decoder sees. Or block indices of the vision transformer
                (0 the first block, -1 the last): these blocks' outputs; later blocks are not run.
            camera_mask: As for `forward`; an absent camera's features are zero.
            chunk_size: Most images per pass through the vision transformer; None for about 16384 patches. Smaller
                passes need less memory. Results do not depend on it.
            deepstack: Return `Features(main, deep)`: the features, and one more such item for each index of the
                config's `deepstack_visual_indexes`, which the decoder adds after its first blocks. Not with `layers`.

        Returns:
            (B, V, h, w, D), row-major, h = resized height / 28 (Qwen3-VL: 32); for a list of cameras a list of V
            tensors (B, h, w, D).
            With `layers`, a list with one such item per layer, of patches: (B, V, 2h, 2w, C).

        Raises:
            TypeError, ValueError: An argument is not as described. Raised before any work.
            torch.OutOfMemoryError: The batch does not fit; the model stays usable.
        """
        if layers is not None:
            layers = resolve_layers(layers, self.config.vision.depth)
        chunk_size = checks.check_chunk_size(chunk_size)
        if deepstack and (layers is not None or self.config.vision.deepstack_visual_indexes is None):
            raise ValueError("deepstack needs a model with deep features, and layers=None")
        check_given("images", images, "a tensor or a list of tensors")
        device = self.device
        check_no_gradient_in_a_capture(self, device, images)
        request = self.processor.request(images, None, camera_mask, resize=resize, device=device)
        try:
            found = self._calls.encode(self._caller(cuda_graph), request, layers, chunk_size)
            return found if deepstack or layers is not None else found.main
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self._calls.tower.clear()
        # Raised out here, where nothing holds on to what the failed call had on the GPU.
        raise out_of_memory(images, chunk_size, reason)

    def _apply(self, *arguments: Any, **keywords: Any) -> QwenBatchedVL:
        """`.to()` and the like: the graphs' memory must not stay behind."""
        self._calls.clear()
        self._placement = object()
        return super()._apply(*arguments, **keywords)

    @property
    def _network(self) -> Network:
        return Network(self.visual, self.model, self.lm_head)

    def _caller(self, cuda_graph: bool) -> Caller:
        return Caller(self._network, self.processor, self.dtype, cuda_graph)

    def _read(self, images: object, texts: object, batch: Mapping[str, Any], **layout: Any) -> Call:
        """The call that a user makes, checked."""
        device = self.device
        dtype = self._embedding_dtype()
        # What the device does first of all: the host is as long at the texts as at all else.
        layout["images_first"] = self._calls.makes_graphs(self.processor, device)
        return read_call(self.processor, self.config, device, dtype, images, texts, batch, **layout)

    def _embedding_dtype(self) -> torch.dtype | None:
        """What embeddings and image features must have; None where they are cast."""
        weight = embedding_weight(self.model.embed_tokens)
        is_cast = type(weight) is not nn.Parameter or torch.is_autocast_enabled(weight.device.type)
        return None if is_cast else weight.dtype

    def _check_wanted(
        self,
        layers: Sequence[int],
        norm: str,
        logits: str | int | None,
        has_targets: bool,
        keys_values: Sequence[int] | None = (),
    ) -> Wanted:
        """What a call asks for, where it can be given."""
        blocks = self.config.text.num_hidden_layers
        checks.check_choice("norm", norm, "post", "pre")
        if type(logits) is not int:
            checks.check_choice("logits", logits, None, "last", "all")
        if logits is not None or has_targets:
            self._check_lm_head()
        is_none = keys_values is None or (isinstance(keys_values, (list, tuple)) and not keys_values)
        of_blocks = () if is_none else resolve_layers(keys_values, blocks, "keys_values")
        return Wanted(tuple(resolve_layers(layers, blocks + 1)), norm, logits, keys_values=tuple(of_blocks))


BatchedVL = QwenBatchedVL  # `from_pretrained` takes the family from the checkpoint
