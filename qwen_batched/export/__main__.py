"""`python -m qwen_batched.export`: a checkpoint -> a folder of ONNX graphs, for onnxruntime-genai, or of packages.

Exit code 0; 2 where nothing was exported, with the reason in a line on standard error.
"""

from __future__ import annotations

import argparse
import sys

import torch

from qwen_batched.export.api import ExportError, export_live
from qwen_batched.export.live import LiveModel
from qwen_batched.export.request import OPSET, PARTS, has_decoder
from qwen_batched.ops import PILLOW
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL


def main(arguments: list[str] | None = None) -> int:
    """Exports, and prints each part's deviation from the live model."""
    options = _parser().parse_args(arguments)
    try:
        loading = {"dtype": options.dtype, "device": options.device, "num_layers": options.num_layers}
        if options.parts and not has_decoder(options.parts):  # which need not be read
            loading |= {"num_layers": 1, "lm_head": False}
        on_gpu = options.device is not None and options.device.startswith("cuda")
        loading["resample_backend"] = None if on_gpu else PILLOW
        live = LiveModel(lambda: QwenBatchedVL.from_pretrained(options.model, **loading), is_kept=False)
        sizes = (options.frames, options.cameras, options.batch, options.sequence)
        more = (options.frames_dtype, options.opset, options.parts)
        written = export_live(live, options.out, options.target, *sizes, *more)
    except (ExportError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
        print(f"export: {_line(str(error))}", file=sys.stderr)
        return 2
    for name, deviation in written["deviation"].items():
        print(f"{name:16} relative L2 {deviation['measured']:.1e}, bound {deviation['bound']:.1e}")
    print(f"written: {options.out}")
    return 0


def _line(reason: str) -> str:
    """One of any length in one line; compilers put a long command before what went wrong."""
    reason = " ".join(reason.split())
    return reason if len(reason) <= 1000 else f"{reason[:300]} ... {reason[-700:]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.export", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"export: {message}\n")  # one line, without the usage
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER_OR_ID")
    add("--target", required=True, choices=tuple(PARTS))
    add("--frames", required=True, metavar="HxW[:HxW]", help="height and width of frames, and what they are resized to")
    add("--out", required=True, metavar="FOLDER", help="a new or an empty one")
    add("--cameras", type=int, default=1, help="frames of a sample")
    add("--batch", default="1-8", metavar="N[-N]", help="least and most samples")
    add("--sequence", default="dynamic", metavar="S", help="tokens of a sequence, or dynamic")
    add("--dtype", default="auto", help="of the weights: float32, float16, or bfloat16 (engine)")
    add("--frames-dtype", default="uint8", help="uint8 in 0..255, or float32 or float16 in 0..1")
    add("--device", default="cpu", help="that packages are compiled for")
    add("--num-layers", type=int, metavar="N", help="export only the first N decoder blocks")
    add("--opset", type=int, default=OPSET, help="of ONNX")
    add("--parts", nargs="+", choices=sorted({part for parts in PARTS.values() for part in parts}))
    return parser


if __name__ == "__main__":
    sys.exit(main())
