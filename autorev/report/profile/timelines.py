"""Plotly figures of memory over one traced step, stacked by category; drawn in light colours."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from autorev.format import ByteUnit, clean, format_bytes, format_seconds, unit_for
from autorev.profiler.readings import Timeline
from autorev.profiler.record import Profile
from autorev.report.palette import CATEGORY_COLORS
from autorev.report.plotting import INK, MUTED, PANEL, PAPER, layout, scaled
from autorev.report.profile.rows import with_timeline
from autorev.words import CATEGORY_TITLES

MOST_POINTS = 600
"""Of a timeline on a page, which is as many as a drawing has pixels to show."""


def timelines(profile: Profile) -> dict[str, go.Figure]:
    """Memory over the traced step of every method that has a timeline, all on one scale; by id, the first ones first.

    The ids are `timeline-N`, N counting through `with_timeline`'s two lists."""
    first, rest = with_timeline(profile)
    found = [(each, each.memory.timeline) for each in (*first, *rest) if each.memory and each.memory.timeline]
    highest = max((_total(line, i) for _, line in found for i in range(len(line.seconds))), default=0)
    unit = unit_for([highest])
    return {f"timeline-{i}": _timeline(line, highest, unit) for i, (_, line) in enumerate(found)}


def _timeline(line: Timeline, highest: int, unit: ByteUnit) -> go.Figure:
    kept = thinned(line)
    figure = go.Figure()
    for category, (color, _) in CATEGORY_COLORS.items():
        sizes = line.categories.get(category)
        if not sizes or not any(sizes):
            continue
        figure.add_scatter(
            mode="lines",
            name=CATEGORY_TITLES[category],
            x=[round(line.seconds[i], 5) for i in kept],
            y=[scaled(sizes[i], unit) for i in kept],
            stackgroup="memory",
            # Memory stays as it is until the next event.
            line={"width": 0, "color": color, "shape": "hv"},
            fillcolor=color,
            hovertemplate=f"%{{fullData.name}}: %{{y:.3f}} {unit.name}<extra></extra>",
        )
    figure.add_scatter(
        mode="lines",
        name="at work",
        x=[round(line.seconds[i], 5) for i in kept],
        y=[scaled(_total(line, i), unit) for i in kept],
        customdata=[f"block {line.blocks[i]}" if line.blocks[i] >= 0 else "no block" for i in kept],
        line={"width": 0, "color": MUTED, "shape": "hv"},  # nothing to see: it says in the hover which block it is
        hovertemplate=f"all: %{{y:.3f}} {unit.name}, %{{customdata}}<extra></extra>",
    )
    figure.update_layout(layout(300), showlegend=False, hovermode="x unified")
    figure.update_layout(margin={"t": 40, "r": 8, "b": 40, "l": 8})
    end = max([line.seconds[-1], *(end for _, _, end in line.marks)], default=0) if line.seconds else 1
    figure.update_xaxes(title_text="seconds of the traced step", range=[0, end], showgrid=False, nticks=6)
    figure.update_yaxes(title_text=f"live, {unit.name}", range=[0, scaled(highest, unit) * 1.12])
    _mark_phases(figure, line, end)
    _mark_peak(figure, line, unit, end)
    return figure


def thinned(line: Timeline) -> list[int]:
    """The indices of at most `MOST_POINTS` points: of every stretch the highest and the lowest, so also the peak."""
    count = len(line.seconds)
    if count <= MOST_POINTS:
        return list(range(count))
    stretches = MOST_POINTS // 2 - 1
    kept = {0, count - 1}
    for i in range(stretches):
        stretch = range(i * count // stretches, (i + 1) * count // stretches)
        kept |= {max(stretch, key=lambda at: _total(line, at)), min(stretch, key=lambda at: _total(line, at))}
    return sorted(kept)


def _total(line: Timeline, at: int) -> int:
    return sum(sizes[at] for sizes in line.categories.values())


def _mark_phases(figure: go.Figure, line: Timeline, end: float) -> None:
    """Backward on a tinted ground between forward and optimizer, each named above."""
    for name, begin, stop in line.marks:
        if name == "backward":
            ground = {"type": "rect", "x0": begin, "x1": stop, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
            figure.add_shape(ground, fillcolor=PANEL, line={"width": 0})
        if begin > 0:
            rule = {"type": "line", "x0": begin, "x1": begin, "y0": 0, "y1": 1, "yref": "paper"}
            figure.add_shape(rule, line={"color": MUTED, "width": 1, "dash": "dot"})
        middle, narrow = (begin + stop) / 2, (stop - begin) < 0.2 * end
        # A phase too narrow for its name has it at that side of the figure.
        at, anchor = (middle, "center") if not narrow else (0, "left") if middle < end / 2 else (end, "right")
        figure.add_annotation(
            text=escape(clean(name)),
            x=at,
            xanchor=anchor,
            y=1.0,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            font={"color": MUTED, "size": 11},
        )


def _mark_peak(figure: go.Figure, line: Timeline, unit: ByteUnit, end: float) -> None:
    if not line.seconds:
        return
    at, size = line.seconds[line.peak_at], _total(line, line.peak_at)
    figure.add_annotation(
        text=f"<b>{format_bytes(size)}</b>",
        x=at,
        y=scaled(size, unit),
        yanchor="bottom",
        xanchor="left" if at < end / 2 else "right",
        showarrow=False,
        font={"color": INK, "size": 12},
    )
    figure.add_scatter(
        mode="markers",
        name="peak",
        x=[round(at, 5)],
        y=[scaled(size, unit)],
        marker={"color": INK, "size": 7, "line": {"color": PAPER, "width": 1.5}},
        hovertemplate=f"peak: {format_bytes(size)} after {format_seconds(at)}<extra></extra>",
    )
