"""The bound of the unfolded forward-backward algorithm through its virtual network with leakage.

Chouzenoux, Della Valle, Pesquet, Stability Bounds for the Unfolded Forward-Backward Algorithm, JMIV 2025 (arXiv
2412.17888). The bias b_0 that feeds every layer is carried along as part of the state, z_n = (x_n, b_n), scaled by
leakage factors eta_n that the network itself does not depend on. In a common eigenbasis every layer acts by a 2 x 2
matrix.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from firmly.certificates.blocks import Blocks
from firmly.certificates.family import Family
from firmly.errors import NotCertifiable

START, BIAS, JOINT = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # d -> (x_0, b_0): one of them, or both equal to d


def virtual_network_bound(
    beta: Tensor,
    steps: Tensor,
    eta: Tensor | None = None,
    entry: Tensor | tuple[float, float] | None = None,
    output: Literal["state", "image"] = "image",
) -> float:
    """theta_m / 2^(m-1) for layers x_n = R_n(beta_n x_{n-1} + steps_n b_0) on eigenvalues, beta (m, P), steps (m,).

    M_{i..n} = [[B, L], [0, e]] on every eigenvalue, with B the product of the beta, e = eta_n / eta_{i-1} and L the
    response to the bias; a_{i,n} = |M_{i..n}|^2; theta_0 = 1, theta_n = sum_i theta_{i-1} sqrt(a_{i,n}).
    `output="image"` drops the row of the bias in the last layer. `entry` (P, 2) or (2,) says how (x_0, b_0) depends
    on a scalar input; None perturbs both freely.
    """
    m, size = beta.shape
    eta = torch.ones(m + 1, dtype=beta.dtype) if eta is None else eta
    theta = [1.0]
    for n in range(1, m + 1):
        total = 0.0
        B = torch.ones(size, dtype=beta.dtype)
        response = torch.zeros(size, dtype=beta.dtype)  # of x_n to the carried b_{i-1}
        for i in range(n, 0, -1):
            response = response * (eta[i] / eta[i - 1]) + B * (steps[i - 1] * eta[0] / eta[i - 1])
            B = B * beta[i - 1]
            leak = 0.0 if n == m and output == "image" else eta[n] / eta[i - 1]
            if i == 1 and entry is not None:
                x0, b0 = torch.as_tensor(entry).expand(size, 2).unbind(1)
                square = (B * x0 + response * b0).abs() ** 2 + leak**2 * b0.abs() ** 2
            else:
                trace = B**2 + response**2 + leak**2
                square = 0.5 * (trace + torch.sqrt((trace**2 - 4 * B**2 * leak**2).clamp(min=0)))
            total += theta[i - 1] * float(square.max().sqrt())
        theta.append(total)
    return theta[m] / 2 ** (m - 1)


def best_leakage_bound(beta: Tensor, steps: Tensor, entry: Tensor | tuple[float, float] | None = None) -> float:
    """The smallest bound over geometric leakages eta_n = ratio^n; each of them is valid."""
    powers = torch.arange(len(steps) + 1, dtype=torch.float64)
    ratios = torch.linspace(0.5, 2.5, 41, dtype=torch.float64)
    return min(virtual_network_bound(beta, steps, ratio**powers, entry) for ratio in ratios)


def virtual_bound(source: Blocks | Family) -> float:
    """The virtual-network bound of a traced forward-backward network with one input, in its common eigenbasis.

    The weights differ from those of an exact chain by rounding. With |e_n| <= drift_n (|v_{n-1}| + |d|) the error in
    front of R_n, the rest of the chain carries it to the output by at most the product of its norms.
    """
    beta, steps, entry, drift = chain(source)
    norms = beta.abs().amax(1)
    inflow = (steps[:, None] * entry[:, 1]).abs().amax(1)
    inflow[0] = entry[:, 0].abs().max()
    size, carried = 1.0, 0.0  # of v_n, and of the errors that have reached it, for |d| = 1
    for norm, flow, error in zip(norms.tolist(), inflow.tolist(), drift.tolist()):
        carried = norm * carried + error * (size + 1)
        size = norm * size + flow + error * (size + 1)
    return best_leakage_bound(beta, steps, entry) * (1 + 1e-12 * len(steps) ** 2) + carried * (1 + 1e-9)


def chain(source: Blocks | Family) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(beta, steps, entry, drift) if z_n = beta_n v_{n-1} + steps_n h d on every block, with one channel and R_n firmly
    nonexpansive, up to an error in z_n of at most drift_n |(v_{n-1}, d)|.

    The first layer is the entry: z_1 = x_0 with x_0 = M_1 d and b_0 = h d.
    """
    weights, data, drifts = zip(*(links(blocks) for blocks in source.parts("closed")))
    beta, gains, drift = torch.cat(weights, 1), torch.cat(data, 1), torch.stack(drifts).amax(0)
    later = gains[1:]
    h = later[int(later.abs().amax(1).argmax())] if len(later) else torch.zeros_like(gains[0])
    size = torch.linalg.vector_norm(h).square().clamp(min=1e-300)
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), ((later @ h.conj()) / size).real])
    unexplained = (gains - steps[:, None] * h).abs().amax(1)
    unexplained[0] = 0.0
    drift = drift + unexplained
    scale = torch.maximum(beta.abs().amax(1), gains.abs().amax(1)).clamp(min=1e-300)
    if float((drift / scale).max()) > 1e-9:
        raise NotCertifiable(NO_CHAIN)
    return beta, steps, torch.stack([gains[0], h], dim=1), drift * (1 + 1e-12)


NO_CHAIN = "the network is no chain x_n = R_n(W_n x_{n-1} + t_n b) with symmetric W_n and one bias b from the data"


def links(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Real weights of v_{n-1} and gains of d in every z_n, (layers, blocks), and a bound of what else is in z_n."""
    layers = len(blocks.rows)
    if layers == 0 or blocks.width != layers + 1 or any(tuple(s) != (0.0, 1.0) for s in blocks.slopes):
        raise NotCertifiable("the virtual network takes one input, one channel, and firmly nonexpansive layers")
    expected = torch.zeros(blocks.width, dtype=torch.complex128)
    expected[-1] = 1.0
    if not bool((blocks.output.value == expected).all()):
        raise NotCertifiable(NO_CHAIN)
    count = max(r.value.shape[0] for r in [*blocks.rows, blocks.output])
    rows = torch.cat([r.value.expand(count, -1, -1).to(torch.complex128) for r in blocks.rows], dim=1)
    beta = torch.ones(layers, count, dtype=torch.float64)
    explained = torch.zeros_like(rows)
    explained[:, :, 0] = rows[:, :, 0]
    for n in range(1, layers):
        beta[n] = rows[:, n, n].real
        explained[:, n, n] = beta[n].to(torch.complex128)
    errors = [0.0 if r.error is None else float(r.error.max()) for r in blocks.rows]
    drift = torch.linalg.vector_norm(rows - explained, dim=2).amax(0) + torch.tensor(errors, dtype=torch.float64)
    return beta, rows[:, :, 0].T, drift
