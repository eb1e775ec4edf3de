"""A pytest plugin for `--nbval`: text is compared strictly, drawings are not.

A drawing's bytes may depend on the fonts and the rounding of the machine; the numbers behind it are printed or claimed
as text, and those are compared.
"""

from typing import Any


def pytest_collectstart(collector: Any) -> None:
    """Have nbval pass over vector images, as it does over bitmaps."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*collector.skip_compare, "image/svg+xml")
