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
        width = config.hidden_size * config.cell_patches
        self.cell_patches = config.cell_patches
        self.norm_joined = norm_joined
        self.ln_q = norm
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size))

    def forward(self, update_TC: Tensor, residual_TC: Tensor | None) -> Tensor:
        x_TC = stream_of(update_TC, residual_TC) if self.norm_joined else self.ln_q(update_TC, residual_TC)[0]
        x_MC = rearrange(x_TC, "(m a) c -> m (a c)", a=self.cell_patches)
        return self.mlp(self.ln_q(x_MC)[0] if self.norm_joined else x_MC)
