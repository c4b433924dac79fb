"""The error bounds of symbols after a sweep, against arithmetic with forty digits, and intervals of spectra."""

from __future__ import annotations

import mpmath
import pytest
import torch
import torch.nn.functional as F

from firmly.certificates.blocks import sweep
from firmly.certificates.family import Family
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.certificates.relax import relaxed
from firmly.certificates.system import Input, Linear, Sum, System
from firmly.linear import Convolution, Dense, DenseBasis, Diagonal, FourierBasis, Resolvent, singular_basis
from firmly.prox.prior import Slope

from .systems import Net, all_bounds, attained, blocks_of, double, spectral, system_of


def number(x) -> mpmath.mpf:
    return mpmath.mpmathify(complex(x)) if isinstance(x, complex) else mpmath.mpf(x)


def as_exact(matrix: torch.Tensor) -> mpmath.matrix:
    return mpmath.matrix([[number(x) for x in row] for row in matrix.tolist()])


def exact_rows(system: System, symbol, averaged: bool) -> list[mpmath.matrix]:
    """Rows of all z_i, and of the output, by the definition of the graph in high precision."""
    sources = [n for n in system.nodes if isinstance(n, Input)] + [n for n in system.nodes if not hasattr(n, "terms")]
    nonlinear = [n for n in sources if not isinstance(n, (Input, Linear))]
    sizes = [n.shape[0] for n in system.inputs] + [n.shape[0] for n in nonlinear]
    width, starts = sum(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
    values, rows, used_inputs, used = [], [], 0, len(system.inputs)

    def unit(place: int) -> mpmath.matrix:
        value = mpmath.zeros(sizes[place], width)
        for i in range(sizes[place]):
            value[i, starts[place] + i] = 1
        return value

    for node in system.nodes:
        if isinstance(node, Input):
            values.append(unit(used_inputs))
            used_inputs += 1
        elif isinstance(node, Linear):
            values.append(symbol(node.map) * values[node.parent])
        elif isinstance(node, Sum):
            total = mpmath.zeros(values[node.terms[0][1]].rows, width)
            for coefficient, parent in node.terms:
                total += mpmath.mpf(float(coefficient)) * values[parent]
            values.append(total)
        else:
            rows.append(values[node.parent])
            v = unit(used)
            used += 1
            if averaged:
                low, high = mpmath.mpf(float(node.slope.low)), mpmath.mpf(float(node.slope.high))
                v = (high - low) / 2 * v + (high + low) / 2 * values[node.parent]
            values.append(v)
    return [*rows, values[system.output]]


def assert_within(symbols, exact: list[mpmath.matrix], block: int = 0):
    for symbol, row in zip(symbols, exact):
        value = symbol.value[block if len(symbol.value) > 1 else 0].detach()
        error = symbol.error[block if len(symbol.error) > 1 else 0]
        difference = as_exact(value) - row[:, : value.shape[1]]
        frobenius = mpmath.sqrt(sum(abs(x) ** 2 for x in difference))
        assert frobenius <= number(float(error)) + mpmath.mpf(10) ** -35
        assert float(error) <= 1e-9 * (1 + float(value.abs().max()))


@pytest.mark.parametrize("averaged", [False, True], ids=["open", "averaged"])
@pytest.mark.parametrize("seed", range(4))
def test_errors_of_dense_sweeps(seed, averaged):
    generator = torch.Generator().manual_seed(seed)
    A = Dense(torch.randn(3, 3, generator=generator, **double))
    B = Diagonal(torch.rand(3, generator=generator, **double))

    def forward(x):
        y = x
        for k in range(4):
            z = y - 0.37 * A.T(A(y)) + (k + 1) / 3 * B(x)
            y = F.leaky_relu(z, 0.3) if k % 2 else torch.relu(z) - 0.1 * y
        return A(y)

    system = system_of(Net(forward, A, B), (3,))
    with mpmath.workdps(40):
        weight, diagonal = as_exact(A.weight), mpmath.diag([mpmath.mpf(float(b)) for b in B.weight])
        known = {id(m): m for m in system.maps}
        table = {
            id(m): diagonal if isinstance(m, Diagonal) else weight if isinstance(m, Dense) else weight.T
            for m in known.values()
        }
        exact = exact_rows(system, lambda m: table[id(m)], averaged)
        blocks = sweep(system, DenseBasis(), "averaged" if averaged else "open")
        assert_within([*blocks.rows, blocks.output], exact)


@pytest.mark.parametrize("averaged", [False, True], ids=["open", "averaged"])
def test_errors_of_fourier_sweeps(averaged):
    """Convolutions, their adjoints and a resolvent on six frequencies, with exact waves."""
    n = 6
    kernel = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0), **double)
    C = Convolution(kernel, (1, n))
    R = Resolvent(C, 0.3)

    def forward(y):
        x = C.T(y)
        for _ in range(3):
            x = R(C.T(y) + 0.3 * torch.relu(x)) - x / 7.0
        return x

    system = system_of(Net(forward, C, R), (1, n))
    blocks = sweep(system, FourierBasis((n,)), "averaged" if averaged else "open")
    family = Family(system, FourierBasis((n,)))
    with mpmath.workdps(40):
        for f in range(n // 2 + 1):
            h = sum(
                mpmath.mpf(float(kernel[0, 0, j])) * mpmath.expjpi(mpmath.mpf(2 * f * (j - 1)) / n) for j in range(3)
            )

            def symbol(linear_map, h=h):
                if isinstance(linear_map, Resolvent):
                    return mpmath.matrix([[1 / (abs(h) ** 2 + mpmath.mpf(float(linear_map.weight)))]])
                return mpmath.matrix([[h if isinstance(linear_map, Convolution) else mpmath.conj(h)]])

            exact = exact_rows(system, symbol, averaged)
            assert_within([*blocks.rows, blocks.output], exact, f)
            # blocks that were merged are covered by the errors of the one that stands for them
            merged = family.blocks(torch.arange(len(family)), "averaged" if averaged else "open")
            assert any(
                all(
                    mpmath.sqrt(sum(abs(x) ** 2 for x in as_exact(s.value[b].detach()) - row)) <= float(s.error[b])
                    for s, row in zip([*merged.rows, merged.output], exact)
                )
                for b in range(len(family))
            )


def test_families_of_equal_blocks_give_the_bounds_of_all_blocks():
    kernel = torch.tensor([[0.1, 0.2, 0.1], [0.2, 0.4, 0.2], [0.1, 0.2, 0.1]], **double)[None, None]
    C = Convolution(kernel, (1, 8, 8))
    net = Net(lambda y: torch.relu(C.T(y) - C(C(torch.relu(C.T(y))))), C)
    system = system_of(net, (1, 8, 8))
    basis = FourierBasis((8, 8))
    family, blocks = Family(system, basis), blocks_of(system, basis)
    assert len(family) < basis.blocks / 2
    for bound in (product_bound, averaged_bound):
        assert bound(family) == pytest.approx(bound(blocks), rel=1e-10)
    with torch.no_grad():
        assert spectral(family_blocks(family), True, 1e-6) == pytest.approx(spectral(blocks, True, 1e-6), rel=1e-4)


def family_blocks(family: Family):
    return family.blocks(torch.arange(len(family)))


def test_merging_never_lowers_a_bound():
    """Blocks that nearly agree, to the last digits, may be merged; the bound covers each of them."""
    values = 1.0 + 1e-13 * torch.arange(12, **double)
    K = Diagonal(values)
    system = system_of(Net(lambda x: torch.relu(K.T(K(x))), K), (12,))
    for basis in (DenseBasis(), singular_basis(K)):
        found = product_bound(Family(relaxed(system, basis)[0], basis))
        assert found >= float(values[-1]) ** 2


# -- intervals of singular values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 4, 64])
def test_cells_hold_for_every_operator_of_that_norm(cells):
    """Sampled operators with norm at most that of K, in the same network, stay below the bound made for K."""
    size = 1.3
    K = Dense(torch.diag(torch.tensor([size, 0.2, 0.7], **double)))

    def network(operator):
        def forward(y):
            x = operator.T(y)
            for t in (0.4, 1.1):
                x = torch.relu(x - t * (operator.T(operator(x)) - operator.T(y)))
            return x

        return Net(forward, operator)

    system = system_of(network(K), (3,))
    found = all_bounds(system, singular_basis(K, cells=cells), 1e-2)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(3, 3, generator=generator, **double))[0]
        V = torch.linalg.qr(torch.randn(3, 3, generator=generator, **double))[0]
        spectrum = size * torch.rand(3, generator=generator, **double)
        spectrum[0] = size
        other = network(Dense(U @ torch.diag(spectrum) @ V))
        least = attained(other, [(3,)], 2, seed)
        for name, bound in found.items():
            assert least <= bound * (1 + 1e-9), (name, least, bound)
    if cells == 64:
        exact = all_bounds(system, singular_basis(K), 1e-2)
        assert found["product"] <= 1.5 * exact["product"]


