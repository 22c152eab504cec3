"""Image features alone, and for the decoder where nothing that makes them is trained: both by CUDA graphs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen_batched.inputs.checks import Resize, check_chunk_size, check_given, resolve_layers
from qwen_batched.inputs.request import Request
from qwen_batched.model.embedding import Features, as_given
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.runtime.cuda_graphs import CudaGraphs
from qwen_batched.training.api import Trainable


class ImageEncoder(Trainable):
    """A model's way from frames to features.

    Attributes:
        processor: Frames to pixels.
        dtype: The parameters' dtype.
    """

    processor: TensorProcessor
    dtype: torch.dtype
    _vision_graphs: CudaGraphs  # apart from those of whole calls: features stay true whatever happens to the decoder

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

        On a GPU, where no gradient is wanted, shapes get CUDA graphs as in `forward`.

        Args:
            images: As for `forward`.
            layers: None for the merged features that the decoder sees. Or block indices of the vision transformer
                (0 the first block, -1 the last): these blocks' outputs; later blocks are not run.
            camera_mask: As for `forward`; an absent camera's features are zero.
            resize: As for `forward`.
            chunk_size: Most images per pass through the vision transformer; None for about 16384 patches. Smaller
                passes need less memory. Results do not depend on it.
            cuda_graph: As for `forward`.

        Returns:
            (B, V, h, w, D), row-major, h = resized height / 28; for a list of cameras a list of V tensors (B, h, w, D).
            With `layers`, a list with one such item per layer, of patches: (B, V, 2h, 2w, C).

        Raises:
            TypeError, ValueError: An argument is not as described. Raised before any work.
            torch.OutOfMemoryError: The batch does not fit; the model stays usable.
        """
        if layers is not None:
            layers = resolve_layers(layers, self.config.vision.depth)
        chunk_size = check_chunk_size(chunk_size)
        check_given("images", images, "a tensor or a list of tensors")
        self.check_no_gradient_in_a_capture(images)
        request = self.processor.request(images, None, camera_mask, resize=resize, device=self.device)
        try:
            return self._encode(request, cuda_graph, layers, chunk_size)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self._vision_graphs.clear()
        # Raised out here, where nothing holds on to what the failed call had on the GPU.
        sizes = ", ".join(str(tuple(frames.shape)) for frames in ([images] if isinstance(images, Tensor) else images))
        raise torch.OutOfMemoryError(
            f"encode_images ran out of memory for images {sizes} with chunk_size={chunk_size}; a smaller chunk_size "
            f"(images per pass) needs less. {reason}"
        )

    def _batch(self, request: Request, cuda_graph: bool) -> dict[str, Any]:
        """The processor's batch; on a GPU with `features` in place of pixels.

        Those of a frozen tower come from a graph, in training too: to launch it kernel by kernel takes the host as long
        as the GPU, and the decoder waits for both. A compiler sees the two networks in one piece instead.
        """
        if not request.frames or not self._graphs_may_serve(cuda_graph) or torch.compiler.is_compiling():
            return self.processor.batch(request, self.dtype)
        features = self._encode(replace(request, prompts=None), cuda_graph)
        return self.processor.batch(replace(request, frames=()), self.dtype) | {"features": features}

    def _encode(
        self, request: Request, cuda_graph: bool, layers: Sequence[int] | None = None, chunk_size: int | None = None
    ) -> Features | list[Features]:
        """The features of a request for images alone."""

        def run(*tensors: Tensor) -> Features | list[Features]:
            batch = self.processor.batch(request.with_tensors(tensors), self.dtype)
            inputs = batch["pixel_values"], batch["raster_order"], batch.get("camera_present")
            # Without either it is called as `embed` calls it: hooks see the same arguments.
            options = {} if layers is None and chunk_size is None else {"layers": layers, "chunk_size": chunk_size}
            features = self.visual(*inputs, **options)
            if layers is None:
                return as_given(features, request.as_list)
            return [as_given(output, request.as_list) for output in features]

        if not self._graphs_may_serve(cuda_graph):
            return run(*request.tensors)
        key = (repr((layers, chunk_size)), *self._key(request))
        return self._vision_graphs.run([self.visual], key, run, *request.tensors, device=self.device)

    def _graphs_may_serve(self, wanted: bool) -> bool:
        if not wanted or self.device.type != "cuda":
            return False
        # A processor of another class, or with methods of its own, may decide in Python what it does at every call.
        return type(self.processor) is TensorProcessor and vars(TensorProcessor).keys().isdisjoint(vars(self.processor))

    def _key(self, request: Request) -> tuple[Hashable, ...]:
        """What shapes a call besides its arguments and tensors."""
        processor = self.processor
        tokens = processor.config.image_token_id, processor.prompts.pad_token_id, processor.padding_side
        return *request.key, self.dtype, processor, processor.image, *tokens
