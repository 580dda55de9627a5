"""The plots of one fine-tuning run; what a record does not hold has no plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, log10
from typing import Any

from autorev.finetuning.record import Calibration, FineTuning, Logged
from autorev.format import format_bytes, unit_for
from autorev.report import maps, plots
from autorev.report.document import Figure
from autorev.report.finetuning import numbers, view
from autorev.report.palette import Look

_FEWEST_TO_SMOOTH = 12
"""Steps, before a mean over the neighbouring ones says more than the steps themselves."""
_WIDE = 3.0
"""Highest over lowest loss, from which on a logarithmic axis tells more."""
_NEAR = 0.25
"""Nats: what lies closer to the original model than this has a panel of its own where other runs lie far away."""
STEPS = "optimiser step"


def loss_over_steps(run: FineTuning) -> Figure | None:
    """Training loss and validation loss by step, the original model's as a line, and the plain one's at the end."""
    if not (run.logged or run.evaluations):
        return None
    look, series = view.looks([run])[0], []
    rows = [row for row in run.logged if view.finite(view.training_loss(row))]
    steps, losses = [row.step for row in rows], [view.training_loss(row) for row in rows]
    smooth = len(rows) >= _FEWEST_TO_SMOOTH
    if rows:
        name, opacity = ("training, each step", 0.45) if smooth else ("training", 0.9)
        series.append(_line(name, steps, losses, plots.MUTED, width=1, opacity=opacity))
    if smooth:
        window = _window(len(rows))
        mean = numbers.running_mean(losses, window)
        series.append(_line(f"training, mean of {window} steps", steps, mean, plots.MUTED, width=2.5))
    end = max([run.recipe.steps, *(row.step for row in run.logged)])
    if run.original is not None and view.finite(run.original.loss):
        whose = "original model" if run.pretrained else "random weights"
        name, level = f"{whose}: {numbers.loss_text(run.original.loss)}", run.original.loss
        series.append(plots.Series.level(name, [0, end], level, plots.INK))
    evaluations = [e for e in run.evaluations if view.finite(e.loss)]
    if evaluations:
        x, y = [e.step for e in evaluations], [e.loss for e in evaluations]
        how: dict[str, Any] = {"mode": "lines+markers", "size": 9, "outlined": True}
        series.append(_line("validation", x, y, look.color, **how))
    if run.vanilla is not None and run.method.reversible and view.finite(run.vanilla.loss):
        name = f"as the plain architecture: {numbers.loss_text(run.vanilla.loss)}"
        ring: dict[str, Any] = {"symbol": "circle-open", "size": 15, "mode": "markers", "outlined": True}
        series.append(_line(name, [run.vanilla.step], [run.vanilla.loss], plots.INK, **ring))
    title, y_axis = loss_axis(series, "loss, nats a token")
    x_axis = {"range": [-0.015 * end, 1.03 * end]}
    label = "Training and validation loss over the optimiser steps"
    return plots.lines("loss", label, series, STEPS, title, height=430, x_axis=x_axis, y_axis=y_axis)


def loss_axis(series: Sequence[plots.Series], title: str) -> tuple[str, dict[str, Any]]:
    """The title and the vertical axis of losses: logarithmic where they lie far apart, and then it says so."""
    losses = [value for each in series for value in each.y if value is not None and value > 0]
    if losses and max(losses) > _WIDE * min(losses):
        return f"{title} (log scale)", plots.log_axis(losses)
    return title, {}


def divergence_over_steps(run: FineTuning) -> Figure | None:
    """How far the model is from the original on the training text, which distillation minimises."""
    found = [
        (row.step, row.divergence) for row in run.logged if row.divergence is not None and view.finite(row.divergence)
    ]
    if not found:
        return None
    steps, values = [step for step, _ in found], [value for _, value in found]
    mean = numbers.running_mean(values, _window(len(values)))
    series = [
        _line("each step", steps, values, plots.MUTED, width=1, opacity=0.45),
        _line("mean over neighbouring steps", steps, mean, plots.ACCENT, width=2.5),
    ]
    label, y_axis = "KL of the original model and this one over the optimiser steps", {"rangemode": "tozero"}
    return plots.lines("divergence", label, series, STEPS, "KL(original, model), nats", height=280, y_axis=y_axis)


def schedule(run: FineTuning) -> list[Figure]:
    """Gamma and side bits over the steps, where they moved."""
    if not view.moved(run):
        return []
    return [
        _over_steps(run, "gamma", lambda row: row.gamma, "mean gamma", numbers.gamma_text),
        _over_steps(run, "side-bits", lambda row: row.side_bits, "side bits, mean over the steps", numbers.bits_text),
    ]


def _over_steps(
    run: FineTuning, id: str, value_of: Callable[[Logged], float | None], title: str, words: Callable[[float], str]
) -> Figure:
    found = [(row.step, value) for row in run.logged if (value := value_of(row)) is not None]
    texts = [f"step {step}: {words(value)}" for step, value in found]
    x, y = [step for step, _ in found], [value for _, value in found]
    series = [plots.Series(title, x, y, texts, view.looks([run])[0].color, width=2.5, mode="lines", shape="hv")]
    at = run.recipe.schedule_steps
    marked = [(at, "")] if run.recipe.schedule and 0 < at <= run.recipe.steps else []
    label, y_axis = f"{title.capitalize()} over the optimiser steps", {"rangemode": "tozero"}
    return plots.lines(id, label, series, STEPS, title, height=260, legend=False, y_axis=y_axis, marked=marked)


def memory_over_steps(run: FineTuning) -> Figure | None:
    """The peak of every step that was looked at, the teacher's part as a line if there is one."""
    rows = view.with_peak(run)
    if len(rows) < 2:
        return None
    unit = unit_for([peak for _, peak in rows])
    steps, texts = [row.step for row, _ in rows], [f"step {row.step}: {format_bytes(peak)}" for row, peak in rows]
    peaks = [plots.in_unit(peak, unit) for _, peak in rows]
    series = [replace(plots.Series.like(view.looks([run])[0], "peak of the step", steps, peaks, texts=texts), size=8)]
    if run.teacher_bytes:
        name = f"of which the teacher: {format_bytes(run.teacher_bytes)}"
        series.append(plots.Series.level(name, steps, plots.in_unit(run.teacher_bytes, unit), plots.MUTED))
    label, y_axis = "Peak memory of the steps that were looked at", {"rangemode": "tozero"}
    legend = bool(run.teacher_bytes)
    return plots.lines("memory", label, series, STEPS, f"peak, {unit.name}", height=300, legend=legend, y_axis=y_axis)


