"""A fine-tuning run as one screen of a terminal, or as plain text; several as one table for each model."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from autorev.finetuning.record import FineTuning
from autorev.format import NOTHING, clean, format_integer, format_rate, plural, sentence, unit_for
from autorev.report.analysis.terminal import bullet
from autorev.report.finetuning.comparison_tables import scratch_table
from autorev.report.finetuning.html import tiles
from autorev.report.finetuning.numbers import change_text, loss_text
from autorev.report.finetuning.rows import (
    RunGroup,
    against_plain,
    families,
    groups,
    how_words,
    labels,
    latest,
    recipe_title,
    short,
    side_bits_words,
    steps_done,
)
from autorev.report.finetuning.tables import evaluations_table
from autorev.report.finetuning.verdict import drift_words, export_gap, may_export, verdict
from autorev.report.tables import Cell, Table
from autorev.words import model_facts

_LONGEST_NOTE = 300
_MOST_EVALUATIONS = 10
"""Lines of evaluations before those in between are left out: this is one screen."""


def print_fine_tunings(runs: Sequence[FineTuning], console: Console) -> None:
    """One screen for a single run; one table for each model for several."""
    sections = _sections(runs[0]) if len(runs) == 1 else map(_group, groups(runs))
    for i, section in enumerate(sections):
        if i:
            console.print()
        console.print(section, highlight=False)


def render_text(run: FineTuning) -> str:
    """The same screen as plain text, 100 columns wide."""
    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False, _environ={})
    with console.capture() as capture:
        print_fine_tunings([run], console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _sections(run: FineTuning) -> Iterator[RenderableType]:
    yield _heading(run)
    found = evaluations_table(run)
    if found.rows:
        yield _evaluations(found)
    facts = [tile for tile in tiles(run) if not tile.title.startswith(("Validation", "Perplexity"))]
    if facts:
        yield Group(*(_fact(tile.title, tile.figure, tile.against or tile.warning) for tile in facts))
    drift = drift_words(run)
    if drift:
        yield Text(drift, "dim")
    yield _verdict(run)
    if run.notes:
        yield Group(*(bullet("Note:", short(sentence(note), _LONGEST_NOTE)) for note in run.notes))


def _heading(run: FineTuning) -> RenderableType:
    where, corpus = run.environment, run.corpus
    start = () if run.pretrained else ("random weights",)
    origin = short(", ".join((*model_facts(run.model), *start)), _LONGEST_NOTE)
    text = f"Text: {clean(corpus.source)}, {format_integer(corpus.training_tokens)} tokens"
    machine = f"On {clean(where.machine)}, {plural(where.threads, 'thread')}, {clean(where.date)}"
    lines = [
        Text.assemble((short(run.model.name, _LONGEST_NOTE), "bold"), "  ", (origin, "dim")),
        Text(short(f"Under {how_words(run)}: {recipe_title(run)}", _LONGEST_NOTE)),
        Text(short(text, _LONGEST_NOTE), "dim"),
        Text(short(machine, _LONGEST_NOTE), "dim"),
    ]
    if not run.complete:
        done = f"{format_integer(steps_done(run))} of {plural(run.recipe.steps, 'step')}"
        lines.append(Text(f"Incomplete: {done}; --resume goes on with it.", "bold yellow"))
    return Group(*lines)


def _evaluations(found: Table) -> RenderableType:
    rows = list(found.rows)
    left_out = len(rows) - _MOST_EVALUATIONS
    if left_out > 0:
        rows = [*rows[: _MOST_EVALUATIONS // 2], *rows[-(_MOST_EVALUATIONS // 2) :]]
    table = _table(("validation", *(head.lower() for head in found.heads[1:])))
    for row in rows:
        table.add_row(Text(row.head, "bold cyan" if row.chosen else ""), *(_text(cell) for cell in row.cells))
    if left_out > 0:
        return Group(table, Text(f"{left_out} evaluations in between are in the HTML report.", "dim"))
    return table


def _fact(title: str, figure: str, against: str) -> Text:
    return Text.assemble(f"{title}: ", (figure, "bold"), (f"  ({against})" if against else "", "dim"))


def _verdict(run: FineTuning) -> RenderableType:
    found = verdict(run)
    head = Text.assemble(("Verdict  ", "bold"), (found.title, "bold cyan"))
    return Group(head, Padding(Text(short(found.text.replace("`", ""), 2 * _LONGEST_NOTE)), (0, 0, 0, 2)))


def _group(group: RunGroup) -> RenderableType:
    lines: list[RenderableType] = [Text(short(group.title, _LONGEST_NOTE), "bold")]
    if group.scratch:
        found = scratch_table(group.runs)
        table = _table([head.lower().replace(" ", "\n", 1) for head in found.heads])
        for row in found.rows:
            table.add_row(Text(short(row.head)), *(_text(cell) for cell in row.cells))
        titles = [family.title for family in families(group.runs)]
        return Group(*lines, *(Text(short(title, _LONGEST_NOTE), "dim") for title in titles), table)
    return Group(*lines, _runs(group), *_marks(group))


def _runs(group: RunGroup) -> RenderableType:
    unit = unit_for(run.peak_bytes or 0 for run in group.runs)
    heads = ("run", "side\nbits", "original", "before\ntraining", "after", "as the\nplain", "against\nplain")
    table = _table((*heads, f"peak\n{unit.name}", "tokens\n/s"))
    for run, name in zip(group.runs, labels(group.runs), strict=True):
        now, gap = latest(run), export_gap(run)
        after = loss_text(now.loss if now and (run.complete or now.step) else None)
        table.add_row(
            Text(name),
            Text(side_bits_words(run)),
            Text(loss_text(run.original.loss if run.original else None)),
            Text(loss_text(run.zero_shot.loss if run.zero_shot else None)),
            Text(after if run.complete or after == NOTHING else f"{after}~", "bold"),
            Text(change_text(gap), "" if gap is None or may_export(run) else "red"),
            Text(change_text(against_plain(run, group.runs))),
            Text(NOTHING if run.peak_bytes is None else unit.number(run.peak_bytes)),
            Text(format_rate(run.tokens_per_second)),
        )
    return table


def _marks(group: RunGroup) -> Iterator[RenderableType]:
    """What the table's signs mean, only those that occur."""
    yield Text("Validation loss, nats a token; as the plain: the difference without the coupling", "dim")
    if any(not run.complete for run in group.runs):
        yield Text("~ not complete; --resume goes on with it", "dim")


def _table(heads: Sequence[str]) -> RichTable:
    table = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(heads[0], max_width=34, vertical="top")
    for head in heads[1:]:
        table.add_column(head, justify="right")
    return table


def _text(cell: Cell | str) -> Text:
    if isinstance(cell, str):
        return Text(cell)
    return Text(cell.text, "red" if cell.bad else "bold" if cell.strong else "")
