"""Plotly figures of the memory of one profile's step, drawn in light colours; pure functions of the record.

Every function takes what the record holds and leaves out what it does not hold: a method without memory keeps its row
and says why it has no bar.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import plotly.graph_objects as go

from autorev.format import ByteUnit, format_bytes, format_rate, unit_for
from autorev.profiler.readings import Memory
from autorev.profiler.record import Profile, Result, Status
from autorev.report.palette import CATEGORY_COLORS
from autorev.report.plotting import (
    BAD,
    INK,
    LIMIT_LINE,
    LINE,
    MUTED,
    PAPER,
    ROW_HEIGHT,
    layout,
    row_label,
    scaled,
)
from autorev.report.profile.rows import (
    before_and_after,
    ended,
    labels,
    looks,
    measured_memory,
    peak_bytes,
    peak_categories,
    results,
    shown_categories,
)
from autorev.report.profile.timelines import timelines
from autorev.words import CATEGORY_TITLES


def memory_figures(profile: Profile) -> dict[str, go.Figure]:
    """Every figure of memory that the record has data for, by the id of its place in a page."""
    found: dict[str, go.Figure] = {}
    if any(peak_bytes(each) for each in profile.results):
        found["peak"] = peak_by_category(profile)
    if len(front_points(profile)) > 1:
        found["tradeoff"] = memory_against_throughput(profile)
    found |= timelines(profile)
    if any(memory.block_bytes for _, memory in measured_memory(profile)):
        found["kept-by-block"] = kept_by_block(profile)
    return found


def peak_by_category(profile: Profile) -> go.Figure:
    """The peak of every method as a bar stacked by category, its figure at the right, the budget as a line."""
    rows = results(profile)
    peaks = [peak_bytes(each) or 0 for each in rows]
    totals = [max(peak, sum(peak_categories(each).values())) for peak, each in zip(peaks, rows, strict=True)]
    scale = max([*totals, profile.budget_bytes or 0]) if budget_in_sight(profile) else max(totals)
    unit = unit_for([scale])
    figure = go.Figure()
    for category in shown_categories(rows):
        sizes = [peak_categories(each).get(category, 0) for each in rows]
        if any(sizes):
            _bar(figure, CATEGORY_TITLES[category], sizes, unit, CATEGORY_COLORS[category][0])
    unexplained = [0 if peak_categories(each) else peak for peak, each in zip(peaks, rows, strict=True)]
    if any(unexplained):
        _bar(figure, "not attributed to a category", unexplained, unit, LINE)
    name_rows(figure, [_row_name(profile, each) for each in rows])
    for place, each in enumerate(rows):
        peak = peak_bytes(each)
        text = format_bytes(peak) if peak else ended(each)
        figure.add_annotation(
            text=text if peak else f"<i>{escape(text)}</i>",
            y=place,
            yref="y",
            xref="paper",
            x=1,
            xanchor="left",
            showarrow=False,
            font={"color": INK if peak else MUTED, "size": 13 if peak else 12},
        )
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 90), barmode="stack", bargap=0.3, showlegend=False)
    figure.update_layout(margin={"t": 30 if budget_in_sight(profile) else 8, "r": 92, "b": 44, "l": 8})
    figure.update_xaxes(title_text=f"memory at the peak, {unit.name}", range=[0, scaled(scale, unit) * 1.02])
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, ticklabelstandoff=6)
    if profile.budget_bytes and budget_in_sight(profile):
        budget_across(figure, profile.budget_bytes, unit)
    return figure


def budget_in_sight(profile: Profile) -> bool:
    """Is there a budget, near enough to the highest peak that bars on one scale with it can be read?"""
    peaks = [peak_bytes(each) or 0 for each in profile.results]
    return profile.budget_bytes is not None and profile.budget_bytes <= 2 * max(peaks, default=0)


def memory_against_throughput(profile: Profile) -> go.Figure:
    """One point per method; the line joins those that no other beats in both, the dashed line is the budget."""
    points = front_points(profile)
    unit = unit_for(peak for _, peak, _ in points)
    names, look = labels(profile), looks(profile)
    best = sorted((rate, peak) for _, peak, rate in front(points))
    figure = go.Figure()
    if len(best) > 1:
        figure.add_scatter(
            mode="lines",
            name="no method is better in both",
            x=[rate for rate, _ in best],
            y=[scaled(peak, unit) for _, peak in best],
            line={"color": MUTED, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    for each, peak, rate in points:
        drawn = look[each.method.spec]
        figure.add_scatter(
            mode="markers",
            name=escape(names[each.method.spec]),
            x=[rate],
            y=[scaled(peak, unit)],
            customdata=[f"{format_bytes(peak)}, {format_rate(rate)} {profile.units}/s"],
            marker={"color": drawn.color, "symbol": drawn.symbol, "size": 13, "line": {"width": 2, "color": PAPER}}
            if not drawn.symbol.endswith("open")
            else {"color": drawn.color, "symbol": drawn.symbol, "size": 13, "line": {"width": 2}},
            hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        )
    tallest = max(peak for _, peak, _ in points)
    figure.update_layout(layout(430))
    budget = profile.budget_bytes
    if budget and budget <= 1.5 * tallest:
        ends = [min(rate for _, _, rate in points), max(rate for _, _, rate in points)]
        figure.add_scatter(
            mode="lines",
            name=f"budget: {format_bytes(budget)}",
            x=ends,
            y=[scaled(budget, unit)] * 2,
            line=LIMIT_LINE,
            hoverinfo="skip",
        )
        tallest = max(tallest, budget)
    lowest = min(peak for _, peak, _ in points)
    rates = [rate for _, _, rate in points]
    figure.update_xaxes(title_text=f"{profile.units} a second (right is faster)", range=_span(min(rates), max(rates)))
    figure.update_yaxes(title_text=f"peak, {unit.name} (low is better)")
    figure.update_yaxes(range=_span(scaled(lowest, unit), scaled(tallest, unit)))
    return figure


def _span(low: float, high: float) -> list[float]:
    """An axis around the values that begins at zero, or high enough to tell them apart, but never shows only a sliver:
    it covers at least half of the highest value."""
    start = min(low - 0.08 * high, 0.5 * high)
    return [max(0.0, start), 1.06 * high]


def front_points(profile: Profile) -> list[tuple[Result, int, float]]:
    """(result, peak, throughput) of every method that has both."""
    found = []
    for each, memory in measured_memory(profile):
        rate = profile.per_second(each.step_seconds)
        if rate:
            found.append((each, memory.peak_bytes, rate))
    return found


def front(points: list[tuple[Result, int, float]]) -> list[tuple[Result, int, float]]:
    """Those to which no other point is at least equal in both memory and throughput and better in one."""

    def beaten(peak: int, rate: float) -> bool:
        return any(p <= peak and r >= rate and (p, r) != (peak, rate) for _, p, r in points)

    return [point for point in points if not beaten(point[1], point[2])]


def kept_by_block(profile: Profile) -> go.Figure:
    """What every block keeps between forward and backward under plain, checkpoint and one reversible method."""
    shown = [(each, each.memory) for each in before_and_after(profile) if each.memory and each.memory.block_bytes]
    unit = unit_for(size for _, memory in shown for size in memory.block_bytes)
    series = [(each, [scaled(s, unit) for s in memory.block_bytes], _sizes(memory)) for each, memory in shown]
    figure = along_blocks(profile, series)
    figure.update_yaxes(title_text=f"kept by the block, {unit.name}", rangemode="tozero")
    return figure


def _sizes(memory: Memory) -> list[str]:
    return [format_bytes(size) for size in memory.block_bytes]


def along_blocks(profile: Profile, series: list[tuple[Result, list[float], list[str]]]) -> go.Figure:
    """One line per method along the blocks, from (result, values, values as text)."""
    names, look = labels(profile), looks(profile)
    figure = go.Figure()
    for each, values, texts in series:
        drawn = look[each.method.spec]
        figure.add_scatter(
            mode="lines+markers",
            name=escape(names[each.method.spec]),
            x=list(range(len(values))),
            y=values,
            customdata=texts,
            line={"color": drawn.color, "width": 1.5},
            marker={"symbol": drawn.symbol, "size": 6},
            hovertemplate="%{fullData.name}, block %{x}: %{customdata}<extra></extra>",
        )
    figure.update_layout(layout(340), showlegend=True)
    figure.update_xaxes(title_text="block", showgrid=False)
    return figure


def name_rows(figure: go.Figure, names: Iterable[str]) -> None:
    """Names at the left of rows 0, 1, 2, ...; two rows may have the same."""
    texts = list(names)
    figure.update_yaxes(tickvals=list(range(len(texts))), ticktext=texts)


def budget_across(figure: go.Figure, budget: int, unit: ByteUnit) -> None:
    """The budget as a line through rows of peaks."""
    at = scaled(budget, unit)
    figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=LIMIT_LINE | {"color": INK})
    figure.add_annotation(
        text=f"budget: {format_bytes(budget)}",
        x=at,
        xanchor="right",
        y=1,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        font={"color": BAD, "size": 12},
    )


def _bar(figure: go.Figure, name: str, sizes: list[int], unit: ByteUnit, color: str) -> None:
    figure.add_bar(
        orientation="h",
        name=name,
        y=list(range(len(sizes))),
        x=[scaled(size, unit) for size in sizes],
        customdata=[format_bytes(size) for size in sizes],
        marker={"color": color, "line": {"color": PAPER, "width": 0.5}},
        hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
    )


def _row_name(profile: Profile, result: Result) -> str:
    name = labels(profile)[result.method.spec]
    return row_label(f"{name} (predicted)" if result.status is Status.PREDICTED else name)
