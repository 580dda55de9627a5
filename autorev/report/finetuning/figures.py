"""Plotly figures of one fine-tuning run, drawn in light colours; pure functions of the record.

What a record does not hold is left out: a figure without data is not made at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import asinh, ceil, floor, isfinite, log10

import plotly.graph_objects as go

from autorev.finetuning.record import Calibration, FineTuning, Logged
from autorev.format import clean, format_bytes, unit_for
from autorev.report.finetuning.numbers import bits_text, change_text, gamma_text, loss_text, running_mean
from autorev.report.finetuning.rows import finite, looks, moved, short, training_loss, with_peak
from autorev.report.palette import THEME
from autorev.report.plotting import ACCENT, BAD, INK, LIMIT_LINE, MUTED, PAPER, layout, scaled

SMALLEST_CHANGE = 0.01
"""Nats: below, a scale of changes is linear, and above it grows by powers of ten."""
_FEWEST_TO_SMOOTH = 12
"""Steps, before a mean over the neighbouring ones says more than the steps themselves."""
_WIDE = 3.0
"""Highest over lowest loss, from which on a logarithmic axis tells more."""


def run_figures(run: FineTuning) -> dict[str, go.Figure]:
    """Every figure of a run that the record has data for, by the id of its place in a page."""
    found: dict[str, go.Figure] = {}
    if run.logged or run.evaluations:
        found["loss"] = loss_over_steps(run)
    if any(finite(row.divergence) for row in run.logged):
        found["divergence"] = divergence_over_steps(run)
    if moved(run):
        found["gamma"] = _over_steps(run, lambda row: row.gamma, "mean gamma", gamma_text)
        found["side-bits"] = _over_steps(run, lambda row: row.side_bits, "side bits, mean over the steps", bits_text)
    if len(with_peak(run)) > 1:
        found["memory"] = memory_over_steps(run)
    if run.calibration is not None:
        if run.calibration.sensitivities:
            found["sensitivity"] = sensitivity(run.calibration, chosen_bits(run))
        if run.calibration.assignments:
            found["assignments"] = assignments(run.calibration)
    return found


def loss_over_steps(run: FineTuning) -> go.Figure:
    """Training loss and validation loss by step, the original model's as a line, and the plain one's at the end."""
    figure, color = go.Figure(), looks([run])[0].color
    rows = [row for row in run.logged if finite(training_loss(row))]
    losses = [training_loss(row) for row in rows]
    smooth = len(rows) >= _FEWEST_TO_SMOOTH
    if rows:
        name = "training, each step" if smooth else "training"
        _line(figure, name, [row.step for row in rows], losses, MUTED, width=1, opacity=0.45 if smooth else 0.9)
    if smooth:
        window = _window(len(rows))
        title = f"training, mean of {window} steps"
        _line(figure, title, [row.step for row in rows], running_mean(losses, window), MUTED, width=2.5)
    end = max([run.recipe.steps] + [row.step for row in run.logged])
    if run.original is not None and finite(run.original.loss):
        # Not a shape: the legend names it, also on a phone.
        whose = "original model" if run.pretrained else "random weights"
        flat, name = [run.original.loss] * 2, f"{whose}: {loss_text(run.original.loss)}"
        _line(figure, name, [0, end], flat, INK, dash="dash", width=1.5)
    evaluations = [e for e in run.evaluations if finite(e.loss)]
    if evaluations:
        _line(
            figure,
            "validation",
            [e.step for e in evaluations],
            [e.loss for e in evaluations],
            color,
            marker={"size": 9, "color": color, "line": {"color": PAPER, "width": 1.5}},
        )
    if run.vanilla is not None and run.method.reversible and finite(run.vanilla.loss):
        figure.add_scatter(
            mode="markers",
            name=f"as the plain architecture: {loss_text(run.vanilla.loss)}",
            x=[run.vanilla.step],
            y=[round(run.vanilla.loss, 5)],
            marker={"symbol": "circle-open", "size": 15, "color": INK, "line": {"width": 2}},
            hovertemplate="%{fullData.name}<extra></extra>",
        )
    figure.update_layout(layout(430), showlegend=True)
    figure.update_xaxes(title_text="optimiser step", range=[-0.015 * end, 1.03 * end], showgrid=False)
    figure.update_yaxes(title_text="loss, nats a token")
    shown = [value for trace in figure.data for value in trace.y if value > 0]
    if wide(shown):
        logarithmic_losses(figure, shown)
    return figure


def divergence_over_steps(run: FineTuning) -> go.Figure:
    """How far the model is from the original on the training text, which distillation minimises."""
    found = [(row.step, row.divergence) for row in run.logged if row.divergence is not None and finite(row.divergence)]
    steps, values = [step for step, _ in found], [value for _, value in found]
    figure = go.Figure()
    _line(figure, "each step", steps, values, MUTED, width=1, opacity=0.45)
    _line(figure, "mean over neighbouring steps", steps, running_mean(values, _window(len(values))), ACCENT, width=2.5)
    figure.update_layout(layout(280), showlegend=True)
    figure.update_xaxes(title_text="optimiser step", showgrid=False)
    figure.update_yaxes(title_text="KL(original, model), nats", rangemode="tozero")
    return figure


def memory_over_steps(run: FineTuning) -> go.Figure:
    """The peak of every step that was looked at, the teacher's part as a line if there is one."""
    rows = with_peak(run)
    unit = unit_for([peak for _, peak in rows])
    figure, look = go.Figure(), looks([run])[0]
    figure.add_scatter(
        mode="lines+markers",
        name="peak of the step",
        x=[row.step for row, _ in rows],
        y=[scaled(peak, unit) for _, peak in rows],
        customdata=[format_bytes(peak) for _, peak in rows],
        line={"color": look.color, "width": 2},
        marker={"symbol": look.symbol, "size": 8},
        hovertemplate="step %{x}: %{customdata}<extra></extra>",
    )
    if run.teacher_bytes:
        figure.add_scatter(
            mode="lines",
            name=f"of which the teacher: {format_bytes(run.teacher_bytes)}",
            x=[rows[0][0].step, rows[-1][0].step],
            y=[scaled(run.teacher_bytes, unit)] * 2,
            line={"color": MUTED, "width": 1.5, "dash": "dash"},
            hoverinfo="skip",
        )
    figure.update_layout(layout(300), showlegend=bool(run.teacher_bytes))
    figure.update_xaxes(title_text="optimiser step", showgrid=False)
    figure.update_yaxes(title_text=f"peak, {unit.name}", rangemode="tozero")
    return figure


