"""The negative log-likelihood of Student's distribution for errors of whole images, its degrees of freedom learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError, ShapeError
from firmly.robust.losses import VOID, log_probabilities
from firmly.robust.pencil import given_laws


class TLoss(nn.Module):
    """-1/D log of the density of Student's t for the error of an image: logits, labels -> one loss per image, (batch,).

        r = 1/2 sum over valid pixels i of |p_i - e_{y_i}|^2,   D = (classes - 1) (number of valid pixels),
        loss = ( log G(nu/2) - log G((nu + D)/2) + D/2 log(pi nu) + (nu + D)/2 log(1 + r / nu) ) / D,

    G the gamma function. Labels are integers (batch, *spatial), or laws (batch, class, *spatial) in the place of e_y,
    not valid where they sum to 0. Large errors count by their logarithm: of images with many wrong labels the gradient
    is small. The degrees of freedom nu are a parameter (`log_nu`): give `parameters()` to the optimiser. An image
    without a valid pixel has loss 0. Computed in double precision.
    Source: Gonzalez-Jimenez et al., Robust T-Loss for medical image segmentation, 2023, with the identity for its scale
    matrix; the paper has two classes, where this is its loss divided by D.
    """

    def __init__(self, nu: float = math.e):
        super().__init__()
        if not 0 < nu < math.inf:
            raise SettingsError(f"the degrees of freedom are positive, given {nu}")
        self.log_nu = nn.Parameter(torch.tensor(math.log(nu)))

    def forward(self, logits: Tensor, labels: Tensor, void: int = VOID) -> Tensor:
        p = log_probabilities(logits).double().exp()
        laws, valid = given_laws(labels, logits.shape[1], void)
        if laws.shape != logits.shape:
            raise ShapeError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
        r = (valid * (p - laws.double()).square().sum(1)).flatten(1).sum(1) / 2
        D = (logits.shape[1] - 1) * valid.flatten(1).sum(1).double()
        nu = self.log_nu.double().exp()
        gammas = torch.lgamma(nu / 2) - torch.lgamma((nu + D) / 2)
        total = gammas + D / 2 * torch.log(math.pi * nu) + (nu + D) / 2 * torch.log1p(r / nu)
        return torch.where(D > 0, total / D.clamp(min=1), 0).to(logits.dtype)
