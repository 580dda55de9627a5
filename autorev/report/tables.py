"""Tables and tiles as data, so that a page and a test read the same cells."""

from __future__ import annotations

from dataclasses import dataclass

from autorev.format import NOTHING


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure, with what is said below it."""

    text: str
    note: str = ""
    bad: bool = False
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One line: its heading, what is said below that, and one cell per column."""

    head: str
    cells: tuple[Cell | str, ...]
    notes: tuple[str, ...] = ()
    chosen: bool = False
    """Is it the recommended one?"""


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows; every row has one cell less than there are headings."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.heads) - 1 for row in self.rows), "a row lacks a cell"


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure that is shown large, beside what it stands against."""

    title: str
    figure: str
    against: str = ""
    """The comparison in words; empty where there is none."""
    warning: str = ""


NO_FIGURE = Cell(NOTHING)
