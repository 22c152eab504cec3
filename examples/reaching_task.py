"""In: a random generator. Out: samples of a reaching task, and batches of them in LeRobot's form, drawn frames and all.

Three cubes of different colours lie on a table, a gripper hovers above, and an instruction names one of the cubes. The
front camera sees the whole table; the wrist camera rides on the gripper, sees what is below, and fails now and then.
The action is the way from the gripper to the cube that is meant.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from PIL import Image, ImageDraw
from torch import Tensor

Place = tuple[float, float]
Point = tuple[float, float, float]
Colour = tuple[int, int, int]
Batch = dict[str, Tensor | list[str]]

CAMERAS = ("front", "wrist")
SIDE = 84  # pixels of a frame's side
COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "green": (0, 160, 90),
    "blue": (9, 132, 227),
    "yellow": (253, 203, 60),
}
PHRASES = ("move to the {} cube", "reach for the {} cube", "go to the {} cube")
CUBES = 3  # in a scene
WRIST_FAILS = 0.1  # probability

# Metres: x to the right, y away from the front camera, z up; the middle of the table top is the origin.
TABLE = (0.50, 0.40)  # half its width and depth
REACH = (0.40, 0.30)  # cubes and gripper stay within
EDGE = 0.12  # of a cube
CLEARANCE = 0.20  # between the middles of two cubes
WRIST_HEIGHT = 0.60


# ------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Scene:
    """Where the cubes (by colour) and the gripper are, and whether the wrist camera works."""

    cubes: dict[str, Place]
    gripper: Place
    wrist_works: bool

    @cached_property
    def frames(self) -> dict[str, Image.Image]:
        """What each camera sees; black where it fails."""
        black = Image.new("RGB", (SIDE, SIDE))
        return {
            "front": render(self.cubes, FRONT),
            "wrist": render(self.cubes, wrist_above(self.gripper)) if self.wrist_works else black,
        }


@dataclass(frozen=True)
class Sample:
    """A scene and what the gripper is told to do there."""

    scene: Scene
    target: str
    phrase: str

    @property
    def instruction(self) -> str:
        return self.phrase.format(self.target)

    @property
    def action(self) -> Place:
        """From the gripper to the cube that is meant, in metres."""
        (x, y), (gripper_x, gripper_y) = self.scene.cubes[self.target], self.scene.gripper
        return x - gripper_x, y - gripper_y

    def misled(self) -> "Sample":
        """The same scene with an instruction that names another of its cubes."""
        names = list(self.scene.cubes)
        return replace(self, target=names[(names.index(self.target) + 1) % len(names)])


def draw_samples(rng: random.Random, scenes: int) -> list[Sample]:
    """Each scene comes once for every cube in it, so that nothing but the instruction tells those samples apart."""
    drawn = [random_scene(rng) for _ in range(scenes)]
    return [Sample(scene, target, rng.choice(PHRASES)) for scene in drawn for target in scene.cubes]


def random_scene(rng: random.Random) -> Scene:
    places: list[Place] = []
    while len(places) < CUBES:
        place = random_place(rng)
        if all(math.dist(place, other) > CLEARANCE for other in places):
            places.append(place)
    cubes = dict(zip(rng.sample(sorted(COLOURS), CUBES), places, strict=True))
    return Scene(cubes, gripper=random_place(rng), wrist_works=rng.random() >= WRIST_FAILS)


def random_place(rng: random.Random) -> Place:
    return rng.uniform(-REACH[0], REACH[0]), rng.uniform(-REACH[1], REACH[1])


def make_batch(samples: Sequence[Sample]) -> Batch:
    """What a data loader over a LeRobotDataset gives. `*_is_pad` marks the samples in which a camera has no frame."""
    scenes = [sample.scene for sample in samples]
    return {
        "observation.images.front": torch.stack([to_tensor(scene.frames["front"]) for scene in scenes]),
        "observation.images.wrist": torch.stack([to_tensor(scene.frames["wrist"]) for scene in scenes]),
        "observation.images.wrist_is_pad": torch.tensor([not scene.wrist_works for scene in scenes]),
        "observation.state": torch.tensor([scene.gripper for scene in scenes]),
        "action": torch.tensor([sample.action for sample in samples]),
        "task": [sample.instruction for sample in samples],
    }


def to_tensor(frame: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
    return pixels.view(frame.height, frame.width, 3).permute(2, 0, 1).float() / 255  # (3, H, W), 0 to 1


def reached(actions: Tensor, wanted: Tensor) -> Tensor:
    """Bool (B,): which of `actions` (B, 2) end above the cube that `wanted` (B, 2) leads to."""
    return ((actions - wanted).abs() <= EDGE / 2).all(dim=1)


# ----------------------------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: where it is, what it looks at, which way is up in its frame, and its focal length in frames."""

    eye: Point
    target: Point
    up: Point
    focal: float

    @cached_property
    def axes(self) -> tuple[Point, Point, Point]:
        """Unit vectors of the frame: right, down, ahead."""
        ahead = unit(minus(self.target, self.eye))
        right = unit(cross(ahead, self.up))
        return right, cross(ahead, right), ahead

    def project(self, point: Point) -> tuple[float, float]:
        """Column and row, from 0 to 1 inside the frame."""
        right, down, depth = (dot(minus(point, self.eye), axis) for axis in self.axes)
        return 0.5 + self.focal * right / depth, 0.5 + self.focal * down / depth


