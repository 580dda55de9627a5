"""Sections as Markdown with GitHub's tables, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from autorev.format import NOTHING, clean
from autorev.report import document as doc


def to_markdown(sections: Iterable[doc.Section]) -> str:
    """Headings, and below them what they hold; empty for nothing."""
    found = [piece for section in sections for piece in _section(section)]
    return "\n\n".join(found) + "\n" if found else ""


def _section(section: doc.Section) -> Iterator[str]:
    if section.title:
        yield f"{'#' * section.level} {literal(section.title)}"
    yield from map(_shown, section.parts)


def _shown(part: doc.Part) -> str:
    match part:
        case doc.Text():
            return ("# " if part.kind == "h1" else "") + "".join(map(_span, part.spans))
        case doc.Bullets():
            marks = (f"{i}." if part.kind == "ol" else "-" for i in range(1, len(part.items) + 1))
            return "\n".join(f"{mark} {literal(item)}" for mark, item in zip(marks, part.items, strict=True))
        case doc.Command():
            return "  \n".join(code(line) for line in part.text.splitlines())
        case doc.Table():
            return _table(part)
        case _:
            raise TypeError(f"Markdown does not show {type(part).__name__}")


def _span(span: str | doc.Span) -> str:
    if isinstance(span, str):
        return literal(span, ends=True)
    return {"code": code, "strong": lambda words: f"**{literal(words)}**", "link": _link}.get(span.tone, literal)(
        span.text
    )


def _link(words: str) -> str:
    return f"[{words}](https://{words.lower().replace('arxiv ', 'arxiv.org/abs/')})"


def _table(table: doc.Table) -> str:
    """The columns of figures are aligned to the right."""
    heads = [head.lower().replace("\n", " ") for head in table.heads]
    marks = ["---" if i in (0, *table.words) else "---:" for i in range(len(heads))]
    rows = [
        [code(row.head) if table.code_heads and row.head != NOTHING else _head(row), *map(_cell, row.cells)]
        for row in table.rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[literal(h) for h in heads], marks, *rows])


def _head(row: doc.Row) -> str:
    name = literal(row.head)
    notes = ", ".join(literal(note) for note in row.notes if note != row.head)
    name = f"**{name}**" if row.chosen else name
    return f"{name}: {notes}" if notes else name


def _cell(cell: doc.Content) -> str:
    match cell:
        case str():
            return literal(cell) or NOTHING
        case doc.Cell():
            words = code(cell.text) if cell.tone == "code" else "<br>".join(map(literal, cell.text.split("\n")))
            words = f"**{words}**" if cell.strong and cell.text != NOTHING else words
            return f"{words} ({', '.join(map(literal, cell.note.splitlines()))})" if cell.note else words or NOTHING
        case _:
            raise TypeError(f"Markdown does not show {type(cell).__name__}")


def literal(words: str, ends: bool = False) -> str:
    """`words` with what Markdown or HTML would read in it made literal; `ends`: with the spaces at its ends."""
    found = clean(words)
    if ends and words:
        found = f"{' ' * words[0].isspace()}{found}{' ' * words[-1].isspace()}" if found else " "
    escaped = found.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", escaped)


def code(words: str) -> str:
    """`words` as code in a cell: only a backtick and a bar could end it early."""
    return "`" + clean(words).replace("`", "'").replace("|", "\\|") + "`"
