"""Certificates: how far the output of a network can move when its inputs move."""

from firmly.certificates.averagedness import Averagedness, averagedness
from firmly.certificates.bound import bound, solved_multipliers
from firmly.certificates.certificate import Bound, Certificate
from firmly.certificates.certify import certify
from firmly.certificates.gains import Gains, Star, gains, star
from firmly.certificates.groups import Grouped
from firmly.certificates.local import ErrorMap, LocalCertificate, error_map, local
from firmly.certificates.lower import Attack, attack
from firmly.certificates.rows import RowBounds, rows
from firmly.certificates.signal import Signal, trace
from firmly.certificates.verify import verify

__all__ = [
    "Attack",
    "Averagedness",
    "Bound",
    "Certificate",
    "ErrorMap",
    "Gains",
    "Grouped",
    "LocalCertificate",
    "RowBounds",
    "Signal",
    "Star",
    "attack",
    "averagedness",
    "bound",
    "certify",
    "error_map",
    "gains",
    "local",
    "rows",
    "solved_multipliers",
    "star",
    "trace",
    "verify",
]
