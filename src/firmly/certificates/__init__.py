"""Certificates: how far the output of a network can move when its inputs move."""

from firmly.certificates.bound import bound, solved_multipliers
from firmly.certificates.certificate import Bound, Certificate
from firmly.certificates.certify import certify
from firmly.certificates.lower import Attack, attack
from firmly.certificates.signal import Signal, trace
from firmly.certificates.verify import verify

__all__ = [
    "Attack",
    "Bound",
    "Certificate",
    "Signal",
    "attack",
    "bound",
    "certify",
    "solved_multipliers",
    "trace",
    "verify",
]
