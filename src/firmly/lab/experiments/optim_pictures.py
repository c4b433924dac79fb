"""Curves of several methods, each with the band of its confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from firmly.lab.charts import Scale, number
from firmly.lab.experiments.bregman_pictures import GRID, HEIGHT, SCALE, WHITE, WIDTH, Band, Colour, as_png, font, write

COLOURS: tuple[Colour, ...] = ((18, 144, 140), (201, 105, 47), (61, 99, 181), (123, 130, 137), (162, 59, 114))


def curves_picture(bands: Sequence[Band], x_name: str, y_name: str) -> bytes:
    """A PNG of at most five curves, the first in the colour of ours."""
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WHITE)
    pen = ImageDraw.Draw(picture, "RGBA")
    low, high = min(min(b.low) for b in bands), max(max(b.high) for b in bands)
    across = Scale(min(min(b.x) for b in bands), max(max(b.x) for b in bands), 46 * SCALE, (WIDTH - 22) * SCALE)
    up = Scale(max(0.0, low - 0.02), min(1.0, high + 0.02), (HEIGHT - 44) * SCALE, 56 * SCALE)
    for tick in up.ticks(5):
        pen.line([(across.start, up(tick)), (across.end, up(tick))], GRID, SCALE)
        write(pen, across.start - 6 * SCALE, up(tick), number(tick), "rm")
    for tick in across.ticks(6):
        write(pen, across(tick), up.start + 6 * SCALE, number(tick), "ma")
    write(pen, across.end, (HEIGHT - 4) * SCALE, x_name, "rs")
    write(pen, 4 * SCALE, 44 * SCALE, y_name, "ls")
    for band, colour in zip(bands, COLOURS):
        edge = [*zip(band.x, band.high), *reversed(list(zip(band.x, band.low)))]
        pen.polygon([(across(a), up(b)) for a, b in edge], (*colour, 40))
    for band, colour in zip(bands, COLOURS):
        pen.line([(across(a), up(b)) for a, b in zip(band.x, band.mean)], colour, 2 * SCALE, "curve")
    at = 8.0 * SCALE
    for band, colour in zip(bands, COLOURS):
        pen.circle((at, 12 * SCALE), 5 * SCALE, colour)
        write(pen, at + 10 * SCALE, 12 * SCALE, band.name, "lm")
        at += 28 * SCALE + pen.textlength(band.name, font())
    return as_png(picture, (WIDTH, HEIGHT))
