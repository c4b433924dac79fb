"""The errors that firmly raises on purpose; each message says what was given and what to do."""

from __future__ import annotations


class FirmlyError(Exception):
    """Anything that firmly refuses."""


class ShapeError(FirmlyError, ValueError):
    """A tensor whose shape does not fit the map it was given to."""


class ConditionError(FirmlyError, ValueError):
    """A condition of an algorithm (a step size, say) does not hold."""


class NotDiagonal(FirmlyError):
    """A linear map is not diagonalised by the basis it was asked about."""


class NotCertifiable(FirmlyError):
    """An operation that no bound is known for stands in the way of a certificate."""


class NotConverged(FirmlyError, RuntimeError):
    """An inner iteration that did not reach its certified accuracy."""


class NotDifferentiable(FirmlyError, RuntimeError):
    """A derivative that does not exist, or that is not computed here."""


class VerificationError(FirmlyError):
    """A certificate does not hold for the network it was checked against."""


class DataError(FirmlyError, ValueError):
    """Data that cannot be used: not finite, of a wrong type, or with a wrong checksum."""


class SettingsError(FirmlyError, ValueError):
    """A setting that does not exist or has a value out of its range."""


class StorageError(FirmlyError, OSError):
    """A file that could not be written or read: a full disk, a missing permission."""
