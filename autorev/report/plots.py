"""The kinds of plots: bars and dots in rows, lines along numbers, stacked areas over time, and a map of blocks.

Each makes a `Figure` as plotly takes it, in light colours. Text that comes from a model is escaped: plotly reads a
little HTML in its labels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

from autorev.analysis import Category
from autorev.format import ByteUnit, clean, format_bytes, unit_for
from autorev.report.document import Figure
from autorev.report.palette import CATEGORY_COLORS, THEME, Look
from autorev.words import CATEGORY_TITLES

INK, MUTED, LINE, BAD, ACCENT, PAPER, PANEL = (
    THEME[role][0] for role in ("ink", "muted", "line", "bad", "accent", "paper", "panel")
)
FEWEST_POINTS = 4
"""Along an axis, before a curve says more than a table."""
_ROW = 34
"""Height of a row, in pixels."""
_MOST_TICKS = 12
_font = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


@dataclass(frozen=True, slots=True)
class Limit:
    """What must not be exceeded: a device's memory, a budget; or what the rest is compared with."""

    value: float
    text: str = ""
    color: str = BAD


@dataclass(frozen=True, slots=True)
class Series:
    """One trace: values and how they are drawn. `texts` are what is said of each when it is pointed at."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    texts: Sequence[str] = ()
    color: str = MUTED
    symbol: str = "circle"
    dash: str = "solid"
    width: float = 2
    size: float = 7
    mode: str = "lines+markers"
    opacity: float = 1
    shape: str = "linear"
    legend: bool = True
    group: str = ""
    """Those of one group share an entry of the legend."""
    outlined: bool = False

    @classmethod
    def like(cls, look: Look, name: str, x: Sequence[float], y: Sequence[float], **rest: Any) -> Series:
        """A series with the look of a method."""
        return cls(name, x, y, color=look.color, symbol=look.symbol, dash=look.dash, **rest)

    @classmethod
    def level(cls, name: str, ends: Sequence[float], at: float, color: str = BAD) -> Series:
        """A dashed line across: a limit, or what the rest is compared with."""
        return cls(name, [ends[0], ends[-1]], [at, at], color=color, dash="dash", width=1.5, mode="lines")

    def trace(self) -> dict[str, Any]:
        """As plotly takes it."""
        made: dict[str, Any] = {
            "type": "scatter",
            "mode": self.mode,
            "name": escape(clean(self.name)),
            "x": [_rounded(x) for x in self.x],
            "y": [_rounded(y) for y in self.y],
            "showlegend": self.legend,
            "line": {"color": self.color, "dash": self.dash, "width": self.width, "shape": self.shape},
        }
        if "markers" in self.mode:
            made["marker"] = {"color": self.color, "symbol": self.symbol, "size": self.size}
            if self.outlined:
                hollow = self.symbol.endswith(("open", "thin"))
                made["marker"]["line"] = {"width": 2, "color": self.color if hollow else PAPER}
        if self.group:
            made["legendgroup"] = escape(clean(self.group))
        if self.opacity != 1:
            made["opacity"] = self.opacity
        if self.texts:
            made["customdata"] = [escape(each) for each in self.texts]
            made["hovertemplate"] = "%{fullData.name}: %{customdata}<extra></extra>"
        else:
            made["hoverinfo"] = "skip"
        return made


@dataclass(frozen=True, slots=True)
class Part:
    """One colour of stacked bars: a value for every row."""

    name: str
    color: str | Sequence[str]
    values: Sequence[float]
    texts: Sequence[str]


def in_unit(size: int, unit: ByteUnit) -> float:
    """Bytes in `unit`, with as many digits as a figure can show."""
    return round(size / unit.size, 4)


def category_parts(held: Sequence[dict[str, int]], unit: ByteUnit) -> list[Part]:
    """Bars of bytes by category, one for each of `held`."""
    made = []
    for category in Category:
        sizes = [each.get(category, 0) for each in held]
        if any(sizes):
            made.append(_bytes_part(CATEGORY_TITLES[category], CATEGORY_COLORS[category][0], sizes, unit))
    return made


def _bytes_part(name: str, color: str | Sequence[str], sizes: Sequence[int], unit: ByteUnit) -> Part:
    return Part(name, color, [in_unit(size, unit) for size in sizes], [format_bytes(size) for size in sizes])


def peak_bars(
    id: str,
    label: str,
    names: Sequence[str],
    held: Sequence[dict[str, int]],
    peaks: Sequence[int | None],
    notes: Sequence[str],
    *,
    bad: Sequence[bool] = (),
    scale: int,
    limit: tuple[int, str] | None = None,
) -> Figure:
    """A bar of every peak, stacked by category, on one scale; what has no categories is said to be unexplained."""
    unit = unit_for([scale])
    parts = category_parts(held, unit)
    unexplained = [0 if each else peak or 0 for each, peak in zip(held, peaks, strict=True)]
    if any(unexplained):
        parts.append(_bytes_part("not attributed to a category", LINE, unexplained, unit))
    at = None if limit is None else Limit(in_unit(limit[0], unit), limit[1], INK)
    cut = [(peak or 0) > scale for peak in peaks]
    title, end = f"memory at the peak, {unit.name}", in_unit(scale, unit) * 1.02
    return bars(id, label, names, parts, title, notes, bad=bad, cut=cut, end=end, limit=at)


def bars(
    id: str,
    label: str,
    names: Sequence[str],
    parts: Sequence[Part],
    title: str,
    notes: Sequence[str] = (),
    *,
    bad: Sequence[bool] = (),
    cut: Sequence[bool] = (),
    end: float | None = None,
    limit: Limit | None = None,
    legend: bool = False,
) -> Figure:
    """One stacked bar a row, its figure at the right; a bar that is longer than the scale is marked as cut."""
    rows = list(range(len(names)))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(clean(part.name)),
            "y": rows,
            "x": [_rounded(value) for value in part.values],
            "customdata": [escape(each) for each in part.texts],
            "marker": {
                "color": part.color if isinstance(part.color, str) else list(part.color),
                "line": {"color": PAPER, "width": 0.5},
            },
            "hovertemplate": "%{fullData.name}: %{customdata}<extra></extra>",
        }
        for part in parts
    ]
    layout = _rows_layout(names, title, legend, limit)
    layout |= {"barmode": "stack", "bargap": 0.3}
    layout["yaxis"]["showgrid"] = False
    layout["xaxis"] |= {"rangemode": "tozero", "nticks": 7} if end is None else {"range": [0, end]}
    layout["margin"] |= {"r": 92 if any(notes) else 16}
    for place, note in enumerate(notes):
        over = bool(bad) and bad[place]
        style = {"color": BAD if over else INK, "size": 13 if note[:1].isdigit() or over else 12}
        layout["annotations"].append(_beside(place, f"<b>! {escape(note)}</b>" if over else escape(note), style))
        if cut and cut[place]:
            layout["annotations"].append(_beside(place, "<b>\u203a\u203a</b>", {"color": PAPER}, "right"))
    return Figure(id, label, data, layout)


def dots(
    id: str,
    label: str,
    names: Sequence[str],
    series: Sequence[Series],
    title: str,
    notes: Sequence[str] = (),
    *,
    limit: Limit | None = None,
    medians: Sequence[float] = (),
    axis: dict[str, Any] | None = None,
    legend: bool = True,
) -> Figure:
    """Marks in rows; `y` of the series are places of rows. Medians are bars through a row."""
    layout = _rows_layout(names, title, legend, limit)
    layout["yaxis"] |= {"griddash": "dot"} if not medians else {"showgrid": False}
    layout["xaxis"] |= axis if axis is not None else {"rangemode": "tozero"}
    layout["margin"] |= {"r": 76 if notes else 16}
    for place, middle in enumerate(medians):
        ends = {"x0": middle, "x1": middle, "y0": place - 0.38, "y1": place + 0.38}
        layout["shapes"].append({"type": "line", **ends, "line": {"color": INK, "width": 2}})
    layout["annotations"] += [_beside(place, escape(note), {"color": INK}) for place, note in enumerate(notes)]
    return Figure(id, label, [each.trace() for each in series], layout)


def lines(
    id: str,
    label: str,
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    height: int = 340,
    legend: bool = True,
    x_axis: dict[str, Any] | None = None,
    y_axis: dict[str, Any] | None = None,
    marked: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Lines and marks on two axes, as high as the entries of the legend need; `marked` places on x have a rule."""
    entries = sum(each.legend for each in series)
    layout = base_layout(height + 11 * max(0, entries - 4 if legend else 0))
    layout["xaxis"] |= {"title": axis_title(layout, x_title), "showgrid": False, **(x_axis or {})}
    layout["yaxis"] |= {"title": axis_title(layout, y_title), **(y_axis or {})}
    layout["showlegend"] = legend
    for at, name in marked:
        layout["shapes"].append(rule(at, MUTED, "dot", 1))
        if name:
            layout["annotations"].append(above(at, name, MUTED))
    return Figure(id, label, [each.trace() for each in series], layout)