def _over_steps(
    run: FineTuning, value_of: Callable[[Logged], float | None], title: str, text: Callable[[float], str]
) -> go.Figure:
    found = [(row.step, value) for row in run.logged if (value := value_of(row)) is not None]
    figure = go.Figure()
    figure.add_scatter(
        mode="lines",
        name=title,
        x=[step for step, _ in found],
        y=[round(value, 5) for _, value in found],
        customdata=[text(value) for _, value in found],
        line={"color": looks([run])[0].color, "width": 2.5, "shape": "hv"},
        hovertemplate="step %{x}: %{customdata}<extra></extra>",
    )
    if run.recipe.schedule and 0 < run.recipe.schedule_steps <= run.recipe.steps:
        at = run.recipe.schedule_steps
        figure.add_shape(
            type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line={"color": MUTED, "width": 1, "dash": "dot"}
        )
    figure.update_layout(layout(260), showlegend=False)
    figure.update_xaxes(title_text="optimiser step", showgrid=False)
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return figure


def sensitivity(calibration: Calibration, chosen: dict[str, int]) -> go.Figure:
    """What each block costs with fewer side bits than the rest: a row per number of bits, a column per block."""
    blocks = list(dict.fromkeys(each.block for each in calibration.sensitivities))
    # Blocks that stayed at the finest have a row too, without a measurement: it is what the rest is against.
    bits = sorted({each.side_bits for each in calibration.sensitivities} | {*chosen.values()}, reverse=True)
    found = {(each.block, each.side_bits): each.increase for each in calibration.sensitivities}
    rows = [[found.get((block, k)) for block in blocks] for k in bits]
    powers = range(-3, 2)
    figure = go.Figure()
    figure.add_heatmap(
        x=list(range(len(blocks))),
        y=list(range(len(bits))),
        z=[[None if value is None else round(_power(value), 4) for value in row] for row in rows],
        customdata=[
            [
                f"{escape(short(block))}: {'-' if v is None else change_text(v)} nats"
                for block, v in zip(blocks, row, strict=True)
            ]
            for row in rows
        ],
        zmin=powers[0],
        zmax=powers[-1],
        colorscale=[[0, THEME["line"][0]], [1, BAD]],
        xgap=1,
        ygap=1,
        colorbar={
            "orientation": "h",
            "thickness": 9,
            "len": 0.55,
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "outlinewidth": 0,
            "tickvals": list(powers),
            "ticktext": [f"{10.0**power:g}" if power > powers[0] else "0" for power in powers],
            "tickfont": {"size": 11, "color": MUTED},
        },
        hovertemplate="%{customdata}<extra></extra>",
    )
    places = [(i, bits.index(chosen[block])) for i, block in enumerate(blocks) if chosen.get(block) in bits]
    if places:
        figure.add_scatter(
            mode="markers",
            name="chosen",
            x=[x for x, _ in places],
            y=[y for _, y in places],
            marker={"symbol": "circle", "size": 7, "color": INK, "line": {"color": PAPER, "width": 1}},
            hoverinfo="skip",
        )
    figure.update_layout(layout(150 + 34 * len(bits)), showlegend=False)
    figure.update_layout(margin={"t": 52, "r": 8, "b": 44, "l": 8})
    figure.update_xaxes(title_text="block", showgrid=False, range=[-0.5, len(blocks) - 0.5], ticks="")
    figure.update_yaxes(title_text="side bits", tickvals=list(range(len(bits))), ticktext=[str(k) for k in bits])
    figure.update_yaxes(range=[len(bits) - 0.5, -0.5], showgrid=False, ticks="")
    return figure


