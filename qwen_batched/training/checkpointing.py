"""Blocks that forget their activations and compute them again in the backward pass (Chen et al., arXiv:1604.06174).

In and out: what the block takes and gives. Gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen_batched import ops
from qwen_batched.arguments import as_int, shown

T = TypeVar("T")
OPTIONS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")


def recompute(function: Callable[..., T], *inputs: object, **options: Any) -> T:
    """`function(*inputs)`; where gradients are enabled, what its backward pass needs is computed again by then."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    chosen = ops.backend()
    if chosen == "auto":
        return checkpoint(function, *inputs, use_reentrant=False, **options)

    def with_backend(*inputs: object) -> T:
        with ops.use_backend(chosen):  # the backward pass has threads of its own, which do not know what was chosen
            return function(*inputs)

    return checkpoint(with_backend, *inputs, use_reentrant=False, **options)


class CheckpointedBlock(nn.Module):
    """A block, its `compute`, that can do so, and does once `gradient_checkpointing_enable` was called.

    The block's own hooks stay outside: they run once, and FSDP's gather its weights.
    """

    # Options of `torch.utils.checkpoint.checkpoint`; None where activations are kept.
    recomputing: Mapping[str, Any] | None = None

    def advance(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The block with its last addition left to the next norm: an update and the residual stream, in and out."""
        if self.recomputing is None:
            return self.compute(*inputs)
        return recompute(self.compute, *inputs, **self.recomputing)


class GradientCheckpointing(nn.Module):
    """A network of such blocks, with the methods that transformers' models have for it."""

    _no_split_modules: ClassVar[list[str]] = ["VisionBlock", "DecoderBlock"]  # what accelerate wraps for FSDP

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From now on blocks keep their inputs alone for the backward pass, and run again in it.

        This is so wherever gradients are enabled, in `eval()` mode too: unlike in transformers the mode means nothing
        here. Gradients are the same. Frozen blocks that nothing before them makes part of a graph keep nothing at all,
        with or without.

        Args:
            gradient_checkpointing_kwargs: Options of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: Which blocks: the first and every n-th after it.
            offload: Must be False.

        Raises:
            TypeError: An option is unknown.
            ValueError: The reentrant variant or offloading is asked for, or `every_n_layers` is below 1.
        """
        if not isinstance(gradient_checkpointing_kwargs, Mapping | None):
            raise TypeError(f"gradient_checkpointing_kwargs must be a dict, got {shown(gradient_checkpointing_kwargs)}")
        options = dict(gradient_checkpointing_kwargs or {})
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(f"gradient_checkpointing_kwargs must be among {OPTIONS}, got {unknown}")
        if options.pop("use_reentrant", False) or offload:
            raise ValueError("gradient checkpointing is non-reentrant and on the device: got use_reentrant or offload")
        every_n_layers = as_int("every_n_layers", every_n_layers, 1)
        for index, block in enumerate(self._checkpointed_blocks()):
            block.recomputing = None if index % every_n_layers else options

    def gradient_checkpointing_disable(self) -> None:
        """From now on blocks keep their activations."""
        for block in self._checkpointed_blocks():
            block.recomputing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block runs again in the backward pass."""
        return any(block.recomputing is not None for block in self._checkpointed_blocks())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by its newer name."""
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing` by its newer name."""
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Does nothing: reentrant checkpointing alone needs inputs that want a gradient. peft calls it."""

    def disable_input_require_grads(self) -> None:
        """Does nothing, like `enable_input_require_grads`."""

    def _checkpointed_blocks(self) -> list[CheckpointedBlock]:
        return [module for module in self.modules() if isinstance(module, CheckpointedBlock)]
