"""What a check found, and how its numbers are printed so that a second run prints the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import Refuted, Undecided, Verdict


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        kind: One of ``proves``, ``agrees``, ``converges``, ``bounds``, ``covers``.
        verdict: True, unknown or false.
        refused: Whether it is false by the margin that a negative control must reach.
        what: The statement checked, in a few words.
        scope: The dimensions a proof covers, or how many effective cases were run.
        result: The measured result, printed deterministically.
        cases: The number of effective cases; zero for a symbolic check.
    """

    kind: str
    verdict: Verdict
    refused: bool
    what: str
    scope: str
    result: str
    cases: int = 0

    def require(self) -> Finding:
        """Return the finding if it is a pass.

        Returns:
            The finding itself.

        Raises:
            Refuted: If the check is false.
            Undecided: If it settles nothing.
        """
        message = f"{self.kind} ({self.what or self.scope}): {self.result}"
        if self.verdict is Verdict.FALSE:
            raise Refuted(message)
        if self.verdict is Verdict.UNKNOWN:
            raise Undecided(message)
        return self


def at_most(error: float) -> str:
    """Print an error rounded up to a power of ten.

    Args:
        error: A finite error, at least 0.

    Returns:
        For example ``"10⁻¹⁵"`` or ``"0.1"``; ``"0"`` for an exact zero.
    """
    return "0" if error == 0 else _power_of_ten(math.ceil(math.log10(error) - 1e-9))


def at_least(error: float) -> str:
    """Print an error rounded down to a power of ten.

    Args:
        error: A finite error, at least 0.

    Returns:
        For example ``"10⁻⁷"`` or ``"0.1"``; ``"0"`` for an exact zero.
    """
    return "0" if error == 0 else _power_of_ten(math.floor(math.log10(error) + 1e-9))


def truncated(value: float, digits: int = 3) -> str:
    """Print a number cut, not rounded, so that a ratio below one never prints as one.

    Args:
        value: The number.
        digits: Decimal places kept.

    Returns:
        The text.
    """
    factor = 10**digits
    return f"{math.floor(value * factor + 1e-9) / factor:.{digits}f}"


def _power_of_ten(exponent: int) -> str:
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
