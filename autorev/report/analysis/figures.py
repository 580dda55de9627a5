"""The plots of an analysis: peaks, peaks by phase, and peaks along batch and sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autorev.analysis import Analysis, Sweep
from autorev.format import clean, format_bytes, format_integer, unit_for
from autorev.methods import TILES
from autorev.report import document as doc
from autorev.report import plots
from autorev.report.analysis import view
from autorev.report.palette import PHASE_LOOKS, Look, look_of


def peaks(analysis: Analysis, rows: list[view.MethodRow], id: str, label: str) -> doc.Figure:
    """The peak of every method as a bar, stacked by category, with the device's capacity."""
    scale, capacity = view.bar_scale(analysis, rows)
    peaks = [row.prediction.peak_bytes for row in rows]
    return plots.peak_bars(
        id,
        label,
        [plots.row_name(row.label, 26) for row in rows],
        [row.prediction.categories for row in rows],
        peaks,
        [format_bytes(peak) for peak in peaks],
        bad=[not view.fits(row, analysis) for row in rows],
        scale=scale,
        limit=(capacity, _capacity(analysis)) if capacity else None,
    )


def _capacity(analysis: Analysis) -> str:
    device = analysis.device
    return f"{clean(device.title)}: {format_bytes(device.memory_bytes)}" if device else ""


def phase_peaks(analysis: Analysis, rows: list[view.MethodRow]) -> doc.Figure:
    peaks = [peak for row in rows for peak in row.prediction.phase_peaks.values() if peak]
    unit, series = unit_for(peaks), []
    for phase, (color, symbol) in PHASE_LOOKS.items():
        sizes = [row.prediction.phase_peaks.get(phase) for row in rows]
        places = [None if not size else plots.in_unit(size, unit) for size in sizes]
        texts = [format_bytes(size or 0) for size in sizes]
        every = list(range(len(rows)))
        series.append(plots.Series(phase, places, every, texts, color=color, symbol=symbol, size=11, mode="markers"))
    device = analysis.device
    limit = plots.Limit(plots.in_unit(device.memory_bytes, unit), "") if device else None
    names = [plots.row_name(row.label, 26) for row in rows]
    axis = plots.log_axis([*peaks, *([device.memory_bytes] if device else [])], unit.size)
    title = f"peak of the phase, {unit.name} (log scale)"
    label = "Peak memory of every method in forward, backward and optimizer"
    return plots.dots("phase-peaks", label, names, series, title, limit=limit, axis=axis)


def along(analysis: Analysis, axis: str, title: str, x_title: str) -> doc.Figure | None:
    """On linear axes: what fits is read off both; couplings to train from scratch with are in the table."""
    kept = {name for row in view.kept_and_scratch(analysis)[0] for name in row.names}
    rows = [(label, line) for label, line in view.sweep_rows(analysis, axis) if line.method in kept]
    device = analysis.device
    highest = view.LONGEST_BAR * device.memory_bytes if device else max(p for _, line in rows for p in line.peak_bytes)
    values = sorted({v for _, line in rows for v, peak in _points(line) if peak <= highest})
    if len(values) < plots.FEWEST_POINTS:
        return None
    tallest = max(peak for _, line in rows for v, peak in _points(line) if v <= values[-1] and peak <= highest)
    unit = unit_for([tallest, device.memory_bytes if device else 0])
    series = []
    for label, line in rows:
        points = [(value, peak) for value, peak in _points(line) if value <= values[-1]]
        texts = [f"{axis} {format_integer(value)}: {format_bytes(peak)}" for value, peak in points]
        x, y = [value for value, _ in points], [plots.in_unit(peak, unit) for _, peak in points]
        series.append(plots.Series.like(_look(line.method), label, x, y, texts=texts))
    if device:
        top = plots.in_unit(device.memory_bytes, unit)
        series.append(plots.Series.level(_capacity(analysis), values, top))
        for name, most in _reached(analysis, axis, kept):
            look, said = _look(name), f"fits up to {axis} {format_integer(most)}"
            mark: dict[str, Any] = {"mode": "markers", "size": 12, "legend": False, "outlined": True, "texts": [said]}
            if most <= values[-1]:
                series.append(plots.Series.like(look, name, [most], [top], **mark))
    chosen = getattr(analysis.setting, axis, None)
    marked = [(chosen, "as set")] if chosen and chosen <= values[-1] else []
    y_axis = {
        "range": [0, plots.in_unit(min(highest, max(tallest, device.memory_bytes if device else 0)), unit) * 1.05]
    }
    x_axis, y_title = plots.whole_numbers(values), f"peak, {unit.name}"
    id = f"memory-by-{axis}"
    return plots.lines(id, title, series, x_title, y_title, height=460, x_axis=x_axis, y_axis=y_axis, marked=marked)


def _look(method: str) -> Look:
    """Of one with tiles, the second of its kind."""
    return look_of(method.removesuffix(TILES), int(method.endswith(TILES)))


def _points(line: Sweep) -> list[tuple[int, int]]:
    return list(zip(line.values, line.peak_bytes, strict=True))


def _reached(analysis: Analysis, axis: str, kept: set[str]) -> Iterator[tuple[str, int]]:
    for reach in analysis.frontier:
        most = reach.largest_batch if axis == "batch" else reach.longest_sequence
        if most and reach.method in kept:
            yield reach.method, most
