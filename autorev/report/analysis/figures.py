"""Plotly figures of an analysis, drawn in light colours; pure functions from an Analysis to a Figure.

Text that comes from the analysis is escaped: plotly reads a little HTML in its labels.
"""

from __future__ import annotations

from html import escape
from math import log10

import plotly.graph_objects as go

from autorev.analysis import Analysis, DeviceInfo, Sweep
from autorev.format import ByteUnit, clean, format_bytes, format_integer, unit_for
from autorev.report.analysis.rows import MethodRow, bar_scale, fits, method_rows, shown_categories, sweep_rows
from autorev.report.palette import CATEGORY_COLORS, PHASE_COLORS, method_color
from autorev.report.plotting import (
    BAD,
    DASHES,
    INK,
    LIMIT_LINE,
    MUTED,
    PAPER,
    ROW_HEIGHT,
    SYMBOLS,
    layout,
    logarithmic,
    logarithmic_values,
    row_label,
    scaled,
)
from autorev.words import CATEGORY_TITLES

_highest_peak = 8
"""In device capacities: curves leave the figure there."""
_phase_symbols = {"forward": "triangle-right", "backward": "diamond", "optimizer": "square"}


def figures(analysis: Analysis) -> dict[str, go.Figure]:
    """Every figure the analysis has data for, by the id of its place in a page."""
    found: dict[str, go.Figure] = {}
    if analysis.predictions:
        found["memory-by-method"] = memory_by_method(analysis)
    for axis in ("batch", "sequence"):
        if sweep_rows(analysis, axis):
            found[f"memory-by-{axis}"] = memory_along(analysis, axis)
    if any(prediction.phase_peaks for prediction in analysis.predictions):
        found["phase-peaks"] = phase_peaks(analysis)
    return found


def memory_by_method(analysis: Analysis) -> go.Figure:
    """The peak of every method as a bar, stacked by category, with the device's capacity."""
    rows = method_rows(analysis)
    scale, capacity = bar_scale(analysis)
    unit = unit_for([scale])
    labels = [_row_label(row) for row in rows]
    figure = go.Figure()
    for category in shown_categories(rows):
        sizes = [row.prediction.categories.get(category, 0) for row in rows]
        figure.add_bar(
            orientation="h",
            name=CATEGORY_TITLES[category],
            y=labels,
            x=[scaled(size, unit) for size in sizes],
            customdata=[format_bytes(size) for size in sizes],
            marker={"color": CATEGORY_COLORS[category][0], "line": {"color": PAPER, "width": 0.5}},
            hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        )
    for row, label in zip(rows, labels, strict=True):
        _note_peak(figure, row, label, analysis, scale)
    end = scaled(scale, unit) * 1.02
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 80), barmode="stack", bargap=0.3, showlegend=False)
    figure.update_layout(margin={"t": 30 if capacity else 8, "r": 76, "b": 44, "l": 8})
    figure.update_xaxes(title_text=f"memory at the peak, {unit.name}", range=[0, end])
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=6)
    if capacity and analysis.device:
        # Over bars of every colour, ink is the one that is always seen.
        _mark_capacity(figure, analysis.device, unit, INK)
    return figure


def phase_peaks(analysis: Analysis) -> go.Figure:
    """The peak of every method in each phase of a step, as points on a logarithmic axis."""
    rows = method_rows(analysis)
    peaks = [peak for row in rows for peak in row.prediction.phase_peaks.values() if peak]
    unit = unit_for(peaks)
    labels = [_row_label(row) for row in rows]
    figure = go.Figure()
    for phase, (color, _) in PHASE_COLORS.items():
        sizes = [row.prediction.phase_peaks.get(phase) for row in rows]
        figure.add_scatter(
            mode="markers",
            name=phase,
            y=labels,
            x=[None if not size else scaled(size, unit) for size in sizes],
            customdata=[format_bytes(size or 0) for size in sizes],
            marker={"color": color, "size": 11, "symbol": _phase_symbols[phase]},
            hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        )
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 120))
    capacity = [analysis.device.memory_bytes] if analysis.device else []
    logarithmic(figure.layout.xaxis, peaks + capacity, unit.size)
    if analysis.device:
        _mark_capacity(figure, analysis.device, unit, BAD)
    figure.update_xaxes(title_text=f"peak of the phase, {unit.name}")
    figure.update_yaxes(autorange="reversed", griddash="dot", ticklabelstandoff=6)
    return figure


