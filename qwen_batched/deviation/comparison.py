"""Runs both implementations on the same cases, one model at a time, and measures how far they are from the yardstick.

The yardstick is transformers in float32, one sample at a time. Its stages stay on the host; all others' are measured on
the device as they come, and let go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_batched.arguments import dtype_name
from qwen_batched.deviation.cases import Case
from qwen_batched.deviation.loading import load_ours, load_theirs
from qwen_batched.deviation.measures import Continuation, Distance, Equality, Measure
from qwen_batched.deviation.memory import Needs, TooLittleMemory
from qwen_batched.deviation.ours import camera_pixels, run_ours
from qwen_batched.deviation.stages import EXACT, GREEDY, PIXELS, Stages
from qwen_batched.deviation.theirs import run_theirs
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.transformers_reference import TransformersReference, without_tf32

OURS, THEIRS = "ours", "theirs"
FLOAT32_BOUND = 1e-5  # relative L2 above which transformers' own float32 is looked at

Run = tuple[str, torch.dtype]


@dataclass(frozen=True)
class Plan:
    """What is to be compared."""

    folder: str  # the checkpoint's
    processor: TensorProcessor  # ours, for pixels and sizes
    cases: tuple[Case, ...]  # each with a label of its own
    stages: Stages  # which blocks
    dtypes: tuple[torch.dtype, ...]  # float32 and others, or some of them. The yardstick is float32 in any case
    device: torch.device  # where all models run
    new_tokens: int  # how many tokens are generated; 0 for none
    float64: str  # "always", "never", or "auto": for cases with a float32 stage above `FLOAT32_BOUND`
    needs: Needs
    trained_like: bool = False  # whether the weights were made up to be like a trained model's


@dataclass
class Findings:
    """What was measured."""

    # By run, case and stage. transformers' own float32 is measured from its float64.
    measures: dict[tuple[Run, str, str], Measure] = field(default_factory=dict)
    # Cases whose frames transformers resizes with another library than we do. Their pixels have no bound, and
    # transformers' networks were given ours.
    resized_apart: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)  # what the reader has to know

    def get(self, run: Run, case: str, stage: str) -> Measure | None:
        """The measure, where there is one."""
        return self.measures.get((run, case, stage))

    def pooled(self, run: Run, stage: str) -> Measure | None:
        """Over all cases."""
        found = [measure for (r, _, s), measure in self.measures.items() if (r, s) == (run, stage)]
        return type(found[0]).pooled(found) if found else None


@dataclass
class _Sample:
    """What is kept of the yardstick for one sample."""

    stages: dict[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None  # given to transformers' networks in place of its own
    scores: Tensor | None = None


def compare(plan: Plan, bar: tqdm) -> Findings:
    """Runs everything. Raises `ValueError` where transformers or this package cannot load the checkpoint."""
    return _Comparison(plan, bar).run()


class _Comparison:
    def __init__(self, plan: Plan, bar: tqdm) -> None:
        self.plan, self.bar = plan, bar
        self.findings = Findings()
        self.samples: dict[tuple[str, int], _Sample] = {}

    def run(self) -> Findings:
        plan = self.plan
        low = [dtype for dtype in plan.dtypes if dtype != torch.float32]
        runs = 1 + (torch.float32 in plan.dtypes) + 2 * len(low) + (plan.float64 == "always")
        self.bar.reset(total=runs * _work(plan.cases))
        self._run_yardstick()
        if torch.float32 in plan.dtypes:
            self._measure_ours(torch.float32)
        if cases := self._cases_for_float64():
            self.bar.total += _work(cases) * (plan.float64 == "auto")
            try:
                self._measure_theirs(torch.float64, cases)
            except torch.OutOfMemoryError as error:
                if plan.float64 == "always":
                    raise
                note = f"transformers' own float32 was not measured everywhere: {error}".splitlines()[0]
                self.findings.notes.append(note)
        for dtype in low:
            self._measure_theirs(dtype, plan.cases)
            self._measure_ours(dtype)
        return self.findings

    def _run_yardstick(self) -> None:
        plan = self.plan
        reference = load_theirs(plan.folder, torch.float32, plan.device, plan.processor.resample_backend)
        for case in plan.cases:
            self.bar.set_description(f"transformers float32 {case.label}")
            pixels = self._pixels_for_theirs(case, reference)
            for index in range(len(case.texts)):
                sample = self.samples[case.label, index] = _Sample(pixels=None if pixels is None else pixels[index])

                def keep(stage: str, values: Tensor, sample: _Sample = sample) -> None:
                    sample.stages[stage] = values.cpu()

                scores = run_theirs(reference, case, index, plan.stages, plan.new_tokens, keep, sample.pixels)
                sample.scores = None if scores is None else scores.cpu()
                self.bar.update(case.pixels / len(case.texts))

    def _pixels_for_theirs(self, case: Case, reference: TransformersReference) -> list[Tensor] | None:
        """Each sample's patches by our processor, where transformers' would differ for its library's sake."""
        plan, on_cpu = self.plan, self.plan.device.type == "cpu"
        backend = plan.processor.resample_backend
        same_library = reference.resample_backend == backend if on_cpu else reference.resizes_on_gpu
        cell = plan.processor.config.vision.cell_size
        grids = plan.processor.request(case.images, None).grids
        sizes = [(h * cell, w * cell) for h, w in grids]
        resized = any(tuple(frames.shape[2:]) != size for frames, size in zip(case.cameras, sizes, strict=True))
        if same_library or not resized:
            return None
        if not self.findings.resized_apart:
            here = f"as by {backend}" if on_cpu else "by PyTorch on the GPU"
            self.findings.notes.append(
                f"Frames are resized {here} here and by {reference.resample_backend} in transformers, which round "
                "differently: pixels have no bound where they are resized, and transformers' networks are given ours."
            )
        self.findings.resized_apart.add(case.label)
        cameras = camera_pixels(plan.processor, case, plan.device)
        return list(torch.cat([pixels.cpu() for pixels in cameras], dim=1))

    def _cases_for_float64(self) -> tuple[Case, ...]:
        """Those where transformers' own float32 has to be known for ours to be judged."""
        plan = self.plan
        if plan.float64 != "auto":
            return plan.cases if plan.float64 == "always" else ()
        above = {
            case
            for (_, case, stage), measure in self.findings.measures.items()
            if isinstance(measure, Distance) and not measure.relative_l2 <= FLOAT32_BOUND
            if not (stage == PIXELS and case in self.findings.resized_apart)
        }
        cases = tuple(case for case in plan.cases if case.label in above)
        try:
            if cases:
                plan.needs.check(plan.device, [torch.float64])
        except TooLittleMemory as error:
            self.findings.notes.append(f"transformers' own float32 was not measured: {error}")
            return ()
        return cases

    def _measure_theirs(self, dtype: torch.dtype, cases: Iterable[Case]) -> None:
        plan, exact = self.plan, dtype == torch.float64
        reference = load_theirs(plan.folder, dtype, plan.device, plan.processor.resample_backend)
        for case in cases:
            self.bar.set_description(f"transformers {dtype_name(dtype)} {case.label}")
            for index in range(len(case.texts)):
                sample = self.samples[case.label, index]

                def measure(stage: str, values: Tensor, case: Case = case, sample: _Sample = sample) -> None:
                    if exact:  # the yardstick itself is measured, from what it is an approximation of
                        yardstick = sample.stages[stage].to(values.device)
                        self._add((THEIRS, torch.float32), case, stage, yardstick, values, sample)
                    else:
                        self._add((THEIRS, dtype), case, stage, values, sample.stages[stage], sample)

                new_tokens = 0 if exact else plan.new_tokens
                run_theirs(reference, case, index, plan.stages, new_tokens, measure, sample.pixels)
                self.bar.update(case.pixels / len(case.texts))

    def _measure_ours(self, dtype: torch.dtype) -> None:
        plan = self.plan
        model = load_ours(plan.folder, dtype, plan.device, plan.processor.resample_backend)
        for case in plan.cases:
            self.bar.set_description(f"this library {dtype_name(dtype)} {case.label}")

            def measure(stage: str, index: int, values: Tensor, case: Case = case) -> None:
                sample = self.samples[case.label, index]
                self._add((OURS, dtype), case, stage, values, sample.stages[stage], sample)

            with without_tf32():
                run_ours(model, case, plan.stages, plan.new_tokens, measure)
            self.bar.update(case.pixels)

    def _add(self, run: Run, case: Case, stage: str, values: Tensor, yardstick: Tensor, sample: _Sample) -> None:
        measures, key = self.findings.measures, (run, case.label, stage)
        if stage == GREEDY:
            measures.setdefault(key, Continuation()).add(values, yardstick, sample.scores)
        else:
            measures.setdefault(key, Equality() if stage in EXACT else Distance()).add(values, yardstick)


def _work(cases: Iterable[Case]) -> int:
    return sum(case.pixels for case in cases)
