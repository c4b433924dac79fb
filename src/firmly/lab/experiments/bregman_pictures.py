"""Pictures of classifiers: curves with bands, the star of their sensitivities, and where they decide what."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from firmly.lab.charts import Scale, number
from firmly.lab.experiments.bregman_data import EXTENT, Samples
from firmly.lab.experiments.bregman_robustness import certified_radii
from firmly.lab.flows import interval

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {"MLP": (123, 130, 137), "ResNet": (201, 105, 47), "BregmaNet": (18, 144, 140)}
GRID, INK, WHITE = (222, 225, 228), (70, 76, 82), (255, 255, 255)
CLASSES: tuple[Colour, Colour] = ((40, 92, 170), (206, 84, 44))
WIDTH, HEIGHT = 460, 330  # pixels
SCALE = 2  # drawn larger and reduced, for smooth lines


class Band(NamedTuple):
    """A mean over seeds at every x, with the ends of its interval."""

    name: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def radii_up_to(radius: float, points: int = 60) -> list[float]:
    return [radius * k / (points - 1) for k in range(points)]


def band(name: str, x: Sequence[float], curves: Sequence[Sequence[float]]) -> Band:
    """The band of the 95% intervals over curves, one of each seed; for one seed it is the curve."""
    at = [interval(list(values)) for values in zip(*curves)]
    halves = [0.0 if math.isinf(i.half) else i.half for i in at]
    low, high = ([i.mean + sign * half for i, half in zip(at, halves)] for sign in (-1, 1))
    return Band(name, x, [i.mean for i in at], low, high)


def band_picture(bands: Sequence[Band], x_name: str, y_name: str) -> bytes:
    """A PNG of proportions in [0, 1] over x, each with its band, as far as one is above 0; names are of `COLOURS`."""
    end = 2 + max((k for b in bands for k, value in enumerate(b.high) if value > 0), default=len(bands[0].x))
    bands = [Band(b.name, *(values[:end] for values in b[1:])) for b in bands]
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WHITE)
    pen = ImageDraw.Draw(picture, "RGBA")
    across = Scale(min(bands[0].x), max(bands[0].x), 46 * SCALE, (WIDTH - 14) * SCALE)
    up = Scale(0.0, 1.0, (HEIGHT - 44) * SCALE, 50 * SCALE)
    for tick in up.ticks(5):
        pen.line([(across.start, up(tick)), (across.end, up(tick))], GRID, SCALE)
        write(pen, across.start - 6 * SCALE, up(tick), number(tick), "rm")
    for tick in across.ticks(5):
        write(pen, across(tick), up.start + 6 * SCALE, number(tick), "ma")
    write(pen, across.end, (HEIGHT - 4) * SCALE, x_name, "rs")
    write(pen, 4 * SCALE, 38 * SCALE, y_name, "ls")
    for band in bands:
        edge = [*zip(band.x, band.high), *reversed(list(zip(band.x, band.low)))]
        pen.polygon([(across(a), up(min(max(b, 0.0), 1.0))) for a, b in edge], (*COLOURS[band.name], 48))
    for band in bands:
        pen.line([(across(a), up(b)) for a, b in zip(band.x, band.mean)], COLOURS[band.name], 2 * SCALE, "curve")
    legend(pen, [band.name for band in bands])
    return as_png(picture, (WIDTH, HEIGHT))


def star_picture(values: Mapping[str, Mapping[str, float]]) -> bytes:
    """A PNG with a polygon for every network: a ray for every group of inputs, as long as its bound."""
    groups = list(next(iter(values.values())))
    top = max(max(rays.values()) for rays in values.values())
    picture = Image.new("RGB", (WIDTH * SCALE, WIDTH * SCALE), WHITE)
    pen = ImageDraw.Draw(picture, "RGBA")
    centre, radius = (WIDTH / 2 * SCALE, (WIDTH / 2 + 12) * SCALE), (WIDTH / 2 - 104) * SCALE

    def place(k: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * k / len(groups) - math.pi / 2
        length = radius * value / top
        return centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)

    for share in (0.25, 0.5, 0.75, 1.0):
        ring = [place(k, share * top) for k in range(len(groups))]
        pen.line([*ring, ring[0]], GRID, SCALE)
    for k, group in enumerate(groups):
        pen.line([centre, place(k, top)], GRID, SCALE)
        x, y = place(k, 1.08 * top)
        anchor = "m" if abs(x - centre[0]) < 0.2 * radius else "l" if x > centre[0] else "r"
        write(pen, x, y, group, f"{anchor}m")
    write(pen, centre[0] + 4 * SCALE, centre[1] - radius + 10 * SCALE, number(top), "lm")
    for name, rays in values.items():
        ring = [place(k, rays[group]) for k, group in enumerate(groups)]
        pen.polygon(ring, (*COLOURS[name], 40))
        pen.line([*ring, ring[0]], COLOURS[name], 2 * SCALE, "curve")
    legend(pen, list(values))
    return as_png(picture, (WIDTH, WIDTH))


def region_picture(net: nn.Sequential, pairs: Tensor, samples: Samples, radius: float) -> bytes:
    """A PNG of the square of the spirals in the colours of both classes, pale where the proved distance to the other
    class is short, and full from `radius` on; `pairs` as in `Constants`."""
    side = 230
    line = torch.linspace(-EXTENT, EXTENT, side, dtype=torch.float64)
    y, x = torch.meshgrid(line.flip(0), line, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    with torch.no_grad():
        classes = net(points).argmax(1)
    strength = (certified_radii(net, Samples(points, classes), pairs) / radius).clamp(max=1)[:, None]
    full = torch.tensor(CLASSES, dtype=torch.float64)[classes]
    colours = 255 + (0.12 + 0.68 * strength) * (full - 255)
    pixels = colours.round().byte().reshape(side, side, 3).contiguous()
    picture = Image.frombytes("RGB", (side, side), bytes(pixels.numpy())).resize((2 * side, 2 * side))
    picture = picture.resize((2 * side * SCALE,) * 2, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture, "RGBA")
    for (a, b), label in zip(samples.x[:300].tolist(), samples.labels[:300].tolist()):
        at = ((a / EXTENT + 1) * side * SCALE, (1 - b / EXTENT) * side * SCALE)
        pen.circle(at, 2.6 * SCALE, CLASSES[label], WHITE, SCALE // 2)
    return as_png(picture, (2 * side, 2 * side), 96)


def legend(pen: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
    x = 8.0 * SCALE
    for name in names:
        pen.circle((x, 12 * SCALE), 5 * SCALE, COLOURS[name])
        write(pen, x + 10 * SCALE, 12 * SCALE, name, "lm")
        x += 32 * SCALE + pen.textlength(name, font())


def write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str) -> None:
    pen.text((x, y), text, INK, font(), anchor)


def font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(13 * SCALE)


def as_png(picture: Image.Image, size: tuple[int, int], colours: int = 64) -> bytes:
    buffer = io.BytesIO()
    small = picture.resize(size, Image.Resampling.LANCZOS)
    small.quantize(colours).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
