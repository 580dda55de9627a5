"""The README's map of the repository is the repository."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import BEGIN, END, RECORDS, with_table

ROOT = Path(__file__).parents[2]


def paths_of_the_map() -> set[str]:
    """Every file and folder that the tree in the README names."""
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", text, re.DOTALL)
    assert tree is not None
    folders: list[str] = []
    found = set()
    for line in tree[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        found.add("".join(folders[: depth + 1]))
    return found


def test_everything_on_the_map_exists() -> None:
    """A file that is moved or deleted is moved or deleted on the map."""
    assert [path for path in sorted(paths_of_the_map()) if not (ROOT / path).exists()] == []


def test_every_module_is_on_the_map() -> None:
    """A new module gets its line."""
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "autorev").rglob("*.py") if p.name != "__init__.py"}
    assert sorted(modules - paths_of_the_map()) == []


def test_no_placeholder_is_left() -> None:
    """Output in the README is real output."""
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"\b(SMOLLM2_OUTPUT|LLAMA_OUTPUT|FILE_TREE|TODO)\b", text)
    assert text.count("Recommendation  ") >= 2


def test_the_results_are_those_of_the_records() -> None:
    """README's results table is what `python -m benchmarks.results` makes of the recorded profiles."""
    text = (ROOT / "README.md").read_text()
    assert BEGIN in text and END in text
    assert len(list(RECORDS.glob("*.json"))) >= 2
    assert with_table(text) == text, "run python -m benchmarks.results"
