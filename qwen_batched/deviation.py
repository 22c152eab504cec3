"""How far the results are from transformers': `python -m qwen_batched.deviation [--model FOLDER_OR_ID]`.

In: a checkpoint. Out: a table, and exit code 1 where a bound is missed. For each image size a batch of samples with
texts of different lengths runs here at once and in transformers one sample at a time, on the same frames, in float32
and in bfloat16. The yardstick is always transformers in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from qwen_batched.qwen_batched_VL_model import QwenBatchedVL
from qwen_batched.testing import default_checkpoint
from qwen_batched.transformers_reference import TransformersReference

SIZES = ((224, 224), (252, 252), (252, 308), (476, 644))
CAMERAS = 2
TEXTS = ("pick up the red cube and put it into the box on the left", "stop")
STAGES = ("image features", "middle layer", "hidden states", "logits")
FLOAT32_BOUND = 1e-5  # relative L2
BFLOAT16_BOUND = 1.05  # our deviation over transformers' own

Outputs = dict[str, list[Tensor]]  # by stage, one tensor (tokens, width) per sample


@dataclass(frozen=True)
class Deviation:
    """Distance of some outputs from the yardstick's, over all samples.

    Attributes:
        relative_l2: Norm of the difference over norm of the yardstick.
        min_cosine: Of the worst token.
        mean_relative: Mean of |difference| / (|yardstick| + 1), as an earlier implementation reported it.
    """

    relative_l2: float
    min_cosine: float
    mean_relative: float

    @classmethod
    def between(cls, outputs: list[Tensor], yardstick: list[Tensor]) -> Deviation:
        """Measures in float64."""
        ours, theirs = torch.cat(outputs).double(), torch.cat(yardstick).double()
        difference = ours - theirs
        return cls(
            relative_l2=float(difference.norm() / theirs.norm()),
            min_cosine=float(F.cosine_similarity(ours, theirs, dim=-1).min()),
            mean_relative=float((difference.abs() / (theirs.abs() + 1)).mean()),
        )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table. Returns 0; 1 where a bound is missed; 2 where there is nothing to compare."""
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        folder = options.model or default_checkpoint()
        rows = list(_rows(str(folder), device))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"deviation: {error}", file=sys.stderr)
        return 2
    weights = options.model or "embedded default, random weights"
    print(
        f"\nDeviation from transformers {transformers.__version__}, float32, one sample at a time ({weights}, {device})"
    )
    print(f"{'size':>9}  {'stage':<15} {'float32':>9} {'bfloat16':>9} {'theirs':>9} {'ratio':>6} {'min cos':>8}  bound")
    for row in rows:
        print(row.text())
    missed = [row for row in rows if not row.within_bounds]
    print(f"{len(rows) - len(missed)} of {len(rows)} within float32 <= {FLOAT32_BOUND} and ratio <= {BFLOAT16_BOUND}")
    return 1 if missed else 0


@dataclass(frozen=True)
class Row:
    """One line of the table: one stage at one size."""

    size: tuple[int, int]
    stage: str
    float32: Deviation
    bfloat16: Deviation
    reference_bfloat16: Deviation

    @property
    def ratio(self) -> float:
        return self.bfloat16.relative_l2 / self.reference_bfloat16.relative_l2

    @property
    def within_bounds(self) -> bool:
        return self.float32.relative_l2 <= FLOAT32_BOUND and self.ratio <= BFLOAT16_BOUND

    def text(self) -> str:
        size = "x".join(map(str, self.size))
        ours, theirs = self.bfloat16.relative_l2, self.reference_bfloat16.relative_l2
        verdict = "ok" if self.within_bounds else "MISSED"
        return (
            f"{size:>9}  {self.stage:<15} {self.float32.relative_l2:9.1e} {ours:9.1e} {theirs:9.1e} {self.ratio:6.2f} "
            f"{self.bfloat16.min_cosine:8.5f}  {verdict}"
        )


def _rows(folder: str, device: str) -> Iterator[Row]:
    """All stages at all sizes. One model at a time is on the device."""
    # disable=None: no bar where the output is not a terminal
    passes = tqdm(total=4 * len(SIZES), desc="deviation", unit="batch", leave=False, disable=None)
    results: dict[tuple[str, torch.dtype], list[Outputs]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for whose, run in (("theirs", _reference_outputs), ("ours", _our_outputs)):
            results[whose, dtype] = []
            for outputs in run(folder, dtype, device):
                results[whose, dtype].append(outputs)
                passes.update()
    passes.close()
    yardsticks = results["theirs", torch.float32]
    for index, size in enumerate(SIZES):
        for stage in STAGES:
            deviations = [
                Deviation.between(results[key][index][stage], yardsticks[index][stage])
                for key in (("ours", torch.float32), ("ours", torch.bfloat16), ("theirs", torch.bfloat16))
            ]
            yield Row(size, stage, *deviations)


def _reference_outputs(folder: str, dtype: torch.dtype, device: str) -> Iterator[Outputs]:
    reference = TransformersReference.from_pretrained(folder, dtype=dtype, device=device)
    for size in SIZES:
        outputs: Outputs = {stage: [] for stage in STAGES}
        for frames, text in zip(_frames(*size), TEXTS, strict=True):
            result = reference.run(**reference.processor_inputs(list(frames), text))
            middle = len(result.hidden_states) // 2
            stages = (torch.cat(result.image_features), result.hidden_states[middle][0], result.hidden_states[-1][0])
            for stage, values in zip(STAGES, (*stages, result.logits[0]), strict=True):
                outputs[stage].append(values.cpu())
        yield outputs


@torch.inference_mode()
def _our_outputs(folder: str, dtype: torch.dtype, device: str) -> Iterator[Outputs]:
    model = QwenBatchedVL.from_pretrained(folder, dtype=dtype, device=device)
    middle = (model.config.text.num_hidden_layers + 1) // 2
    for size in SIZES:
        out = model(_frames(*size), list(TEXTS), layers=(middle, -1), logits="all")
        samples = range(len(TEXTS))
        values = (*out.hidden_states, out.logits)
        texts = [[rows[sample][out.attention_mask[sample]].cpu() for sample in samples] for rows in values]
        images = [out.image_features[sample].flatten(0, 2).cpu() for sample in samples]
        yield dict(zip(STAGES, (images, *texts), strict=True))


def _frames(height: int, width: int) -> Tensor:
    """Frames (samples, cameras, 3, height, width), uint8: soft shapes with some noise, the same at every call."""
    generator = torch.Generator().manual_seed(height * width)
    count = len(TEXTS) * CAMERAS
    shapes = F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), size=(height, width), mode="bicubic")
    noise = torch.randn(count, 3, height, width, generator=generator)
    frames = (shapes * 255 + noise * 6).round().clamp(0, 255).to(torch.uint8)
    return frames.unflatten(0, (len(TEXTS), CAMERAS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.deviation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder or hub id; the embedded default where left out")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