def log_axis(sizes: Iterable[float], unit: float = 1) -> dict[str, Any]:
    """A logarithmic axis in `unit` around `sizes`; within a few powers of ten with more ticks than 1, 2 and 5."""
    found = list(sizes)
    low, high = max(min(found), 1e-3 * unit) / unit / 1.15, max(found) / unit * 1.2
    digits = (1.0, 2.0, 5.0) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    steps = [digit * 10.0**power for power in range(floor(log10(low)), ceil(log10(high)) + 1) for digit in digits]
    ticks = [step for step in steps if low <= step <= high]
    ends = [log10(low), log10(high)]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def whole_numbers(values: Sequence[int]) -> dict[str, Any]:
    """An axis from zero along sizes, each of them a tick if there is room."""
    far = max(values, default=1)
    ticks: list[int] = []
    for value in sorted(set(values), reverse=True):
        if not ticks or ticks[-1] - value >= far / _MOST_TICKS:
            ticks.append(value)
    ends = [-0.02 * far, 1.04 * far]
    return {"range": ends, "tickvals": ticks[::-1], "ticktext": [_short(t) for t in ticks[::-1]], "tickangle": 0}


def row_name(name: str, width: int = 20) -> str:
    """`name` for the left of a row, in lines of at most `width` letters."""
    return "<br>".join(escape(line) for line in textwrap.wrap(clean(name), width)) or "-"


