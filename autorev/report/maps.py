"""Plots that fill a plane: bytes stacked over time, and values by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from autorev.format import clean, format_bytes, unit_for
from autorev.report.document import Figure
from autorev.report.palette import CATEGORY_COLORS
from autorev.report.plots import (
    BAD,
    INK,
    LINE,
    MUTED,
    PANEL,
    PAPER,
    Series,
    above,
    axis_title,
    base_layout,
    in_unit,
    row_ticks,
    rule,
)
from autorev.words import CATEGORY_TITLES


def areas(
    id: str,
    label: str,
    seconds: Sequence[float],
    held: Mapping[str, Sequence[int]],
    doing: Sequence[str],
    marks: Iterable[tuple[str, float, float]],
    peak: tuple[float, int, str] | None,
    highest: int,
) -> Figure:
    """Bytes by category over time, on a scale up to `highest`, its phases named above, its peak as a dot."""
    unit = unit_for([highest])
    times = [round(each, 5) for each in seconds]
    data: list[dict[str, Any]] = []
    for category, (color, _) in CATEGORY_COLORS.items():
        if any(held.get(category, ())):
            sizes = [in_unit(size, unit) for size in held[category]]
            style = {"line": {"width": 0, "color": color, "shape": "hv"}, "fillcolor": color, "stackgroup": "memory"}
            hover = f"%{{fullData.name}}: %{{y:.3f}} {unit.name}<extra></extra>"
            data.append(_area(CATEGORY_TITLES[category], times, sizes) | style | {"hovertemplate": hover})
    totals = [in_unit(sum(sizes), unit) for sizes in zip(*held.values(), strict=True)]
    # Nothing to see: it says in the hover which block it is.
    data.append(
        _area("at work", times, totals)
        | {"customdata": list(doing), "line": {"width": 0, "color": MUTED, "shape": "hv"}}
        | {"hovertemplate": f"all: %{{y:.3f}} {unit.name}, %{{customdata}}<extra></extra>"}
    )
    found = list(marks)
    end = max([*times[-1:], *(stop for _, _, stop in found)], default=0) or 1
    layout = base_layout(300)
    layout |= {"showlegend": False, "hovermode": "x unified", "margin": {"t": 40, "r": 8, "b": 40, "l": 8}}
    layout["xaxis"] |= {"title": axis_title(layout, "seconds of the traced step"), "range": [0, end], "nticks": 6}
    layout["xaxis"] |= {"showgrid": False}
    layout["yaxis"] |= {"title": axis_title(layout, f"live, {unit.name}"), "range": [0, in_unit(highest, unit) * 1.12]}
    for name, begin, stop in found:
        _mark_phase(layout, name, begin, stop, end)
    if peak:
        at, size, words = peak
        place = {"x": at, "y": in_unit(size, unit), "yanchor": "bottom", "xanchor": "left" if at < end / 2 else "right"}
        bold = {"text": f"<b>{format_bytes(size)}</b>", "showarrow": False, "font": {"color": INK, "size": 12}}
        layout["annotations"].append(place | bold)
        dot = {"color": INK, "size": 7, "line": {"color": PAPER, "width": 1.5}}
        mark = {"type": "scatter", "mode": "markers", "name": "peak", "x": [round(at, 5)], "y": [place["y"]]}
        data.append(mark | {"marker": dot, "hovertemplate": f"{words}<extra></extra>"})
    return Figure(id, label, data, layout)


def _area(name: str, x: list[float], y: list[float]) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y}


def _mark_phase(layout: dict[str, Any], name: str, begin: float, stop: float, end: float) -> None:
    """Backward on a tinted ground between forward and optimizer, each named above."""
    if name == "backward":
        ground = {"type": "rect", "x0": begin, "x1": stop, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        layout["shapes"].append(ground | {"fillcolor": PANEL, "line": {"width": 0}})
    if begin > 0:
        layout["shapes"].append(rule(begin, MUTED, "dot", 1))
    middle, narrow = (begin + stop) / 2, (stop - begin) < 0.2 * end
    # A phase too narrow for its name has it at that side of the figure.
    at, anchor = (middle, "center") if not narrow else (0, "left") if middle < end / 2 else (end, "right")
    layout["annotations"].append(above(at, escape(clean(name)), MUTED, anchor, 11))


def heat(
    id: str,
    label: str,
    values: list[list[float | None]],
    texts: list[list[str]],
    rows: Sequence[str],
    ticks: dict[int, str],
    marks: Sequence[tuple[int, int]],
    titles: tuple[str, str],
) -> Figure:
    """A map of values between the first and the last of `ticks`; marks are (column, row)."""
    columns = len(values[0]) if values else 0
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": list(range(columns)),
            "y": list(range(len(rows))),
            "z": values,
            "customdata": [[escape(each) for each in row] for row in texts],
            "xgap": 1,
            "ygap": 1,
            "zmin": min(ticks),
            "zmax": max(ticks),
            "colorscale": [[0, LINE], [1, BAD]],
            "hovertemplate": "%{customdata}<extra></extra>",
            "colorbar": {
                "orientation": "h",
                "thickness": 9,
                "len": 0.55,
                "outlinewidth": 0,
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "tickvals": list(ticks),
                "ticktext": list(ticks.values()),
                "tickfont": {"size": 11, "color": MUTED},
            },
        }
    ]
    if marks:
        x, y = [column for column, _ in marks], [row for _, row in marks]
        data.append(Series("chosen", x, y, color=INK, mode="markers", outlined=True).trace())
    layout = base_layout(150 + 34 * len(rows))
    layout |= {"showlegend": False, "margin": {"t": 52, "r": 8, "b": 44, "l": 8}}
    layout["xaxis"] |= {"title": axis_title(layout, titles[0]), "showgrid": False, "ticks": ""}
    layout["xaxis"] |= {"range": [-0.5, columns - 0.5]}
    layout["yaxis"] |= {"title": axis_title(layout, titles[1]), "showgrid": False, "ticks": ""}
    layout["yaxis"] |= row_ticks(rows)
    return Figure(id, label, data, layout)
