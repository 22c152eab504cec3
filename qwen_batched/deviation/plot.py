"""A picture of the deviation against the depth, drawn with Pillow: a curve for each run, and the ratio below."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from qwen_batched.arguments import dtype_name
from qwen_batched.deviation.bounds import FINAL_RATIO_BOUND
from qwen_batched.deviation.comparison import FLOAT32_BOUND, OURS, THEIRS, Findings, Plan, Run
from qwen_batched.deviation.measures import Distance
from qwen_batched.deviation.stages import decoder_stage, vision_stage

WIDTH, HEIGHT = 1280, 900
LEFT, RIGHT = 92, 32
CURVES, RATIOS = (128, 560), (602, 742)  # top and bottom of the two fields
MOST_RATIO = 4.0  # drawn as it is; what is more, at the upper edge
FINER = 2  # drawn so much larger, and scaled down: Pillow's lines are not smooth
INK, FAINT, GRID, BAND = "#1f2937", "#6b7280", "#e5e7eb", "#f6f8fb"
COLOURS = {OURS: "#2563eb", THEIRS: "#ea580c"}
MOST_NUMBERS = 12  # of blocks, under each network

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One run: by stage its values over all sizes together, and the least and largest of any size."""

    run: Run
    values: Mapping[str, float]
    lowest: Mapping[str, float]
    highest: Mapping[str, float]

    @property
    def name(self) -> str:
        """For the legend."""
        who, dtype = self.run
        own = ", from its float64" if self.run == (THEIRS, torch.float32) else ""
        return f"{'this library' if who == OURS else 'transformers'}, {dtype_name(dtype)}{own}"

    @property
    def colour(self) -> str:
        """By whose run it is."""
        return COLOURS[self.run[0]]

    @property
    def dashed(self) -> bool:
        """float32, which lies far below the others."""
        return self.run[1] == torch.float32


def draw(plan: Plan, findings: Findings, title: str, subtitle: str, path: Path) -> None:
    """Writes the picture, a PNG."""
    dtypes = sorted(plan.dtypes, key=lambda dtype: dtype == torch.float32)  # those far up first, as in the picture
    runs = [(who, dtype) for dtype in dtypes for who in (OURS, THEIRS)]
    curves = [curve for run in runs if (curve := _curve(plan, findings, run)).values]
    picture = _Picture(plan, curves)
    picture.draw_curves(curves)
    picture.draw_ratios(curves)
    picture.write(title, subtitle, curves)
    picture.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path, format="PNG")


def _curve(plan: Plan, findings: Findings, run: Run) -> Curve:
    values, lowest, highest = {}, {}, {}
    for stage in plan.stages.names:
        measures = [findings.get(run, case.label, stage) for case in plan.cases]
        # What is equal to the last bit, or not a number, has no place on a logarithmic axis.
        measures = [x for x in measures if isinstance(x, Distance) and 0 < x.relative_l2 < math.inf]
        if measures:
            values[stage] = Distance.pooled(measures).relative_l2
            lowest[stage], highest[stage] = (end(x.relative_l2 for x in measures) for end in (min, max))
    return Curve(run, values, lowest, highest)


