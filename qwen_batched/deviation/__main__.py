"""`python -m qwen_batched.deviation`: how far a checkpoint's results are from transformers', stage by stage.

In: a checkpoint, frames and texts. Out: a table, and exit code 1 where a bound is missed, 2 where nothing was compared.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from PIL import Image
from tqdm import tqdm

from qwen_batched.checkpoint.device import resolve_device
from qwen_batched.checkpoint.folder import find_folder
from qwen_batched.deviation import batch_effect, cases, report
from qwen_batched.deviation.bounds import misses
from qwen_batched.deviation.cases import Case
from qwen_batched.deviation.comparison import Plan, compare
from qwen_batched.deviation.memory import Needs, check_frames
from qwen_batched.deviation.plot import draw
from qwen_batched.deviation.stages import Stages
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.ops import PILLOW, TORCHVISION
from qwen_batched.profile import frame_size
from qwen_batched.testing import PRESETS, WEIGHTS, default_checkpoint, write_checkpoint
from qwen_batched.transformers_reference import check_reference_version

SIZES = ((224, 224), (252, 252), (252, 308), (476, 644))
CAMERAS = BATCH = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Prints the report. Returns 0; 1 where a bound is missed; 2 where nothing could be compared."""
    options = _parser().parse_args(arguments)
    try:
        with _checkpoint(options) as (folder, weights):
            return _run(options, folder, weights)
    except torch.OutOfMemoryError as error:
        reason = f"too little memory: {error}"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what PyTorch says on the host
            raise
        reason = f"too little memory on the host: {error}"
    except (OSError, TypeError, ValueError) as error:
        reason = str(error)
    print(f"deviation: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _run(options: argparse.Namespace, folder: Path, weights: str) -> int:
    plan = _plan(options, folder)
    samples, cameras = len(plan.cases[0].texts), len(plan.cases[0].cameras)
    backend = plan.processor.resample_backend if plan.device.type == "cpu" else "PyTorch on the GPU"
    title = (
        f"{weights}; {plan.device}; {samples} samples x {cameras} cameras at each of {len(plan.cases)} sizes; "
        f"frames resized as by {backend}"
    )
    # disable=None: no bar where the output is not a terminal
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(desc="deviation", bar_format=bar_format, leave=False, disable=None) as bar:
        measured = batch_effect.measure_batch_effect(plan, bar) if options.batch_effect else compare(plan, bar)
    settings = vars(options) | {"weights": weights, "resample_backend": backend}
    facts = {"settings": settings, "environment": report.environment(plan.device)}
    if options.batch_effect:
        print(batch_effect.text(plan, measured, title))
        missed = bool(batch_effect.broken_promises(measured))
        facts["batch_effect"] = batch_effect.as_json(measured)
    else:
        found = misses(plan, measured)
        print(report.table(plan, measured, found, title))
        missed = bool(found)
        facts |= report.as_json(plan, measured, found)
        if options.plot:
            heading = f"Deviation from transformers {transformers.__version__} in float32"
            draw(plan, measured, heading, title, options.plot)
    if options.json:
        options.json.write_text(report.dumps(facts) + "\n", encoding="utf-8")
    return int(missed)


def _plan(options: argparse.Namespace, folder: Path) -> Plan:
    """What is asked for, after every check that can be made before the work starts."""
    device = resolve_device(options.device)
    processor = TensorProcessor.from_pretrained(folder, resample_backend=options.resample_backend)
    stages = Stages.of(processor.config, options.vision_layers, options.layers)
    chosen = tuple(_cases(options))
    dtypes = tuple(dtype for name, dtype in DTYPES.items() if name in options.dtype)
    needs = Needs.of(folder, processor, chosen, stages, options.new_tokens)
    needs.check(device, [torch.float32, *dtypes, *([torch.float64] if options.float64 == "always" else [])])
    new_tokens, trained_like = options.new_tokens, options.weights == "trained-like"
    float64 = options.float64 if torch.float32 in dtypes else "never"
    return Plan(str(folder), processor, chosen, stages, dtypes, device, new_tokens, float64, needs, trained_like)


@contextlib.contextmanager
def _checkpoint(options: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The checkpoint's folder and its weights in words, after the checks that need neither."""
    try:
        check_reference_version()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot and options.batch_effect:
        raise ValueError("--plot draws the stages, which --batch-effect does not compare")
    if options.model is not None:
        if options.weights or options.preset:
            raise ValueError("--weights and --preset make a checkpoint up, and cannot go with --model")
        yield find_folder(options.model), options.model
        return
    preset, weights = options.preset or "small", options.weights or "random"
    if (preset, weights) == ("small", "random"):
        yield default_checkpoint(), "embedded default, random weights"
        return
    with tempfile.TemporaryDirectory(prefix="qwen_batched-", ignore_cleanup_errors=True) as folder:
        # Stored as the published checkpoints are: then bfloat16 rounds no weight. Small frames stay as they are.
        write_checkpoint(folder, preset, weights=weights, dtype=torch.bfloat16, image={"min_pixels": 28 * 28})
        yield Path(folder), f"preset {preset}, {weights} weights"


def check_writable(path: Path) -> None:
    """Raises `ValueError` where no file can be written; leaves none behind."""
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    if not existed:
        path.unlink()


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    texts = options.texts or cases.TEXTS
    batch = options.batch or (len(options.texts) if options.texts else BATCH)
    pictures: list[Image.Image] = list(cases.read_images(options.images or ()))
    cameras = options.cameras or len(pictures) or CAMERAS
    for size in dict.fromkeys(options.sizes or ([None] if pictures else SIZES)):
        if size:
            check_frames(batch * cameras * size[0] * size[1])
        case = (size, batch, cameras, texts)
        yield cases.of_files(pictures, *case) if pictures else cases.made_up(*case)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.deviation", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"deviation: {message}\n")  # one line, without the usage
    add = parser.add_argument_group("checkpoint").add_argument
    add("--model", metavar="FOLDER_OR_ID", help="the embedded default with random weights where left out")
    add("--preset", choices=sorted(PRESETS), help="without --model: shapes of weights that are made up")
    add("--weights", choices=WEIGHTS, help="without --model: their kind; trained-like ones round as real ones do")
    add = parser.add_argument_group("frames and texts").add_argument
    add(
        "--sizes",
        type=frame_size,
        nargs="+",
        metavar="HxW",
        help="of frames in pixels, 224 or 480x640; a batch each",
    )
    add("--cameras", type=_positive, help="frames of a sample")
    add("--batch", type=_positive, help="samples of a batch")
    add("--texts", nargs="+", metavar="TEXT", help="the samples', in turns")
    add("--images", type=Path, nargs="+", metavar="FILE", help="pictures for frames, in turns; made up where left out")
    add(
        "--resample-backend",
        choices=(PILLOW, TORCHVISION),
        help="whose image processor both libraries follow on a CPU; transformers' own choice where left out",
    )
    add = parser.add_argument_group("what is compared").add_argument
    add("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    add("--device", help="cuda or cpu; cuda where there is one")
    add("--layers", type=int, nargs="+", metavar="K", help="decoder blocks, as `layers` of a call; all where left out")
    add("--vision-layers", type=int, nargs="+", metavar="K", help="vision blocks, from 0; all where left out")
    add("--new-tokens", type=_count, default=8, metavar="N", help="greedy tokens of each sample")
    add(
        "--float64",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether transformers' own float32 is measured; auto: where ours is above its bound",
    )
    add("--batch-effect", action="store_true", help="compare samples alone and in batches, in place of the stages")
    add = parser.add_argument_group("reports").add_argument
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the deviation against the depth there")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
