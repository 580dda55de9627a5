"""An analysis as one screen of a terminal, or as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autorev.analysis import Analysis, Block, Verdict
from autorev.format import (
    NOTHING,
    ByteUnit,
    clean,
    format_bytes,
    format_integer,
    format_seconds,
    plural,
    sentence,
    unit_for,
)
from autorev.report.analysis.rows import (
    MethodRow,
    Run,
    all_blocks,
    bar_scale,
    fits,
    method_rows,
    reversible_count,
    shown_categories,
    similar_groups,
    step_kinds,
)
from autorev.report.bars import CAPACITY_MARK, Bar, legend, uses_color
from autorev.words import device_facts, headline, model_facts, setting_facts

_MOST_GROUPS = 10
"""Lines of blocks before the rest is only counted: this is one screen, not the whole list."""
_MOST_RANGES = 3
_verdict_styles = {Verdict.ELIGIBLE: "green", Verdict.CAVEAT: "yellow", Verdict.REFUSED: "red"}


def print_analysis(analysis: Analysis, console: Console) -> None:
    """One screen: the model, its blocks, the memory of every method, what to do."""
    for i, section in enumerate(_sections(analysis, console)):
        if i:
            console.print()
        console.print(section, highlight=False)


def render_text(analysis: Analysis) -> str:
    """The same screen as plain text, 100 columns wide."""
    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False, _environ={})
    with console.capture() as capture:
        print_analysis(analysis, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _sections(analysis: Analysis, console: Console) -> Iterator[RenderableType]:
    yield _heading(analysis)
    yield _blocks(analysis)
    if analysis.predictions:
        yield _memory(analysis, console)
    if analysis.recommendation:
        yield _advice(analysis)
    if analysis.notes:
        yield Group(*(bullet("Note:", sentence(note)) for note in analysis.notes))


def _heading(analysis: Analysis) -> RenderableType:
    facts = ", ".join(model_facts(analysis.model))
    lines = [Text.assemble((clean(analysis.model.name), "bold"), "  ", (facts, "dim"))]
    if analysis.setting:
        lines.append(Text("One training step: " + ", ".join(_setting_phrases(analysis))))
    return Group(*lines)


def _setting_phrases(analysis: Analysis) -> Iterator[str]:
    assert analysis.setting
    facts = setting_facts(analysis.setting)
    yield f"batch {analysis.setting.batch}"
    yield from (value for name, value in facts.items() if name != "Batch")
    if device := analysis.device:
        yield device_facts(device)


def _blocks(analysis: Analysis) -> RenderableType:
    blocks = all_blocks(analysis)
    count = f"{reversible_count(analysis)} of {plural(len(blocks), 'block')} can be made reversible"
    chains = f", in {plural(len(analysis.chains), 'chain')}" if analysis.chains else ""
    groups = [group for chain in analysis.chains for group in similar_groups(chain.blocks)]
    groups += similar_groups(analysis.refused)
    order = list(dict.fromkeys(first.reasons for first, _ in groups))
    groups.sort(key=lambda group: order.index(group[0].reasons))
    shown, rest = groups[:_MOST_GROUPS], groups[_MOST_GROUPS:]

    lines: list[RenderableType] = [Text.assemble(("Blocks", "bold"), f"  {count}{chains}")]
    rows = [(first, _group_cells(first, runs)) for first, runs in shown]
    # Equal widths in every row keep the columns aligned across the tables between the reasons.
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    for reasons, members in groupby(rows, lambda row: row[0].reasons):
        table = Table.grid(padding=(0, 1))
        for first, cells in members:
            padded = [Text(cell.ljust(width)) for cell, width in zip(cells, widths, strict=True)]
            padded[3].stylize(_verdict_styles[first.verdict])
            table.add_row(*padded)
        lines.append(Padding(table, (0, 0, 0, 2)))
        lines += [Padding(Text(clean(reason), "dim"), (0, 0, 0, 4)) for reason in reasons]
    if rest:
        left = sum(len(run.blocks) for _, runs in rest for run in runs)
        lines.append(Text(f"  and {plural(left, 'block')} of {plural(len(rest), 'more kind')}", "dim"))
    return Group(*lines)


def _group_cells(first: Block, runs: list[Run]) -> tuple[str, ...]:
    labels = [run.label for run in runs]
    named = ", ".join(labels[:_MOST_RANGES]) + (", ..." if len(labels) > _MOST_RANGES else "")
    count = sum(len(run.blocks) for run in runs)
    return named, clean(first.class_name), f"x{count}", first.verdict.value, step_kinds(first)


def _memory(analysis: Analysis, console: Console) -> RenderableType:
    rows = method_rows(analysis)
    unit = unit_for(row.prediction.peak_bytes for row in rows)
    scale, capacity = bar_scale(analysis)
    reach_heads = ["largest\nbatch"] if analysis.frontier else []
    reach_heads += ["longest\nsequence"] if _has_sequences(analysis) else []

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="dim")
    table.add_column("\nmethod", max_width=13 if console.width < 100 else 24)
    table.add_column("memory at the peak,\nby category", ratio=1, no_wrap=True)
    for head in (f"peak\n{unit.name}", f"kept\n{unit.name}", "roofline\ntime"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("peak\nphase", no_wrap=True)
    for head in reach_heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            _method_cell(row, analysis),
            Bar(row.prediction.categories, scale, capacity),
            _peak_cell(row, analysis, unit),
            Text(unit.number(row.prediction.kept_bytes)),
            Text(format_seconds(row.prediction.step_seconds)),
            Text(clean(row.prediction.phase)),
            *_reach_cells(row, len(reach_heads)),
        )
    signs = legend(shown_categories(rows), uses_color(console), console.width)
    return Group(table, Text(), signs, *_marks(analysis, rows))


def _method_cell(row: MethodRow, analysis: Analysis) -> Text:
    star = "" if row.prediction.preserves_function else "*"
    best = analysis.recommendation and analysis.recommendation.method in row.names
    return Text(", ".join(clean(name) + star for name in row.names), "bold cyan" if best else "")


def _peak_cell(row: MethodRow, analysis: Analysis, unit: ByteUnit) -> Text:
    peak = unit.number(row.prediction.peak_bytes)
    return Text(peak, "bold") if fits(row, analysis) else Text(f"!{peak}", "bold red")


def _has_sequences(analysis: Analysis) -> bool:
    return any(reach.longest_sequence is not None for reach in analysis.frontier)


def _reach_cells(row: MethodRow, count: int) -> list[Text]:
    figures = (row.reach.largest_batch, row.reach.longest_sequence) if row.reach else (None, None)
    return [Text(NOTHING if figure is None else format_integer(figure)) for figure in figures[:count]]


def _marks(analysis: Analysis, rows: list[MethodRow]) -> Iterator[Text]:
    """What the table's words and signs mean; only the signs that occur."""
    yield Text("kept: between forward and backward. Roofline time: a lower bound.", "dim")
    _, capacity = bar_scale(analysis)
    if capacity and analysis.device:
        mark = f"{CAPACITY_MARK} {format_bytes(capacity)}, the memory of {clean(analysis.device.title)}"
        all_fit = all(fits(row, analysis) for row in rows)
        yield Text(mark + ("" if all_fit else ";  ! does not fit"), "dim")
    if not all(row.prediction.preserves_function for row in rows):
        yield Text("* a pretrained model does not keep its function; it needs fine-tuning to recover", "dim")


def _advice(analysis: Analysis) -> RenderableType:
    assert analysis.recommendation
    recommendation = analysis.recommendation
    lines: list[RenderableType] = [
        Text.assemble(("Recommendation  ", "bold"), (headline(recommendation.method), "bold cyan")),
        Padding(Text(sentence(recommendation.why)), (0, 0, 0, 2)),
    ]
    lines += [bullet(f"  {i}.", sentence(step)) for i, step in enumerate(recommendation.advice, 1)]
    return Group(*lines)


def bullet(sign: str, text: str) -> RenderableType:
    """`text` with its wrapped lines indented to stand under its first."""
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(sign, no_wrap=True), Text(text))
    return table
