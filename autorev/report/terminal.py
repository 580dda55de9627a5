"""Sections on the screen of a terminal, or as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.style import Style
from rich.table import Table as Grid
from rich.text import Text as Line

from autorev.analysis import Category
from autorev.commands import apart
from autorev.report import document as doc
from autorev.report.palette import CATEGORY_COLORS
from autorev.words import CATEGORY_TITLES

CAPACITY_MARK, CUT_MARK = "|", ">"
"""On a bar: the device's memory, and the end of one that is longer than the scale."""
_LONGEST = 600
"""Letters: a screen is no place for a whole traceback."""
_styles = {"strong": "bold", "muted": "dim", "accent": "bold cyan", "warn": "bold yellow", "bad": "red"}
_styles |= {"eligible": "green", "caveat": "yellow", "refused": "red"}
_letters = dict(zip(Category, "PGOAWSBLx", strict=True))


def print_sections(sections: Iterable[doc.Section], console: Console) -> None:
    """Each after an empty line."""
    for i, section in enumerate(sections):
        if i:
            console.print()
        title = [Line(section.title, "bold")] if section.title else []
        console.print(Group(*title, *(_shown(part, console) for part in section.parts)), highlight=False, crop=False)


def to_text(sections: Iterable[doc.Section]) -> str:
    """The same screen as plain text, 100 columns wide."""
    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False, _environ={})
    with console.capture() as capture:
        print_sections(sections, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _shown(part: doc.Part, console: Console) -> RenderableType:
    match part:
        case doc.Text():
            return Padding(_line(part.spans), (0, 0, 0, part.indent)) if part.indent else _line(part.spans)
        case doc.Bullets():
            return Group(*map(_bullet, part.signs or ["-"] * len(part.items), part.items))
        case doc.Table():
            return Padding(_table(part, console), (0, 0, 0, part.indent))
        case doc.Legend():
            if not part.categories or console.width < part.room:
                return Group()
            mark = [Line(part.mark, "dim")] if part.mark else []
            return Group(Line(), _legend(part.categories, console), *mark)
        case doc.Tiles():
            return Group(*(_fact(tile.title, tile.figure, tile.against or tile.warning) for tile in part.tiles))
        case _:
            raise TypeError(f"a terminal does not show {type(part).__name__}")


def _line(spans: Iterable[str | doc.Span]) -> Line:
    words = [each if isinstance(each, str) else (each.text, _styles.get(each.tone, "")) for each in spans]
    made = Line.assemble(*words)
    made.truncate(_LONGEST)
    return made


def _fact(title: str, figure: str, against: str) -> Line:
    return Line.assemble(f"{title}: ", (figure, "bold"), (f"  ({against})" if against else "", "dim"))


def _bullet(sign: str, words: str) -> RenderableType:
    """`words` with its wrapped lines indented to stand under its first, and a command on one line, however long."""
    words, command = apart(words)
    table = Grid.grid(padding=(0, 1))
    table.add_row(Line(sign, no_wrap=True), Line(shortened(f"{words}; from the command line:" if command else words)))
    indent = " " * (len(sign) + 1)
    return Group(table, Line(indent + command, no_wrap=True, overflow="ignore")) if command else table


def shortened(words: str, limit: int = 1000) -> str:
    """`words`, cut where they would fill a screen."""
    return words if len(words) <= limit else f"{words[: limit - 3]}..."


def _table(table: doc.Table, console: Console) -> RenderableType:
    if console.width < table.room:
        table = _without_bars(table)
    bars = {i for row in table.rows for i, cell in enumerate(row.cells, 1) if isinstance(cell, doc.Bar)}
    heads = [head if head.isupper() else head[:1].lower() + head[1:] for head in table.heads]
    heads = [head if "\n" in head else head.replace(" ", "\n", 1) for head in heads]
    heads = [head if "\n" in head or not any("\n" in h for h in heads) else f"\n{head}" for head in heads]
    made = Grid(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=bool(bars), header_style="dim")
    made.add_column(heads[0], max_width=max(16, min(24, console.width // 5 - 2)) if bars else 34)
    for i, head in enumerate(heads[1:], 1):
        words = i in table.words or i in bars
        made.add_column(head, justify="left" if words else "right", ratio=1 if i in bars else None, no_wrap=not words)
    for row in table.rows:
        made.add_row(_head(row), *map(_cell, row.cells))
    return made


def _without_bars(table: doc.Table) -> doc.Table:
    """The table without its second column; where that said why there is no bar, the row's heading does."""
    rows = []
    for row in table.rows:
        bar = row.cells[0]
        said = f" ({bar.text})" if isinstance(bar, doc.Cell) else ""
        rows.append(replace(row, head=row.head + said, cells=row.cells[1:]))
    words = tuple(i - 1 for i in table.words)
    return replace(table, heads=(table.heads[0], *table.heads[2:]), rows=tuple(rows), words=words)


def _head(row: doc.Row) -> Line:
    return Line(shortened(row.head, 60), "bold cyan" if row.chosen else "")


def _cell(cell: doc.Content) -> RenderableType:
    match cell:
        case doc.Bar():
            return _Blocks(cell)
        case doc.Cell():
            return Line(cell.text, "bold red" if cell.bad and cell.strong else _style(cell))
        case str():
            return Line(cell)
        case _:
            return Line(", ".join(each.text for each in cell))


def _style(cell: doc.Cell) -> str:
    return "red" if cell.bad else "bold" if cell.strong else _styles.get(cell.tone, "")


class _Blocks:
    """A bar in coloured blocks, or letters where there is no colour; the last cell is for what lies beyond it."""

    def __init__(self, bar: doc.Bar) -> None:
        self.bar = bar

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(12, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, bar = options.max_width, self.bar
        color = _uses_color(console)
        drawn = Line(no_wrap=True, end="")
        mark = int(bar.capacity / bar.scale * (width - 1)) if bar.capacity is not None else None
        cut = sum(bar.categories.values()) > bar.scale
        for cell in range(width):
            if cut and cell == width - 1:
                drawn.append(CUT_MARK, "bold")
                continue
            # Where two categories meet inside a cell, its halves take one colour each.
            left, right = (self._at((cell + part) / (width - 1)) for part in (0.25, 0.75))
            if cell == mark:
                drawn.append(CAPACITY_MARK, Style(bold=True, bgcolor=_color(left) if color else None))
            elif color:
                drawn.append(*_colored(left, right))
            else:
                middle = self._at((cell + 0.5) / (width - 1))
                drawn.append(_letters[middle] if middle else " ")
        yield drawn

    def _at(self, fraction: float) -> Category | None:
        """The category that covers this place of the scale."""
        position = fraction * self.bar.scale
        for category in Category:
            position -= self.bar.categories.get(category, 0)
            if position < 0:
                return category
        return None


def _legend(shown: Sequence[Category], console: Console) -> Line:
    """What the colours or letters of a bar stand for, in lines that break between two entries only."""
    words, room = Line(), console.width
    for category in shown:
        title = CATEGORY_TITLES[category]
        gap = "" if room == console.width else "   "
        if len(gap + title) + 2 > room:
            gap, room = "\n", console.width
        room -= len(gap.strip("\n") + title) + 2
        sign = ("\u2588", CATEGORY_COLORS[category][1]) if _uses_color(console) else (_letters[category], "bold")
        words.append_text(Line.assemble(gap, sign, f" {title}"))
    return words


def _uses_color(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _color(category: Category | None) -> str | None:
    # Terminals are dark more often than not, and the dark palette is readable on white too.
    return CATEGORY_COLORS[category][1] if category else None


def _colored(left: Category | None, right: Category | None) -> tuple[str, Style]:
    if left is None:
        return " ", Style()
    if left == right:
        return "\u2588", Style(color=_color(left))
    return "\u258c", Style(color=_color(left), bgcolor=_color(right))
