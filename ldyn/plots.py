"""The one figure style of the book: a palette safe for colour-blind readers, and what every chapter draws on.

Call `use_style()` once at the head of a notebook, then draw on `figure(...)` or `panels(...)`. Axes, labels
and ticks are drawn in one ink (`INK`) on white; the site's build turns that ink into the colour of the page's
text, so that a figure reads in the light and in the dark. Colours with a meaning come from `PALETTE`.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK: Final = "#1b1b1b"
"""Colour of axes, ticks and text."""

PALETTE: Final = MappingProxyType(
    {
        "blue": "#0072b2",
        "orange": "#e69f00",
        "green": "#009e73",
        "vermillion": "#d55e00",
        "purple": "#cc79a7",
        "sky": "#56b4e9",
        "yellow": "#f0e442",
        "grey": "#7f7f7f",
    }
)
"""Okabe and Ito's colours by name; grey is for what is only a reference."""

LINE_STYLES: Final = ("-", "--", "-.", ":")
"""Line styles to pair with the colours, so that no difference rests on colour alone."""

WIDTHS: Final = MappingProxyType({"text": 6.17, "half": 4.2})
"""Figure widths by name, in inches; "text" is as wide as the column of text."""

_CYCLE: Final = ("blue", "vermillion", "green", "orange", "purple", "sky")

STYLE: Final[MappingProxyType[Any, Any]] = MappingProxyType(
    {
        "figure.dpi": 100.0,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "savefig.facecolor": "white",
        "savefig.dpi": 200.0,
        "svg.fonttype": "path",
        "svg.hashsalt": "learning-dynamics-verified",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10.0,
        "mathtext.fontset": "cm",
        "axes.facecolor": "none",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 10.0,
        "axes.labelsize": 10.0,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": PALETTE["grey"],
        "grid.linewidth": 0.4,
        "grid.alpha": 0.35,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 9.0,
        "ytick.labelsize": 9.0,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.direction": "out",
        "ytick.direction": "out",
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "patch.edgecolor": INK,
        "hatch.color": INK,
        "image.cmap": "cividis",
    }
)


def use_style() -> None:
    """Make the book's figure style current, and have notebooks draw vector figures.

    Starts from matplotlib's defaults, so that a call gives the same style whatever was set before. In a
    notebook, figures become SVG whose bytes depend on the figure alone: identifiers come from a fixed salt
    and no date is written. Needs matplotlib (`pip install ldyn[plots]`).
    """
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcdefaults()
    mpl.rcParams.update(STYLE)
    mpl.rcParams["axes.prop_cycle"] = cycler(color=[PALETTE[name] for name in _CYCLE])
    _draw_svg_in_notebooks()


def figure(*, width: Literal["text", "half"] | float = "text", aspect: float = 0.62) -> tuple[Figure, Axes]:
    """Open a figure with one pair of axes in the book's proportions.

    Args:
        width: "text" (as wide as the text), "half", or a width in inches.
        aspect: Height of the figure over its width.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If the width is unknown or not positive, or the aspect not positive.
    """
    fig, (ax,) = panels(1, 1, width=width, aspect=aspect)
    return fig, ax


def panels(
    rows: int,
    columns: int,
    *,
    width: Literal["text", "half"] | float = "text",
    aspect: float = 0.45,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Open a figure with several pairs of axes in the book's proportions.

    Args:
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        width: "text" (as wide as the text), "half", or a width in inches.
        aspect: Height of the whole figure over its width.
        sharex: Whether the axes share their horizontal scale.
        sharey: Whether the axes share their vertical scale.

    Returns:
        The figure and its axes, row by row.

    Raises:
        ValueError: If a count is below one, the width unknown or not positive, or the aspect not positive.
    """
    import matplotlib.pyplot as plt

    for name, count in (("rows", rows), ("columns", columns)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count!r}")
    inches = _inches(width)
    if not 0 < aspect < float("inf"):
        raise ValueError(f"aspect: expected a positive ratio of height to width, got {aspect!r}")
    fig, axes = plt.subplots(
        rows, columns, figsize=(inches, inches * aspect), sharex=sharex, sharey=sharey, squeeze=False
    )
    return fig, list(axes.flat)


def _inches(width: str | float) -> float:
    """Turn a width, named or in inches, into inches."""
    if isinstance(width, str):
        if width not in WIDTHS:
            raise ValueError(f"width: expected one of {sorted(WIDTHS)} or a number of inches, got {width!r}")
        return WIDTHS[width]
    if not 0 < width < float("inf"):
        raise ValueError(f"width: expected a positive number of inches, got {width!r}")
    return float(width)


def _draw_svg_in_notebooks() -> None:
    """Choose vector output, uncropped and undated, when IPython is running this code."""
    try:
        from IPython.core.getipython import get_ipython

        inline = import_module("matplotlib_inline.backend_inline")
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        # Uncropped, the figure keeps the width it was given and text has one size in all figures.
        inline.set_matplotlib_formats("svg", bbox_inches=None, metadata={"Date": None, "Creator": None})