def memory_along(analysis: Analysis, axis: str) -> go.Figure:
    """The peak of every method along `axis` (batch or sequence), with the device's capacity.

    Both axes are logarithmic: the values are spread by factors, and so are the peaks.
    """
    rows = sweep_rows(analysis, axis)
    points = _points_in_reach([sweep for _, sweep in rows], analysis.device)
    values = sorted({value for value, _ in points})
    sizes = [peak for _, peak in points]
    unit = unit_for(sizes)
    figure = go.Figure()
    for label, sweep in rows:
        # What a pretrained model can use stands out; the lines often lie close together.
        prediction = analysis.prediction(sweep.method)
        bold = prediction is None or prediction.preserves_function
        figure.add_trace(_sweep_line(label, sweep, unit, bold))
    figure.update_layout(layout(460))
    title = {"batch": "batch, samples", "sequence": "sequence, tokens per sample"}[axis]
    figure.update_xaxes(title_text=title)
    figure.update_yaxes(title_text=f"peak, {unit.name}")
    logarithmic_values(figure.layout.xaxis, values)
    if analysis.device:
        figure.add_trace(_capacity_curve(analysis.device, values, unit))
        sizes.append(analysis.device.memory_bytes)
    logarithmic(figure.layout.yaxis, sizes, unit.size)
    chosen = getattr(analysis.setting, axis, None)
    if chosen and values[0] <= chosen <= values[-1]:
        _mark_setting(figure, chosen)
    return figure


def _points_in_reach(sweeps: list[Sweep], device: DeviceInfo | None) -> list[tuple[int, int]]:
    """The points that set the axes: none that is many times beyond the device, if that leaves any."""
    points = [point for sweep in sweeps for point in zip(sweep.values, sweep.peak_bytes, strict=True)]
    if device is None:
        return points
    return [point for point in points if point[1] <= _highest_peak * device.memory_bytes] or points


def _sweep_line(label: str, sweep: Sweep, unit: ByteUnit, bold: bool) -> go.Scatter:
    return go.Scatter(
        mode="lines+markers" if bold else "lines",
        name=escape(label),
        x=list(sweep.values),
        y=[scaled(peak, unit) for peak in sweep.peak_bytes],
        customdata=[
            f"{format_integer(value)}: {format_bytes(peak)}"
            for value, peak in zip(sweep.values, sweep.peak_bytes, strict=True)
        ],
        line={
            "color": method_color(sweep.method),
            "dash": DASHES.get(sweep.method, "solid"),
            "width": 2.5 if bold else 1.75,
        },
        marker={"symbol": SYMBOLS.get(sweep.method, "circle"), "size": 7},
        zorder=2 if bold else 1,
        hovertemplate=f"%{{fullData.name}}, {escape(sweep.axis)} %{{customdata}}<extra></extra>",
    )


def _row_label(row: MethodRow) -> str:
    star = "" if row.prediction.preserves_function else "*"
    return row_label(", ".join(name + star for name in row.names), 26)


def _note_peak(figure: go.Figure, row: MethodRow, label: str, analysis: Analysis, scale: int) -> None:
    """The peak in figures in a column at the right, and an arrow where its bar is cut."""
    fitting = fits(row, analysis)
    peak = row.prediction.peak_bytes
    text = format_bytes(peak) if fitting else f"<b>! {format_bytes(peak)}</b>"
    place = {"y": label, "yref": "y", "xref": "paper", "x": 1, "showarrow": False}
    figure.add_annotation(place, text=text, xanchor="left", font={"color": INK if fitting else BAD})
    if peak > scale:
        figure.add_annotation(place, text="<b>\u203a\u203a</b>", xanchor="right", font={"color": PAPER})


def _mark_capacity(figure: go.Figure, device: DeviceInfo, unit: ByteUnit, color: str) -> None:
    """The device's memory as a line through rows of peaks."""
    at = scaled(device.memory_bytes, unit)
    axis = figure.layout.xaxis
    # On a logarithmic axis a shape is placed by the value itself, an annotation by its logarithm.
    spot = log10(at) if axis.type == "log" else at
    figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=LIMIT_LINE | {"color": color})
    figure.add_annotation(
        text=_capacity_text(device),
        x=spot,
        xanchor="right" if spot > sum(axis.range) / 2 else "left",
        y=1,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        font={"color": color, "size": 12},
    )


def _capacity_curve(device: DeviceInfo, values: list[int], unit: ByteUnit) -> go.Scatter:
    """The device's memory among the curves; in the legend, its name covers none of them."""
    return go.Scatter(
        mode="lines",
        name=_capacity_text(device),
        x=[values[0], values[-1]],
        y=[scaled(device.memory_bytes, unit)] * 2,
        line=LIMIT_LINE,
        hovertemplate="%{fullData.name}<extra></extra>",
    )


def _capacity_text(device: DeviceInfo) -> str:
    return f"{escape(clean(device.title))}: {format_bytes(device.memory_bytes)}"


def _mark_setting(figure: go.Figure, chosen: int) -> None:
    """Where the predicted step stands on the axis of a sweep."""
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_shape(type="line", x0=chosen, x1=chosen, y0=0, y1=1, yref="paper", line=line)
    place = {"x": log10(chosen), "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    figure.add_annotation(place, text="as set", font={"color": MUTED, "size": 12})
