"""Records as reports: what is shown of each kind, on a terminal, as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autorev.report import plan, terminal
from autorev.report.analysis import content as analysis
from autorev.report.document import Page, Section
from autorev.report.finetuning import comparison as finetunings
from autorev.report.finetuning import content as finetuning
from autorev.report.markdown import to_markdown
from autorev.report.profile import comparison as profiles
from autorev.report.profile import content as profile
from autorev.report.profile.page import page as profile_page

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is said of one record, and of several."""

    screen: Callable[[Any], Iterable[Section]]
    screen_of_many: Callable[[Any], Iterable[Section]]
    markdown: Callable[[Any], Iterable[Section]]
    page: Callable[[Any, str], Page]
    page_of_many: Callable[[Any, str], Page] | None
    """None: each has a page of its own."""


_kinds = {
    "analysis": _Kind(analysis.screen, analysis.screen_of_many, analysis.markdown, analysis.page, None),
    "profile": _Kind(profile.screen, profiles.screen, profile.markdown, profile_page, profiles.page),
    "plan": _Kind(plan.screen, plan.screen_of_many, plan.markdown, plan.page, None),
    "fine-tuning": _Kind(
        finetuning.screen, finetuning.screen_of_many, finetuning.markdown, finetuning.page, finetunings.page
    ),
}


def print_records(records: Sequence[Any], console: Console) -> None:
    """One screen for a single record; for several of one kind, what they say together."""
    kind = _kinds[records[0].kind]
    terminal.print_sections(kind.screen(records[0]) if len(records) == 1 else kind.screen_of_many(records), console)


def render_text(record: Any) -> str:
    """The same screen as plain text, 100 columns wide."""
    return terminal.to_text(_kinds[record.kind].screen(record))


def render_markdown(records: Sequence[Any]) -> str:
    """Tables for GitHub; empty for nothing."""
    return to_markdown(_kinds[records[0].kind].markdown(records)) if records else ""


def page_of(records: Sequence[Any], command: str) -> Page:
    """The page of one record, or of several of one kind; `command` is what made it.

    Raises:
        ValueError: there is no record, or several that have no page together.
    """
    if not records:
        raise ValueError("there is no record to report")
    kind = _kinds[records[0].kind]
    if len(records) == 1:
        return kind.page(records[0], command)
    if kind.page_of_many is None:
        raise ValueError(f"a page is of one {records[0].kind}")
    return kind.page_of_many(records, command)


def render_html(records: Sequence[Any], command: str) -> str:
    """The same page as one file that needs nothing else.

    Raises:
        ValueError: see `page_of`.
    """
    # plotly and jinja are for those alone who want a page.
    from autorev.report.html import to_html

    return to_html(page_of(records, command))
