"""The progress of long work, shown on the standard error stream where tqdm is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

__all__ = ["Progress", "progress_bar"]

DELAY = 2.0
"""Seconds after which a bar appears: short work shows none."""


class Progress(Protocol):
    """What a bar can be told."""

    def update(self, n: int = 1) -> object:
        """Count steps."""

    def set_postfix(self, values: dict[str, str], *, refresh: bool) -> object:
        """Show values beside the bar."""

    def close(self) -> object:
        """Take the bar away."""

    def __enter__(self) -> Progress:
        """Start."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object:
        """Take the bar away."""


def progress_bar(
    total: int | None, *, desc: str, unit: str, done: int = 0, leave: bool = True, shown: bool = True
) -> Progress:
    """Open a progress bar that appears after two seconds.

    Args:
        total: Number of steps, or None where it is unknown.
        desc: What is being done.
        unit: What a step is.
        done: Steps that were done before.
        leave: Whether the bar stays when the work is done.
        shown: Whether to show it at all.

    Returns:
        A bar of tqdm, or one that nobody sees where tqdm is not installed or nothing is to be shown.
    """
    try:
        tqdm = import_module("tqdm") if shown else None
    except ImportError:
        tqdm = None
    if tqdm is None:
        return _Silent()
    bar: Progress = tqdm.tqdm(
        total=total, initial=done, desc=desc, unit=unit, delay=DELAY, leave=leave, file=sys.stderr
    )
    return bar


class _Silent:
    """A bar that nobody sees."""

    def update(self, n: int = 1) -> None:
        """Pass over steps."""

    def set_postfix(self, values: dict[str, str], *, refresh: bool) -> None:
        """Pass over values."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> _Silent:
        """Start."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Do nothing."""
