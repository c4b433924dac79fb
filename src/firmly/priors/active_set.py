"""Newton's method on the active sets of a batch, after a few accelerated steps that find them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from functools import cached_property

import torch
from torch import Tensor

from firmly.priors.accelerated import STEPS, Accelerated, largest_eigenvalue
from firmly.priors.duality import Gap
from firmly.priors.problem import Problem

CONTINUATION = 0.7  # factor of the weights from step to step, from the largest meaningful one down
BOLD_STEPS = 40  # of the first steps, which are longer than convergence allows: codes are sparse, so D acts as if small
SETTLING, SETTLED = 3, 0.05  # the support is found when so many steps change at most this part of it
RIDGE = 0.7  # power of the unit roundoff, relative to the largest diagonal entry: what rounding may do
WALL = 1e15  # on the diagonal, relative to the rest, holds an atom at zero
SHRINKING = 3  # systems solved while atoms leave, before the gradient is measured
FIRST_ROUNDS = 16  # of Newton before the first accelerated step, where few atoms join at a time
ROUNDS = 4  # of Newton between accelerated steps
LONGEST = 320  # accelerated steps between rounds of Newton
ENTRIES = {"cpu": 2**18, "cuda": 2**26}  # of all Gram matrices at once
SAFE = (1e-10, 1e10)  # sizes of data that single precision squares without harm


class ActiveSet:
    """Finite convergence where it counts: the code on a known support with known signs is a linear system.

    Accelerated steps in single precision, whose weights come down from the largest meaningful ones, predict the support
    A and the signs s. Then rounds of Newton's method on this face,

        d_A = -(D_A' D_A + curvature)^-1 (grad_A + weight_A s_A),     z <- the part of z + t d that keeps its signs,

    with t = 1, 1/2, ... until the objective decreases; atoms that leave are zero, atoms |grad_j| > weight_j join. Where
    this does not finish, accelerated steps follow, twice as many every time, soon in full precision and with step
    1 / |D|^2, so that the method converges as FISTA does. For groups of one entry.
    Sources: Lee et al., Efficient sparse coding algorithms, 2007 (feature-sign search); Andrew and Gao, Scalable
    training of L1-regularized log-linear models, 2007 (the projection on the orthant); Hale, Yin and Zhang,
    Fixed-point continuation for l1-minimization, 2008.
    """

    def __init__(
        self, problem: Problem, z: Tensor, gram: Tensor, step_size: float | None = None, joining: int | None = None
    ):
        self.problem, self.gram, self.known_step = problem, gram, step_size
        # single precision squares such data without harm
        sizes = [float(problem.y.abs().amax()), float(gram.diagonal().amax()) ** 0.5]
        sizes += [float(problem.penalty.weight.min()), float(problem.penalty.weight.max())]
        self.rough = torch.float32 if all(SAFE[0] < size < SAFE[1] for size in sizes) else problem.y.dtype
        self.taken, self.block, self.turn = 0, STEPS, ROUNDS
        self.rounds = 0 if joining is None else FIRST_ROUNDS
        # how many atoms may join a face in a round
        self.joining = torch.full((len(z),), joining or z.shape[1], device=z.device).clamp(max=z.shape[1])
        self.kept = None  # codes, objectives, correlations before accelerated steps

    @cached_property
    def step_size(self) -> float:
        """1 / |D|^2, found when it is first needed, unless given."""
        return 1 / largest_eigenvalue(self.problem) if self.known_step is None else self.known_step

    def keep(self, chosen: Tensor) -> None:
        """Go on with these problems only (a mask)."""
        self.problem = self.problem.rows(chosen)
        self.joining = self.joining[chosen]
        if self.kept is not None:
            self.kept = tuple(part[chosen] for part in self.kept)

    def advance(self, z: Tensor, found: Gap, c: Tensor) -> tuple[Tensor, int]:
        """The codes after accelerated steps or one round of Newton, and how many steps; c = D'(y - D z)."""
        objective = found.objective
        if self.kept is not None:  # bold steps may have failed
            before, lower, then = self.kept
            risen = objective > lower
            if bool(risen.any()):
                z, c = torch.where(risen[:, None], before, z), torch.where(risen[:, None], then, c)
                objective = torch.minimum(objective, lower)
            self.kept = None
        if self.rounds > 0:
            self.rounds -= 1
            return self.newton(z, c), 1
        self.rounds, self.turn = self.turn, min(2 * self.turn, LONGEST)
        self.kept = z, objective, c
        return self.accelerate(z, c)

    def accelerate(self, z: Tensor, c: Tensor) -> tuple[Tensor, int]:
        """The codes after a number of accelerated steps, and how many: the first time until the supports settle."""
        bold = self.taken < BOLD_STEPS
        problem = self.problem.to(self.rough) if bold else self.problem
        steps = Accelerated(problem, z.to(problem.y.dtype), self.step_size * (2 if bold else 1))
        count, self.block = self.block, min(2 * self.block, LONGEST)
        if self.taken == 0:  # first lower the weights to what they are
            level = (self.problem.penalty.pull(c) / self.problem.penalty.weight).amax(1, keepdim=True)
            level = level.clamp(max=1 / SAFE[0]).to(problem.y.dtype)
            stages = math.ceil(math.log(max(float(level.max()), 1.0)) / -math.log(CONTINUATION))
            for _ in range(stages):
                level = (level * CONTINUATION).clamp(min=1)
                steps.step(level, restart=False)
            self.taken += stages
            count = BOLD_STEPS - stages
        sign, done = steps.z.sgn(), 0
        while done < count:
            for _ in range(SETTLING):
                steps.step(restart=not bold)
            done += SETTLING
            before, sign = sign, steps.z.sgn()
            if bold and float((sign != before).sum()) <= SETTLED * float((sign != 0).sum()):
                break
        self.taken += done
        return steps.z.to(z.dtype), done

    def newton(self, z: Tensor, c: Tensor) -> Tensor:
        """One round for every problem whose active set has at most 2 m atoms."""
        penalty = self.problem.penalty
        excess = torch.where(z == 0, penalty.pull(c) / penalty.weight, 0)
        if bool((self.joining < z.shape[1]).any()):  # only those that violate their condition most
            least = excess.sort(1, descending=True).values.gather(1, self.joining[:, None] - 1)
            excess = torch.where(excess >= least, excess, 0)
        sign = torch.where(z != 0, z.sgn(), torch.where(excess > 1 + torch.finfo(z.dtype).eps ** RIDGE, c.sgn(), 0))
        size = (sign != 0).sum(1)
        new, entries = z.clone(), ENTRIES.get(z.device.type, ENTRIES["cuda"])
        order = size.argsort()
        ordered = size[order].tolist()
        begin = bisect_left(ordered, 1)
        stop = bisect_right(ordered, 2 * self.problem.y.shape[1])
        while begin < stop:  # faces of similar size together
            width = min(-(-ordered[begin] // 8) * 8, len(sign[0]))
            end = min(bisect_right(ordered, width), begin + max(entries // width**2, 1), stop)
            rows = order[begin:end]
            new[rows] = self.faces(rows, z, c, sign, ordered[end - 1])
            begin = end
        stuck = (new == z).all(1)
        if bool((stuck & (self.joining == 1)).all()):
            self.rounds = 0
        fewer, more = (self.joining.minimum(size) // 4).clamp(min=1), (2 * self.joining).clamp(max=z.shape[1])
        self.joining = torch.where(stuck, fewer, more)
        return new

    def faces(self, rows: Tensor, z: Tensor, c: Tensor, sign: Tensor, width: int) -> Tensor:
        """The codes of these problems, with at most `width` active atoms each, after Newton's method on their faces."""
        penalty, full, c, sign = self.problem.penalty.rows(rows), z[rows], c[rows], sign[rows]
        row, atom = sign.nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(rows))
        place = row, torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        where = atom.new_zeros(len(rows), width).index_put(place, atom)  # (rows, width), the rest of a row is padding
        zero = z.new_zeros(len(rows), width)
        s, u = zero.index_put(place, sign[row, atom]), zero.index_put(place, full[row, atom])
        weight = penalty.weight.expand(full.shape)[row, atom]
        # on the face the penalty is linear, so that the gradient of the objective is
        slope = zero.index_put(place, penalty.curvature * full[row, atom] - c[row, atom] + weight * sign[row, atom])
        system = self.gram_of(where)
        diagonal = system.diagonal(dim1=1, dim2=2)
        largest = diagonal.amax(1, keepdim=True)
        diagonal.add_(penalty.curvature + torch.finfo(z.dtype).eps ** RIDGE * largest)
        on = s != 0
        walls = WALL * largest
        for _ in range(SHRINKING):
            diagonal.add_(torch.where(on, 0, walls))
            factor, _ = torch.linalg.cholesky_ex(system)
            d = -torch.cholesky_solve((slope * on)[:, :, None], factor)[:, :, 0]
            moved = torch.where((u + d) * s > 0, u + d, 0) * on
            change = moved - u
            bend = torch.bmm(system, change[:, :, None])[:, :, 0]
            up = ~(((slope + bend / 2) * change).sum(1) <= 0)  # also where the system is singular
            if bool(up.any()):
                moved[up], bend[up] = shortened(u[up], d[up], s[up], slope[up], system[up])
            gone = on & (moved == 0)
            u, slope, on = moved, slope + bend, on & ~gone
            if not bool(gone.any()):
                break
            walls = torch.where(gone, walls, 0)
        full[row, atom] = u[place]
        return full

    def gram_of(self, where: Tensor) -> Tensor:
        """D_A' D_A for the sets A of every problem: (batch, p) -> (batch, p, p)."""
        n = len(self.gram)
        return self.gram.view(-1).take(where[:, :, None] * n + where[:, None, :])


def shortened(u: Tensor, d: Tensor, s: Tensor, slope: Tensor, system: Tensor) -> tuple[Tensor, Tensor]:
    """The first of u + d / 2, u + d / 4, ..., the first change of a sign that lowers, else u; and system @ change."""
    best, bend = u.clone(), torch.zeros_like(u)
    open_ = torch.isfinite(d).all(1)
    crossing = torch.where((u != 0) & ((u + d) * s < 0), -u / d, 1).amin(1, keepdim=True)
    for t in (0.5, 0.25, 0.0625, crossing):
        moved = torch.where((u + t * d) * s > 0, u + t * d, 0)
        change = moved - u
        turned = torch.bmm(system, change[:, :, None])[:, :, 0]
        down = open_ & (((slope + turned / 2) * change).sum(1) < 0)
        best[down], bend[down] = moved[down], turned[down]
        open_ = open_ & ~down
    return best, bend
