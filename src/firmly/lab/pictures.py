"""Images as PNG bytes, enlarged details, and differences made visible."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from torch import Tensor


def png(image: Tensor) -> bytes:
    """A gray image (1, height, width) in [0, 1] as PNG; values outside are shown as black or white."""
    from PIL import Image

    pixels = (image[0].detach().cpu().clamp(0, 1) * 255).round().byte().contiguous()
    buffer = io.BytesIO()
    height, width = pixels.shape
    Image.frombytes("L", (width, height), bytes(pixels.numpy())).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def coloured(values: Tensor) -> bytes:
    """Values (height, width) in [0, 1] as a PNG in the colours `COLOURS`; values outside have the first or the last."""
    from PIL import Image

    index = (values.detach().cpu().clamp(0, 1) * (len(COLOURS) - 1)).round().byte().contiguous()
    height, width = index.shape
    image = Image.frombytes("P", (width, height), bytes(index.numpy()))
    image.putpalette([part for colour in COLOURS for part in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def between(anchors: Sequence[tuple[int, int, int]], count: int) -> list[tuple[int, int, int]]:
    """`count` colours from the first anchor to the last, linear between neighbours."""
    colours = []
    for i in range(count):
        at = i / (count - 1) * (len(anchors) - 1)
        k = min(int(at), len(anchors) - 2)
        red, green, blue = (round(a + (at - k) * (b - a)) for a, b in zip(anchors[k], anchors[k + 1]))
        colours.append((red, green, blue))
    return colours


COLOURS = between(((9, 6, 48), (84, 18, 108), (166, 44, 94), (227, 96, 52), (249, 176, 62), (253, 250, 205)), 48)
"""From dark violet to pale yellow, of rising lightness, readable without colours too."""


def data_uri(content: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def detail(image: Tensor, top: int, left: int, size: int) -> Tensor:
    """The size x size pixels at (top, left)."""
    return image[..., top : top + size, left : left + size]


def busiest(image: Tensor, size: int) -> tuple[int, int]:
    """Top left corner of the size x size window with the most edges, away from the border: where zooming in pays."""
    from torch.nn.functional import avg_pool2d

    edges = (image[0, 1:, :-1] - image[0, :-1, :-1]).abs() + (image[0, :-1, 1:] - image[0, :-1, :-1]).abs()
    border = size // 4
    energy = avg_pool2d(edges[None, None, border:-border, border:-border].sqrt(), size, stride=size // 8)[0, 0]
    index = int(energy.argmax())
    rows, columns = divmod(index, energy.shape[1])
    return border + rows * (size // 8), border + columns * (size // 8)


def signed(difference: Tensor, scale: float) -> Tensor:
    """A difference as a picture: gray where it is 0, white at +scale, black at -scale."""
    return 0.5 + 0.5 * difference / scale
