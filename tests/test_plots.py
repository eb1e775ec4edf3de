"""The figure style: deterministic drawings, one ink, sizes as asked, bad sizes refused."""

import io
import re
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from ldyn.plots import INK, LINE_STYLES, PALETTE, WIDTHS, figure, panels, use_style


@pytest.fixture(autouse=True)
def _restore():
    with mpl.rc_context():
        yield
    plt.close("all")


def drawn() -> str:
    use_style()
    fig, ax = figure()
    ax.plot([0, 1, 2], [0.0, 1.0, 0.5], "o-", label="$p$")
    ax.set_xlabel("step")
    ax.legend()
    file = io.StringIO()
    fig.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def test_a_drawing_depends_on_nothing_but_the_figure():
    first = drawn()
    mpl.rcParams.update({"font.size": 20, "svg.hashsalt": "other", "lines.linewidth": 9})
    assert drawn() == first


def test_lines_and_letters_have_the_ink_or_a_colour_of_the_palette():
    colours = set(re.findall(r"#[0-9a-f]{6}\b", drawn()))
    assert INK in colours
    assert colours <= {INK, "#ffffff", *PALETTE.values()}


def test_no_spines_at_the_top_and_right():
    use_style()
    _, ax = figure()
    shown = {side for side, spine in ax.spines.items() if spine.get_visible()}
    assert shown == {"left", "bottom"}


@pytest.mark.parametrize(("width", "inches"), [("text", WIDTHS["text"]), ("half", WIDTHS["half"]), (3.5, 3.5)])
def test_sizes(width, inches):
    fig, _ = figure(width=width, aspect=0.5)
    assert fig.get_size_inches() == pytest.approx([inches, inches / 2])


def test_panels_come_row_by_row():
    fig, axes = panels(2, 3, sharex=True)
    assert len(axes) == 6
    assert axes == fig.axes
    rows = [ax.get_subplotspec().rowspan.start for ax in axes]
    assert rows == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figure(width="page"), r"width: expected one of .*half.*text.* got 'page'"),
        (lambda: figure(width=0.0), r"width: expected a positive number of inches, got 0.0"),
        (lambda: figure(width=float("nan")), r"width: expected a positive number of inches, got nan"),
        (lambda: figure(aspect=-1.0), r"aspect: expected a positive ratio .* got -1.0"),
        (lambda: panels(0, 2), r"rows: expected at least 1, got 0"),
        (lambda: panels(1, 0), r"columns: expected at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_cycle_has_six_colours_of_the_palette():
    use_style()
    cycle = [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]]
    assert len(set(cycle)) == 6
    assert set(cycle) <= set(PALETTE.values())
    assert len(set(LINE_STYLES)) == 4


def test_importing_the_module_loads_no_matplotlib():
    code = "import sys, ldyn.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
