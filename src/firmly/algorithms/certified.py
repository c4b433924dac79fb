"""The certified norms that step sizes rest on."""

from __future__ import annotations

from firmly.linear.map import LinearMap
from firmly.linear.memo import Memo


def norm(linear_map: LinearMap) -> float:
    """An upper bound of |A| that is proved, remembered on the map for as long as its tensors do not change.

    A learned step reads it in every forward pass, and a factorisation may stand behind it.
    """
    memo: Memo[float] = linear_map.__dict__.setdefault("_norm_memo", Memo())
    return memo.get(linear_map, lambda: linear_map.norm().upper)
