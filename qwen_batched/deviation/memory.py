"""How much memory a comparison takes, about, and how much there is: said before the work starts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_batched.arguments import dtype_name
from qwen_batched.checkpoint.weights import find_tensors
from qwen_batched.deviation.cases import Case
from qwen_batched.deviation.stages import Stages
from qwen_batched.families import family_of
from qwen_batched.model.tensor_processor import TensorProcessor

# Kernels, cuBLAS and the allocator's rounding; over a case's stages, what exists besides them for a while.
WORKSPACE = {"cuda": 2e9, "cpu": 0.2e9}
PASSING = 1.5
CGROUP = Path("/sys/fs/cgroup")


class TooLittleMemory(ValueError):
    """Says what is needed and what is free."""


@dataclass(frozen=True)
class Needs:
    """Of a comparison, in bytes."""

    parameters: int  # how many the checkpoint has
    stages: tuple[int, ...]  # all stages of each case, in float32
    scores: int  # of the largest attention: how many it has, all heads together

    @classmethod
    def of(
        cls, folder: Path, processor: TensorProcessor, cases: Sequence[Case], stages: Stages, new_tokens: int
    ) -> Needs:
        """From the files' headers and the sizes of the resized frames; nothing is read or computed."""
        stored = find_tensors(folder, family_of(processor.config.model_type).keys)
        parameters = sum(math.prod(tensor.shape) for tensor in stored.values())
        sizes = tuple(_stage_bytes(processor, case, stages, new_tokens) for case in cases)
        return cls(parameters, sizes, max(_scores(processor, case) for case in cases))

    def check(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        """Raises `TooLittleMemory` where a model does not fit on the device, or on the host with the stages."""
        host = sum(self.stages) + WORKSPACE["cpu"]
        for dtype in dtypes:
            size = dtype.itemsize
            need = self.parameters * size + PASSING * max(self.stages) * size / 4 + WORKSPACE[device.type]
            if dtype == torch.float64:  # no fused attention has it: scores, probabilities and a copy exist at once
                need += 3 * self.scores * size
            if device.type == "cuda":
                _compare(need, free_bytes(device), f"a model in {dtype_name(dtype)}", str(device))
                # transformers loads on the host first; our float64 is widened on the device.
                need = self.parameters * min(size, 4)
            _check_host(host + need, f"a model in {dtype_name(dtype)} and the stages")


def check_frames(pixels: int) -> None:
    """Raises `TooLittleMemory` where so many pixels cannot be made up on the host: three float32 copies at once."""
    _check_host(3 * 3 * 4 * pixels, "frames of this size")


def free_bytes(device: torch.device) -> float:
    """Free memory of a device; infinite where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _left_in_cgroup())


def _stage_bytes(processor: TensorProcessor, case: Case, stages: Stages, new_tokens: int) -> int:
    config = processor.config
    request = processor.request(case.images, list(case.texts), max_new_tokens=new_tokens)
    cells = len(case.texts) * sum(h * w for h, w in request.grids)
    patches = cells * config.vision.cell_patches
    width, vocabulary = config.text.hidden_size, config.text.vocab_size
    values = patches * (config.vision.patch_dim + config.vision.hidden_size * (1 + len(stages.vision_blocks)))
    values += cells * width + request.prompts.tokens * width * (1 + len(stages.decoder_blocks))
    values += (request.prompts.tokens - cells + len(case.texts) * new_tokens) * vocabulary
    return 4 * values


def _scores(processor: TensorProcessor, case: Case) -> int:
    """One image's in a block over whole images, or one sample's in the decoder."""
    config = processor.config
    request = processor.request(case.images, list(case.texts))
    patches = max(h * w for h, w in request.grids) * config.vision.cell_patches
    return max(patches**2 * config.vision.num_heads, request.prompts.length**2 * config.text.num_attention_heads)


def _check_host(need: float, what: str) -> None:
    _compare(need, free_bytes(torch.device("cpu")), what, "the host")


def _compare(need: float, free: float, what: str, where: str) -> None:
    if need > free:
        sizes = f"{need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise TooLittleMemory(f"too little memory on {where}: {what} need about {sizes}")


def _available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _left_in_cgroup() -> float:
    """A container's limit, which /proc/meminfo does not know of."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = float((CGROUP / "memory.current").read_text(encoding="ascii"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return math.inf if limit == "max" else float(limit) - used + float(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return math.inf
