"""What all figures of all reports share: letters, axes, marks; drawn in light colours.

Text that comes from a model is escaped: plotly reads a little HTML in its labels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from html import escape
from math import ceil, floor, log10
from typing import Any

import plotly.graph_objects as go

from autorev.format import ByteUnit, clean
from autorev.report.palette import THEME

INK, MUTED, LINE, BAD, ACCENT, PAPER, PANEL = (
    THEME[role][0] for role in ("ink", "muted", "line", "bad", "accent", "paper", "panel")
)
ROW_HEIGHT = 34
"""Of a row of bars, in pixels."""
LIMIT_LINE = {"color": BAD, "width": 1.5, "dash": "dash"}
"""What must not be exceeded: a device's memory, a budget."""
SYMBOLS = {
    "plain": "circle",
    "checkpoint": "square",
    "sac": "hexagon",
    "compile": "hourglass",
    "offload": "square-open",
    "momentum": "diamond",
    "leapfrog": "triangle-up",
    "midpoint": "triangle-down",
    "midpoint_a": "triangle-down-open",
    "bdia": "cross",
    "hamiltonian": "star",
    "revnet": "star-open",
}
"""By method, beside its colour."""
DASHES = {
    "offload": "dash",
    "sac": "dash",
    "compile": "dot",
    "midpoint": "dash",
    "midpoint_a": "dot",
    "bdia": "dashdot",
    "revnet": "dash",
}

_font = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


def layout(height: int) -> dict[str, Any]:
    """The layout of a figure of `height` pixels, as wide as its place."""
    axis = {"gridcolor": LINE, "zeroline": False, "fixedrange": True, "automargin": True, "linecolor": LINE}
    axis["title"] = {"font": {"color": MUTED, "size": 12}, "standoff": 10}
    return {
        "template": "none",
        "height": height,
        "autosize": True,
        "margin": {"t": 30, "r": 16, "b": 44, "l": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _font, "size": 13, "color": INK},
        "xaxis": axis,
        "yaxis": axis,
        "dragmode": False,
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": LINE, "font": {"color": INK, "family": _font}},
        # Below the axis title, where a phone has room for it.
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    }


def logarithmic(axis: go.layout.XAxis | go.layout.YAxis, sizes: Iterable[float], unit: float) -> None:
    """A logarithmic axis in `unit` around `sizes`, with ticks at 1, 2 and 5."""
    sizes = list(sizes)
    low, high = log10(max(1, min(sizes)) / unit / 1.3), log10(max(sizes) / unit * 1.3)
    steps = [digit * 10.0**power for power in range(floor(low), ceil(high) + 1) for digit in (1, 2, 5)]
    ticks = [step for step in steps if low <= log10(step) <= high]
    axis.update(type="log", range=[low, high], tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])


def logarithmic_values(axis: go.layout.XAxis, values: list[int], most_ticks: int = 9) -> None:
    """A logarithmic axis along `values`, ascending, each a tick if `most_ticks` are enough (on a phone they are)."""
    ticks = values[:: ceil(len(values) / most_ticks)]
    start, end = log10(values[0]), log10(values[-1])
    margin = max(0.04 * (end - start), 0.05)
    axis.update(type="log", range=[start - margin, end + margin], tickangle=0)
    axis.update(tickvals=ticks, ticktext=[_short(tick) for tick in ticks])


def scaled(size: int, unit: ByteUnit) -> float:
    """Bytes in `unit`, with as many digits as a figure can show."""
    return round(size / unit.size, 4)


def row_label(text: str, width: int = 20) -> str:
    """`text` for the left of a row of bars, in lines of at most `width` letters."""
    return "<br>".join(escape(line) for line in textwrap.wrap(clean(text), width)) or "-"


def _short(value: int) -> str:
    """`2k` for 2,048: there is no room for more under an axis."""
    return f"{value // 1024}k" if value % 1024 == 0 else str(value)