def _short(value: int) -> str:
    """`2k` for 2,048: there is no room for more under an axis."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if isinstance(value, float) else value


def base_layout(height: int) -> dict[str, Any]:
    """The layout of a figure of `height` pixels, as wide as its place."""
    axis = {"gridcolor": LINE, "zeroline": False, "fixedrange": True, "automargin": True, "linecolor": LINE}
    return {
        "template": "none",
        "height": height,
        "autosize": True,
        "margin": {"t": 30, "r": 16, "b": 44, "l": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _font, "size": 13, "color": INK},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "dragmode": False,
        "shapes": [],
        "annotations": [],
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": LINE, "font": {"color": INK, "family": _font}},
        # Below the axis title, where a phone has room for it.
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "traceorder": "normal",
        },
    }


def axis_title(layout: dict[str, Any], words: str) -> dict[str, Any]:
    return {"text": escape(words), "font": {"color": MUTED, "size": 12}, "standoff": 10}


def row_ticks(names: Sequence[str]) -> dict[str, Any]:
    """Names at the left of rows 0, 1, 2, ...; two rows may have the same."""
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names)}
    return {**ticks, "range": [len(names) - 0.5, -0.5]}


def _rows_layout(names: Sequence[str], title: str, legend: bool, limit: Limit | None) -> dict[str, Any]:
    layout = base_layout(_ROW * len(names) + (130 if legend else 80) + (14 if limit and limit.text else 0))
    layout["showlegend"] = legend
    layout["margin"]["t"] = 30 if limit and limit.text else 8
    layout["xaxis"]["title"] = axis_title(layout, title)
    layout["yaxis"] |= {**row_ticks(names), "ticklabelstandoff": 6}
    if limit:
        layout["shapes"].append(rule(limit.value, limit.color, "dash", 1.5))
        if limit.text:
            layout["annotations"].append(above(limit.value, escape(limit.text), limit.color, "right"))
    return layout


def rule(at: float, color: str, dash: str, width: float) -> dict[str, Any]:
    line = {"color": color, "width": width, "dash": dash}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def above(at: float, words: str, color: str, anchor: str = "center", size: int = 12) -> dict[str, Any]:
    place = {"x": at, "xanchor": anchor, "y": 1, "yref": "paper", "yanchor": "bottom"}
    return {"text": words, **place, "showarrow": False, "font": {"color": color, "size": size}}


def _beside(place: int, words: str, font: dict[str, Any], anchor: str = "left") -> dict[str, Any]:
    spot = {"y": place, "yref": "y", "xref": "paper", "x": 1, "xanchor": anchor}
    return {"text": words, **spot, "showarrow": False, "font": font}
