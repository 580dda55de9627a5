"""Several fine-tuning runs as tables: every run of a model, and those from scratch by coupling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from autorev.finetuning.record import EXPORT_LIMIT, FineTuning
from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_integer,
    format_rate,
    format_seconds,
    format_share,
    plural,
)
from autorev.report import document as doc
from autorev.report.finetuning import numbers, view
from autorev.report.finetuning.verdict import export_gap
from autorev.report.profile.tables import environment_facts, optional_bytes

HEADS = (
    *("Run", "Trains", "Steps", "Side bits", "Original", "Before training", "After training", "As the plain"),
    *("Against plain training", "Agreement", "Peak", "Tokens/s", "Teacher"),
)

_MOST_COLUMNS = 10
"""Steps of a table of training losses."""


def runs_table(runs: Sequence[FineTuning], shares: bool = False) -> doc.Table:
    """A row per run with the figures that decide; columns in which no run has a figure are left out.

    `shares`: with every peak as a share of plain training's."""
    rows = tuple(_run(run, runs, shares) for run in runs)
    return doc.without_empty(doc.Table(HEADS, rows, "Every run", words=(1,)))


def _run(run: FineTuning, runs: Sequence[FineTuning], shares: bool) -> doc.Row:
    final, zero, gap = run.final, run.zero_shot, export_gap(run)
    notes = [view.how_words(run)]
    if not run.complete:
        notes.append(f"incomplete: {format_integer(view.steps_done(run))} of {format_integer(run.recipe.steps)} steps")
    if len({(other.recipe.learning_rate, other.recipe.seed) for other in runs}) > 1:
        notes.append(f"rate {run.recipe.learning_rate:g}, seed {run.recipe.seed}")
    cells = (
        view.trains_words(run),
        format_integer(run.recipe.steps),
        view.side_bits_words(run),
        numbers.loss_text(run.original.loss if run.original else None),
        doc.Cell(numbers.loss_text(zero.loss), _signed(view.difference(zero, run.original))) if zero else doc.NO_FIGURE,
        _after(run),
        doc.Cell(numbers.loss_text(run.vanilla.loss), _signed(gap), bad=gap > EXPORT_LIMIT)
        if run.vanilla and gap is not None
        else doc.NO_FIGURE,
        numbers.change_text(view.against_plain(run, runs)),
        doc.Cell(numbers.share_text(final.agreement), _kl(final.divergence))
        if final and final.agreement is not None
        else doc.NO_FIGURE,
        _peak(run, view.plain_of(run, runs) if shares else None),
        doc.Cell(format_rate(run.tokens_per_second), format_seconds(run.step_seconds) if run.step_seconds else ""),
        optional_bytes(run.teacher_bytes or None),
    )
    return doc.Row(clean(run.name), cells, tuple(notes))


def _peak(run: FineTuning, plain: FineTuning | None) -> doc.Cell:
    if run.peak_bytes is None:
        return doc.NO_FIGURE
    whole = plain.peak_bytes if plain else None
    return doc.Cell(format_bytes(run.peak_bytes), f"{format_share(run.peak_bytes, whole)} of plain's" if whole else "")


def _after(run: FineTuning) -> doc.Cell:
    """The final loss, or the latest of a run that goes on, saying so."""
    if run.final:
        return doc.Cell(
            numbers.loss_text(run.final.loss), f"ppl {numbers.perplexity_text(run.final.perplexity)}", strong=True
        )
    now = view.latest(run)
    return (
        doc.Cell(NOTHING, f"{numbers.loss_text(now.loss)} at step {format_integer(now.step)}")
        if now and now.step
        else doc.NO_FIGURE
    )


def _signed(change: float | None) -> str:
    return "" if change is None else numbers.change_text(change)


def _kl(divergence: float | None) -> str:
    return "" if divergence is None else f"KL {numbers.divergence_text(divergence)}"


