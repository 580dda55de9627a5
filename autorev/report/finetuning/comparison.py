"""The page of several fine-tuning runs: losses over steps, memory and speed, and side bits against the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from autorev.finetuning.record import EXPORT_LIMIT, FineTuning
from autorev.format import clean, format_bytes, format_rate, plural, unit_for
from autorev.report import document as doc
from autorev.report import plots, shared
from autorev.report.finetuning import figures, view
from autorev.report.finetuning import tables_of_many as many
from autorev.report.finetuning.numbers import bits_text, change_text, loss_text
from autorev.report.finetuning.verdict import verdict
from autorev.report.palette import look_of
from autorev.report.plots import Part as Bar

Ends = tuple[float, float]
Points = list[tuple[int, float]]


def page(runs: Sequence[FineTuning], command: str) -> doc.Page:
    """What the runs say together; `command` is what made the report."""
    found = [replace(group, runs=tuple(view.ranked(group.runs))) for group in view.groups(runs)]
    lead, notice = f"Of {plural(len({group.model for group in found}), 'model')}, compared", []
    if unfinished := [clean(run.name) for run in runs if not run.complete]:
        are, them = ("is", "it") if len(unfinished) == 1 else ("are", "them")
        title = doc.strong(f"{plural(len(unfinished), 'run')} {are} not complete:")
        words = doc.prose(f" `--resume` goes on with {them}.").spans
        notice.append(doc.text(title, f" {', '.join(unfinished)}.", *words, kind="notice"))
    sections = [section for i, group in enumerate(found) for section in _group(group, f"g{i}")]
    return shared.page_of_many(runs, "fine-tuning", lead, notice, sections, many.environments(runs), command)


def _group(group: view.RunGroup, id: str) -> Iterator[doc.Section]:
    runs = group.runs
    table = many.scratch_table(runs) if group.scratch else many.runs_table(runs, shares=True)
    yield doc.Section(group.title, (table, doc.text(_meanings(group), kind="hint")))
    drawn = frontier(runs, f"{id}-frontier") if not group.scratch else []
    if drawn:
        said = (
            "Further left is less memory, lower is better. Hollow: after the conversion, before any training. Filled: "
            "after training; below 0 it learned more from the text than the coupling cost. The table above has the "
            "figures."
        )
        yield doc.Section("Side bits against the loss", (doc.captioned(doc.Grid(tuple(drawn)), caption=said),))
    for j, family in enumerate(view.families(runs)):
        parts = tuple(_family(family, f"{id}-f{j}"))
        if parts:
            yield doc.Section(family.title, parts)
    costs = [figure for figure in (memory(runs, f"{id}-memory"), speed(runs, f"{id}-speed")) if figure]
    if costs:
        said = "The highest peak of the steps that were looked at, and the speed of the others."
        if any(run.teacher_bytes for run in runs):
            said += " The grey part is the teacher, the frozen copy of the original that distillation needs."
        yield doc.Section("Memory and speed", (doc.captioned(doc.Grid(tuple(costs)), caption=said),))
    became = tuple(zip(view.labels(runs), map(_verdict, runs), strict=True))
    yield doc.Section(
        "What became of each", (doc.Fold("Show the verdict on every run", (doc.Facts(became, "method"),)),)
    )


def _meanings(group: view.RunGroup) -> str:
    plain = any(view.plain_of(run, group.runs) for run in group.runs)
    if group.scratch:
        said = "Validation loss in nats a token, each seed's with the seed in brackets."
        said += " Against plain: from the residual baseline by the same recipe, seed by seed." if plain else ""
        return f"{said} As the plain: how much higher the loss is with the trained weights in the plain architecture."
    said = (
        "Validation loss in nats a token; the small figure below it is the difference to the original model before "
        f"training, and to the coupling as the plain architecture, where red is more than {EXPORT_LIMIT}."
    )
    said += " Against plain training: by the same recipe, with the same data, order and seed." if plain else ""
    return (
        f"{said} ppl: perplexity. Agreement: places where the likeliest next token is the original's. Side bits: mean "
        "of an element and step."
    )


def _verdict(run: FineTuning) -> doc.Text:
    found = verdict(run)
    return doc.text(doc.strong(f"{found.title}."), " ", *doc.prose(found.text).spans)


def _family(family: view.Family, id: str) -> Iterator[doc.Part]:
    runs = family.runs
    if drawn := validation(runs, f"{id}-validation"):
        said = "The same held-out text each time; the dashed line is the original model."
        yield doc.captioned(
            doc.Grid(tuple(drawn)), many.evaluations_by_step(runs), caption=said, title="Validation loss"
        )
    if figure := training(runs, f"{id}-training"):
        said = (
            "Each line is a mean over neighbouring steps; with distillation, of the part that the text makes. Every "
            "step reads other text, some of it harder: what rises here for plain training too is the text."
        )
        yield doc.captioned(figure, many.training_by_step(runs), caption=said, title="Training loss")


def validation(runs: Sequence[FineTuning], id: str) -> list[doc.Figure]:
    """Validation loss over the steps; where the runs lie far apart, how far each is from the original model."""
    points = {run.name: [(e.step, e.loss) for e in run.evaluations if view.finite(e.loss)] for run in runs}
    losses = [loss for found in points.values() for _, loss in found]
    if not losses:
        return []
    far = max(losses) > 3 * min(losses)
    against = far and all(run.pretrained and run.original for run in runs if run.evaluations)

    def drawn(run: FineTuning) -> Points:
        level = run.original.loss if run.original and against else 0.0
        return [(e.step, e.loss - level) for e in run.evaluations if view.finite(e.loss)]

    series = _over_steps(runs, drawn, mode="lines+markers", size=8)
    last = max(step for found in points.values() for step, _ in found)
    originals = {
        run.original.loss for run in runs if run.pretrained and run.original and view.finite(run.original.loss)
    }
    if len(originals) == 1:
        (level,) = originals
        name, at = f"original model: {loss_text(level)}", 0.0 if against else level
        series.append(plots.Series.level(name, [0, last], at, plots.INK))
    label = "Validation loss over the optimiser steps"
    if against:
        return figures.panels(id, label, series, figures.STEPS, "loss less the original's, nats")
    title, y_axis = figures.loss_axis(series, "validation loss, nats")
    return [plots.lines(id, label, series, figures.STEPS, title, height=360, y_axis=y_axis)]


def training(runs: Sequence[FineTuning], id: str) -> doc.Figure | None:
    """Smoothed training loss over the steps."""
    series = _over_steps(runs, view.smoothed_training, mode="lines")
    title, y_axis = figures.loss_axis(series, "training loss, nats")
    label = "Training loss over the optimiser steps"
    return plots.lines(id, label, series, figures.STEPS, title, height=360, y_axis=y_axis) if series else None


def _over_steps(
    runs: Sequence[FineTuning], points_of: Callable[[FineTuning], Points], **how: Any
) -> list[plots.Series]:
    """A line of every run that has points, plain training last: it is thin, and what the rest is against.

    Seeds of one coupling look alike and share an entry of the legend."""
    rows = sorted(
        zip(runs, view.labels(runs), view.looks(runs), strict=True), key=lambda row: row[0].method.name == "plain"
    )
    shown, series = set[str](), []
    for run, _, look in rows:
        if found := points_of(run):
            name = view.short(view.how_words(run))
            width = 1.5 if run.method.name == "plain" else 2.5
            series.append(
                replace(figures.coupled(look, name, found), width=width, legend=name not in shown, group=name, **how)
            )
            shown.add(name)
    return series


def memory(runs: Sequence[FineTuning], id: str) -> doc.Figure | None:
    """The peak of every run as a bar, the teacher a part of it."""
    if not any(run.peak_bytes for run in runs):
        return None
    unit = unit_for([run.peak_bytes or 0 for run in runs])
    notes = [format_bytes(run.peak_bytes) if run.peak_bytes else "-" for run in runs]
    rest = [plots.in_unit(max(0, (run.peak_bytes or 0) - run.teacher_bytes), unit) for run in runs]
    parts = [Bar("peak", [look.color for look in view.looks(runs)], rest, notes)]
    if any(run.teacher_bytes and run.peak_bytes for run in runs):
        teacher = [plots.in_unit(run.teacher_bytes, unit) if run.peak_bytes else 0.0 for run in runs]
        parts.append(Bar("teacher", plots.MUTED, teacher, [format_bytes(run.teacher_bytes) for run in runs]))
    names = [plots.row_name(name, 26) for name in view.labels(runs)]
    return plots.bars(id, "Peak memory of every run", names, parts, f"peak memory, {unit.name}", notes)


def speed(runs: Sequence[FineTuning], id: str) -> doc.Figure | None:
    """Tokens a second of every run as a bar."""
    rates = [run.tokens_per_second for run in runs]
    if not any(rates):
        return None
    parts = [
        Bar(
            "tokens/s",
            [look.color for look in view.looks(runs)],
            [r or 0.0 for r in rates],
            list(map(format_rate, rates)),
        )
    ]
    names = [plots.row_name(name, 26) for name in view.labels(runs)]
    return plots.bars(id, "Tokens a second of every run", names, parts, "tokens/s", list(map(format_rate, rates)))


def frontier_points(runs: Sequence[FineTuning]) -> list[tuple[str, FineTuning, Ends, list[float | None]]]:
    """(name, run, side bits at start and end, loss increase before and after training) of all that can be drawn."""
    found = []
    for run, name in zip(runs, view.labels(runs), strict=True):
        ends = view.side_bits_ends(run)
        changes = [view.difference(run.zero_shot, run.original), view.difference(run.final, run.original)]
        finites = [value if view.finite(value) else None for value in changes]
        if ends is not None and finites != [None, None]:
            found.append((name, run, ends, finites))
    return found


def frontier(runs: Sequence[FineTuning], id: str) -> list[doc.Figure]:
    """Side bits against the loss relative to the original model: hollow before training, filled after it."""
    points = frontier_points(runs)
    if not points:
        return []
    drawn = [figures.calibrated("calibration, before training", run.calibration) for run in runs if run.calibration]
    series = [replace(each, legend=i == 0) for i, each in enumerate(each for each in drawn if each.x)]
    shown = set[str]()
    for name, run, ends, changes in points:
        method = view.ends_as(run)
        look, entry, both = look_of(method), view.short(method), None not in changes
        if both:
            way: dict[str, Any] = {"dash": "dot", "width": 1, "mode": "lines", "legend": False, "group": entry}
            series.append(plots.Series(entry, ends, changes, color=look.color, **way))
        for place, (bits, value) in enumerate(zip(ends, changes, strict=True)):
            if value is None:
                continue
            when, hollow = ("before training", "after training")[place], place == 0
            symbol = look.symbol.removesuffix("-open") + ("-open" if hollow else "")
            said = f"{name}, {when}: {bits_text(bits)} bits, {change_text(value)} nats"
            # One entry for each coupling, and that filled if there is a filled one.
            how: dict[str, Any] = {
                "legend": method not in shown and not (hollow and both),
                "group": entry,
                "mode": "markers",
            }
            series.append(
                plots.Series(
                    entry, [bits], [value], [said], look.color, symbol, size=11 + place, outlined=hollow, **how
                )
            )
        shown.add(method)
    most = max(value for each in series for value in each.x if value is not None) if series else 1.0
    plain = [run for run in runs if run.method.name == "plain"]
    levels = {run.recipe.steps: view.difference(run.final, run.original) for run in plain}
    for steps, level in levels.items():
        if level is not None and view.finite(level):
            name, ends = f"plain after {steps} steps: {change_text(level)}", (-0.15, most + 0.15)
            series.append(plots.Series.level(name, ends, level, look_of("plain").color))
    x_axis = {"range": [-0.2, most + 0.2], "dtick": 1}
    title, y_title = "side bits of an element and block, mean", "loss against the original, nats"
    label = "Side bits against the loss relative to the original model"
    return figures.panels(id, label, series, title, y_title, x_axis=x_axis)
