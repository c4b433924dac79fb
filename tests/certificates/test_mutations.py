"""A tracer that is broken on purpose has to be caught: each mutation makes some bound fall below the truth.

The truth is measured on the networks themselves, by Jacobians, and so does not depend on the tracer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from firmly.certificates import blocks as blocks_module
from firmly.certificates import signal
from firmly.certificates.blocks import sweep
from firmly.certificates.pencil import pencil
from firmly.certificates.relax import Norms, Relaxation, Term
from firmly.certificates.signal import HANDLERS
from firmly.errors import FirmlyError
from firmly.linear import Convolution, Dense, DenseBasis, FourierBasis, SingularBasis, singular_basis
from firmly.linear.map import Adjoint
from firmly.linear.symbol import Symbol
from firmly.prox import GroupL1
from firmly.prox.prior import Slope

from .systems import Net, all_bounds, attained, blocks_of, double, system_of

verify = import_module("firmly.certificates.verify")  # the package shows the function of this name
M = torch.tensor([[1.0, 3.0], [0.0, 0.5]], **double)
A, K = Dense(M), Dense(torch.diag(torch.tensor([2.0, 0.3], **double)))
C = Convolution(torch.ones(1, 1, 3, **double), (1, 6))
PRIOR = GroupL1(0.5)


def layers(x):
    return F.linear(torch.relu(F.linear(x, 2.0 * M)), M)


def residual(x):
    return x + F.leaky_relu(F.linear(x, M), 1.7)


def difference(x):
    return x - F.linear(torch.relu(x), -2.0 * M.abs())


def gram(x):
    return A.T(A(x)) - 3.0 * x


def scaled(x):
    return 3.0 * torch.tanh(x)


def padded(x):
    return F.conv1d(F.pad(x, (1, 1), "circular"), torch.ones(1, 1, 3, **double))


def group(x):
    z = torch.cat([x, 0.0 * x], dim=1) + torch.tensor([0.5, 0.8], **double)
    return PRIOR.prox(z)[:, 1:] + 0.05 * x


def same_maps(x):
    return 0.1 * x + A.T(torch.relu(A(x))) - A.T(torch.relu(A(x) + 1.0))


def joined(x):
    return torch.cat([x, 2.0 * x.flip(1)], dim=1)


def image(x):
    return C(torch.relu(C(x))) - 0.5 * x


def singular(x):
    return torch.relu(K.T(K(x)))


CASES = [
    (layers, (2,), [DenseBasis(), Norms()]),
    (residual, (2,), [DenseBasis(), Norms()]),
    (difference, (2,), [DenseBasis()]),
    (gram, (2,), [DenseBasis(), Norms()]),
    (scaled, (2,), [DenseBasis()]),
    (padded, (1, 5), [DenseBasis(), FourierBasis((5,))]),
    (group, (1,), [DenseBasis()]),
    (same_maps, (2,), [Norms()]),
    (joined, (2,), [DenseBasis()]),
    (image, (1, 6), [FourierBasis((6,))]),
    (singular, (2,), [singular_basis(K), singular_basis(K, cells=1)]),
]


@cache
def truths() -> list[float]:
    return [attained(function, [shape], 12) for function, shape, _ in CASES]


def check_everything() -> None:
    """The small soundness suite that has to catch every mutation."""
    for (function, shape, bases), true in zip(CASES, truths()):
        system = system_of(Net(function, A, K, C, PRIOR), shape)
        for basis in bases:
            for name, bound in all_bounds(system, basis, 1e-2).items():
                assert true <= bound * (1 + 1e-9), (function.__name__, basis.name, name, true, bound)
    blocks = blocks_of(system_of(Net(layers), (2,)))
    claimed = verify.certified_gain(blocks, torch.ones(2, **double), False, rho=(0.5 * truths()[0]) ** 2)
    assert claimed >= truths()[0]


def test_the_suite_passes_without_mutations():
    check_everything()


MUTATIONS = {}


def mutation(function):
    MUTATIONS[function.__name__] = function
    return function


@mutation
def a_layer_is_skipped(patch):
    patch.setitem(HANDLERS, F.linear, lambda tracer, x, *args: x)


@mutation
def a_skip_is_dropped(patch):
    patch.setitem(HANDLERS, torch.add, lambda tracer, a, b: b if isinstance(b, signal.Signal) else a)


@mutation
def a_slope_is_too_small(patch):
    patch.setitem(HANDLERS, F.leaky_relu, lambda tracer, x, *args, **kwargs: x.nonlinear(Slope(0.0, 1.0)))


@mutation
def a_nonlinearity_is_taken_for_half_of_it(patch):
    patch.setitem(HANDLERS, torch.relu, lambda tracer, x: x.nonlinear(Slope(0.0, 0.5)))


@mutation
def the_padding_is_wrong(patch):
    right = HANDLERS[F.pad]
    patch.setitem(HANDLERS, F.pad, lambda tracer, x, pad, mode="constant", value=None: right(tracer, x, pad))


@mutation
def a_scaling_is_forgotten(patch):
    patch.setattr(signal.Signal, "scaled", lambda self, factor: self)


@mutation
def a_sign_is_dropped(patch):
    patch.setitem(HANDLERS, torch.sub, HANDLERS[torch.add])


@mutation
def the_adjoint_is_taken_for_the_map(patch):
    patch.setattr(Adjoint, "_symbol", lambda self, basis: self.of.symbol(basis))


@mutation
def a_relaxation_is_forgotten(patch):
    patch.setattr(Relaxation, "gain_of", lambda self, linear_map, parent, shape: parent)


@mutation
def two_relaxed_values_share_a_block(patch):
    patch.setattr(Term, "path", lambda self: ())


@mutation
def a_relaxed_map_has_half_its_norm(patch):
    right = Relaxation.block

    def halved(self, parent, slope, *args):
        return right(self, parent, Slope(slope.low / 2, slope.high / 2), *args)

    patch.setattr(Relaxation, "block", halved)


@mutation
def entries_that_act_together_get_multipliers_of_their_own(patch):
    def separable(*args, **kwargs):
        blocks = sweep(*args, **kwargs)
        blocks.separable = [True] * len(blocks.separable)
        return blocks

    patch.setitem(blocks_of.__globals__, "sweep", separable)


@mutation
def error_bounds_are_dropped(patch):
    right = SingularBasis.symbol_of

    def exact(self, linear_map):
        symbol = right(self, linear_map)
        return symbol and Symbol(symbol.value, 0 * symbol.error, symbol.rows, symbol.columns)

    patch.setattr(SingularBasis, "symbol_of", exact)


@mutation
def errors_are_lost_in_products(patch):
    right = Symbol.__matmul__

    def forgetful(self, other):
        product = right(self, other)
        return Symbol(product.value, 0 * product.error, product.rows, product.columns)

    patch.setattr(Symbol, "__matmul__", forgetful)


@mutation
def only_the_first_block_counts(patch):
    patch.setattr(FourierBasis, "sample", lambda self, values: values)
    right = Convolution._symbol

    def first(self, basis):
        symbol = right(self, basis)
        return Symbol(symbol.value[-1:], symbol.error, symbol.rows, symbol.columns)

    patch.setattr(Convolution, "_symbol", first)


@mutation
def the_columns_of_a_sum_are_not_padded_but_cut(patch):
    def cut(symbol, width):
        missing = width - symbol.value.shape[2]
        return Symbol(F.pad(0 * symbol.value, (0, missing)), symbol.error) if missing else symbol

    patch.setattr(blocks_module, "padded", cut)


@mutation
def a_proof_is_taken_for_granted(patch):
    patch.setattr(verify, "holds", lambda *args: True)


@mutation
def constraints_are_stronger_than_the_slopes(patch):
    def flipped(blocks, per_channel):
        family = pencil(blocks, per_channel)
        return replace(family, high=0.5 * family.high)

    patch.setattr(verify, "pencil", flipped)
    patch.setitem(all_bounds.__globals__, "pencil", flipped)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_caught(name, monkeypatch):
    truths()
    MUTATIONS[name](monkeypatch)
    with pytest.raises((AssertionError, FirmlyError)):
        check_everything()
