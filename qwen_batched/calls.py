"""Eager, graph or compiled: how a model's calls run is decided here and nowhere else.

A captured graph holds the whole call (frames to result), image features only, or one step of generation. Under
torch.compile everything runs eagerly, for the compiler to see in one piece.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qwen_batched.generation import Decoding, DecodingKind, DecodingPool, Rules, Sampling
from qwen_batched.inputs.batch import Batch, FeatureMaps, Features, without_absent
from qwen_batched.inputs.prepared import check_on_device
from qwen_batched.inputs.request import Request
from qwen_batched.inputs.transformers_batch import TransformersBatch
from qwen_batched.linear.fused import pack
from qwen_batched.model import pipeline
from qwen_batched.model.decoder import Decoder, DecoderBlock
from qwen_batched.model.decoder_inputs import DecoderInputs
from qwen_batched.model.image_features import block_outputs, image_features
from qwen_batched.model.pipeline import Decoded, Network, Prefilled, Wanted
from qwen_batched.model.prompt_cache import PromptCache, Suffix, run_suffix
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.outputs import VLOutput
from qwen_batched.runtime.cuda_graphs import Check, CudaGraphs, deferring_checks, make_all
from qwen_batched.runtime.fast_path import can_fuse, runs_own_code


class Caller(NamedTuple):
    """Whose call it is, and how it may run."""

    network: Network
    processor: TensorProcessor
    dtype: torch.dtype  # of the parameters
    graph: bool  # the user's leave to use graphs


# What a user gives: frames and texts, a batch that the processor prepared, or one of transformers'.
Call = Request | Batch | TransformersBatch
MAX_DECODER_GRAPHS, MAX_SUFFIX_GRAPHS, MAX_STEP_GRAPHS = 64, 8, 16
IMAGE_FIELDS = ("pixel_values", "camera_present", "grids", "images", "as_list")


class Calls:
    """Runs the calls of one model, and keeps their graphs."""

    def __init__(self) -> None:
        self.tower = CudaGraphs(prepare=pack)  # of image features
        self.decoder = CudaGraphs(MAX_DECODER_GRAPHS, prepare=pack)  # from ids and features to hidden states, logits
        self.steps = CudaGraphs(MAX_STEP_GRAPHS)  # of generations, each bound to its state
        self.idle = DecodingPool(lambda decoding: self.steps.drop(decoding.token))  # those states
        # Of tokens behind a prompt, of which each graph holds a copy.
        self.suffixes = CudaGraphs(MAX_SUFFIX_GRAPHS, prepare=pack)

    @property
    def _all(self) -> tuple[CudaGraphs, ...]:
        return self.tower, self.decoder, self.steps, self.suffixes

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()  # a copied or unpickled model begins anew

    def forward(self, caller: Caller, call: Call, wanted: Wanted) -> VLOutput:
        """The result of a call with texts."""
        network, processor, _, graph = caller
        if torch.is_grad_enabled():
            may_use_graphs = self._may_use_graphs(processor, call.device, graph)
            if may_use_graphs and not network.decoder.training and any(map(_is_trained, network)):
                _log_advice()
            return pipeline.run(network, self.batch(caller, call), wanted)
        return pipeline.output(*self._decoded(caller, call, wanted))

    @torch.no_grad()
    def prefill(self, caller: Caller, call: Call, wanted: Wanted, checks: list[Check] | None = None) -> Prefilled:
        """A prompt, with what tokens behind it need; with `checks` as of `_launched`."""
        wanted = replace(wanted, cache=True)
        if checks is None:
            return pipeline.prefilled(*self._decoded(caller, call, wanted))
        return pipeline.prefilled(*self._launched(caller, call, wanted, checks))

    def _decoded(self, caller: Caller, call: Call, wanted: Wanted) -> tuple[Batch, Features | None, Decoded]:
        """`_launched`, by modules as they are."""

        def run(checks: list[Check] | None) -> tuple[Batch, Features | None, Decoded]:
            decoded = self._launched(caller, call, wanted, checks)
            make_all(checks)
            return decoded

        return deferring_checks(run)

    def _launched(
        self, caller: Caller, call: Call, wanted: Wanted, checks: list[Check] | None
    ) -> tuple[Batch, Features | None, Decoded]:
        """A call without gradients: image features by one graph, decoder and head by another.

        Each is keyed by what shapes it, so that cameras and texts do not multiply. What lies between is few launches:
        those that lay out the sequences, and copies of what the decoder reads.

        To look at the modules takes the host a few tenths of a millisecond for each graph: with a list of `checks` it
        is left to the caller, once all is launched. Raises `OutdatedError` where modules have changed and something
        else than a graph would see what came of that. Where the tower runs without a graph the list stays empty: what
        its hooks have seen must not be seen again.
        """
        (visual, decoder, head), processor, dtype, graph = caller
        batch = self.batch(caller, call, checks)
        features, inputs = pipeline.encode(visual, batch, wanted)
        if inputs.features and not checks:
            checks = None  # the tower itself may have run
        length = inputs.length
        if self._rounds_up(decoder, call.device):
            inputs = inputs.rounded_up()
        run = functools.partial(pipeline.decode, decoder, head, wanted)
        if self._may_use_graphs(processor, call.device, graph):
            modules = [decoder] if head is None else [decoder, head]
            key = wanted, *_decoder_settings(modules, dtype)
            options = {"rooms": inputs.rooms, "checks": checks}
            decoded = self._by_graph(self.decoder, modules, key, run, inputs, call.device, **options)
        else:
            decoded = run(inputs.padded())
        return batch, features, decoded if inputs.room in (None, length) else decoded.cut(length, wanted)

    def _rounds_up(self, decoder: Decoder, device: torch.device) -> bool:
        """Whether sequences get room for more tokens, with a graph or without, so that both compute the same.

        Not where a hook would see it.
        """
        if device.type != "cuda" or torch.compiler.is_compiling():
            return False
        parts = (decoder.embed_tokens, nn.Embedding), *((block, DecoderBlock) for block in decoder.layers)
        return runs_own_code(decoder) and all(can_fuse(part, kind) for part, kind in parts)

    @torch.no_grad()
    def extend(self, caller: Caller, cache: PromptCache, suffix: Suffix) -> Tensor:
        """Last hidden states of tokens behind a prompt."""
        decoder = caller.network.decoder
        run = functools.partial(run_suffix, decoder)
        if not self._may_use_graphs(caller.processor, suffix.device, caller.graph):
            return run(suffix, *cache.tensors)
        key = _decoder_settings([decoder], caller.dtype)
        return self._by_graph(self.suffixes, [decoder], key, run, suffix, suffix.device, kept=cache)

    def batch(self, caller: Caller, call: Call, checks: list[Check] | None = None) -> Batch:
        """The batch of a call; on a GPU with `features` in place of pixels.

        Those of a frozen tower come from a graph, in training too: to launch it kernel by kernel takes the host as long
        as the GPU, and the decoder waits for both. Whether that was true is left to the caller with `checks`.
        """
        visual, processor, dtype, graph = caller.network.visual, *caller[1:]
        may_use_graphs = self._may_use_graphs(processor, call.device, graph)
        if isinstance(call, Request):
            if not call.frames or not may_use_graphs:
                return processor.batch(call.laid_out, dtype)
            features = self._features(caller, call.images, checks)
            return replace(processor.batch(replace(call.laid_out, frames=()), dtype), features=features)
        batch = _batch_of(call, processor, dtype)
        if batch.pixel_values is None or not may_use_graphs:
            return batch
        images = Batch(**{name: getattr(batch, name) for name in IMAGE_FIELDS})
        key, run = ("batch", *_settings(processor, dtype)), functools.partial(image_features, visual)
        features = self._by_graph(self.tower, [visual], key, run, images, call.device, checks=checks)
        return replace(batch, pixel_values=None, features=features)

    def _features(self, caller: Caller, request: Request, checks: list[Check] | None) -> Features:
        """Those that the decoder takes. A camera mask needs no graph of its own."""
        mask = request.camera_mask
        if mask is None or torch.is_grad_enabled():
            return self.encode(caller, request, checks=checks)
        features = self.encode(caller, replace(request, camera_mask=None), checks=checks)
        # For callers. No token stands for an absent camera, so the deep ones may stay.
        return features._replace(main=without_absent(features.main, mask))

    def encode(
        self,
        caller: Caller,
        request: Request,
        layers: Sequence[int] | None = None,
        chunk_size: int | None = None,
        checks: list[Check] | None = None,
    ) -> Features | list[FeatureMaps]:
        """The features of a request for images only; with `layers` the outputs of these blocks."""
        (visual, _, _), processor, dtype, graph = caller

        def run(request: Request) -> Features | list[FeatureMaps]:
            batch = processor.batch(request, dtype)
            if layers is None:
                return image_features(visual, batch, chunk_size)
            return block_outputs(visual, batch, layers, chunk_size)

        if not self._may_use_graphs(processor, request.device, graph):
            return run(request)
        key = (repr(layers), chunk_size, *_settings(processor, dtype))
        return self._by_graph(self.tower, [visual], key, run, request, request.device, checks=checks)

    @contextlib.contextmanager
    def decoding(
        self,
        caller: Caller,
        prefilled: Prefilled,
        sampling: Sampling,
        rules: Rules,
        checks: list[Check] | None = None,
    ) -> Iterator[tuple[Decoding, Callable[[int], None]]]:
        """The state of a generation behind its prompts, with the first token, and what runs so many steps more.

        After the `with` block the state and its graph serve the next generation of the kind. The `checks` of the
        prompts are made once the first steps are launched.
        """
        (_, decoder, head), processor, _, graph = caller
        kind = DecodingKind.of(prefilled, sampling, rules)
        may_use_graphs = self._may_use_graphs(processor, kind.device, graph)
        if sampling.temperature > 0 or not may_use_graphs:  # draws of PyTorch's generator may not be repeated
            make_all(checks)
        if not may_use_graphs:
            decoding = Decoding(decoder, head, kind)
            decoding.begin(decoder, head, prefilled, sampling, rules)
            yield decoding, decoding.run
            return
        idle, epoch = self.idle.take(kind)
        decoding = idle or Decoding(decoder, head, kind)

        @torch.no_grad()
        def run(steps: int) -> None:
            self.steps.repeat(decoding.modules, decoding.token, decoding.step, steps, kind.device, checks)
            make_all(checks)

        try:
            decoding.lend()
            decoding.begin(decoder, head, prefilled, sampling, rules)
            yield decoding, run
        finally:
            decoding.give_back()
            self.idle.give(decoding, epoch)

    def makes_graphs(self, processor: TensorProcessor, device: torch.device) -> bool:
        """Whether calls on this device may become graphs."""
        return self._may_use_graphs(processor, device, True)

    @property
    def graph_count(self) -> int:
        """How many there are."""
        return sum(map(len, self._all))

    @contextlib.contextmanager
    def admitting_all(self) -> Iterator[list[RuntimeError]]:
        """Inside the `with` block second calls are captured, whatever has to give way; yields why some could not be."""
        refused: list[RuntimeError] = []
        with contextlib.ExitStack() as stack:
            for graphs in self._all:
                stack.enter_context(graphs.admitting_all(refused))
            yield refused

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Forgets the graphs made inside the `with` block if it raises."""
        before = [graphs.keys() for graphs in self._all]
        try:
            yield
        except BaseException:
            self.idle.clear()  # whose steps are among the graphs
            for graphs, keys in zip(self._all, before, strict=True):
                graphs.keep_only(keys)
            raise

    def clear(self) -> None:
        """Forgets all graphs, and frees their memory."""
        for graphs in self._all:
            graphs.clear()
        self.idle.clear()

    def _may_use_graphs(self, processor: TensorProcessor, device: torch.device, wanted: bool) -> bool:
        """What a call decides before its tensors are looked at; `CudaGraphs.run` looks at these."""
        if not wanted or device.type != "cuda" or torch.compiler.is_compiling():
            return False
        # A processor of another class, or with methods of its own, may decide in Python what it does at every call.
        return type(processor) is TensorProcessor and vars(TensorProcessor).keys().isdisjoint(vars(processor))

    def _by_graph(
        self,
        graphs: CudaGraphs,
        modules: Sequence[nn.Module],
        key: tuple[Hashable, ...],
        run: Callable[..., object],
        call: Call | DecoderInputs | Suffix,
        device: torch.device,
        **options: Any,
    ) -> object:
        """`run` of the call; `options` are those of `CudaGraphs.run`."""
        tensors, spec = _pytree.tree_flatten(call)

        def on_tensors(*given: Tensor) -> object:
            return run(_pytree.tree_unflatten(given[: len(tensors)], spec), *given[len(tensors) :])

        key = (*key, type(call), spec.context)
        return graphs.run(modules, key, on_tensors, *tensors, device=device, **options)


