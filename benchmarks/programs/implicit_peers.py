"""The hypergradient d outer / d log lam with other packages, each in its own way of saying it.

A maker takes a `HoldOut` and returns its settings: names, each with a function that gives (value, gradient). What a
package can prepare once (tracing, compiled code, the Lipschitz constant) is prepared outside these functions. Packages
that differentiate but do not solve get celer's solution at its tightest tolerance.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.programs.implicit_problems import HoldOut

Evaluation = Callable[[], tuple[float, float]]
Maker = Callable[[HoldOut], dict[str, Evaluation]]


class NotOffered(Exception):
    """The package has no way to say this problem."""


def celer_solution(problem: HoldOut, tol: float) -> Callable[[], np.ndarray]:
    """celer's coefficients (p,): the fastest solver among those that do not differentiate."""
    import celer

    n, X, y = len(problem.y), np.asfortranarray(problem.X.numpy()), problem.y.numpy()
    common = {"fit_intercept": False, "tol": tol, "max_iter": 10_000}
    if problem.kind == "lasso":
        return lambda: celer.Lasso(alpha=problem.weight, **common).fit(X, y).coef_
    if problem.kind == "elastic net":
        total = problem.weight + problem.curvature
        return lambda: celer.ElasticNet(alpha=total, l1_ratio=problem.weight / total, **common).fit(X, y).coef_
    if problem.kind == "group":
        return lambda: celer.GroupLasso(problem.group, alpha=problem.weight, **common).fit(X, y).coef_
    return lambda: celer.LogisticRegression(C=1 / (n * problem.weight), **common).fit(X, y).coef_[0]


def step_size(problem: HoldOut) -> float:
    """The inverse of the Lipschitz constant of the gradient of the loss."""
    X = problem.X if len(problem.X) <= problem.X.shape[1] else problem.X.mT
    square = float(torch.linalg.eigvalsh(X @ X.mT)[-1])
    return len(problem.y) / square * (4 if problem.kind == "logistic" else 1)


def gradient_step(problem: HoldOut) -> Callable[[Tensor, Tensor], Tensor]:
    """T(b, log lam), the proximal gradient step of the inner problem; its fixed points are the solutions."""
    X, y, t = problem.X, problem.y, step_size(problem)

    def step(b: Tensor, logs: Tensor) -> Tensor:
        if problem.kind == "logistic":
            slope = -(X.mT @ (y * torch.sigmoid(-y * (X @ b)))) / len(y)
        else:
            slope = X.mT @ (X @ b - y) / len(y)
        z, threshold = b - t * slope, t * logs.exp()
        if problem.group > 1:
            rows = z.reshape(-1, problem.group)
            size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            return (rows * (1 - threshold / size.clamp(min=1e-300)).clamp(min=0)).reshape(-1)
        return z.sign() * (z.abs() - threshold).clamp(min=0) / (1 + t * problem.curvature)

    return step


