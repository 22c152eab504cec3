"""`python -m qwen_batched.extract`: a data set in, its image features and hidden states out.

Exit code 0; 1 where work is missing; 2 for bad input, where nothing was done. The reason is a line on standard error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from dataclasses import fields
from pathlib import Path

DONE, MISSING, REFUSED = 0, 1, 2
NEEDED = ("av", "pyarrow")  # the modules of the extra
ENGINES = ("local", "ray", "torchrun")


def main(arguments: list[str] | None = None) -> int:
    """Extracts, and prints a summary; or what `--dry-run` or `--verify` ask for."""
    options = _parser().parse_args(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return _say(f'{" and ".join(missing)} must be installed: pip install "qwen_batched[extract]"', REFUSED)
    from qwen_batched.extraction import command
    from qwen_batched.extraction.request import Request, read_resize

    given = vars(options) | {"out": Path(options.out)}
    try:
        given["resize"] = read_resize(options.resize)
        request = Request(**{field.name: given[field.name] for field in fields(Request)})
        if options.dry_run:
            print(command.describe(request, options.images_per_second))
            return DONE
        if options.verify is not None:
            return DONE if command.verify(request, options.verify) else MISSING
        processes = command.processes(request, options.gpus, options.engine)
        job = command.open_job(request)
    except command.REFUSALS as error:
        return _say(error, REFUSED)
    try:
        return DONE if command.extract(job, options.engine, processes) else MISSING
    except command.FAILURES as error:
        return _say(f"{error}: what is written stays, and the same command goes on from there", MISSING)
    except KeyboardInterrupt:
        return _say("interrupted: the same command goes on from there", MISSING)
    except command.REFUSALS as error:
        return _say(error, REFUSED)


def _say(message: object, code: int) -> int:
    print(f"extract: {' '.join(str(message).split())[:1000]}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.extract", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(REFUSED, f"extract: {message}\n")  # one line, without the usage
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="LeRobot, images, videos, parquet, webdataset: a folder, a file or a hub id")
    add("out", metavar="OUT", help="a new folder, or one to go on with")
    add("--model", required=True, metavar="FOLDER_OR_ID")
    add("--cameras", nargs="+", metavar="CAMERA", help="which, in this order; all by default")
    add("--resize", default="hf", metavar="HxW", help="an exact size; hf for the checkpoint's rule, none for as it is")
    add("--what", nargs="+", default=["image_features"], help="image_features, hidden:N, last")
    add("--pool", default="none", help="none, or mean over cells or tokens")
    add("--format", default="safetensors", help="of the shards: safetensors, or parquet of pooled features, in float32")
    add("--dtype", default="auto", help="of the model and the features: bfloat16, float16, float32 or auto")
    add("--engine", default="local", choices=ENGINES)
    add("--gpus", type=int, metavar="N", help="processes, or actors of Ray, with a GPU each; all by default")
    add("--device", help="cpu or cuda; cuda where there is any by default")
    add("--text", help="the text of every frame for hidden states, in place of the data set's")
    add("--text-column", metavar="COLUMN", help="of parquet and arrow files, with each frame's text")
    add("--template", default="chat", help="as for the model: chat, plain or a layout of one's own")
    add("--batch-size", type=int, default=32, help="frames of a batch, each with all cameras")
    add("--shard-mb", type=int, metavar="MB", help="most megabytes of a shard; 512 by default")
    add("--shard-frames", type=int, metavar="N", help="most frames of a shard")
    add("--limit", type=int, metavar="N", help="only the first N frames")
    add("--on-error", default="stop", help="stop at a frame that cannot be read, or skip it")
    add("--decoders", type=int, default=8, metavar="N", help="threads that decode, for each process")
    add("--threads", type=int, metavar="N", help="PyTorch's on a CPU, for each process")
    add("--tolerance", type=float, default=1e-4, help="seconds between a timestamp and its frame of a video")
    add("--revision", help="of a data set on the hub")
    add("--claim-expiry", type=float, default=120.0, metavar="SECONDS", help="when others take over what stands still")
    add("--dry-run", action="store_true", help="say frames, bytes and hours, and extract nothing")
    add("--images-per-second", type=float, metavar="R", help="of a device, for --dry-run; measured by default")
    add("--verify", type=int, nargs="?", const=16, metavar="N", help="compute N rows again and compare them")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