def sensitivity(run: FineTuning, calibration: Calibration) -> Figure | None:
    """What each block costs with fewer side bits than the rest: a row per number of bits, a column per block."""
    blocks = list(dict.fromkeys(each.block for each in calibration.sensitivities))
    if not blocks:
        return None
    chosen = chosen_bits(run)
    # Blocks that stayed at the finest have a row too, without a measurement: it is what the rest is against.
    bits = sorted({each.side_bits for each in calibration.sensitivities} | {*chosen.values()}, reverse=True)
    found = {(each.block, each.side_bits): each.increase for each in calibration.sensitivities}
    rows = [[found.get((block, k)) for block in blocks] for k in bits]
    ticks = {power: f"{10.0**power:g}" if power > -3 else "0" for power in range(-3, 2)}
    texts = [
        [f"{view.short(block)}: {numbers.change_text(value)} nats" for block, value in zip(blocks, row, strict=True)]
        for row in rows
    ]
    values = [[None if value is None else round(_power(value), 4) for value in row] for row in rows]
    marks = [(i, bits.index(chosen[block])) for i, block in enumerate(blocks) if chosen.get(block) in bits]
    label = "Loss increase with one block at fewer side bits"
    return maps.heat("sensitivity", label, values, texts, [str(k) for k in bits], ticks, marks, ("block", "side bits"))


