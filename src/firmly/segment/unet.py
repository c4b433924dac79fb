"""A compact U-Net: the plain baseline of segmentation networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError, ShapeError


class UNet(nn.Module):
    """Images (batch, in_channels, height, width) -> scores (batch, classes, height, width), without a softmax.

    `levels` resolutions of `width`, 2 width, 4 width ... channels; at each, two 3 x 3 convolutions with batch
    normalisation and ReLU on the way down and on the way up, means of 2 x 2 pixels between them, and copies across.
    Height and width are multiples of 2^(levels - 1): `ShapeError`. `certify` traces it in eval mode, with bounds that
    grow fast with the depth.
    Source: Ronneberger, Fischer and Brox, U-Net: convolutional networks for biomedical image segmentation, 2015; with
    padding, batch normalisation, means in the place of maxima, and repeated pixels in the place of transposed
    convolutions.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 16, levels: int = 3):
        super().__init__()
        if min(in_channels, width, levels) < 1 or classes < 2:
            raise SettingsError(
                f"channels, width and levels are at least 1 and classes 2, given {in_channels} channels, "
                f"width {width}, {levels} levels, {classes} classes"
            )
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([in_channels, *widths], widths))
        self.up = nn.ModuleList(block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.read = nn.Conv2d(width, classes, 1)
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        factor = 2 ** (self.levels - 1)
        if x.dim() != 4 or x.shape[2] % factor or x.shape[3] % factor:
            raise ShapeError(
                f"this U-Net takes (batch, channels, height, width) with height and width multiples of {factor}, given "
                f"{tuple(x.shape)}"
            )
        passed: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else nn.functional.avg_pool2d(x, 2))
            passed.append(x)
        for up, across in zip(self.up, passed[-2::-1]):
            x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2, mode="nearest"), across], 1))
        return self.read(x)


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
