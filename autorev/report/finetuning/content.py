"""What a report of fine-tunings says on a screen and as Markdown, and the page of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autorev.finetuning.record import EXPORT_LIMIT, FineTuning
from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_integer,
    format_rate,
    format_seconds,
    plural,
    unit_for,
)
from autorev.report import document as doc
from autorev.report import shared
from autorev.report.finetuning import figures, tables, view
from autorev.report.finetuning.numbers import change_text, loss_text, perplexity_text
from autorev.report.finetuning.tables_of_many import runs_table, scratch_table
from autorev.report.finetuning.verdict import drift_words, export_gap, may_export, memory_words, verdict
from autorev.report.profile.page import facts_of

_LONGEST = 300
_MOST_EVALUATIONS = 10
"""Lines of evaluations before those in between are left out: a terminal is one screen."""
_NOTICED = 0.1
"""Nats by which the training loss has to rise before it is worth a sentence."""
_MEANINGS = (
    "Validation loss in nats a token; in brackets the difference to the original model (before training) and to the "
    "loss under the coupling (as the plain architecture). ppl: perplexity. Against plain training: by the same recipe, "
    "with the same data, order and seed. Agreement: places where the likeliest next token is the original model's. "
    "Side bits: mean of an element and step."
)
_MEANINGS_SCRATCH = (
    "Validation loss in nats a token, each seed's with the seed in brackets. Against plain: from the residual baseline "
    "by the same recipe, seed by seed."
)


def screen(run: FineTuning) -> Iterator[doc.Section]:
    """One screen of a terminal: the recipe, the losses, what it needed, and the verdict."""
    yield doc.Section("", tuple(_heading(run)))
    if run.original or run.evaluations:
        yield doc.Section("", tuple(_evaluations(run)))
    facts = [tile for tile in tiles(run) if not tile.title.startswith(("Validation", "Perplexity"))]
    if view.side_bits_ends(run):
        facts.append(doc.Tile("Side bits", view.side_bits_words(run), "of an element and step, mean"))
    if facts:
        yield doc.Section("", (doc.Tiles(tuple(facts)),))
    if drift := drift_words(run):
        yield doc.Section("", (doc.text(doc.muted(drift)),))
    found = verdict(run)
    said = view.short(found.text.replace("`", ""), 2 * _LONGEST)
    yield doc.Section(
        "", (doc.text(doc.strong("Verdict  "), doc.Span(found.title, "accent")), doc.text(said, indent=2))
    )
    yield from shared.notes_on_screen(run.notes)


def _heading(run: FineTuning) -> Iterator[doc.Part]:
    where, corpus = run.environment, run.corpus
    start = () if run.pretrained else ("random weights",)
    words = f"Text: {clean(corpus.source)}, {format_integer(corpus.training_tokens)} tokens"
    machine = f"On {clean(where.machine)}, {plural(where.threads, 'thread')}, {clean(where.date)}"
    yield shared.name_on_screen(run.model, *start)
    yield doc.text(view.short(f"Under {view.how_words(run)}: {view.recipe_title(run)}", _LONGEST))
    yield doc.text(doc.muted(view.short(words, _LONGEST)))
    yield doc.text(doc.muted(view.short(machine, _LONGEST)))
    if not run.complete:
        done = f"{format_integer(view.steps_done(run))} of {plural(run.recipe.steps, 'step')}"
        yield doc.text(doc.Span(f"Incomplete: {done}; --resume goes on with it.", "warn"))


def _evaluations(run: FineTuning) -> Iterator[doc.Part]:
    found = tables.evaluations_table(run)
    half, left_out = _MOST_EVALUATIONS // 2, len(found.rows) - _MOST_EVALUATIONS
    rows = found.rows if left_out <= 0 else (*found.rows[:half], *found.rows[-half:])
    yield doc.Table(found.heads, rows)
    if left_out > 0:
        yield doc.text(doc.muted(f"{left_out} evaluations in between are in the HTML report."))


def screen_of_many(runs: Sequence[FineTuning]) -> Iterator[doc.Section]:
    """One table for each model: plain training first, then by the loss; those from scratch by coupling."""
    for group in view.groups(runs):
        if group.scratch:
            titles = (doc.text(doc.muted(view.short(family.title, _LONGEST))) for family in view.families(group.runs))
            yield doc.Section(view.short(group.title, _LONGEST), (*titles, scratch_table(group.runs)))
        else:
            yield doc.Section(view.short(group.title, _LONGEST), (_runs_on_screen(group), *_marks(group)))


def _runs_on_screen(group: view.RunGroup) -> doc.Table:
    unit = unit_for(run.peak_bytes or 0 for run in group.runs)
    runs, rows = view.ranked(group.runs), []
    for run, name in zip(runs, view.labels(runs), strict=True):
        now, gap = view.latest(run), export_gap(run)
        after = loss_text(now.loss if now and (run.complete or now.step) else None)
        cells: dict[str, doc.Content] = {
            "side\nbits": view.side_bits_words(run),
            "original": loss_text(run.original.loss if run.original else None),
            "before\ntraining": loss_text(run.zero_shot.loss if run.zero_shot else None),
            "after": doc.Cell(after if run.complete or after == NOTHING else f"{after}~", strong=True),
            "as the\nplain": doc.Cell(change_text(gap), bad=gap is not None and not may_export(run)),
            "against\nplain": change_text(view.against_plain(run, group.runs)),
            f"peak\n{unit.name}": NOTHING if run.peak_bytes is None else unit.number(run.peak_bytes),
            "tokens\n/s": format_rate(run.tokens_per_second),
        }
        rows.append((doc.Row(name), cells))
    return doc.table("run", rows)


def _marks(group: view.RunGroup) -> Iterator[doc.Part]:
    """What the table's signs mean, only those that occur."""
    yield doc.text("Validation loss, nats a token; as the plain: the difference without the coupling", kind="hint")
    if any(not run.complete for run in group.runs):
        yield doc.text(doc.muted("~ not complete; --resume goes on with it"))


