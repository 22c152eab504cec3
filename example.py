"""Camera frames and an instruction in; hidden states, image features and a picture of them out.

With random weights and rendered cameras, so that nothing is downloaded:
    python example.py
With the real model and your own frames:
    python example.py --model Qwen/Qwen2.5-VL-3B-Instruct --images front.jpg wrist.jpg --text "pick up the red cube"
"""

import argparse
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from qwen_batched import QwenBatchedVL
from qwen_batched.pictures import draw_feature_maps
from qwen_batched.testing import default_checkpoint


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    frames = args.images or [render_scene(eye, target) for eye, target in SYNTHETIC_CAMERAS]
    images = to_model_input(frames)

    try:
        name = args.model or str(default_checkpoint())
        model = QwenBatchedVL.from_pretrained(name, dtype=args.dtype, device=args.device).eval()
        device = next(model.parameters()).device
        with torch.inference_mode():
            out, first_seconds = timed(lambda: model(images, [args.text]), device)
            out, second_seconds = timed(lambda: model(images, [args.text]), device)
    except (OSError, ValueError) as error:  # a model that can't be had, a frame that is too small, ...
        parser.error(" ".join(str(error).split()))

    print(f"model    {args.model or 'random weights in the real architecture: the features mean nothing'}")
    print(f"text     {args.text!r}\n")
    print_shapes("images", images, "in: frames as uint8, 0 to 255 (..., RGB, height, width)")
    print_shapes("input_ids", out.input_ids, "the prompt's tokens (samples, tokens)")
    print_shapes("attention_mask", out.attention_mask, "True on the sample's tokens, False on padding")
    print_shapes("image_mask", out.image_mask, f"True on image tokens, {int(out.image_mask.sum())} of them here")
    print_shapes("last_hidden_state", out.last_hidden_state, "what a policy reads (samples, tokens, width)")
    print_shapes("image_features", out.image_features, "a map for each camera (..., rows, columns, width)")
    print(f"\nfirst call   {first_seconds * 1000:8.1f} ms, with the one-time work for these sizes")
    print(f"second call  {second_seconds * 1000:8.1f} ms, on {device}")

    caption = f'"{textwrap.shorten(args.text, 70)}"'
    if not args.model:
        caption += "\nThe weights are made up: the colours show that the pipeline works, and mean nothing."
    draw_feature_maps(images, out.image_features, caption=caption).save(args.output)
    print(f"\npicture  {args.output.resolve()}")


# --------------------------------------------------------------------------------------------------------- to the model


def to_model_input(frames: Sequence[Image.Image]) -> Tensor | list[Tensor]:
    """Cameras of one size are one tensor (1, V, 3, H, W); others are a list with a (1, 3, H_i, W_i) for each camera."""
    cameras = [to_tensor(frame)[None] for frame in frames]
    if len({camera.shape for camera in cameras}) == 1:
        return torch.stack(cameras, dim=1)
    return cameras


