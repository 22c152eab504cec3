"""What is written of a frame: the streams, each a folder of shards with tensors of rows of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_batched.extraction.request import IMAGE_FEATURES, LAST, PARQUET, SAFETENSORS, Request, folder_of
from qwen_batched.inputs.batch import Features, Grid
from qwen_batched.model.tensor_processor import TensorProcessor

DEEPSTACK = "deepstack-{level}"  # a folder beside image_features, of families whose decoder takes deep features
MASK = "mask"  # bool (S,), False on padding, beside unpooled hidden states


@dataclass(frozen=True)
class Stream:
    """A folder of shards below OUT/features/."""

    folder: str  # "image_features/front", "hidden-18"
    shape: tuple[int, ...]  # of a row: (h, w, D), (S, D), or pooled (D,)
    has_mask: bool = False
    format: str = SAFETENSORS  # and what its files' names end with

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Of a frame."""
        size = dtype.itemsize
        for side in self.shape:
            size *= side
        return size + (self.shape[0] if self.has_mask else 0)

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"folder": self.folder, "shape": list(self.shape), "mask": self.has_mask}

    @classmethod
    def from_json(cls, said: dict[str, Any], file_format: str) -> Stream:
        """From the manifest."""
        return cls(said["folder"], tuple(said["shape"]), said["mask"], file_format)


def grids_of(processor: TensorProcessor, request: Request, sizes: Sequence[tuple[int, int]]) -> tuple[Grid, ...]:
    """Cells of each camera's features. Raises `ValueError` for sizes that the model does not take."""
    images = [torch.zeros(1, 3, *size, dtype=torch.uint8) for size in sizes]
    return processor.request(images, None, resize=request.resize, device="cpu").grids


def streams_of(
    processor: TensorProcessor,
    request: Request,
    cameras: Sequence[str],
    grids: Sequence[Grid],
    texts: Sequence[str],
) -> tuple[Stream, ...]:
    """All that a request asks for.

    Args:
        processor: The model's.
        request: See there.
        cameras, grids: Names, and cells of each.
        texts: Every different text of the data set; the longest sequence decides on S.

    Raises:
        ValueError: A layer is not there, or a text is too long.
    """
    config = processor.config
    width, depth = config.vision.out_hidden_size, config.text.num_hidden_layers
    streams = []
    for what in request.what:
        if what == IMAGE_FEATURES:
            deep = 0 if request.pool == "mean" else len(config.vision.deepstack_visual_indexes or ())
            for name in (what, *(DEEPSTACK.format(level=level) for level in range(deep))):
                for camera, grid in zip(cameras, grids, strict=True):
                    shape = (width,) if request.pool == "mean" else (*grid, width)
                    streams.append(Stream(f"{name}/{camera}", shape))
            continue
        if what != LAST and int(what.partition(":")[2]) > depth:
            raise ValueError(f"hidden:N must be of a layer from 0 to {depth}, got {what}")
        if request.pool == "mean":
            streams.append(Stream(folder_of(what), (config.text.hidden_size,)))
        else:
            length = max(sequence_length(processor, request, grids, text) for text in texts)
            streams.append(Stream(folder_of(what), (length, config.text.hidden_size), has_mask=True))
    return tuple(streams)


def sequence_length(processor: TensorProcessor, request: Request, grids: Sequence[Grid], text: str) -> int:
    """Tokens of a prompt with an image of each camera."""
    vision = processor.config.vision

    def maps() -> list[torch.Tensor]:
        return [torch.zeros(1, *grid, vision.out_hidden_size) for grid in grids]

    deep = [maps() for _ in vision.deepstack_visual_indexes or ()]
    batch = processor(None, [text], template=request.template, image_features=Features(maps(), deep))
    return batch["input_ids"].shape[1]


def streams_in(manifest: dict[str, Any]) -> tuple[Stream, ...]:
    """The streams of a folder."""
    return tuple(Stream.from_json(said, manifest["file_format"]) for said in manifest["streams"])


def stored_dtype(file_format: str, dtype: torch.dtype) -> torch.dtype:
    """Of what is written: the model's `dtype`; in parquet, which has no bfloat16, that in which means are computed."""
    return torch.float32 if file_format == PARQUET else dtype


def dtype_in(manifest: dict[str, Any]) -> torch.dtype:
    """The same of a folder."""
    return stored_dtype(manifest["file_format"], getattr(torch, manifest["dtype"]))