def _power(increase: float) -> float:
    """The power of ten of an increase; one below a thousandth of a nat is none."""
    return log10(max(increase, 1e-3)) if isfinite(increase) else 1.0


def chosen_bits(run: FineTuning) -> dict[str, int]:
    """Side bits by block at the end, where the chains have one step for each block that was calibrated."""
    blocks = list(dict.fromkeys(each.block for each in run.calibration.sensitivities)) if run.calibration else []
    bits = [bits for chain in run.chains for bits in chain.side_bits]
    return dict(zip(blocks, bits, strict=True)) if len(blocks) == len(bits) else {}


def assignments(calibration: Calibration) -> list[Figure]:
    """Mean side bits against what they do to the loss; the chosen ones marked, the budget as a line."""
    measured = calibrated("measured", calibration)
    series = [measured] if measured.x else []
    for each in calibration.assignments:
        if each.chosen and view.finite(each.increase):
            name = f"chosen: {numbers.bits_text(each.side_bits)} side bits, {numbers.change_text(each.increase)} nats"
            how: dict[str, Any] = {"color": plots.ACCENT, "size": 15, "mode": "markers", "outlined": True}
            series.append(plots.Series(name, [each.side_bits], [each.increase], ["chosen"], **how))
    if not series:
        return []
    most = max(each.side_bits for each in calibration.assignments)
    name = f"budget: {numbers.change_text(calibration.budget)} nats"
    series.append(plots.Series.level(name, [0, most], calibration.budget))
    x_axis = {"range": [-0.1, most + 0.15]}
    label = "Side bits against the loss increase"
    title = "side bits of an element and step, mean"
    return panels("assignments", label, series, title, "loss increase, nats", x_axis=x_axis)


def calibrated(name: str, calibration: Calibration, legend: bool = True) -> plots.Series:
    """The assignments that were measured, as a line."""
    rows = [each for each in calibration.assignments if view.finite(each.increase)]
    texts = [
        f"{numbers.bits_text(each.side_bits)} side bits: {numbers.change_text(each.increase)} nats" for each in rows
    ]
    x, y = [each.side_bits for each in rows], [each.increase for each in rows]
    return plots.Series(name, x, y, texts, dash="dot", width=1.5, size=6, legend=legend, group=name)


def panels(
    id: str, label: str, series: Sequence[plots.Series], x_title: str, y_title: str, **rest: Any
) -> list[Figure]:
    """Changes of a loss on a linear axis; where some lie far off, what is near zero once more in a panel of its own."""
    values = [value for each in series for value in each.y if value is not None]
    found = [plots.lines(id, label, series, x_title, y_title, height=400, y_axis={"zeroline": True}, **rest)]
    near = [value for value in values if abs(value) <= _NEAR]
    if near and max(map(abs, values)) > 4 * _NEAR:
        ends = [min(near) - 0.1 * _NEAR, max(near) + 0.1 * _NEAR]
        y_axis, title = {"range": ends, "zeroline": True}, f"{y_title}, within {_NEAR:g} of the original"
        found.append(
            plots.lines(f"{id}-near", f"{label}, near zero", series, x_title, title, height=400, y_axis=y_axis, **rest)
        )
    return found


def coupled(look: Look, name: str, points: Sequence[tuple[int, float]], **rest: Any) -> plots.Series:
    """Losses of a run over its steps."""
    texts = [f"step {step}: {numbers.loss_text(loss)}" for step, loss in points]
    return plots.Series.like(
        look, name, [step for step, _ in points], [loss for _, loss in points], texts=texts, **rest
    )


def _window(count: int) -> int:
    """An odd number of neighbouring steps, of `count`, that are averaged."""
    return max(5, count // 12) | 1


def _line(name: str, steps: Sequence[int], values: Sequence[float], color: str, **how: Any) -> plots.Series:
    texts = [f"step {step}: {numbers.loss_text(value)}" for step, value in zip(steps, values, strict=True)]
    return plots.Series(name, steps, values, texts, color, **{"mode": "lines", **how})
