"""Images as PNG bytes, enlarged details, and differences made visible."""

from __future__ import annotations

import base64
import io

from torch import Tensor


def png(image: Tensor) -> bytes:
    """A gray image (1, height, width) in [0, 1] as PNG; values outside are shown as black or white."""
    from PIL import Image

    pixels = (image[0].detach().cpu().clamp(0, 1) * 255).round().byte().contiguous()
    buffer = io.BytesIO()
    height, width = pixels.shape
    Image.frombytes("L", (width, height), bytes(pixels.numpy())).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


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


def error_maps(bound: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """The certified error map of an image (1, height, width) and the change by an attack, on one scale for `png`:
    white is the largest change that the bound allows."""
    top = float(bound.max()) or 1.0
    return bound / top, attacked / top
