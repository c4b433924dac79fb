"""Mixed-norm estimates: few active sources, by block coordinate descent on working sets, and reweighted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError
from firmly.priors.sources.source_model import SourceModel

ADDED = 10  # sources that join the working set in a round
ROUNDS = 200
LARGEST_NEWTON = 600  # unknowns of a Newton step


class Estimate(NamedTuple):
    """Sources of one window of data.

    `courses` (time, sources, orientations) are currents; `active` the indices of sources that are not zero; `gap` a
    duality gap, relative to half the squared norm of the data; `status` a sentence.
    """

    courses: Tensor
    active: Tensor
    gap: float
    status: str

    def strength(self) -> Tensor:
        """The Frobenius norm of every course: (sources,)."""
        return torch.linalg.vector_norm(self.courses, dim=(0, 2))


def mixed_norm(
    model: SourceModel, data: Tensor, alpha: float = 40.0, tol: float = 1e-6, debias: bool = True
) -> list[Estimate]:
    """min_X 1/2 |Y - G R^(1/2) X|_F^2 + a sum_i |X_i|_F for every window; the currents are R^(1/2) X.

    `data` are whitened windows (batch, time, sensors). `alpha` is a in percent of its largest useful value
    max_i |(G R^(1/2))_i^T Y|_F, at which nothing is active. `debias` fits the active courses again by least
    squares, without the penalty. Stops when the relative duality gap is below `tol`.
    Source: Gramfort et al., Mixed-norm estimates for the M/EEG inverse problem, 2012; Strohmeier et al., The iterative
    reweighted mixed-norm estimate, 2016.
    """
    if not 0 < alpha < 100:
        raise DataError(f"alpha is a percentage between 0 and 100, given {alpha}")
    estimates = []
    for window in model.checked(data):
        short, back = _short(window)
        problem = _Problem(model.weighted, model.orientations, short)
        courses, gap = problem.solve(torch.ones(model.sources, dtype=torch.float64), alpha / 100 * problem.top(), tol)
        estimates.append(_estimate(model, short, back, courses, gap, tol, debias))
    return estimates


def reweighted_mixed_norm(
    model: SourceModel, data: Tensor, alpha: float = 40.0, rounds: int = 10, tol: float = 1e-6, debias: bool = True
) -> list[Estimate]:
    """min_X 1/2 |Y - G R^(1/2) X|_F^2 + a sum_i sqrt(|X_i|_F), by `rounds` mixed norms with weights 2 sqrt(|X_i|_F).

    Nonconvex, with less bias and fewer sources than `mixed_norm`. As in the source the gain is scaled so that a = alpha
    is the percentage of the first, convex round. The gap is that of the last one.
    Source: Strohmeier, Bekhti, Haueisen and Gramfort, The iterative reweighted mixed-norm estimate, 2016.
    """
    if not 0 < alpha < 100 or rounds < 1:
        raise DataError(f"alpha is a percentage between 0 and 100 and rounds at least 1; given {alpha} and {rounds}")
    estimates = []
    for window in model.checked(data):
        short, back = _short(window)
        top = _Problem(model.weighted, model.orientations, short).top()
        unit = 100 / top if top > 0 else 1.0
        problem = _Problem(model.weighted * unit, model.orientations, short)
        weights = torch.ones(model.sources, dtype=torch.float64)
        courses, gap, before = torch.zeros(model.sources, model.orientations, short.shape[1]).double(), 0.0, None
        for _ in range(rounds):
            courses, gap = problem.solve(weights, alpha, tol)
            strength = torch.linalg.vector_norm(courses, dim=(1, 2))
            weights = 2 * strength.sqrt()
            if before is not None and float((strength - before).abs().max()) <= 1e-6 * float(strength.max()):
                break
            before = strength
        estimates.append(_estimate(model, short, back, courses * unit, gap, tol, debias))
    return estimates


class _Problem:
    """The group lasso of one window: gain (sensors, sources * orientations), data (sensors, rank)."""

    def __init__(self, gain: Tensor, orientations: int, data: Tensor):
        self.gain = gain.unflatten(1, (-1, orientations))  # (sensors, sources, orientations)
        self.data = data
        self.scale = 0.5 * float(data.square().sum())

    def top(self) -> float:
        return float(torch.linalg.vector_norm(self.correlations(self.data), dim=(1, 2)).max())

    def correlations(self, residual: Tensor) -> Tensor:
        return torch.einsum("mno,mt->not", self.gain, residual)

    def solve(self, weights: Tensor, penalty: float, tol: float) -> tuple[Tensor, float]:
        """Courses weights_i Z_i with Z the group lasso of the gain with weighted columns, and its relative gap."""
        alive = torch.nonzero(weights > 0).flatten()
        courses = self.data.new_zeros(self.gain.shape[1], self.gain.shape[2], self.data.shape[1])
        gap = 0.0
        while len(alive):
            residual = self.data - torch.einsum("mno,not->mt", self.gain, courses)
            pull = weights * torch.linalg.vector_norm(self.correlations(residual), dim=(1, 2))
            strength = torch.linalg.vector_norm(courses, dim=(1, 2))
            size = float((strength[alive] / weights[alive]).sum())
            dual = residual * min(1.0, penalty / max(float(pull.max()), 1e-300))
            before, gap = (
                gap,
                float(
                    0.5 * residual.square().sum()
                    + penalty * size
                    - self.scale
                    + 0.5 * (self.data - dual).square().sum()
                )
                / max(self.scale, 1e-300),
            )
            if gap <= tol or gap == before:
                break
            active = torch.nonzero(strength).flatten()
            work = torch.cat([active, alive[pull[alive].topk(min(ADDED, len(alive))).indices]]).unique()
            courses[work] = self._descend(work, weights[work], penalty, courses[work], 0.1 * tol)
        return courses, gap

    def _descend(self, work: Tensor, weights: Tensor, penalty: float, courses: Tensor, tol: float) -> Tensor:
        """The sources in `work`: sweeps of block coordinate descent that find the active ones, then Newton steps."""
        gain = (self.gain[:, work] * weights[:, None]).flatten(1)
        lasso = _GroupLasso(gain.mT @ gain, gain.mT @ self.data, self.gain.shape[2], penalty)
        z = (courses / weights[:, None, None]).flatten(0, 1)
        for _ in range(ROUNDS):
            before = lasso.objective(z)
            z = lasso.newton(lasso.sweeps(z))
            if before - lasso.objective(z) <= tol * self.scale:
                break
        return z.unflatten(0, (len(work), -1)) * weights[:, None, None]


class _GroupLasso:
    """min_Z 1/2 <Z, Q Z> - <B, Z> + a sum_i |Z_i|_F for Z (sources * orientations, rank): a small working set."""

    def __init__(self, gram: Tensor, target: Tensor, width: int, penalty: float):
        self.gram, self.target, self.width, self.penalty = gram, target, width, penalty
        self.count = len(gram) // width
        blocks = gram.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.steps = (1 / torch.linalg.eigvalsh(blocks)[:, -1]).tolist()

    def sizes(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z.unflatten(0, (self.count, self.width)), dim=(1, 2))

    def objective(self, z: Tensor) -> float:
        return float((z * (0.5 * self.gram @ z - self.target)).sum() + self.penalty * self.sizes(z).sum())

    def sweeps(self, z: Tensor, count: int = 10) -> Tensor:
        z, pull = z.clone(), self.target - self.gram @ z
        for _ in range(count):
            for i, step in enumerate(self.steps):
                rows = slice(i * self.width, (i + 1) * self.width)
                ahead = z[rows] + step * pull[rows]
                size = float(torch.linalg.vector_norm(ahead))
                change = ahead * max(0.0, 1 - step * self.penalty / size) - z[rows] if size > 0 else -z[rows]
                if bool(change.any()):
                    z[rows] += change
                    pull -= self.gram[:, rows] @ change
        return z

    def newton(self, z: Tensor) -> Tensor:
        """One damped Newton step on the sources that are not zero, where the objective is smooth."""
        sizes = self.sizes(z)
        on = torch.nonzero(sizes).flatten()
        rank, block = z.shape[1], self.width * z.shape[1]
        if not 0 < len(on) * block <= LARGEST_NEWTON:
            return z
        rows = (on[:, None] * self.width + torch.arange(self.width)).flatten()
        gram, active = self.gram[rows][:, rows], z[rows].reshape(len(on), block)
        slope = gram @ z[rows] - self.target[rows] + self.penalty * (active / sizes[on, None]).reshape(-1, rank)
        hessian = torch.kron(gram, torch.eye(rank).to(gram)).reshape(len(on), block, len(on), block)
        way = active / sizes[on, None]
        eye = torch.eye(block).to(gram)
        bend = self.penalty / sizes[on, None, None] * (eye - way[:, :, None] * way[:, None])
        index = torch.arange(len(on))
        hessian[index, :, index] += bend
        step, info = torch.linalg.solve_ex(hessian.reshape(len(rows) * rank, -1), -slope.reshape(-1, 1))
        if int(info) or not bool(torch.isfinite(step).all()):
            return z
        start = self.objective(z)
        for halvings in range(6):
            trial = z.clone()
            trial[rows] += 0.5**halvings * step.reshape(-1, rank)
            if self.objective(trial) < start:
                return trial
        return z


def _short(window: Tensor) -> tuple[Tensor, Tensor]:
    """The data (sensors, rank) along their temporal directions, and these (rank, time): |Y| and |X_i| stay the same."""
    courses, values, fields = torch.linalg.svd(window, full_matrices=False)  # window = courses values fields
    kept = values > 1e-12 * values[0].clamp(min=1e-300)
    return (values[kept, None] * fields[kept]).mT, courses[:, kept].mT


def _estimate(
    model: SourceModel, short: Tensor, back: Tensor, courses: Tensor, gap: float, tol: float, debias: bool
) -> Estimate:
    active = torch.nonzero(torch.linalg.vector_norm(courses, dim=(1, 2))).flatten()
    if debias and len(active):
        gain = model.weighted.unflatten(1, (-1, model.orientations))[:, active].flatten(1)
        fit = torch.linalg.lstsq(gain, short, driver="gelsd").solution
        courses = torch.zeros_like(courses)
        courses[active] = fit.unflatten(0, (len(active), -1))
    currents = torch.einsum("not,tk->kno", courses * model.scale[:, None, None], back)
    reached = f"the duality gap {gap:.1e} is {'within' if gap <= tol else 'above'} the tolerance {tol:.1e}"
    return Estimate(currents, active, gap, f"{len(active)} active sources; {reached}")
