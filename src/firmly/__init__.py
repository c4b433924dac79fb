"""Neural networks that come from optimisation algorithms, with stability certificates.

The rooms (`firmly.linear`, `firmly.prox`, ...) and the functions below are loaded when they are first used, so that
`import firmly` and `firmly --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firmly import (
        algorithms,
        certificates,
        data,
        errors,
        fixedpoint,
        lab,
        linear,
        networks,
        optim,
        priors,
        prox,
        robust,
        segment,
    )
    from firmly.certificates import Certificate, attack, certify, verify
    from firmly.fixedpoint import Solution, bilevel, fixed_point, implicit, solve
    from firmly.networks import unroll

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Solution",
    "algorithms",
    "attack",
    "bilevel",
    "certificates",
    "certify",
    "data",
    "errors",
    "fixed_point",
    "fixedpoint",
    "implicit",
    "lab",
    "linear",
    "networks",
    "optim",
    "priors",
    "prox",
    "robust",
    "segment",
    "solve",
    "unroll",
    "verify",
]

_HOME = {
    "Certificate": "certificates",
    "Solution": "fixedpoint",
    "attack": "certificates",
    "bilevel": "fixedpoint",
    "certify": "certificates",
    "fixed_point": "fixedpoint",
    "implicit": "fixedpoint",
    "solve": "fixedpoint",
    "unroll": "networks",
    "verify": "certificates",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"firmly.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"firmly.{name}")
    raise AttributeError(f"firmly has no '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
