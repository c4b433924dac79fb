"""LipSDP-neuron for a chain v_i = R_i(W_i v_{i-1}) with slopes in [0, 1], as one semidefinite program in cvxpy.

    minimise rho  subject to  rho |v_0|^2 - |W_m v_{m-1}|^2 + 2 sum_i <v_i, T_i (v_i - W_i v_{i-1})> >= 0

over diagonal T_i >= 0: Fazlyab et al., Efficient and accurate estimation of Lipschitz constants for deep neural
networks, NeurIPS 2019. A wide first layer is replaced by its triangular factor, which changes no norm. The
value is what the solver says, without a proof. python -m benchmarks.programs.lipsdp_cvxpy WEIGHTS.npz
"""

from __future__ import annotations

import json
import sys
import time

import cvxpy as cp
import numpy as np


def lipsdp(weights: list[np.ndarray]) -> float:
    if weights[0].shape[1] > weights[0].shape[0]:
        weights = [np.linalg.qr(weights[0].T, mode="r").T, *weights[1:]]
    sizes = [W.shape[1] for W in weights]
    rho = cp.Variable(nonneg=True)
    T = [cp.Variable(n, nonneg=True) for n in sizes[1:]]
    rows = []
    for i, m in enumerate(sizes):
        row = [np.zeros((m, n)) for n in sizes]
        row[i] = rho * np.eye(m) if i == 0 else 2 * cp.diag(T[i - 1])
        if i == len(sizes) - 1:
            row[i] = row[i] - weights[-1].T @ weights[-1]
        if i > 0:
            row[i - 1] = -cp.diag(T[i - 1]) @ weights[i - 1]
        if i + 1 < len(sizes):
            row[i + 1] = -weights[i].T @ cp.diag(T[i])
        rows.append(row)
    M = cp.bmat(rows)
    problem = cp.Problem(cp.Minimize(rho), [0.5 * (M + M.T) >> 0])
    problem.solve(solver=cp.CLARABEL)
    if problem.status != cp.OPTIMAL:
        raise SystemExit(f"the solver ended with {problem.status}")
    return float(np.sqrt(rho.value))


if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        weights = [file[f"arr_{i}"] for i in range(len(file.files))]
    started = time.perf_counter()
    value = lipsdp(weights)
    print(json.dumps({"value": value, "seconds": time.perf_counter() - started}))
