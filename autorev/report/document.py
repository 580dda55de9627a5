"""A report as data: pages of sections, and what stands in them. What a renderer shows, a test can read.

A content file (`analysis.py`, `profile/`, `finetuning/`) makes these from a record; `terminal.py`, `markdown.py` and
`html.py` show them, and know no record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autorev.analysis import Category
from autorev.format import NOTHING


@dataclass(frozen=True, slots=True)
class Span:
    """Words that stand out: strong, muted, accent, good, warn, bad or code."""

    text: str
    tone: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph. Kinds: hint (small), lead, why, notice, h3 and h4 (headings within a section)."""

    spans: tuple[str | Span, ...]
    kind: str = ""
    indent: int = 0
    """Columns of a terminal."""

    @property
    def plain(self) -> str:
        """The words alone."""
        return "".join(each if isinstance(each, str) else each.text for each in self.spans)


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; `signs` are what a terminal puts before each item (`Note:`, `1.`)."""

    items: tuple[str, ...]
    signs: tuple[str, ...] = ()
    kind: str = "ul"
    """ul, ol, or a class of the page's style sheet: because, reasons, paths (as code)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values. Kinds: facts (in a line), environment (below each other), method (whole paragraphs)."""

    entries: tuple[tuple[str, str | Text | Terms], ...]
    kind: str = "environment"


@dataclass(frozen=True, slots=True)
class Terms:
    """Words with their meaning, some with the colour of a category."""

    entries: tuple[tuple[Category | None, str, str], ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure that is shown large, beside what it stands against."""

    title: str
    figure: str
    against: str = ""
    """The comparison in words; empty where there is none."""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Figures that decide, side by side."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure, with what is said below it."""

    text: str
    note: str = ""
    """Further lines are further notes."""
    bad: bool = False
    strong: bool = False
    tone: str = ""
    """code; or the class of a verdict."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Bytes by category on a scale from 0 to `scale`, as a terminal draws them; the capacity is a mark on it."""

    categories: dict[str, int]
    scale: int
    capacity: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line: its heading, what is said below that, and one cell per column."""

    head: str
    cells: tuple[Content, ...] = ()
    notes: tuple[str, ...] = ()
    chosen: bool = False
    """Is it the recommended one?"""
    below: tuple[Part, ...] = ()
    """What needs the whole width, below the row."""


Content = str | Cell | Bar | tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows; every row has one cell less than there are headings."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    label: str = ""
    """What it shows, for those who hear the page."""
    words: tuple[int, ...] = ()
    """Columns of words, which begin at the left; the first one always does."""
    fold: str = ""
    """The title behind which it is folded away."""
    kind: str = "numbers"
    """numbers or blocks, whose rows become cards on a phone."""
    indent: int = 0
    room: int = 0
    """Columns that a terminal has to have for its bars."""
    code_heads: bool = False
    """Are the rows' headings names of a program?"""

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.heads) - 1 for row in self.rows), "a row lacks a cell"


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot: plotly's data and layout, drawn in light colours, in the place of this id."""

    id: str
    label: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Legend:
    """What the colours of categories stand for, and the mark that a terminal draws on a bar."""

    categories: tuple[Category, ...]
    mark: str = ""
    room: int = 0
    """As of the table whose bars it explains."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Parts beside each other, as far as there is room. Kinds: grid (of figures) and pair (of halves)."""

    parts: tuple[Part, ...]
    columns: int = 2
    kind: str = "grid"


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that belong together. Kinds: figure (with its legend, caption and table) and stack."""

    parts: tuple[Part, ...]
    kind: str = "figure"


@dataclass(frozen=True, slots=True)
class Fold:
    """Parts behind a title."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """What was typed to make a record or a report."""

    text: str
    label: str = "Command"


Part = Text | Bullets | Facts | Tiles | Table | Figure | Legend | Grid | Group | Fold | Command


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: tuple[Part, ...]
    eyebrow: str = ""
    """Above the heading of the section that says what to do: it is shown as a card."""
    level: int = 2
    """Of the heading in Markdown, which may stand within a longer text."""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report."""

    title: str
    """Of the browser's window."""
    head: tuple[Part, ...]
    """Below the name in large letters, which is the first."""
    sections: tuple[Section, ...]
    foot: tuple[Part, ...] = ()

    @property
    def figures(self) -> dict[str, Figure]:
        """Every plot by its id, in the order of the page."""
        parts = [*self.head, *(part for section in self.sections for part in section.parts), *self.foot]
        return {each.id: each for each in _figures(parts)}


def _figures(parts: Iterable[Part]) -> Iterator[Figure]:
    for part in parts:
        if isinstance(part, Figure):
            yield part
        elif isinstance(part, Grid | Group | Fold):
            yield from _figures(part.parts)


NO_FIGURE = Cell(NOTHING)


def text(*spans: str | Span, kind: str = "", indent: int = 0) -> Text:
    """A paragraph of words and spans."""
    return Text(spans, kind, indent)


def prose(words: str, kind: str = "", indent: int = 0) -> Text:
    """A paragraph whose commands stand between backticks."""
    pieces = words.split("`")
    spans = (Span(each, "code") if i % 2 else each for i, each in enumerate(pieces))
    return Text(tuple(each for each in spans if each), kind, indent)


def strong(words: str) -> Span:
    """Bold."""
    return Span(words, "strong")


def muted(words: str) -> Span:
    """Beside the point."""
    return Span(words, "muted")


def numbered(items: Iterable[str]) -> Bullets:
    """First, second, third."""
    found = tuple(items)
    return Bullets(found, tuple(f"  {i}." for i in range(1, len(found) + 1)), "ol")


def table(first: str, entries: Sequence[tuple[Row, dict[str, Content]]], **rest: Any) -> Table:
    """Rows with their cells by heading, below which all of them stand; the first column's heading is `first`."""
    heads = tuple(entries[0][1]) if entries else ()
    return Table((first, *heads), tuple(replace(row, cells=tuple(cells.values())) for row, cells in entries), **rest)


def stack(*parts: Part) -> Group:
    """Parts below each other, as one cell of a grid."""
    return Group(parts, "stack")


def captioned(*parts: Part | None, caption: str = "", title: str = "") -> Group:
    """A figure with its title above and its caption below it; tables come after the caption."""
    head = [text(title, kind="h3")] if title else []
    shown = [part for part in parts if part is not None]
    tables = [part for part in shown if isinstance(part, Table)]
    words = [prose(caption, kind="caption")] if caption else []
    return Group((*head, *(part for part in shown if not isinstance(part, Table)), *words, *tables))


def without_empty(table: Table, keep: int = 0) -> Table:
    """The table without columns in which no row has a figure; the first `keep` stay."""
    empty = (NOTHING, NO_FIGURE)
    kept = [i for i in range(len(table.heads) - 1) if i < keep or any(row.cells[i] not in empty for row in table.rows)]
    rows = tuple(replace(row, cells=tuple(row.cells[i] for i in kept)) for row in table.rows)
    return replace(table, heads=(table.heads[0], *(table.heads[i + 1] for i in kept)), rows=rows)
