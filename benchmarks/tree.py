"""The file tree of docs/architecture.md: every module of the package with the first sentence of its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "autorev"
COLUMN = 28


def tree() -> str:
    """A fenced block, files before folders."""
    return "\n".join(["```text", "autorev/", *_lines(PACKAGE, "  "), "```"])


def _lines(folder: Path, indent: str) -> Iterator[str]:
    entries = [p for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    for path in sorted(entries, key=lambda p: (p.is_dir(), p.name)):
        if path.name != "__init__.py":
            name = f"{indent}{path.name}{'/' if path.is_dir() else ''}"
            yield f"{name:<{COLUMN}}{_sentence(path)}".rstrip()
        if path.is_dir():
            yield from _lines(path, indent + "  ")


def _sentence(path: Path) -> str:
    file = path / "__init__.py" if path.is_dir() else path
    paragraph = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    return paragraph.replace("\n", " ").removesuffix(".")
