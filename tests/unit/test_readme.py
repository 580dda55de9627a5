"""The pages say what the repository holds: generated sections, links, the length of the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.results import ARCHITECTURE, RECORDS, SECTIONS, with_section
from benchmarks.tree import tree
from tests.helpers.pages import PAGES, ROOT, fences

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
LONGEST = 150
"""Lines of the README: what a newcomer reads. The rest has pages of its own."""


@pytest.mark.parametrize(("page", "name"), SECTIONS, ids=[name for _, name in SECTIONS])
def test_generated_sections_are_those_of_the_records(page: Path, name: str) -> None:
    """Tables are made of the records, and the file tree of the modules' docstrings."""
    text = page.read_text(encoding="utf-8")
    made = SECTIONS[page, name]()
    assert len(made.splitlines()) > 5 or made == "Nothing is recorded yet."
    assert with_section(text, name, made) == text, "run python -m benchmarks.results"


def test_a_section_that_a_page_lacks_is_an_error() -> None:
    """A renamed mark must not go unnoticed."""
    with pytest.raises(ValueError, match="not enough values"):
        with_section("text without marks", "table", "")


def test_every_recorded_analysis_is_shown() -> None:
    """A record that no page reads is dead weight."""
    records = [path.name for path in (RECORDS / "analyses").glob("*.json")]
    assert records
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in records if name not in pages] == []


def test_every_module_is_in_the_tree_with_a_sentence() -> None:
    """Its docstring says what it is for."""
    modules = {p.name for p in (ROOT / "autorev").rglob("*.py") if p.name != "__init__.py"}
    lines = {words[0]: words[1:] for line in tree().splitlines() if (words := line.split(maxsplit=1))}
    assert sorted(modules - lines.keys()) == []
    assert [name for name in modules if not lines[name]] == []


def test_everything_beside_the_package_exists() -> None:
    """The second tree of the page on architecture is written by hand."""
    (beside,) = (
        f for f in fences("text") if f.page == ARCHITECTURE and "cli.py" in f.text and "autorev/" not in f.text
    )
    named = [line.split()[0] for line in beside.text.splitlines()]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert len(named) > 5


def test_the_readme_is_one_page() -> None:
    """A newcomer reads it to the end."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository and, where one is named, to a heading in it."""
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [_anchor(text) for text in headings], f"{page.name} links to {target}#{heading}"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_one_report_is_kept() -> None:
    """The others are made by the commands of docs/results.md."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in ignored if line.startswith("!reports/")] == ["!reports/llama-3.1-8b-lora-32k.html"]
    assert (ROOT / "reports" / "llama-3.1-8b-lora-32k.html").is_file()
