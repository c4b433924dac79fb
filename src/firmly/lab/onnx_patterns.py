"""Activations that exporters write out as products, put together again: a product of two traced values has no bound.

SiLU is x sigmoid(x), Mish x tanh(softplus(x)), HardSwish x hardsigmoid(x), GELU x (1 + erf(x / sqrt 2)) / 2, and
softplus switches to x itself beyond a threshold. Constants count as equal up to single precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol


class Step(Protocol):
    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict


Number = Callable[[str], float | None]  # the value of a constant with one entry


def recognised(step: Step, made_by: dict[str, Step], number: Number) -> tuple[str, list[str]] | None:
    """The operator and the inputs that this step amounts to, or None if it is no part of a known pattern."""
    if step.operator == "Where":
        return switched_softplus(step, made_by, number)
    if step.operator != "Mul":
        return None
    for x, gate in (step.inputs, step.inputs[::-1]):
        source = made_by.get(gate)
        if source is None:
            continue
        if source.operator == "Sigmoid" and source.inputs == [x]:
            return "Swish", [x]
        if source.operator == "HardSigmoid" and source.inputs == [x]:
            alpha, beta = source.attributes.get("alpha", 0.2), source.attributes.get("beta", 0.5)
            if close(alpha, 1 / 6) and close(beta, 0.5):
                return "HardSwish", [x]
        inner = made_by.get(source.inputs[0]) if source.operator == "Tanh" else None
        if inner is not None and inner.operator == "Softplus" and inner.inputs == [x]:
            return "Mish", [x]
        argument = one_plus_erf(source, made_by, number)
        if argument is None:
            continue
        if argument == x:
            return "TwiceGelu", [x]
        if times_constant(x, made_by, number) == (argument, 0.5):
            return "Gelu", [argument]
    return None


def one_plus_erf(step: Step, made_by: dict[str, Step], number: Number) -> str | None:
    """x if the step computes 1 + erf(x / sqrt 2)."""
    if step.operator != "Add":
        return None
    for term, one in (step.inputs, step.inputs[::-1]):
        error_function = made_by.get(term)
        if number(one) == 1.0 and error_function is not None and error_function.operator == "Erf":
            scaled = times_constant(error_function.inputs[0], made_by, number)
            if scaled is not None and close(scaled[1], math.sqrt(0.5)):
                return scaled[0]
    return None


def times_constant(name: str, made_by: dict[str, Step], number: Number) -> tuple[str, float] | None:
    """(x, c) if the value is c x."""
    step = made_by.get(name)
    if step is not None and step.operator == "Div" and (c := number(step.inputs[1])):
        return step.inputs[0], 1 / c
    if step is not None and step.operator == "Mul":
        for x, factor in (step.inputs, step.inputs[::-1]):
            if (c := number(factor)) is not None:
                return x, c
    return None


def switched_softplus(step: Step, made_by: dict[str, Step], number: Number) -> tuple[str, list[str]] | None:
    """x > 20 ? x : softplus(x)."""
    condition, x, otherwise = (made_by.get(step.inputs[0]), step.inputs[1], made_by.get(step.inputs[2]))
    if condition is None or otherwise is None or condition.operator != "Greater" or otherwise.operator != "Softplus":
        return None
    threshold = number(condition.inputs[1])
    fits = condition.inputs[0] == x and otherwise.inputs == [x] and threshold is not None and threshold >= 20
    return ("Softplus", [x]) if fits else None


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)
