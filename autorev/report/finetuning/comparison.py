"""Plotly figures across fine-tuning runs: losses over steps, memory and speed, and side bits against the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from autorev.finetuning.record import FineTuning
from autorev.format import format_bytes, format_rate, unit_for
from autorev.report.finetuning.figures import (
    change_axis,
    change_scale,
    logarithmic_losses,
    wide,
)
from autorev.report.finetuning.numbers import bits_text, change_text, loss_text
from autorev.report.finetuning.rows import (
    Look,
    RunGroup,
    difference,
    ends_as,
    families,
    finite,
    how_words,
    labels,
    looks,
    short,
    side_bits_ends,
    smoothed_training,
)
from autorev.report.palette import method_color
from autorev.report.plotting import DASHES, INK, MUTED, PAPER, ROW_HEIGHT, SYMBOLS, layout, row_label, scaled
from autorev.report.profile.figures import name_rows

Ends = tuple[float, float]
Points = list[tuple[int, float]]


def comparison_figures(groups: Sequence[RunGroup]) -> dict[str, go.Figure]:
    """Every figure across the runs of each group that there is data for, by the id of its place in a page."""
    found: dict[str, go.Figure] = {}
    for i, group in enumerate(groups):
        if not group.scratch and frontier_points(group.runs):
            found[f"g{i}-frontier"] = frontier(group.runs)
        for j, family in enumerate(families(group.runs)):
            if any(_validation(run) for run in family.runs):
                found[f"g{i}-f{j}-validation"] = validation(family.runs)
            if any(smoothed_training(run) for run in family.runs):
                found[f"g{i}-f{j}-training"] = training(family.runs)
        if any(run.peak_bytes for run in group.runs):
            found[f"g{i}-memory"] = memory(group.runs)
        if any(run.tokens_per_second for run in group.runs):
            found[f"g{i}-speed"] = speed(group.runs)
    return found


def validation(runs: Sequence[FineTuning]) -> go.Figure:
    """Validation loss over the steps; where the runs lie far apart, how far each is from the original model."""
    losses = [loss for run in runs for _, loss in _validation(run)]
    against = wide(losses) and all(run.pretrained and run.original for run in runs if run.evaluations)
    figure = go.Figure()
    for run, name, look, first in _drawn(runs, _validation):
        points = _validation(run)
        level = run.original.loss if run.original and against else 0.0
        figure.add_scatter(
            mode="lines+markers",
            name=escape(short(how_words(run))),
            legendgroup=escape(short(how_words(run))),
            showlegend=first,
            x=[step for step, _ in points],
            y=[change_scale(loss - level) if against else round(loss, 5) for _, loss in points],
            customdata=[loss_text(loss) for _, loss in points],
            line={"color": look.color, "dash": look.dash, "width": _width(run)},
            marker={"symbol": look.symbol, "size": 8},
            hovertemplate=f"{escape(name)}, step %{{x}}: %{{customdata}}<extra></extra>",
        )
    last = max((trace.x[-1] for trace in figure.data), default=0)
    originals = {run.original.loss for run in runs if run.pretrained and run.original and finite(run.original.loss)}
    for level in sorted(originals)[:1] if len(originals) == 1 else ():
        figure.add_scatter(
            mode="lines",
            name=f"original model: {loss_text(level)}",
            x=[0, last],
            y=[0.0 if against else round(level, 5)] * 2,
            line={"color": INK, "width": 1.5, "dash": "dash"},
            hoverinfo="skip",
        )
    _along_steps(figure, "validation loss, nats")
    if against:
        changes = [loss - run.original.loss for run in runs if run.original for _, loss in _validation(run)]
        change_axis(figure, changes, "loss less the original's, nats")
    elif wide(losses):
        logarithmic_losses(figure, losses)
    return figure


def training(runs: Sequence[FineTuning]) -> go.Figure:
    """Smoothed training loss over the steps."""
    figure = go.Figure()
    for run, name, look, first in _drawn(runs, smoothed_training):
        points = smoothed_training(run)
        figure.add_scatter(
            mode="lines",
            name=escape(short(how_words(run))),
            legendgroup=escape(short(how_words(run))),
            showlegend=first,
            x=[step for step, _ in points],
            y=[round(loss, 5) for _, loss in points],
            line={"color": look.color, "dash": look.dash, "width": _width(run)},
            hovertemplate=f"{escape(name)}, step %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    _along_steps(figure, "training loss, nats")
    losses = [value for trace in figure.data for value in trace.y if value > 0]
    if wide(losses):
        logarithmic_losses(figure, losses)
    return figure


def _drawn(
    runs: Sequence[FineTuning], points_of: Callable[[FineTuning], Points]
) -> list[tuple[FineTuning, str, Look, bool]]:
    """(run, label, look, is it the first of its like) of all that have points, plain training last: it is thin, and
    what the rest is against.

    Seeds of one coupling look alike and share an entry of the legend."""
    rows = sorted(zip(runs, labels(runs), looks(runs), strict=True), key=lambda row: row[0].method.name == "plain")
    with_line = [row for row in rows if points_of(row[0])]
    firsts = {how_words(run): i for i, (run, _, _) in reversed(list(enumerate(with_line)))}
    return [(run, name, look, firsts[how_words(run)] == i) for i, (run, name, look) in enumerate(with_line)]


def _width(run: FineTuning) -> float:
    return 1.5 if run.method.name == "plain" else 2.5


def _along_steps(figure: go.Figure, title: str) -> None:
    entries = sum(trace.showlegend is not False for trace in figure.data)
    figure.update_layout(layout(340 + 11 * entries), showlegend=True)
    figure.update_xaxes(title_text="optimiser step", showgrid=False)
    figure.update_yaxes(title_text=title)


def _validation(run: FineTuning) -> Points:
    return [(e.step, e.loss) for e in run.evaluations if finite(e.loss)]


def memory(runs: Sequence[FineTuning]) -> go.Figure:
    """The peak of every run as a bar, the teacher a part of it."""
    unit = unit_for([run.peak_bytes or 0 for run in runs])
    rest = [scaled(max(0, (run.peak_bytes or 0) - run.teacher_bytes), unit) for run in runs]
    texts = [format_bytes(run.peak_bytes) if run.peak_bytes else "" for run in runs]
    figure = _bars(runs, rest, texts, f"peak memory, {unit.name}")
    if any(run.teacher_bytes and run.peak_bytes for run in runs):
        figure.add_bar(
            orientation="h",
            name="teacher",
            y=list(range(len(runs))),
            x=[scaled(run.teacher_bytes, unit) if run.peak_bytes else 0 for run in runs],
            customdata=[format_bytes(run.teacher_bytes) for run in runs],
            marker={"color": MUTED},
            hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        )
    return figure


def speed(runs: Sequence[FineTuning]) -> go.Figure:
    """Tokens a second of every run as a bar."""
    rates = [run.tokens_per_second for run in runs]
    return _bars(
        runs, [round(rate or 0, 3) for rate in rates], [format_rate(r) if r else "" for r in rates], "tokens/s"
    )


def _bars(runs: Sequence[FineTuning], values: list[float], texts: list[str], title: str) -> go.Figure:
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        name=title,
        y=list(range(len(runs))),
        x=values,
        customdata=texts,
        marker={"color": [look.color for look in looks(runs)]},
        hovertemplate="%{customdata}<extra></extra>",
    )
    for place, text in enumerate(texts):
        shown = {"text": text or "-", "y": place, "yref": "y", "xref": "paper", "x": 1, "xanchor": "left"}
        figure.add_annotation(shown, showarrow=False, font={"color": INK if text else MUTED, "size": 12})
    name_rows(figure, [row_label(name, 26) for name in labels(runs)])
    figure.update_layout(layout(ROW_HEIGHT * len(runs) + 70), barmode="stack", bargap=0.35, showlegend=False)
    figure.update_layout(margin={"t": 8, "r": 72, "b": 44, "l": 8})
    figure.update_xaxes(title_text=title, rangemode="tozero", nticks=5)
    figure.update_yaxes(range=[len(runs) - 0.5, -0.5], showgrid=False, ticklabelstandoff=6)
    return figure


def frontier_points(runs: Sequence[FineTuning]) -> list[tuple[str, FineTuning, Ends, float | None, float | None]]:
    """(name, run, side bits at start and end, loss increase before training, after it) of all that can be drawn."""
    found = []
    for run, name in zip(runs, labels(runs), strict=True):
        ends = side_bits_ends(run)
        before, after = difference(run.zero_shot, run.original), difference(run.final, run.original)
        before, after = (value if finite(value) else None for value in (before, after))
        if ends is not None and (before is not None or after is not None):
            found.append((name, run, ends, before, after))
    return found


def frontier(runs: Sequence[FineTuning]) -> go.Figure:
    """Side bits against the loss relative to the original model: hollow before training, filled after it."""
    points = frontier_points(runs)
    figure = go.Figure()
    drawn = [value for *_, before, after in points for value in (before, after) if value is not None]
    drawn += _calibrations(figure, runs)
    shown = set[str]()
    for name, run, ends, before, after in points:
        method = ends_as(run)
        both = before is not None and after is not None
        if both:
            figure.add_scatter(
                mode="lines",
                name=escape(short(method)),
                showlegend=False,
                legendgroup=escape(short(method)),
                x=list(ends),
                y=[change_scale(before or 0), change_scale(after or 0)],
                line={"color": method_color(method), "width": 1, "dash": "dot"},
                hoverinfo="skip",
            )
        for place, (bits, value) in enumerate(zip(ends, (before, after), strict=True)):
            if value is None:
                continue
            when = ("before training", "after training")[place]
            figure.add_scatter(
                mode="markers",
                name=escape(short(method)),
                legendgroup=escape(short(method)),
                # One entry for each coupling, and that filled if there is a filled one.
                showlegend=method not in shown and (place == 1 or not both),
                x=[round(bits, 4)],
                y=[change_scale(value)],
                customdata=[f"{escape(name)}, {when}: {bits_text(bits)} bits, {change_text(value)} nats"],
                marker=_marker(method, hollow=place == 0),
                hovertemplate="%{customdata}<extra></extra>",
            )
        shown.add(method)
    plain = [run for run in runs if run.method.name == "plain"]
    levels = {run.recipe.steps: level for run in plain if (level := difference(run.final, run.original)) is not None}
    measured = [each.side_bits for run in runs if run.calibration for each in run.calibration.assignments]
    most = max([bits for _, _, ends, _, _ in points for bits in ends] + measured, default=1.0)
    for steps, level in levels.items():
        if not finite(level):
            continue
        drawn.append(level)
        figure.add_scatter(
            mode="lines",
            name=f"plain after {steps} steps: {change_text(level)}",
            x=[-0.15, most + 0.15],
            y=[change_scale(level)] * 2,
            line={"color": method_color("plain"), "width": 1.5, "dash": "dash"},
            hoverinfo="skip",
        )
    figure.update_layout(layout(480), showlegend=True)
    figure.update_xaxes(title_text="side bits of an element and block, mean", range=[-0.2, most + 0.2], dtick=1)
    change_axis(figure, drawn, "loss against the original, nats")
    return figure


def _marker(method: str, hollow: bool) -> dict[str, Any]:
    symbol, color = SYMBOLS.get(method, "circle").removesuffix("-open"), method_color(method)
    if hollow:
        return {"symbol": f"{symbol}-open", "color": color, "size": 11, "line": {"width": 2}}
    return {"symbol": symbol, "color": color, "size": 12, "line": {"width": 1, "color": PAPER}}


def _calibrations(figure: go.Figure, runs: Sequence[FineTuning]) -> list[float]:
    """The assignments that were measured, as a line; returns the changes that were drawn."""
    drawn: list[float] = []
    for run in runs:
        if run.calibration is None:
            continue
        rows = [each for each in run.calibration.assignments if finite(each.increase)]
        drawn += [each.increase for each in rows]
        figure.add_scatter(
            mode="lines+markers",
            name="calibration, before training",
            showlegend=not any(trace.name == "calibration, before training" for trace in figure.data),
            x=[round(each.side_bits, 4) for each in rows],
            y=[change_scale(each.increase) for each in rows],
            customdata=[f"{bits_text(each.side_bits)} bits, {change_text(each.increase)} nats" for each in rows],
            line={"color": MUTED, "width": 1.5, "dash": DASHES["compile"]},
            marker={"size": 5, "color": MUTED},
            hovertemplate="calibration: %{customdata}<extra></extra>",
        )
    return drawn
