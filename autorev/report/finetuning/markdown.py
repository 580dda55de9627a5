"""Fine-tuning runs as Markdown with GitHub's tables, for the README or a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autorev.finetuning.record import FineTuning
from autorev.format import NOTHING
from autorev.report.analysis.markdown import code, literal, table
from autorev.report.finetuning.comparison_tables import runs_table, scratch_table
from autorev.report.finetuning.rows import RunGroup, groups, trains_words
from autorev.report.tables import Cell, Row, Table

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


def render_markdown(runs: Sequence[FineTuning], made_by: str | None = None) -> str:
    """A table for each model, those from scratch apart, below the commands that made the records.

    `made_by`: one command that made them all, in the place of their own.
    """
    parts = [part for group in groups(runs) for part in _group(group, made_by)]
    return "\n\n".join(parts) + "\n" if parts else ""


def _group(group: RunGroup, made_by: str | None) -> Iterator[str]:
    yield f"### {literal(_heading(group))}"
    own = [line for run in group.runs for line in run.command.splitlines()]
    yield "  \n".join(code(line) for line in ([made_by] if made_by else own))
    found = scratch_table(group.runs) if group.scratch else runs_table(group.runs)
    words = {0, 1} if not group.scratch else {0}
    yield _markdown(found, words)
    yield _MEANINGS_SCRATCH if group.scratch else _MEANINGS
    if any(not run.complete for run in group.runs):
        names = ", ".join(run.name for run in group.runs if not run.complete)
        yield f"Not complete: {literal(names)}; `--resume` goes on with it."


def _heading(group: RunGroup) -> str:
    trained = " and ".join(dict.fromkeys(trains_words(run) for run in group.runs))
    machines = dict.fromkeys(run.environment.machine for run in group.runs)
    days = sorted({run.environment.date.split("T", 1)[0] for run in group.runs})
    return ", ".join((group.model, trained, *machines, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"))


def _markdown(found: Table, words: set[int]) -> str:
    heads = [found.heads[0].lower(), *(head.lower() for head in found.heads[1:])]
    rows = [[_head(row), *map(_cell, row.cells)] for row in found.rows]
    return table(heads, rows, right=set(range(len(heads))) - words)


def _head(row: Row) -> str:
    notes = ", ".join(literal(note) for note in row.notes if note != row.head)
    return f"{literal(row.head)}: {notes}" if notes else literal(row.head)


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return literal(cell) or NOTHING
    text = f"**{literal(cell.text)}**" if cell.strong and cell.text != NOTHING else literal(cell.text)
    return f"{text} ({literal(cell.note)})" if cell.note else text