def to_tensor(frame: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
    return pixels.view(frame.height, frame.width, 3).permute(2, 0, 1).contiguous()  # (3, H, W)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The call's result and its seconds. A GPU works on after the call has returned, so it is waited for."""
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def print_shapes(name: str, tensors: Tensor | list[Tensor], meaning: str) -> None:
    if isinstance(tensors, Tensor):
        print(f"{name:<17} {tuple(tensors.shape)!s:<22} {meaning}")
        return
    for i, camera in enumerate(tensors):
        print_shapes(f"{name}[{i}]", camera, meaning)


# ----------------------------------------------------------------------------------------- a table with cubes, rendered

Point = tuple[float, float, float]
Colour = tuple[int, int, int]

SYNTHETIC_CAMERAS: list[tuple[Point, Point]] = [  # (eye, what it looks at); z is up, the table top is z = 0
    ((0.0, -2.1, 1.3), (0.0, 0.0, 0.1)),  # front
    ((2.3, -1.0, 1.3), (0.0, 0.0, 0.1)),  # side
    ((-0.6, -0.9, 1.2), (-0.2, -0.1, 0.1)),  # wrist, above the red cube
]
CUBES: list[tuple[Point, float, Colour]] = [  # centre, edge, colour
    ((-0.35, -0.20, 0.15), 0.30, (214, 48, 49)),
    ((0.45, -0.10, 0.20), 0.40, (9, 132, 227)),
    ((0.05, 0.50, 0.13), 0.26, (0, 160, 90)),
    ((-0.60, 0.45, 0.10), 0.20, (253, 203, 110)),
]
TABLE: list[Point] = [(-1.1, -0.8, 0.0), (1.1, -0.8, 0.0), (1.1, 0.8, 0.0), (-1.1, 0.8, 0.0)]


def render_scene(eye: Point, target: Point, size: tuple[int, int] = (448, 336)) -> Image.Image:
    """What a pinhole camera sees of the table: flat colours, the far faces drawn first."""
    width, height = 2 * size[0], 2 * size[1]  # drawn larger and shrunk at the end, for smooth edges
    picture = Image.new("RGB", (width, height), (222, 226, 230))
    draw = ImageDraw.Draw(picture)

    position = torch.tensor(eye)
    forward = torch.nn.functional.normalize(torch.tensor(target) - position, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0])), dim=0)
    world_to_camera = torch.stack([right, torch.linalg.cross(forward, right), forward])  # rows: right, down, ahead

    def draw_face(corners: Tensor, colour: Colour) -> None:
        x, y, depth = ((corners - position) @ world_to_camera.T).unbind(dim=1)
        pixels = torch.stack([width / 2 + 1.1 * height * x / depth, height / 2 + 1.1 * height * y / depth], dim=1)
        draw.polygon([(column, row) for column, row in pixels.tolist()], fill=colour)

    draw_face(torch.tensor(TABLE), (196, 160, 120))
    faces = [face for cube in CUBES for face in cube_faces(*cube)]
    for corners, colour in sorted(faces, key=lambda face: -float((face[0].mean(dim=0) - position).norm())):
        draw_face(corners, colour)
    return picture.resize(size, Image.Resampling.LANCZOS)


def cube_faces(centre: Point, edge: float, colour: Colour) -> list[tuple[Tensor, Colour]]:
    """The corners (4, 3) and the shade of the five faces that do not lie on the table."""
    faces = []
    for axis, side, light in ((0, -1, 0.6), (0, 1, 0.75), (1, -1, 0.85), (1, 1, 0.5), (2, 1, 1.0)):
        corners = torch.full((4, 3), float(side))
        corners[:, [other for other in range(3) if other != axis]] = torch.tensor(
            [[-1.0, -1], [1, -1], [1, 1], [-1, 1]]
        )
        red, green, blue = (int(channel * light) for channel in colour)
        faces.append((torch.tensor(centre) + corners * edge / 2, (red, green, blue)))
    return faces


# --------------------------------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Hidden states and image features of camera frames and a text.")
    parser.add_argument("--model", type=model_name, help="hub id or local folder (default: embedded, random weights)")
    parser.add_argument("--images", type=load_image, nargs="+", metavar="FILE", help="a frame for each camera")
    parser.add_argument("--text", default="pick up the red cube", help="the instruction (default: %(default)s)")
    parser.add_argument(
        "--output", type=picture_path, default="features.png", help="the picture (default: %(default)s)"
    )
    parser.add_argument("--device", type=usable_device, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", type=dtype, default="auto", help="float32, bfloat16, ... (default: the checkpoint's)"
    )
    return parser


def model_name(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"{name} is not a model folder: it has no config.json")
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{name} is neither a folder nor a hub id such as Qwen/Qwen2.5-VL-3B-Instruct")
    return name


def load_image(name: str) -> Image.Image:
    try:
        with Image.open(name) as image:
            return ImageOps.exif_transpose(image).convert("RGB")  # phones store photos lying on their side
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{name} does not exist") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise argparse.ArgumentTypeError(f"{name} can't be read as an image ({error})") from None


def picture_path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise argparse.ArgumentTypeError(f"{name} should end in .png, .jpg or .webp")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} can't be written: it is a folder, or its folder does not exist")
    return path


def usable_device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{name} can't be used here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def dtype(name: str) -> torch.dtype | str:
    value = getattr(torch, name, None)
    if name != "auto" and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise argparse.ArgumentTypeError(f"{name} is neither auto nor a floating dtype such as float32 or bfloat16")
    return value or name


if __name__ == "__main__":
    main()
