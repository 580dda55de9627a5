"""The report: Markdown from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from autorev.format import format_bytes
from benchmarks.gpu.record import DONE, WRONG, Row
from benchmarks.gpu.sections import SECTIONS

ENVIRONMENT = "environment"
"""The section of the first row: where the others were made."""


def markdown(rows: Iterable[Row]) -> str:
    """A page: where, what is wrong, and a table for each section with what it lacks and why."""
    rows = list(rows)
    return "\n".join([*_head(rows), *(line for name in SECTIONS for line in _section(name, rows))]) + "\n"


def wrong(rows: Iterable[Row]) -> list[Row]:
    """Those that should not be: gradients that are not right, and pieces that failed, crashed or were stopped."""
    return [row for row in rows if row["status"] in WRONG or not row.get("passed", True)]


def _head(rows: list[Row]) -> Iterator[str]:
    here = next((row for row in rows if row["section"] == ENVIRONMENT), None)
    machine: dict[str, Any] = here["machine"] if here and here["status"] == DONE else {}
    yield f"# The GPU kit on {machine.get('machine', 'an unknown device')}"
    yield ""
    if here and machine:
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        cards = f"{here['count']} x {format_bytes(here['memory'])}" if here["kind"] != "cpu" else "a CPU"
        size = here["size"]
        yield (
            f"`python -m benchmarks.gpu`, {machine['date'][:10]}, {machine['system']}, {cards}, {versions}"
            f"{', commit ' + machine['commit'] if machine['commit'] else ''}."
        )
        yield ""
        yield (
            f"A Llama of {size['blocks']} blocks of width {size['width']}, {size['dtype']}, random weights, LoRA of "
            f"rank {size['rank']}, one sample of {size['tokens']:,} tokens, chunked loss, AdamW, where nothing else is "
            "said."
        )
        if here["quick"]:
            yield "\n**A quick run: everything was tried on a toy. No figure here is a measurement.**"
    bad = wrong(rows)
    done = sum(row["status"] == DONE for row in rows)
    missing = len(rows) - done - sum(row["status"] in WRONG for row in rows)
    yield f"\n{done} pieces done, {len(bad)} wrong, {missing} without a figure (each with its reason below)."
    yield from (
        f"- **WRONG** {row['section']}, {row['piece']}: {row.get('reason') or row.get('found', '')}" for row in bad
    )


def _section(name: str, rows: list[Row]) -> Iterator[str]:
    section = SECTIONS[name]
    own = [row for row in rows if row["section"] == name]
    done = [row for row in own if row["status"] == DONE]
    yield f"\n## {section.TITLE}\n\n{section.WHAT}"
    if done:
        yield f"\n| {' | '.join(section.HEADS)} |\n|---{'|---:' * (len(section.HEADS) - 1)}|"
        for row in done:
            yield from (f"| {' | '.join(_in_a_cell(cell) for cell in cells)} |" for cells in section.cells(row, done))
    lacking = [row for row in own if row["status"] != DONE]
    if lacking:
        yield "\nWithout a figure:\n"
        yield from (f"- {row['piece']}: {row['status']}: {row['reason']}" for row in lacking)
    if not own:
        yield "\nNot run."


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