class _Picture:
    """The canvas, and where things are on it."""

    def __init__(self, plan: Plan, curves: Sequence[Curve]) -> None:
        self.image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.plan = plan
        self.stages = [stage for stage in plan.stages.names if any(stage in curve.values for curve in curves)]

    # --- what is on it ---

    def draw_curves(self, curves: Sequence[Curve]) -> None:
        """The upper field: relative L2 distances on a logarithmic axis."""
        seen = [FLOAT32_BOUND, *(x for curve in curves for x in (*curve.lowest.values(), *curve.highest.values()))]
        bottom, top = math.floor(math.log10(min(seen)) - 0.1), math.ceil(math.log10(max(seen)) + 0.1)

        def y(value: float) -> float:
            return _between(*CURVES, (math.log10(value) - bottom) / (top - bottom))

        self._field(*CURVES)
        for decade in range(bottom, top + 1):
            self._rule(y(10.0**decade), GRID)
            small = _font(10).getlength(str(decade))
            self._text(str(decade), (LEFT - 12) * FINER - small, y(10.0**decade) - 7 * FINER, 10, INK, "lm")
            self._text("10", (LEFT - 13) * FINER - small, y(10.0**decade), 13, INK, "rm")
        self._rule(y(FLOAT32_BOUND), FAINT, dashed=True)
        name = f"bound of float32, {FLOAT32_BOUND:.0e}".replace("e-0", "e-")
        self._text(name, (LEFT + 8) * FINER, y(FLOAT32_BOUND) - 5 * FINER, 12, FAINT, "ls")
        self._axes(*CURVES)
        for curve in curves:
            self._shade(curve, [y(value) for value in curve.highest.values()], map(y, curve.lowest.values()))
        for curve in curves:
            points = [(self._x(stage), y(value)) for stage, value in curve.values.items()]
            self._line(points, curve)

    def draw_ratios(self, curves: Sequence[Curve]) -> None:
        """The lower field: ours over theirs, where both were measured."""
        by_run = {curve.run: curve for curve in curves}
        quotients = {}
        for who, dtype in by_run:
            if who == OURS and (THEIRS, dtype) in by_run:
                ours, theirs = by_run[OURS, dtype], by_run[THEIRS, dtype].values
                quotients[dtype] = {s: value / theirs[s] for s, value in ours.values.items() if s in theirs}
        seen = [value for values in quotients.values() for value in values.values()]
        bottom = math.floor(min([0.9, *seen]) * 10) / 10
        top = min(MOST_RATIO, math.ceil(max([1.1, *seen]) * 10) / 10)

        def y(value: float) -> float:
            return _between(*RATIOS, (min(value, top) - bottom) / (top - bottom))

        self._field(*RATIOS)
        step = 0.1 if top - bottom < 0.55 else 0.2 if top - bottom < 1.1 else 0.5
        for index in range(math.ceil(bottom / step - 1e-6), math.floor(top / step + 1e-6) + 1):
            self._rule(y(index * step), FAINT if abs(index * step - 1) < 1e-6 else GRID)
            self._text(f"{index * step:.1f}", (LEFT - 12) * FINER, y(index * step), 13, INK, "rm")
        self._rule(y(FINAL_RATIO_BOUND), FAINT, dashed=True)
        self._axes(*RATIOS)
        for dtype, values in quotients.items():
            self._line([(self._x(stage), y(value)) for stage, value in values.items()], by_run[OURS, dtype])
        self._stage_names(RATIOS[1] * FINER)

    def write(self, title: str, subtitle: str, curves: Sequence[Curve]) -> None:
        """Title, what was run, what the axes are, and the legend."""
        right = (WIDTH - RIGHT) * FINER
        self._text(title, LEFT * FINER, 36 * FINER, 21, INK, "ls")
        self._text(subtitle, LEFT * FINER, 60 * FINER, 13, FAINT, "ls")
        self._text("relative L2 distance", LEFT * FINER, (CURVES[0] - 12) * FINER, 12, FAINT, "ls")
        shading = "all sizes together; shaded: from the least to the largest of any size"
        self._text(shading, right, (CURVES[0] - 12) * FINER, 12, FAINT, "rs")
        ratio = f"this library over transformers; dashed: bound of the final hidden states, {FINAL_RATIO_BOUND}"
        self._text(ratio, LEFT * FINER, (RATIOS[0] - 12) * FINER, 12, FAINT, "ls")
        x, y = LEFT * FINER, 88 * FINER
        for curve in curves:
            self._line([(x, y - 4 * FINER), (x + 34 * FINER, y - 4 * FINER)], curve, dots=False)
            self._dot(x + 17 * FINER, y - 4 * FINER, curve)
            self._text(curve.name, x + 42 * FINER, y, 13, INK, "ls")
            x += 68 * FINER + _font(13).getlength(curve.name)

    # --- where ---

    def _x(self, stage: str) -> float:
        place = self.stages.index(stage) / max(1, len(self.stages) - 1)
        return (LEFT + 14 + (WIDTH - LEFT - RIGHT - 28) * place) * FINER

    def _field(self, top: int, bottom: int) -> None:
        """The decoder's part has a colour of its own."""
        decoder = set(map(decoder_stage, self.plan.stages.decoder_blocks))
        first = next((place for place, stage in enumerate(self.stages) if stage in decoder), 0)
        if first:
            border = (self._x(self.stages[first - 1]) + self._x(self.stages[first])) / 2
            self.pen.rectangle((border, top * FINER, (WIDTH - RIGHT) * FINER, bottom * FINER), fill=BAND)

    def _axes(self, top: int, bottom: int) -> None:
        left, right = LEFT * FINER, (WIDTH - RIGHT) * FINER
        self.pen.line((left, top * FINER, left, bottom * FINER, right, bottom * FINER), fill=INK, width=FINER)

    def _stage_names(self, bottom: float) -> None:
        """Numbers for blocks, every so many where there is no room, and names for the rest."""
        vision = [vision_stage(block) for block in self.plan.stages.vision_blocks]
        decoder = [decoder_stage(layer) for layer in self.plan.stages.decoder_blocks if layer]
        for names, title in ((vision, "vision blocks"), (decoder, "decoder blocks")):
            names = [name for name in names if name in self.stages]
            if not names:
                continue
            step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 10**6) if len(names) / s <= MOST_NUMBERS)
            for name in names:
                number = int(name.split()[-1])
                if number % step == 0 or len(names) <= MOST_NUMBERS:
                    self._tick(name, bottom)
                    self._text(str(number), self._x(name), bottom + 10 * FINER, 12, INK, "ma")
            middle = (self._x(names[0]) + self._x(names[-1])) / 2
            self._text(title, middle, bottom + 34 * FINER, 13, INK, "ma")
        for name in self.stages:
            if name not in (*vision, *decoder):
                self._tick(name, bottom)
                self._upright(name, self._x(name), bottom + 10 * FINER)

    # --- strokes ---

    def _line(self, points: Points, curve: Curve, dots: bool = True) -> None:
        if curve.dashed:
            self._dashes(points, curve.colour, width=2)
        else:
            self.pen.line(list(points), fill=curve.colour, width=2 * FINER, joint="curve")
        for point in points if dots else ():
            self._dot(*point, curve)

    def _shade(self, curve: Curve, upper: Sequence[float], lower: Sequence[float]) -> None:
        xs = [self._x(stage) for stage in curve.values]
        outline = [*zip(xs, upper, strict=True), *reversed(list(zip(xs, lower, strict=True)))]
        if len(xs) > 1:
            mask = Image.new("L", self.image.size, 0)
            ImageDraw.Draw(mask).polygon(outline, fill=40)
            self.image.paste(Image.new("RGB", self.image.size, curve.colour), mask=mask)

    def _dot(self, x: float, y: float, curve: Curve) -> None:
        radius = (3.2 if len(self.stages) < 40 else 2.4) * FINER
        fill = "white" if curve.dashed else curve.colour
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill, curve.colour, round(1.5 * FINER))

    def _rule(self, y: float, colour: str, dashed: bool = False) -> None:
        ends = [(LEFT * FINER, y), ((WIDTH - RIGHT) * FINER, y)]
        if dashed:
            self._dashes(ends, colour, width=1, on=4, off=5)
        else:
            self.pen.line(ends, fill=colour, width=FINER)

    def _dashes(self, points: Points, colour: str, width: float, on: float = 7, off: float = 4) -> None:
        """A line along the points, its dashes going on from one piece to the next."""
        start, period = 0.0, (on + off) * FINER
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0)
            first = math.floor(start / period) * period - start
            for dash in range(math.ceil((length - first) / period)):
                begin = max(0.0, first + dash * period) / length
                end = min(length, first + dash * period + on * FINER) / length
                if begin < end:
                    ends = (*_along(x0, y0, x1, y1, begin), *_along(x0, y0, x1, y1, end))
                    self.pen.line(ends, fill=colour, width=round(width * FINER))
            start += length

    def _tick(self, stage: str, bottom: float) -> None:
        self.pen.line((self._x(stage), bottom, self._x(stage), bottom + 5 * FINER), fill=INK, width=FINER)

    def _upright(self, text: str, x: float, top: float) -> None:
        font = _font(12)
        ascent, descent = font.getmetrics()
        label = Image.new("L", (math.ceil(font.getlength(text)), ascent + descent), 0)
        ImageDraw.Draw(label).text((0, 0), text, fill=255, font=font)
        label = label.rotate(90, expand=True)
        self.image.paste(Image.new("RGB", label.size, INK), (round(x - label.width / 2), round(top)), label)

    def _text(self, text: str, x: float, y: float, size: int, colour: str, anchor: str) -> None:
        self.pen.text((x, y), text, fill=colour, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * FINER)


def _between(top: float, bottom: float, share: float) -> float:
    return (bottom - (bottom - top) * share) * FINER


def _along(x0: float, y0: float, x1: float, y1: float, share: float) -> tuple[float, float]:
    return x0 + (x1 - x0) * share, y0 + (y1 - y0) * share
