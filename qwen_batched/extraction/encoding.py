"""Frames of a batch -> a tensor of rows for each stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwen_batched.checkpoint.folder import Checkpoint
from qwen_batched.extraction.request import IMAGE_FEATURES, LAST
from qwen_batched.extraction.streams import DEEPSTACK, Stream, dtype_in, streams_in
from qwen_batched.families import read_config
from qwen_batched.inputs.batch import FeatureMaps, Features
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL


class Encoder:
    """A model that is loaded, and what a manifest asks of it."""

    def __init__(self, model: QwenBatchedVL, manifest: dict[str, Any]) -> None:
        """`load` is the usual way."""
        self.model, self.what, self.pools = model, manifest["what"], manifest["pool"] == "mean"
        resize = manifest["resize"]
        self.resize = tuple(resize) if isinstance(resize, list) else resize
        self.template = manifest["template"]
        self.cameras = list(manifest["data"]["cameras"])
        self.streams: tuple[Stream, ...] = streams_in(manifest)
        self.pooled_dtype = dtype_in(manifest)
        self.layers = [-1 if what == LAST else int(what[7:]) for what in self.what if what != IMAGE_FEATURES]
        self.has_deep = model.config.vision.deepstack_visual_indexes is not None

    @classmethod
    def load(cls, name: str, manifest: dict[str, Any], device: torch.device) -> Encoder:
        """Loads the model, and of the decoder what is run."""
        layers = [int(what[7:]) for what in manifest["what"] if what.startswith("hidden:")]
        options: dict[str, Any] = {"dtype": manifest["dtype"], "device": device, "lm_head": False}
        if LAST not in manifest["what"]:
            # Behind the last block stands the final norm, so that a layer is that of the whole model only below it.
            depth = read_config(Checkpoint.open(name, weights=False)).text.num_hidden_layers
            options["num_layers"] = min(depth, max([0, *layers]) + 1)
        return cls(QwenBatchedVL.from_pretrained(name, **options).requires_grad_(False), manifest)

    def __call__(
        self, images: Tensor | list[Tensor], texts: Sequence[str] | None, is_whole: bool = True
    ) -> list[tuple[Tensor, ...]]:
        """The rows of each stream, and its masks where it has some.

        Args:
            images: uint8 (B, V, 3, H, W), or V tensors (B, 3, H, W), as `encode_images` takes them.
            texts: B, where hidden states are asked for.
            is_whole: Whether the batch has the usual size: CUDA graphs are made for it alone.
        """
        with torch.no_grad():
            found = self._features(images, is_whole)
            if self.layers:
                found |= self._hidden_states(found["given"], texts, is_whole)
        return [found[stream.folder] for stream in self.streams]

    def _features(self, images: Tensor | list[Tensor], is_whole: bool) -> dict[str, Any]:
        given = self.model.encode_images(images, resize=self.resize, deepstack=self.has_deep, cuda_graph=is_whole)
        main, deep = given if isinstance(given, Features) else (given, [])
        found: dict[str, Any] = {"given": given}
        for name, maps in ((IMAGE_FEATURES, main), *((DEEPSTACK.format(level=i), x) for i, x in enumerate(deep))):
            for camera, x in zip(self.cameras, _by_camera(maps), strict=True):
                found[f"{name}/{camera}"] = (x.float().mean((1, 2)).to(self.pooled_dtype) if self.pools else x,)
        return found

    def _hidden_states(
        self, features: FeatureMaps | Features, texts: Sequence[str], is_whole: bool
    ) -> dict[str, tuple[Tensor, ...]]:
        out = self.model(
            None,
            list(texts),
            image_features=features,
            layers=self.layers,
            template=self.template,
            cuda_graph=is_whole,
        )
        mask = out.attention_mask
        found = {}
        streams = [stream for stream in self.streams if "/" not in stream.folder]
        for stream, x in zip(streams, out.hidden_states, strict=True):
            if self.pools:
                kept = mask.unsqueeze(-1)
                found[stream.folder] = ((x.float() * kept).sum(1).div(kept.sum(1)).to(self.pooled_dtype),)
                continue
            spare = stream.shape[0] - x.shape[1]  # shorter than the data set's longest; padded on the left, as here
            x = functional.pad(x.masked_fill(~mask.unsqueeze(-1), 0), (0, 0, spare, 0))
            found[stream.folder] = (x, functional.pad(mask, (spare, 0)))
        return found


def _by_camera(maps: FeatureMaps) -> Sequence[Tensor]:
    return maps.unbind(1) if isinstance(maps, Tensor) else maps