def markdown(runs: Sequence[FineTuning], made_by: str | None = None) -> Iterator[doc.Section]:
    """A table for each model, those from scratch apart, below the commands that made the records.

    `made_by`: one command that made them all, in the place of their own.
    """
    for group in view.groups(runs):
        own = "\n".join(line for run in group.runs for line in run.command.splitlines())
        parts: list[doc.Part] = [
            doc.Command(made_by or own),
            scratch_table(group.runs) if group.scratch else runs_table(group.runs),
            doc.text(_MEANINGS_SCRATCH if group.scratch else _MEANINGS),
        ]
        names = ", ".join(run.name for run in group.runs if not run.complete)
        if names:
            parts.append(doc.text(f"Not complete: {names}; ", doc.Span("--resume", "code"), " goes on with it."))
        trained = " and ".join(dict.fromkeys(view.trains_words(run) for run in group.runs))
        machines = dict.fromkeys(run.environment.machine for run in group.runs)
        days = sorted({run.environment.date.split("T", 1)[0] for run in group.runs})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        yield doc.Section(", ".join((group.model, trained, *machines, when)), tuple(parts), level=3)


def page(run: FineTuning, command: str) -> doc.Page:
    """Everything that the record holds; `command` is what made the report."""
    recipe = run.recipe
    start = "pretrained" if run.pretrained else "from random weights"
    facts = {"Trains": view.trains_words(run), "Coupling": clean(run.method.title)}
    if recipe.schedule:
        facts["Schedule"] = f"to {clean(recipe.schedule)} in {plural(recipe.schedule_steps, 'step')}"
    if recipe.distill_weight:
        facts["Distillation"] = f"w = {recipe.distill_weight:g}"
    facts |= {"Steps": format_integer(recipe.steps), "Sequence": f"{format_integer(recipe.sequence)} tokens"}
    facts |= {"Precision": clean(recipe.dtype), "Machine": clean(run.environment.machine)}
    head = shared.page_head(run.model, facts, start, view.how_words(run))
    title = f"{clean(run.model.name)}: fine-tuned under {clean(run.method.title)}"
    return doc.Page(title, head, tuple(_sections(run)), tuple(shared.made_with(run.command, command)))


def _sections(run: FineTuning) -> Iterator[doc.Section]:
    found = verdict(run)
    parts: list[doc.Part] = [doc.prose(found.text, kind="why")]
    parts += [doc.Tiles(tuple(tiles(run)))] if tiles(run) else []
    yield doc.Section(found.title, tuple(parts), eyebrow="Verdict" if run.complete else "Incomplete")
    if run.logged or run.evaluations:
        yield doc.Section("Loss over the steps", tuple(_losses(run)))
    if drawn := figures.schedule(run):
        said = "Means over the steps of all chains."
        said += " The dotted line is where the schedule ends." if run.recipe.schedule else ""
        said += " The table of every step above has the figures."
        title = f"The way to {clean(run.recipe.schedule or 'another gamma')}"
        yield doc.Section(title, (doc.captioned(doc.Grid(tuple(drawn)), caption=said),))
    if run.logged:
        yield doc.Section("Memory and reconstruction", tuple(_memory(run)))
    if run.calibration:
        yield doc.Section("Side bits where they are needed", tuple(_calibration(run)))
    if run.chains:
        steps = tuple(map(tables.chain_steps_table, run.chains))
        yield doc.Section(
            f"The chains {'at the end' if run.complete else 'as they were last'}", (tables.chains_table(run), *steps)
        )
    recipe = doc.Facts(tuple(tables.recipe_facts(run).items()))
    corpus = doc.Facts(tuple(tables.corpus_facts(run).items()))
    halves = (doc.stack(recipe), doc.stack(doc.text("Text", kind="h3"), corpus))
    yield doc.Section("Recipe", (doc.Grid(halves, kind="pair"),))
    yield from shared.notes_on_page(run.notes)
    yield doc.Section("Where and when it ran", (facts_of(run.environment),))


