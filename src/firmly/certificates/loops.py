"""Implicit layers on a `Signal`: an equilibrium v = prox_g(W v + w) is recorded as a loop (docs/theory/loops)."""

from __future__ import annotations

from typing import Any

from firmly.certificates.signal import Signal, Tracer, handles
from firmly.certificates.system import Loop
from firmly.fixedpoint.equilibrium import Splitting, equilibrium
from firmly.linear.monotone import Monotone, monotonicity
from firmly.prox.prior import Slope


@handles(equilibrium)
def loop(tracer: Tracer, splitting: Splitting, w: Signal, *args: Any) -> Signal:
    """One solution v for every w, and from outside <dv, dw> >= m |dv|^2: slopes [0, 1/m].

    With slopes of the prox in [0, b], <dv, b (W dv + dw) - dv> >= 0 gives <dv, dw> >= <dv, (I/b - W) dv>, so that m is
    1/b - 1 plus the monotonicity of the loop.
    """
    prior, mapping = splitting.prior, splitting.loop
    low, high = (float(end) for end in prior.slope_at(1.0))
    if not 0 <= low <= high <= 1 + 1e-12:
        raise tracer.refuse(f"an equilibrium with an activation of slopes in [{low:.6g}, {high:.6g}], not in [0, 1]")
    if high == 0:
        raise tracer.refuse("an equilibrium with a constant activation")
    proved = monotonicity(mapping)
    gained = 0.0 if high == 1 else (1 / high - 1) - 4e-16  # of a prox that is smoother than nonexpansive; rounded down
    m = (proved + gained) * (1 - 4e-16)
    if not m > 0:
        raise tracer.refuse(
            f"an equilibrium whose loop is not proved to be monotone: <(I - W) v, v> >= {proved:.6g} |v|^2 is all that "
            "is known, which leaves open whether there is one solution (firmly.linear.Monotone has it by construction)"
        )
    how = "by its construction" if isinstance(mapping, Monotone) else "by a factorisation"
    text = (
        f"the equilibrium in {tracer.where()} is the exact one, which exists and is unique because <(I - W) v, v> >= "
        f"{proved:.6g} |v|^2 is proved {how}; the tolerance of its solver is not covered"
    )
    if text not in tracer.system.assumptions:
        tracer.system.assumptions.append(text)
    inner = Loop(mapping, Slope(0.0, high), prior.structure)
    return w.nonlinear(Slope.outward(0.0, 1 / m), "whole", inner)