FRONT = Camera(eye=(0.0, -0.80, 1.15), target=(0.0, -0.02, 0.0), up=(0.0, 0.0, 1.0), focal=1.2)


def wrist_above(place: Place) -> Camera:
    x, y = place
    return Camera(eye=(x, y, WRIST_HEIGHT), target=(x, y, 0.0), up=(0.0, 1.0, 0.0), focal=0.9)


def render(cubes: dict[str, Place], camera: Camera) -> Image.Image:
    """Flat colours on a table, the far cubes drawn first."""
    side = 2 * SIDE  # drawn larger and shrunk at the end, for smooth edges
    picture = Image.new("RGB", (side, side), (222, 226, 230))
    draw = ImageDraw.Draw(picture)

    def draw_face(corners: Sequence[Point], colour: Colour) -> None:
        draw.polygon([(side * column, side * row) for column, row in map(camera.project, corners)], fill=colour)

    x, y = TABLE
    draw_face([(-x, -y, 0.0), (x, -y, 0.0), (x, y, 0.0), (-x, y, 0.0)], (196, 160, 120))
    for name, place in sorted(cubes.items(), key=lambda cube: -math.dist((*cube[1], 0.0), camera.eye)):
        for corners, light in visible_faces(place, camera.eye):
            red, green, blue = (int(channel * light) for channel in COLOURS[name])
            draw_face(corners, (red, green, blue))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def visible_faces(place: Place, eye: Point) -> Iterator[tuple[list[Point], float]]:
    """Corners and brightness of a cube's faces that are turned towards `eye`; they do not cover each other."""
    middle = (*place, EDGE / 2)
    for axis, side, light in ((0, -1, 0.6), (0, 1, 0.75), (1, -1, 0.85), (1, 1, 0.5), (2, 1, 1.0)):
        if side * (eye[axis] - middle[axis]) > EDGE / 2:
            around = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
            offsets = [(*pair[:axis], side, *pair[axis:]) for pair in around]
            yield [tuple(m + EDGE / 2 * o for m, o in zip(middle, offset, strict=True)) for offset in offsets], light


def minus(a: Point, b: Point) -> Point:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def dot(a: Point, b: Point) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Point, b: Point) -> Point:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def unit(a: Point) -> Point:
    length = math.hypot(*a)
    return a[0] / length, a[1] / length, a[2] / length
