"""How patches enter the vision transformer and leave it.

PatchEmbed: patches (T, patch_dim) -> (T, C). PatchMerger: (T, C) -> merged cells (T / cell_patches, D).
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.model.parts.norms import AddNorm, stream_of
from qwen_batched.runtime.fast_path import can_fuse, check_has_values


class PatchEmbed(nn.Module):
    """Patches (T, patch_dim) to (T, C)."""

    def __init__(self, config: VisionConfig, bias: bool) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_shape = (config.in_channels, *size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        check_has_values(self.proj)
        patches = patches.to(self.proj.weight.dtype)
        if not can_fuse(self.proj, nn.Conv3d):
            return self.proj(patches.unflatten(-1, self.patch_shape)).flatten(1)
        # A convolution whose stride is its kernel is a matrix product; cuDNN's Conv3d can be far slower.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class PatchMerger(nn.Module):
    """Joins the patches of each merged cell: (T, C) to (T / cell_patches, D)."""

    def __init__(self, config: VisionConfig, norm: AddNorm, norm_joined: bool = False) -> None:
        """Takes a norm of patches, or of joined ones with `norm_joined`."""
        super().__init__()
        self.cell_patches, self.norm_joined = config.cell_patches, norm_joined
        self._build(norm, config.hidden_size * config.cell_patches, config.out_hidden_size)

    def _build(self, norm: AddNorm, width: int, out_width: int) -> None:
        """Makes the parts, by their published names."""
        self.ln_q = norm
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out_width))

    def _norm(self, update: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.ln_q(update, residual)[0]

    def _project(self, x_MC: Tensor) -> Tensor:
        return self.mlp(x_MC)

    def forward(self, update_TC: Tensor, residual_TC: Tensor | None) -> Tensor:
        x_TC = stream_of(update_TC, residual_TC) if self.norm_joined else self._norm(update_TC, residual_TC)
        x_MC = rearrange(x_TC, "(m a) c -> m (a c)", a=self.cell_patches)
        return self._project(self._norm(x_MC) if self.norm_joined else x_MC)


class FlatPatchMerger(PatchMerger):
    """The same with Qwen3-VL's names."""

    def _build(self, norm: AddNorm, width: int, out_width: int) -> None:
        self.norm, self.linear_fc1, self.linear_fc2 = norm, nn.Linear(width, width), nn.Linear(width, out_width)

    def _norm(self, update: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(update, residual)[0]

    def _project(self, x_MC: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x_MC)))