def differentiated(problem: HoldOut, solution: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    logs = torch.tensor(problem.weight, dtype=torch.float64).log().requires_grad_()
    value = problem.outer(solution(logs))
    return float(value), float(torch.autograd.grad(value, logs)[0])


def firmly(problem: HoldOut) -> dict[str, Evaluation]:
    from firmly.priors import implicit_lasso
    from firmly.priors.losses import Logistic
    from firmly.priors.sparse_linear import SparseLinear

    if problem.kind == "logistic":
        model = SparseLinear(problem.X, (problem.y[:, None] + 1) / 2, Logistic(), intercept=False)
        return {"firmly": lambda: differentiated(problem, lambda logs: model.solve(logs.exp())[:-1, 0])}
    scale = len(problem.y) ** 0.5
    X, y = problem.X / scale, problem.y[None] / scale

    def solution(logs: Tensor) -> Tensor:
        return implicit_lasso(X, y, logs.exp(), problem.curvature, problem.group)[0]

    return {"firmly": lambda: differentiated(problem, solution)}


def torchopt(problem: HoldOut) -> dict[str, Evaluation]:
    import torchopt as package

    step, p = gradient_step(problem), problem.X.shape[1]

    def layer(tol: float, solve: Callable) -> Evaluation:
        find = celer_solution(problem, tol)

        def optimality(b: Tensor, logs: Tensor) -> Tensor:
            return b - step(b, logs)

        @package.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
        def found(b: Tensor, logs: Tensor) -> Tensor:
            return torch.from_numpy(find())

        zero = torch.zeros(p, dtype=torch.float64)
        return lambda: differentiated(problem, lambda logs: found(zero, logs))

    return {
        "celer, normal_cg": layer(1e-6, package.linear_solve.solve_normal_cg()),
        "celer, normal_cg, tight": layer(1e-12, package.linear_solve.solve_normal_cg(rtol=1e-10, atol=0.0)),
        "celer, Neumann series": layer(1e-12, package.linear_solve.solve_inv(ns=True)),
    }


def torchdeq(problem: HoldOut) -> dict[str, Evaluation]:
    import torchdeq as package

    step, find = gradient_step(problem), celer_solution(problem, 1e-12)

    def layer(tight: bool, **settings: object) -> Evaluation:
        deq = package.get_deq(ift=True, **settings).double()

        def solution(logs: Tensor) -> Tensor:
            start = torch.from_numpy(find()) if tight else torch.zeros(problem.X.shape[1], dtype=torch.float64)
            states, _ = deq(lambda z: step(z[0], logs)[None], start[None])
            return states[-1][0]

        return lambda: differentiated(problem, solution)

    tight = {"f_tol": 1e-13, "b_tol": 1e-12, "f_max_iter": 300, "b_max_iter": 300}
    return {
        "default": layer(False),
        "celer, Anderson": layer(True, f_solver="anderson", b_solver="anderson", **tight),
        "celer, Broyden": layer(True, f_solver="anderson", b_solver="broyden", **tight),
    }


def jaxopt(problem: HoldOut) -> dict[str, Evaluation]:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt as package

    X, y, X_val, y_val = (jnp.asarray(t.numpy()) for t in (problem.X, problem.y, problem.X_val, problem.y_val))
    logistic, group = problem.kind == "logistic", problem.group
    logs, zero = jnp.log(problem.weight), jnp.zeros(X.shape[1])

    def loss(b: jax.Array, features: jax.Array, target: jax.Array) -> jax.Array:
        if logistic:
            return jnp.logaddexp(0, -target * (features @ b)).mean()
        return ((features @ b - target) ** 2).mean() / 2

    def prox(b: jax.Array, weight: jax.Array, scaling: float = 1.0) -> jax.Array:
        if problem.kind == "elastic net":  # l1 and the ratio of the ridge to it
            return package.prox.prox_elastic_net(b, (weight, problem.curvature / weight), scaling)
        if group > 1:
            each = jax.vmap(lambda v: package.prox.prox_group_lasso(v, weight, scaling))
            return each(b.reshape(-1, group)).reshape(-1)
        return package.prox.prox_lasso(b, weight, scaling)

    def evaluation(solve: Callable) -> Evaluation:
        def outer(logs: jax.Array, X: jax.Array, y: jax.Array) -> jax.Array:
            return loss(solve(jnp.exp(logs), X, y), X_val, y_val) * (1 if logistic else 2)

        both = jax.jit(jax.value_and_grad(outer))

        def evaluate() -> tuple[float, float]:
            value, gradient = both(logs, X, y)
            return float(value), float(gradient)

        return evaluate

    def proximal(**settings: object) -> Evaluation:
        solver = package.ProximalGradient(loss, prox, implicit_diff=True, **settings)
        return evaluation(lambda weight, X, y: solver.run(zero, weight, X, y).params)

    tight = functools.partial(package.linear_solve.solve_normal_cg, tol=1e-10, maxiter=10_000)
    return {
        "proximal gradient": proximal(),
        "proximal gradient, tight": proximal(
            stepsize=step_size(problem), maxiter=100_000, tol=1e-10, implicit_diff_solve=tight
        ),
    }


def cvxpylayers(problem: HoldOut) -> dict[str, Evaluation]:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n, p = problem.X.shape
    X, y = problem.X.numpy(), problem.y.numpy()
    b, weight = cp.Variable(p), cp.Parameter(nonneg=True)
    if problem.kind == "logistic":
        loss = cp.sum(cp.logistic(-cp.multiply(y, X @ b))) / n
    else:
        loss = cp.sum_squares(X @ b - y) / (2 * n)
    sizes = (
        cp.norm1(b)
        if problem.group == 1
        else cp.mixed_norm(cp.reshape(b, (p // problem.group, problem.group), order="C"), 2, 1)
    )
    ridge = problem.curvature / 2 * cp.sum_squares(b) if problem.curvature else 0
    layer = CvxpyLayer(cp.Problem(cp.Minimize(loss + weight * sizes + ridge)), parameters=[weight], variables=[b])

    def evaluation(**settings: object) -> Evaluation:
        return lambda: differentiated(problem, lambda logs: layer(logs.exp(), solver_args=settings)[0])

    return {"default": evaluation(), "tight": evaluation(eps=1e-10, max_iters=100_000)}


def sparse_ho(problem: HoldOut) -> dict[str, Evaluation]:
    """Its own sources, in the folder that the variable SPARSE_HO names; patched where current packages broke it."""
    if problem.kind == "group":
        raise NotOffered("no group lasso")
    sys.path.insert(0, os.environ.get("SPARSE_HO", ""))
    patch()
    import celer
    from sparse_ho import Implicit
    from sparse_ho.models import ElasticNet, Lasso, SparseLogreg

    X, y = np.asfortranarray(problem.X.numpy()), problem.y.numpy()
    X_val, y_val, logistic = np.asfortranarray(problem.X_val.numpy()), problem.y_val.numpy(), problem.kind == "logistic"
    logs = np.log(problem.weight)
    if problem.kind == "elastic net":
        logs = np.log(np.array([problem.weight, problem.curvature]))

    def outer(mask: np.ndarray, dense: np.ndarray) -> np.ndarray:
        A = X_val[:, mask]
        if logistic:
            return -A.T @ (y_val / (1 + np.exp(y_val * (A @ dense)))) / len(y_val)
        return 2 * A.T @ (A @ dense - y_val) / len(y_val)

    def evaluation(model: object, tol: float, linear: float) -> Evaluation:
        algorithm = Implicit(tol_lin_sys=linear, max_iter_lin_sys=1000)

        def evaluate() -> tuple[float, float]:
            found = algorithm.compute_beta_grad(X, y, logs, model, outer, tol=tol, max_iter=100_000)
            mask, dense, gradient, _ = found
            b = torch.zeros(X.shape[1], dtype=torch.float64)
            b[torch.from_numpy(mask)] = torch.from_numpy(dense)
            return float(problem.outer(b)), float(np.atleast_1d(gradient)[0])

        return evaluate

    model = {"lasso": Lasso, "elastic net": ElasticNet, "logistic": SparseLogreg}[problem.kind]
    made = {"default": evaluation(model(), 1e-5, 1e-6), "tight": evaluation(model(), 1e-12, 1e-10)}
    estimators = {"lasso": celer.Lasso, "logistic": celer.LogisticRegression}
    if problem.kind in estimators:
        with_celer = model(estimator=estimators[problem.kind](fit_intercept=False, warm_start=False))
        made["celer"] = evaluation(with_celer, 1e-6, 1e-6)
        made["celer, tight"] = evaluation(with_celer, 1e-12, 1e-10)
    return made


def patch() -> None:
    """What numpy 1.24, scipy 1.14 took away, and hyperopt, which it imports and does not need here."""
    import scipy.sparse.linalg as linalg

    for name, kind in {"float": float, "bool": bool, "int": int}.items():
        setattr(np, name, kind)
    hyperopt = types.ModuleType("hyperopt")
    for name in ("hp", "fmin", "tpe", "rand", "Trials"):
        setattr(hyperopt, name, None)
    sys.modules.setdefault("hyperopt", hyperopt)
    cg = linalg.cg
    linalg.cg = lambda *arguments, tol=1e-6, **more: cg(*arguments, rtol=tol, **more)  # type: ignore[assignment]


PEERS: dict[str, Maker] = {
    "sparse-ho": sparse_ho, "torchopt": torchopt, "jaxopt": jaxopt, "torchdeq": torchdeq, "cvxpylayers": cvxpylayers,
}  # fmt: skip