def test_more_cells_are_never_worse():
    K = Dense(torch.diag(torch.tensor([1.0, 0.5], **double)))
    net = Net(lambda x: torch.relu(x - 1.5 * K.T(K(x))), K)
    system = system_of(net, (2,))
    values = [all_bounds(system, singular_basis(K, cells=n), 1e-3)["product"] for n in (1, 4, 16, 256)]
    assert values == sorted(values, reverse=True)
    assert values[-1] >= 1.0  # s = 0 is in the interval


def test_slopes_are_rounded_outwards():
    low, high = Slope.outward(-1 / 3, 2 / 3)
    assert low < -1 / 3
    assert high > 2 / 3


@pytest.mark.parametrize("form", ["open", "averaged"])
def test_errors_do_not_grow_along_sums_that_run_through_the_layers(form):
    """u <- u + A x(u) - v is nonexpansive in u; products of norms would double its error in every layer."""
    A = Dense(torch.randn(2, 2, generator=torch.Generator().manual_seed(1), **double))
    half = 0.9 / float(A.norm().upper) ** 2

    def forward(y):
        u = y
        for _ in range(12):
            x = A.T(u)
            v = torch.relu(A(x) * half + u)
            u = u - half * A(x) + (1 / 3) * v
        return u

    system = system_of(Net(forward, A), (2,))
    with mpmath.workdps(40):
        weight = as_exact(A.weight)
        exact = exact_rows(system, lambda m: weight if m is A else weight.T, form == "averaged")
        blocks = sweep(system, DenseBasis(), form)
        assert_within([*blocks.rows, blocks.output], exact)
    assert float(blocks.output.error.max()) < (1e-13 if form == "open" else 1e-10)
