"""What runs have in common: options, the checkpoint of a whole model, and what the steps share and find.

In: a command line. Out: a `Run`, to which each step adds its report, its goals, and what was missing or wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import measure
import torch
from measure import Goal, Work, note, print_table
from torch import Tensor

from qwen_batched import QwenBatchedVL
from qwen_batched.inputs.prompt import PromptEncoder
from qwen_batched.testing import PRESETS, write_checkpoint
from qwen_batched.testing.presets import FAMILIES

SENTENCE = "pick up the red cube and put it into the box on the left, then open the drawer and move the arm to the sink"
R = TypeVar("R", bound="Run")
S = TypeVar("S")
PRESET, SMOKE_PRESET = "3b", "tiny"  # what is measured unless told otherwise


@dataclass
class Run:
    """What the steps share, and what they found: `missing` by name with the reason, `wrong` results."""

    options: argparse.Namespace
    shapes: Any
    device: torch.device
    model: QwenBatchedVL
    started: float = field(default_factory=time.perf_counter)
    report: dict[str, Any] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls: type[R], options: argparse.Namespace, shapes: Any, temporary: str) -> tuple[R, str]:
        """A run with a bfloat16 model, and the folder of its checkpoint."""
        started = time.perf_counter()
        device = torch.device("cpu" if options.smoke else "cuda")
        torch.manual_seed(0)
        folder = whole_checkpoint(options, temporary)
        note("checkpoint ready")
        model = QwenBatchedVL.from_pretrained(
            folder, dtype=torch.bfloat16, device=device, num_layers=options.num_layers
        )
        return cls(options, fitted(shapes, model.config.vision.cell_size), device, model, started), folder

    @property
    def has_goals(self) -> bool:
        """Whether its times are those that goals were set for: the 3B model's."""
        found = self.model.config
        same = (
            found.model_type == PRESETS[PRESET].family and found.text.hidden_size == PRESETS[PRESET].text["hidden_size"]
        )
        return self.options.smoke or (same and self.options.num_layers is None)

    @property
    def like(self) -> Tensor:
        """Of the model's dtype and device."""
        return torch.empty(0, dtype=self.model.dtype, device=self.device)

    def times(self, calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, **options: Any) -> dict[str, Any]:
        """Spreads as dicts, by name."""
        seconds = 0.02 if self.options.smoke else seconds
        found = measure.interleaved(calls, self.device, seconds=seconds, **options)
        return {name: asdict(spread) for name, spread in found.items()}

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns; None where this machine cannot, with the reason kept for the report."""
        try:
            return make()
        except Exception as error:  # whatever a compiler or another library raises
            self.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            note(f"{name}: {self.missing[name]}")
            return None

    def finish(self, benchmark: str) -> int:
        """Prints goals and JSON. Returns the exit code."""
        options = self.options
        facts = {
            **measure.environment(benchmark, self.device, options.commit),
            **{"smoke": options.smoke, "quick": options.quick, "dtype": str(self.model.dtype), "model": options.model},
            **{"preset": None if options.model else preset_of(options), "num_layers": options.num_layers},
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        return measure.finish(facts | self.report, self.goals, self.missing, self.wrong, claims=not options.smoke)


# --- options ---


def parser(doc: str, compile_seconds: float = 150) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--model", help="checkpoint folder; None: one is written, with random weights")
    add("--preset", choices=sorted(PRESETS), help=f"of what is written, any family's; None: {PRESET}")
    add("--quick", action="store_true", help="leave transformers' times out")
    add("--compile-seconds", type=float, default=compile_seconds, help="compile no further shape after that long")
    add("--commit", help=f"what to report as the commit; None: ${measure.COMMIT_VARIABLE} or git")
    add("--smoke", action="store_true", help="tiny shapes on the CPU: tests this file, claims nothing")
    made.set_defaults(num_layers=None)
    return made


def whole_model_parser(doc: str) -> argparse.ArgumentParser:
    """With what the benchmarks of the whole model need besides."""
    made = parser(doc, compile_seconds=60)
    add = made.add_argument
    add("--num-layers", type=int, metavar="N", help="the first N decoder blocks alone, of both libraries")
    add("--keep-checkpoint", metavar="FOLDER", help="write random weights there, or take those that are there already")
    choices = ("none", "control", "batch", "all")
    add("--compiled", choices=choices, default="all", help="for which shapes transformers is compiled; control: B=1")
    return made


def main(parser: argparse.ArgumentParser, run_all: Callable[[argparse.Namespace, str], int]) -> None:
    """Parses, calls `run_all` with a temporary folder, and ends the process with its exit code."""
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("needs an NVIDIA GPU; --smoke runs through the code without one")
    if options.smoke:
        print("SMOKE RUN: tiny shapes on the CPU. It tests the benchmark; its numbers mean nothing.")
    torch.backends.cudnn.allow_tf32 = False  # transformers' patch embedding in float32 is a convolution
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.exit(run_all(options, folder))


# --- the whole model ---


def preset_of(options: argparse.Namespace) -> str:
    """Of the checkpoint that is written."""
    return options.preset or (SMOKE_PRESET if options.smoke else PRESET)


def fit(value: Any, cell: int) -> Any:
    """A `Work`, a size or several sizes with sides that are the nearest multiples of a merged cell's."""
    if isinstance(value, Work):
        return replace(value, size=fit(value.size, cell))
    if isinstance(value[0], tuple):
        return tuple(fit(size, cell) for size in value)
    return tuple(max(1, round(side / cell)) * cell for side in value)


