"""Maps that are positive semidefinite by construction."""

from __future__ import annotations

from firmly.linear.algebra import Compose, Identity, Scale, Sum
from firmly.linear.map import LinearMap
from firmly.linear.mask import Diagonal
from firmly.linear.resolvent import Resolvent


def is_gram(linear_map: LinearMap) -> bool:
    """Whether the map is self-adjoint and positive semidefinite by its construction: A.T @ A, A.T @ P @ A with P such.

    A map G of that kind with |G| <= c satisfies <G x, x> >= |G x|^2 / c, so a certificate may treat it as a block with
    slopes in [0, c]. Also the identity, non-negative diagonals, resolvents, and non-negative multiples and sums of such
    maps.
    """
    if isinstance(linear_map, Identity | Resolvent):
        return True
    if isinstance(linear_map, Diagonal):
        return not linear_map.is_complex and bool((linear_map.weight >= 0).all())
    if isinstance(linear_map, Scale):
        return float(linear_map.factor.detach()) >= 0 and is_gram(linear_map.of)
    if isinstance(linear_map, Sum):
        return is_gram(linear_map.first) and is_gram(linear_map.second)
    if not isinstance(linear_map, Compose):
        return False
    chain = factors(linear_map)
    while len(chain) > 1 and chain[0] is chain[-1].T:
        chain = chain[1:-1]
    return not chain or (len(chain) == 1 and is_gram(chain[0]))


def factors(linear_map: LinearMap) -> list[LinearMap]:
    """The maps that a composition consists of, the outermost first."""
    if isinstance(linear_map, Compose):
        return [*factors(linear_map.outer), *factors(linear_map.inner)]
    return [linear_map]