def _losses(run: FineTuning) -> Iterator[doc.Part]:
    said = "In nats a token. Validation is the same held-out text each time, under the coupling."
    if run.recipe.distill_weight:
        said += " Training is the cross entropy alone, the part of the loss that the text makes."
    if run.vanilla and run.method.reversible:
        said += " The ring is the trained weights in the plain architecture, the one that is exported."
    said += f" {rising}" if (rising := rising_words(run)) else ""
    table = tables.steps_table(run) if run.logged else None
    yield doc.captioned(figures.loss_over_steps(run), table, caption=said)
    if figure := figures.divergence_over_steps(run):
        said = "On the training text, in nats; the table of every step above has the figures."
        yield doc.captioned(figure, caption=said, title="Distance to the original model")
    if run.original or run.evaluations:
        yield tables.evaluations_table(run)
        yield doc.text(
            "Standard error: of the loss over the rows of the validation text. Agreement: places where the likeliest "
            "next token is the original model's. KL: from the original model to this one, in nats.",
            kind="hint",
        )


def rising_words(run: FineTuning) -> str:
    """That a training loss which rises need not be a divergence; empty where it does not, or the validation's does."""
    losses, start, now = [loss for _, loss in view.smoothed_training(run)], run.zero_shot, view.latest(run)
    if not losses or not start or not now or now.loss > start.loss or now is start:
        return ""
    if losses[-1] - losses[0] < _NOTICED:
        return ""
    return (
        f"The training loss rises from {loss_text(losses[0])} to {loss_text(losses[-1])} and the validation loss does "
        "not: that is no divergence. Every step reads other text, some of it harder; plain training by the same recipe "
        "reads the same, and the comparison of both shows it in one figure."
    )


def _memory(run: FineTuning) -> Iterator[doc.Part]:
    said = drift_words(run)
    if looked := memory_words(run):
        said += f" {looked}"
        said += "" if run.peak_bytes is None else f" The highest is {format_bytes(run.peak_bytes)}."
    yield doc.text(said)
    if figure := figures.memory_over_steps(run):
        said = (
            "The allocator's peak. Looking at it slows a step, so it is done in some only; the table of every step "
            "above has the figures."
        )
        yield doc.captioned(figure, caption=said)


def _calibration(run: FineTuning) -> Iterator[doc.Part]:
    calibration = run.calibration
    assert calibration
    tokens, budget = format_integer(calibration.tokens), change_text(calibration.budget)
    yield doc.text(f"Measured on {tokens} tokens before any training, under a budget of {budget} nats.")
    if figure := figures.sensitivity(run, calibration):
        said = "By how much the loss rises, in nats, when this block alone has so few side bits."
        said += " The dots are what each block had in the end." if run.chains else ""
        yield doc.captioned(figure, tables.sensitivity_table(run), caption=said, title="One block at a time")
    if drawn := figures.assignments(calibration):
        said = (
            "Each mark is a choice for all blocks that was measured as a whole, against the original model. Further "
            "left is less memory."
        )
        yield doc.captioned(
            doc.Grid(tuple(drawn)), tables.assignments_table(run), caption=said, title="All blocks together"
        )


def tiles(run: FineTuning) -> list[doc.Tile]:
    """What the run reached, and what it needed; only what is known of it."""
    return [*_quality_tiles(run), *_cost_tiles(run)]


def _quality_tiles(run: FineTuning) -> Iterator[doc.Tile]:
    now, zero, original = view.latest(run), run.zero_shot, run.original
    if now is not None:
        title = "Validation loss" if run.complete else f"Validation loss at step {format_integer(now.step)}"
        others = [f"{view.original_words(run)} {loss_text(original.loss)}"] if original else []
        others += [f"before training {loss_text(zero.loss)}"] if zero and zero is not now else []
        yield doc.Tile(title, loss_text(now.loss), ", ".join(others))
        others = [f"{view.original_words(run)} {perplexity_text(original.perplexity)}"] if original else []
        others += [f"before training {perplexity_text(zero.perplexity)}"] if zero and zero is not now else []
        yield doc.Tile("Perplexity", perplexity_text(now.perplexity), ", ".join(others))
    gap = export_gap(run)
    if gap is not None and run.vanilla is not None:
        warning = "" if gap <= EXPORT_LIMIT else "autorev export would refuse it"
        against = f"{change_text(gap)} against the coupling"
        yield doc.Tile("As the plain architecture", loss_text(run.vanilla.loss), against, warning)


def _cost_tiles(run: FineTuning) -> Iterator[doc.Tile]:
    if run.peak_bytes is not None:
        yield doc.Tile("Peak memory", format_bytes(run.peak_bytes))
    if run.teacher_bytes:
        of_it = "a frozen copy of the original" + ("; part of the peak" if run.peak_bytes is not None else "")
        yield doc.Tile("Teacher", format_bytes(run.teacher_bytes), of_it)
    if run.tokens_per_second is not None:
        step = f"{format_seconds(run.step_seconds)} a step" if run.step_seconds else ""
        yield doc.Tile("Tokens a second", format_rate(run.tokens_per_second), step)
