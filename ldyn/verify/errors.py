"""What a check may answer, and what is raised when the answer is not yes."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """The three answers of a check; only `TRUE` is a pass."""

    TRUE = "true"
    UNKNOWN = "unknown"
    FALSE = "false"


class VerificationError(Exception):
    """A claim, or a step of a derivation, could not be accepted."""


class Refuted(VerificationError):
    """The check was carried out and the statement is false."""


class Undecided(VerificationError):
    """The check was carried out and settles nothing; this is not a pass."""


class Vacuous(VerificationError):
    """The check tests nothing: no effective case, one route twice, no evidence, no control."""


class Invalid(VerificationError, ValueError):
    """The check cannot be carried out: NaN, mismatched shapes, unusable arguments."""
