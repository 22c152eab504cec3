"""Position rules: positions (3, T) and inverse frequencies (E / 2,) to cos and sin (T, E / 2), float32.

`ops.mrope_tables` is the sectioned rule of Qwen2-VL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Says which of the three positions turns which frequency. Takes last how many each of time, height and width has.
RopeRule = Callable[[Tensor, Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]


def interleaved_mrope_tables(
    position_ids: Tensor, inv_freq: Tensor, sections: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The rule of Qwen3-VL (arXiv:2511.21631): height and width have every third frequency, time the others."""
    time, *others = (positions[..., None] * inv_freq for positions in position_ids.to(inv_freq.dtype))
    frequencies = torch.arange(len(inv_freq), device=inv_freq.device)
    for axis, angles in enumerate(others, start=1):
        time = torch.where((frequencies % 3 == axis) & (frequencies < 3 * sections[axis]), angles, time)
    return time.cos(), time.sin()