def _power(increase: float) -> float:
    """The power of ten of an increase; one below a thousandth of a nat is none."""
    return log10(max(increase, 1e-3)) if isfinite(increase) else 1.0


def assignments(calibration: Calibration) -> go.Figure:
    """Mean side bits against what they do to the loss; the chosen ones marked, the budget as a line."""
    rows = [each for each in calibration.assignments if finite(each.increase)]
    figure = go.Figure()
    figure.add_scatter(
        mode="lines+markers",
        name="measured",
        x=[round(each.side_bits, 4) for each in rows],
        y=[change_scale(each.increase) for each in rows],
        customdata=[f"{bits_text(each.side_bits)} side bits: {change_text(each.increase)} nats" for each in rows],
        line={"color": MUTED, "width": 1.5},
        marker={"color": MUTED, "size": 7},
        hovertemplate="%{customdata}<extra></extra>",
    )
    for each in rows:
        if each.chosen:
            figure.add_scatter(
                mode="markers",
                name=f"chosen: {bits_text(each.side_bits)} side bits, {change_text(each.increase)} nats",
                x=[round(each.side_bits, 4)],
                y=[change_scale(each.increase)],
                marker={"color": ACCENT, "size": 15, "line": {"color": PAPER, "width": 2}},
                hovertemplate="%{fullData.name}<extra></extra>",
            )
    ends = [0, max([each.side_bits for each in rows], default=1.0)]
    figure.add_scatter(
        mode="lines",
        name=f"budget: {change_text(calibration.budget)} nats",
        x=ends,
        y=[change_scale(calibration.budget)] * 2,
        line=LIMIT_LINE,
        hoverinfo="skip",
    )
    figure.update_layout(layout(340), showlegend=True)
    figure.update_xaxes(title_text="side bits of an element and step, mean", range=[-0.1, ends[1] + 0.15])
    change_axis(figure, [*(each.increase for each in rows), calibration.budget], "loss increase, nats")
    return figure


def chosen_bits(run: FineTuning) -> dict[str, int]:
    """Side bits by block at the end, where the chains have one step for each block that was calibrated."""
    blocks = list(dict.fromkeys(each.block for each in run.calibration.sensitivities)) if run.calibration else []
    bits = [bits for chain in run.chains for bits in chain.side_bits]
    return dict(zip(blocks, bits, strict=True)) if len(blocks) == len(bits) else {}


def wide(losses: Sequence[float]) -> bool:
    """Do losses lie so far apart that a logarithmic axis tells more of them?"""
    return bool(losses) and max(losses) > _WIDE * min(losses)


def logarithmic_losses(figure: go.Figure, losses: Sequence[float]) -> None:
    """A logarithmic axis of losses; within one power of ten with more ticks than 1, 2 and 5."""
    low, high = min(losses) / 1.15, max(losses) * 1.1
    digits = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    steps = [digit * 10.0**power for power in range(floor(log10(low)), ceil(log10(high)) + 1) for digit in digits]
    ticks = [step for step in steps if low <= step <= high]
    figure.update_yaxes(type="log", range=[log10(low), log10(high)], title_text="loss, nats a token (logarithmic)")
    figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def change_scale(change: float) -> float:
    """Where a change of the loss is drawn: near 0 in proportion, farther away by powers of ten, of either sign."""
    return round(asinh(change / SMALLEST_CHANGE), 5)


def change_axis(figure: go.Figure, changes: Iterable[float], title: str) -> None:
    """The vertical axis of `change_scale`, with ticks at powers of ten within the changes."""
    values = [*changes, 0.0]
    low, high = change_scale(min(values)), change_scale(max(values))
    margin = max(0.06 * (high - low), 0.3)
    ticks = [sign * 10.0**power for power in range(-2, 3) for sign in (-1, 1)] + [0.0]
    ticks = sorted(tick for tick in ticks if low - margin <= change_scale(tick) <= high + margin)
    figure.update_yaxes(
        title_text=title,
        range=[low - margin, high + margin],
        tickvals=[change_scale(tick) for tick in ticks],
        ticktext=[f"{tick:+g}" if tick else "0" for tick in ticks],
    )


def _window(count: int) -> int:
    """An odd number of neighbouring steps, of `count`, that are averaged."""
    return max(5, count // 12) | 1


def _line(
    figure: go.Figure,
    name: str,
    steps: Sequence[int],
    values: Sequence[float],
    color: str,
    *,
    width: float = 2,
    dash: str = "solid",
    opacity: float = 1.0,
    marker: dict[str, object] | None = None,
) -> None:
    figure.add_scatter(
        mode="lines+markers" if marker else "lines",
        name=escape(clean(name)),
        x=list(steps),
        y=[round(value, 5) for value in values],
        line={"color": color, "width": width, "dash": dash},
        marker=marker or {},
        opacity=opacity,
        hovertemplate="%{fullData.name}, step %{x}: %{y:.3f}<extra></extra>",
    )
