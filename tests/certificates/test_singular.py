"""Networks made of one operator without a fast transform are certified by its singular values, or by its norm alone."""

from __future__ import annotations

import math

import torch

import firmly as fm


def test_tomography_is_certified_by_the_singular_values_of_its_operator():
    A = fm.linear.Radon((1, 48, 48), torch.linspace(0, math.pi, 31)[:-1])
    net = fm.unroll(fm.algorithms.ForwardBackward(A, fm.prox.L1(0.01)), depth=3, learn=())
    data, start = fm.certify(net), fm.certify(net, wrt="start")
    assert (data.basis.name, start.basis.name) == ("singular", "singular")
    assert data.lower <= data.upper <= 1.05 * data.lower
    # without data, the null space is kept: exactly 1
    assert start.lower <= 1.0 <= start.upper <= 1.001
    for cert in (data, start):
        fm.verify(cert, net)


def test_operators_that_share_no_basis_are_not_taken_for_one():
    A = fm.linear.Radon((1, 24, 24), torch.linspace(0, math.pi, 11)[:-1])
    B = fm.linear.Radon((1, 24, 24), torch.linspace(0.1, math.pi, 11)[:-1])
    net = torch.nn.Sequential(A, A.T, B, B.T)
    assert fm.certify(net, shape=(1, 24, 24), method="product").basis.name != "singular"
