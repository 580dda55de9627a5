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
from autorev.report.document import NO_FIGURE, Cell, Row, Table
from autorev.report.finetuning import view
from autorev.report.finetuning.numbers import change_text, divergence_text, loss_text, perplexity_text, share_text
from autorev.report.finetuning.verdict import export_gap
from autorev.report.profile.tables import environment_facts, optional_bytes

_MOST_COLUMNS = 10
"""Steps of a table of training losses."""


def runs_table(runs: Sequence[FineTuning], shares: bool = False) -> Table:
    """A row per run with the figures that decide; columns in which no run has a figure are left out.

    `shares`: with every peak as a share of plain training's."""
    found = doc.table("Run", [_run(run, runs, shares) for run in runs], label="Every run", words=(1,))
    return doc.without_empty(found)


def _run(run: FineTuning, runs: Sequence[FineTuning], shares: bool) -> tuple[Row, dict[str, doc.Content]]:
    final, zero, gap, recipe = run.final, run.zero_shot, export_gap(run), run.recipe
    notes = [view.how_words(run)]
    if not run.complete:
        notes.append(f"incomplete: {format_integer(view.steps_done(run))} of {format_integer(recipe.steps)} steps")
    if len({(other.recipe.learning_rate, other.recipe.seed) for other in runs}) > 1:
        notes.append(f"rate {recipe.learning_rate:g}, seed {recipe.seed}")
    before, plain, agreement = NO_FIGURE, NO_FIGURE, NO_FIGURE
    if zero:
        before = Cell(loss_text(zero.loss), _signed(view.difference(zero, run.original)))
    if run.vanilla and gap is not None:
        plain = Cell(loss_text(run.vanilla.loss), _signed(gap), bad=gap > EXPORT_LIMIT)
    if final and final.agreement is not None:
        kl = "" if final.divergence is None else f"KL {divergence_text(final.divergence)}"
        agreement = Cell(share_text(final.agreement), kl)
    seconds = format_seconds(run.step_seconds) if run.step_seconds else ""
    cells: dict[str, doc.Content] = {
        "Trains": view.trains_words(run),
        "Steps": format_integer(recipe.steps),
        "Side bits": view.side_bits_words(run),
        "Original": loss_text(run.original.loss if run.original else None),
        "Before training": before,
        "After training": _after(run),
        "As the plain": plain,
        "Against plain training": change_text(view.against_plain(run, runs)),
        "Agreement": agreement,
        "Peak": _peak(run, view.plain_of(run, runs) if shares else None),
        "Tokens/s": Cell(format_rate(run.tokens_per_second), seconds),
        "Teacher": optional_bytes(run.teacher_bytes or None),
    }
    return Row(clean(run.name), notes=tuple(notes)), cells


def _peak(run: FineTuning, plain: FineTuning | None) -> Cell:
    if run.peak_bytes is None:
        return NO_FIGURE
    whole = plain.peak_bytes if plain else None
    return Cell(format_bytes(run.peak_bytes), f"{format_share(run.peak_bytes, whole)} of plain's" if whole else "")


def _after(run: FineTuning) -> Cell:
    """The final loss, or the latest of a run that goes on, saying so."""
    if run.final:
        return Cell(loss_text(run.final.loss), f"ppl {perplexity_text(run.final.perplexity)}", strong=True)
    now = view.latest(run)
    return Cell(NOTHING, f"{loss_text(now.loss)} at step {format_integer(now.step)}") if now and now.step else NO_FIGURE


def _signed(change: float | None) -> str:
    return "" if change is None else change_text(change)


def scratch_table(runs: Sequence[FineTuning]) -> Table:
    """A row per coupling and recipe: the mean of the final losses over the seeds, each, and the gap to plain's."""
    found: dict[object, list[FineTuning]] = defaultdict(list)
    for run in runs:
        found[view.same_but_seed(run), view.how_words(run)].append(run)
    heads = (
        *("Coupling", "Side bits", "Loss after training", "Each seed", "Against plain", "As the plain", "Peak"),
        *("Tokens/s",),
    )
    return doc.without_empty(
        Table(heads, tuple(_architecture(members, runs) for members in found.values()), "Every coupling from scratch")
    )


def _architecture(members: Sequence[FineTuning], runs: Sequence[FineTuning]) -> Row:
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
        Cell(loss_text(fmean(loss for _, loss in finals)), _of(len(finals)), strong=True) if finals else NO_FIGURE,
        ", ".join(f"{loss_text(loss)} ({seed})" for seed, loss in finals) or NOTHING,
        Cell(change_text(fmean(gaps)), _of(len(gaps))) if gaps else NO_FIGURE,
        Cell(change_text(fmean(exported)), bad=fmean(exported) > EXPORT_LIMIT) if exported else NO_FIGURE,
        optional_bytes(max(peaks, default=None)),
        format_rate(fmean(rates)) if rates else NOTHING,
    )
    return Row(view.how_words(first), cells, tuple(notes))


def _of(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else ""


def evaluations_by_step(runs: Sequence[FineTuning]) -> Table:
    """The validation loss of every run at every step it was evaluated."""
    return _by_step(runs, [{e.step: e.loss for e in run.evaluations} for run in runs], "Validation loss by step")


def training_by_step(runs: Sequence[FineTuning]) -> Table:
    """The training loss of every run, each a mean over neighbouring steps, at some steps."""
    found = [dict(view.smoothed_training(run)) for run in runs]
    steps = sorted({step for losses in found for step in losses})
    kept = {*steps[:: -(-len(steps) // _MOST_COLUMNS) or 1], *steps[-1:]}
    shown = [{step: loss for step, loss in losses.items() if step in kept} for losses in found]
    return _by_step(runs, shown, "Training loss by step")


def _by_step(runs: Sequence[FineTuning], found: Sequence[dict[int, float]], label: str) -> Table:
    steps = sorted({step for losses in found for step in losses})
    rows = [
        Row(name, tuple(loss_text(losses.get(step)) for step in steps))
        for name, losses in zip(view.labels(runs), found, strict=True)
    ]
    heads = ("Run", *(f"step {format_integer(step)}" for step in steps))
    return Table(heads, tuple(rows), label, fold="Show as a table")


def environments(runs: Sequence[FineTuning]) -> Table:
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
        rows.append(Row(plural(len(members), "run"), tuple(values[head] for head in heads), (names,)))
    return Table(("Runs", *heads), tuple(rows), "Environments", words=(1, 2, 3, 7, 8))