def check_no_gradient_in_a_capture(module: nn.Module, device: torch.device, images: object = None) -> None:
    """Raises `ValueError` where gradients of parameters or `images` are wanted while a CUDA graph is captured."""
    if not torch.is_grad_enabled() or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return
    frames = images if isinstance(images, list | tuple) else [images]
    if any(getattr(tensor, "requires_grad", False) for tensor in (*frames, *module.parameters())):
        raise ValueError("a CUDA graph holds no gradients: capture the model under torch.no_grad()")


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


@functools.cache
def _log_advice() -> None:
    """Says, once in a process, that parameters which want gradients keep a call in eval mode from a graph."""
    logging.getLogger(__name__).warning(
        "the model is in eval mode and gradients are enabled, so no CUDA graph of the whole call is used, and results "
        "keep what a backward pass needs: call it under torch.no_grad() or inference_mode()"
    )


def out_of_memory(images: Tensor | Sequence[Tensor], chunk_size: int | None, reason: str) -> torch.OutOfMemoryError:
    """What `encode_images` raises where `images` did not fit."""
    sizes = ", ".join(str(tuple(frames.shape)) for frames in ([images] if isinstance(images, Tensor) else images))
    return torch.OutOfMemoryError(
        f"encode_images ran out of memory for images {sizes} with chunk_size={chunk_size}; a smaller chunk_size "
        f"(images per pass) needs less. {reason}"
    )


def _settings(processor: TensorProcessor, dtype: torch.dtype) -> tuple[Hashable, ...]:
    """What shapes a call besides its arguments and tensors."""
    tokens = processor.config.image_token_id, processor.prompts.pad_token_id, processor.padding_side
    return dtype, processor, processor.image, *tokens


def _decoder_settings(modules: Sequence[nn.Module], dtype: torch.dtype) -> tuple[Hashable, ...]:
    """Likewise, of a decoder and perhaps a head.

    Ids and labels below the number of their rows reach no graph of fewer, which is looked at behind its replay.
    """
    decoder, *head = modules
    weights = [module._parameters.get("weight") for module in (decoder.embed_tokens, *head)]
    return dtype, *(None if weight is None else weight.shape[0] for weight in weights)


def _batch_of(call: Call, processor: TensorProcessor, dtype: torch.dtype) -> Batch:
    if isinstance(call, Request):
        return processor.batch(call, dtype)
    return check_on_device(call, processor.config) if isinstance(call, Batch) else processor.arrange(call)
