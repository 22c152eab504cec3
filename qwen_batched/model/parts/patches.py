"""How patches enter the vision transformer and leave it.

PatchEmbed: patches (T, patch_dim) -> (T, C). PatchMerger: (T, C) -> merged cells (T / cell_patches, D).
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.model.parts.norms import AddRMSNorm
from qwen_batched.runtime.fast_path import can_fuse, check_has_values

# transformers' vision transformer takes this from no config.
VISION_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches (T, patch_dim) to (T, C)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_shape = (config.in_channels, *size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        check_has_values(self.proj)
        patches = patches.to(self.proj.weight.dtype)
        if not can_fuse(self.proj, nn.Conv3d):
            return self.proj(patches.unflatten(-1, self.patch_shape)).flatten(1)
        # A convolution whose stride is its kernel is a matrix product; cuDNN's Conv3d can be far slower.
        return F.linear(patches, self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """Joins the patches of each merged cell: (T, C) to (T / cell_patches, D)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size * config.cell_patches
        self.cell_patches = config.cell_patches
        self.ln_q = AddRMSNorm(config.hidden_size, VISION_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size))

    def forward(self, update_TC: Tensor, residual_TC: Tensor) -> Tensor:
        x_TC, _ = self.ln_q(update_TC, residual_TC)
        return self.mlp(rearrange(x_TC, "(m a) c -> m (a c)", a=self.cell_patches))