def fitted(shapes: S, cell: int) -> S:
    """`shapes` with those that it names in `fitted` as multiples of a merged cell's side."""
    return replace(shapes, **{name: fit(getattr(shapes, name), cell) for name in shapes.fitted})


def written(folder: str | Path, preset: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A new checkpoint of random weights, which takes frames of one merged cell and larger."""
    vision = FAMILIES[PRESETS[preset].family].vision
    cell = vision["patch_size"] * vision["spatial_merge_size"]
    return write_checkpoint(folder, preset, dtype=dtype, image={"min_pixels": cell**2}, **options)


def whole_checkpoint(options: argparse.Namespace, temporary: str) -> str:
    """The folder of a bfloat16 checkpoint: the given one, the kept one, or a new one of random weights."""
    if options.model:
        return options.model
    folder = Path(options.keep_checkpoint or f"{temporary}/checkpoint").absolute()
    if not (folder / "config.json").exists():
        note(f"writing random weights to {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place: a run that is cut off leaves nothing that a later one would take for whole.
        unfinished = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
        os.rename(written(unfinished, preset_of(options)), folder)
    return str(folder)


def text_of(prompts: PromptEncoder, tokens: int, seed: int = 0) -> str:
    """A text of exactly so many tokens: words that are one token each."""
    words = [f" {word.strip(',')}" for word in SENTENCE.split()]
    words = [word for word in words if len(prompts.encode(word, "plain", 0)) == 1]
    text = "".join(random.Random(seed).choices(words, k=tokens))
    found = len(prompts.encode(text, "plain", 0))
    if found != tokens:
        raise RuntimeError(f"a text of {tokens} tokens has {found} with this tokenizer")
    return text


def print_beside_ours(title: str, times: Mapping[str, Mapping[str, float]]) -> None:
    """A table of `Spread`s as dicts, "ours" among them."""
    ours = times["ours"]["median"]
    rows = [
        (
            name,
            f"{row['median']:.3f}",
            f"{row['p10']:.3f} .. {row['p90']:.3f}",
            str(row["samples"]),
            f"{row['median'] / ours:.2f} x as fast",
        )
        for name, row in times.items()
    ]
    print(title)
    print_table(("", "ms", "p10 .. p90", "samples", "ours is"), rows)


def ratio_to_ours(times: Mapping[str, Mapping[str, float]] | None, name: str) -> float | None:
    """How many times faster ours is; None where that was not measured."""
    if not times or name not in times:
        return None
    return times[name]["median"] / times["ours"]["median"]
