"""Plotly figures of a profile's times, of its predictions, and of the sizes it swept; drawn in light colours."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from autorev.format import format_bytes, format_integer, format_rate, format_ratio, format_seconds, unit_for
from autorev.profiler.record import Point, Profile, Result
from autorev.report.palette import OVERHEAD_COLORS
from autorev.report.plotting import (
    ACCENT,
    INK,
    LIMIT_LINE,
    LINE,
    MUTED,
    PAPER,
    ROW_HEIGHT,
    layout,
    logarithmic,
    logarithmic_values,
    row_label,
    scaled,
)
from autorev.report.profile.figures import along_blocks, name_rows
from autorev.report.profile.rows import after, axes, by_method, labels, largest, looks
from autorev.words import AXIS_TITLES


def time_figures(profile: Profile) -> dict[str, go.Figure]:
    """Every figure of time, of prediction and of sweeps that the record has data for, by the id of its place."""
    found: dict[str, go.Figure] = {}
    if any(each.samples for each in profile.results):
        found["steps"] = every_step(profile)
    if any(each.work and each.work.blocks for each in block_results(profile)):
        found["forward-by-block"], found["backward-by-block"] = time_by_block(profile)
    if any(each.work and each.work.overhead for each in profile.results):
        found["overhead"] = overhead(profile)
    if prediction_ratios(profile):
        found["prediction"] = prediction_against_measurement(profile)
    for axis in axes(profile):
        if any(point.peak_bytes for point in profile.points if point.axis == axis):
            found[f"sweep-{axis}"] = sweep(profile, axis)
    if any(rate for _, _, rate in largest_batches(profile)):
        found["largest-batch"] = throughput_at_largest_batch(profile)
    return found


def every_step(profile: Profile) -> go.Figure:
    """Every timed step as a dot, the median as a bar: what lies apart is different, what overlaps may not be."""
    rows = [each for each in profile.results if each.samples]
    names, look = labels(profile), looks(profile)
    figure = go.Figure()
    for place, each in enumerate(rows):
        drawn, middle = look[each.method.spec], each.step_seconds or 0.0
        # Rounds stand below each other within the row, so that a slow round is seen as one.
        heights = [_height(place, i, len(each.rounds)) for i, r in enumerate(each.rounds) for _ in r.steps]
        figure.add_scatter(
            mode="markers",
            name=escape(names[each.method.spec]),
            x=[round(seconds, 6) for seconds in each.samples],
            y=heights,
            customdata=[format_seconds(seconds) for seconds in each.samples],
            marker={"color": drawn.color, "size": 6, "opacity": 0.6},
            hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        )
        bar = {"type": "line", "x0": middle, "x1": middle, "y0": place - 0.38, "y1": place + 0.38}
        figure.add_shape(bar, line={"color": INK, "width": 2})
        figure.add_annotation(
            text=format_seconds(middle) + ("*" if each.in_doubt else ""),
            y=place,
            xref="paper",
            x=1,
            xanchor="left",
            showarrow=False,
        )
    name_rows(figure, [row_label(names[each.method.spec]) for each in rows])
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 80), showlegend=False)
    figure.update_layout(margin={"t": 8, "r": 76, "b": 44, "l": 8})
    figure.update_xaxes(title_text="seconds of a step", rangemode="tozero")
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, ticklabelstandoff=6)
    return figure


def _height(place: int, number: int, count: int) -> float:
    return round(place + (0 if count < 2 else 0.5 * (number / (count - 1) - 0.5)), 3)


def block_results(profile: Profile) -> list[Result]:
    """Plain, checkpoint and one reversible method, as far as their blocks were timed."""
    three = (by_method(profile, "plain"), by_method(profile, "checkpoint"), after(profile))
    return [each for each in three if each is not None and each.work is not None and each.work.blocks]


def time_by_block(profile: Profile) -> tuple[go.Figure, go.Figure]:
    """Forward and backward of every block under plain, checkpoint and one reversible method, on one scale."""
    shown = [(each, each.work) for each in block_results(profile) if each.work]
    highest = max(max(block.forward, block.backward) for _, work in shown for block in work.blocks) * 1e3
    made = []
    for phase in ("forward", "backward"):
        times = [(each, [getattr(block, phase) for block in work.blocks]) for each, work in shown]
        series = [(each, [round(t * 1e3, 4) for t in of], [format_seconds(t) for t in of]) for each, of in times]
        figure = along_blocks(profile, series)
        figure.update_yaxes(title_text=f"{phase}, milliseconds", range=[0, highest * 1.05])
        made.append(figure)
    return made[0], made[1]


def overhead(profile: Profile) -> go.Figure:
    """The instrumented step of every method, by what it was spent on."""
    rows = [(each, each.work) for each in profile.results if each.work is not None]
    kinds = list(dict.fromkeys([*OVERHEAD_COLORS, *(kind for _, work in rows for kind in work.overhead)]))
    figure = go.Figure()
    rest = [max(0.0, work.instrumented_seconds - sum(work.overhead.values())) for _, work in rows]
    parts = [("the rest of the step", LINE, rest)]
    for kind in kinds:
        color = OVERHEAD_COLORS.get(kind, (MUTED, MUTED))[0]
        parts.append((kind, color, [work.overhead.get(kind, 0.0) for _, work in rows]))
    for name, color, seconds in parts:
        if any(seconds):
            figure.add_bar(
                orientation="h",
                name=escape(name),
                y=list(range(len(rows))),
                x=[round(s, 6) for s in seconds],
                customdata=[format_seconds(s) for s in seconds],
                marker={"color": color, "line": {"color": PAPER, "width": 0.5}},
                hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
            )
    names = labels(profile)
    name_rows(figure, [row_label(names[each.method.spec]) for each, _ in rows])
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 120), barmode="stack", bargap=0.3, showlegend=True)
    figure.update_layout(margin={"t": 8}, legend_traceorder="normal")
    figure.update_xaxes(title_text="seconds of the instrumented step")
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, ticklabelstandoff=6)
    return figure


def prediction_ratios(profile: Profile) -> list[tuple[Result, float | None, float | None]]:
    """(result, predicted over measured peak, attributed over measured peak) where one of the two is known."""
    found = []
    for each in profile.results:
        if each.memory is None:
            continue
        peak, attributed = each.memory.peak_bytes, each.memory.attributed_bytes
        predicted = each.prediction.peak_bytes / peak if each.prediction and peak else None
        followed = attributed / peak if attributed is not None and peak else None
        if predicted is not None or followed is not None:
            found.append((each, predicted, followed))
    return found


def prediction_against_measurement(profile: Profile) -> go.Figure:
    """The predicted peak and the sum of the followed tensors, each over the peak that the allocator measured."""
    rows = prediction_ratios(profile)
    figure = go.Figure()
    for name, ratios, symbol, color in (
        ("predicted / measured", [ratio for _, ratio, _ in rows], "circle", INK),
        ("attributed / measured", [ratio for _, _, ratio in rows], "line-ns", ACCENT),
    ):
        figure.add_scatter(
            mode="markers",
            name=name,
            x=[None if ratio is None else round(ratio, 4) for ratio in ratios],
            y=list(range(len(rows))),
            customdata=[format_ratio(ratio, 1) for ratio in ratios],
            marker={"color": color, "symbol": symbol, "size": 11, "line": {"color": color, "width": 2}},
            hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        )
    names = labels(profile)
    name_rows(figure, [row_label(names[each.method.spec]) for each, _, _ in rows])
    figure.add_shape(type="line", x0=1, x1=1, y0=0, y1=1, yref="paper", line=LIMIT_LINE | {"color": MUTED})
    off = max(abs(ratio - 1) for _, *pair in rows for ratio in pair if isinstance(ratio, float))
    reach = max(0.1, 1.15 * off)
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 120))
    figure.update_layout(margin={"t": 8})
    figure.update_xaxes(title_text="1 = as measured", range=[max(0, 1 - reach), 1 + reach])
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], griddash="dot", ticklabelstandoff=6)
    return figure


def sweep(profile: Profile, axis: str) -> go.Figure:
    """The peak of every method along `axis`; a cross where a size did not fit the budget. Both axes logarithmic."""
    points = [point for point in profile.points if point.axis == axis]
    values = sorted({point.value for point in points})
    sizes = [point.peak_bytes for point in points if point.peak_bytes]
    budget = profile.budget_bytes
    unit = unit_for(sizes)
    names, look = labels(profile), looks(profile)
    figure = go.Figure()
    for spec in dict.fromkeys(point.method for point in points):
        line = sorted((point for point in points if point.method == spec and point.peak_bytes), key=_value)
        drawn = look[spec]
        figure.add_scatter(
            mode="lines+markers",
            name=escape(names[spec]),
            x=[point.value for point in line],
            y=[scaled(point.peak_bytes or 0, unit) for point in line],
            customdata=[f"{format_integer(p.value)}: {format_bytes(p.peak_bytes or 0)}" for p in line],
            line={"color": drawn.color, "dash": drawn.dash, "width": 2},
            marker={"symbol": drawn.symbol, "size": 7},
            hovertemplate=f"%{{fullData.name}}, {escape(axis)} %{{customdata}}<extra></extra>",
        )
    if budget:
        stopped = [point for point in points if point.peak_bytes is None]
        figure.add_scatter(
            mode="lines",
            name=f"budget: {format_bytes(budget)}",
            x=[values[0], values[-1]],
            y=[scaled(budget, unit)] * 2,
            line=LIMIT_LINE,
            hoverinfo="skip",
        )
        figure.add_scatter(
            mode="markers",
            name="did not fit",
            x=[point.value for point in stopped],
            y=[scaled(budget, unit)] * len(stopped),
            customdata=[f"{escape(names[p.method])}, {format_integer(p.value)}" for p in stopped],
            marker={"symbol": "x-thin", "size": 9, "line": {"color": LIMIT_LINE["color"], "width": 1.5}},
            hovertemplate="%{customdata}: did not fit<extra></extra>",
        )
        sizes.append(budget)
    figure.update_layout(layout(460), showlegend=True)
    figure.update_xaxes(title_text=AXIS_TITLES.get(axis, escape(axis)))
    figure.update_yaxes(title_text=f"peak, {unit.name}")
    logarithmic_values(figure.layout.xaxis, [v for v in values if any(p.value == v and p.peak_bytes for p in points)])
    logarithmic(figure.layout.yaxis, sizes, unit.size)
    return figure


def _value(point: Point) -> int:
    return point.value


def largest_batches(profile: Profile) -> list[tuple[str, int, float | None]]:
    """(spec, largest batch, tokens or samples a second there) of every method for which it was sought."""
    specs = dict.fromkeys(point.method for point in profile.points if point.axis == "batch")
    found = [(spec, largest(profile, spec, "batch")) for spec in specs]
    return [(spec, *reached) for spec, reached in found if reached is not None]


def throughput_at_largest_batch(profile: Profile) -> go.Figure:
    """Tokens (or samples) a second at the largest batch that fits, one bar per method."""
    rows = largest_batches(profile)
    names, look = labels(profile), looks(profile)
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        y=list(range(len(rows))),
        x=[round(rate or 0, 3) for _, _, rate in rows],
        customdata=[f"batch {format_integer(batch)}: {format_rate(rate)} {profile.units}/s" for _, batch, rate in rows],
        marker={"color": [look[spec].color for spec, _, _ in rows]},
        hovertemplate="%{customdata}<extra></extra>",
    )
    for place, (_, batch, rate) in enumerate(rows):
        figure.add_annotation(
            text=f"batch {format_integer(batch)}" if rate else f"batch {format_integer(batch)}, <i>not timed</i>",
            y=place,
            xref="paper",
            x=1,
            xanchor="left",
            showarrow=False,
        )
    name_rows(figure, [row_label(names[spec]) for spec, _, _ in rows])
    figure.update_layout(layout(ROW_HEIGHT * len(rows) + 80), bargap=0.35, showlegend=False)
    figure.update_layout(margin={"t": 8, "r": 92, "b": 44, "l": 8})
    figure.update_xaxes(title_text=f"{profile.units} a second", rangemode="tozero")
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, ticklabelstandoff=6)
    return figure