def scratch_table(runs: Sequence[FineTuning]) -> doc.Table:
    """A row per coupling and recipe: the mean of the final losses over the seeds, each, and the gap to plain's."""
    found: dict[object, list[FineTuning]] = defaultdict(list)
    for run in runs:
        found[view.same_but_seed(run), view.how_words(run)].append(run)
    heads = (
        *("Coupling", "Side bits", "Loss after training", "Each seed", "Against plain", "As the plain", "Peak"),
        *("Tokens/s",),
    )
    return doc.without_empty(
        doc.Table(
            heads, tuple(_architecture(members, runs) for members in found.values()), "Every coupling from scratch"
        )
    )


def _architecture(members: Sequence[FineTuning], runs: Sequence[FineTuning]) -> doc.Row:
    first = members[0]
    finals = [(run.recipe.seed, run.final.loss) for run in members if run.final]
    gaps = [gap for run in members if (gap := view.against_plain(run, runs)) is not None]
    exported = [gap for run in members if (gap := export_gap(run)) is not None]
    peaks = [peak for run in members if (peak := run.peak_bytes) is not None]
    rates = [rate for run in members if (rate := run.tokens_per_second) is not None]
    waiting = len(members) - len(finals)
    notes = [view.recipe_title(first)] if len(view.families(runs)) > 1 else []
    notes += [f"incomplete: {waiting} of {len(members)} runs"] if waiting else []
    cells = (
        view.side_bits_words(first),
        doc.Cell(numbers.loss_text(fmean(loss for _, loss in finals)), _of(len(finals)), strong=True)
        if finals
        else doc.NO_FIGURE,
        ", ".join(f"{numbers.loss_text(loss)} ({seed})" for seed, loss in finals) or NOTHING,
        doc.Cell(numbers.change_text(fmean(gaps)), _of(len(gaps))) if gaps else doc.NO_FIGURE,
        doc.Cell(numbers.change_text(fmean(exported)), bad=fmean(exported) > EXPORT_LIMIT)
        if exported
        else doc.NO_FIGURE,
        optional_bytes(max(peaks, default=None)),
        format_rate(fmean(rates)) if rates else NOTHING,
    )
    return doc.Row(view.how_words(first), cells, tuple(notes))


def _of(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else ""


def evaluations_by_step(runs: Sequence[FineTuning]) -> doc.Table:
    """The validation loss of every run at every step it was evaluated."""
    return _by_step(runs, [{e.step: e.loss for e in run.evaluations} for run in runs], "Validation loss by step")


def training_by_step(runs: Sequence[FineTuning]) -> doc.Table:
    """The training loss of every run, each a mean over neighbouring steps, at some steps."""
    found = [dict(view.smoothed_training(run)) for run in runs]
    steps = sorted({step for losses in found for step in losses})
    kept = {*steps[:: -(-len(steps) // _MOST_COLUMNS) or 1], *steps[-1:]}
    shown = [{step: loss for step, loss in losses.items() if step in kept} for losses in found]
    return _by_step(runs, shown, "Training loss by step")


def _by_step(runs: Sequence[FineTuning], found: Sequence[dict[int, float]], label: str) -> doc.Table:
    steps = sorted({step for losses in found for step in losses})
    rows = [
        doc.Row(name, tuple(numbers.loss_text(losses.get(step)) for step in steps))
        for name, losses in zip(view.labels(runs), found, strict=True)
    ]
    heads = ("Run", *(f"step {format_integer(step)}" for step in steps))
    return doc.Table(heads, tuple(rows), label, fold="Show as a table")


def environments(runs: Sequence[FineTuning]) -> doc.Table:
    """Where the runs were made, those of one machine and one set of versions together, and from when to when."""
    found: dict[tuple[tuple[str, str], ...], list[FineTuning]] = defaultdict(list)
    heads: tuple[str, ...] = ()
    for run in runs:
        facts = environment_facts(run.environment)
        heads = tuple(facts)
        found[tuple((name, value) for name, value in facts.items() if name != "Date")].append(run)
    rows = []
    for facts_found, members in found.items():
        days = sorted({clean(run.environment.date)[:10] for run in members})
        values = {**dict(facts_found), "Date": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"}
        names = ", ".join(view.short(run.name) for run in members)
        rows.append(doc.Row(plural(len(members), "run"), tuple(values[head] for head in heads), (names,)))
    return doc.Table(("Runs", *heads), tuple(rows), "Environments", words=(1, 2, 3, 7, 8))
