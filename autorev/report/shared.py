"""What reports of every kind have in common: how they begin, what they recommend, what made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from autorev.analysis import Category, ModelInfo
from autorev.format import clean, plural, sentence
from autorev.known_methods import METHODS
from autorev.methods import TILES
from autorev.report import document as doc
from autorev.report.terminal import shortened
from autorev.words import CATEGORY_MEANINGS, CATEGORY_TITLES, method_title, model_facts


def name_on_screen(model: ModelInfo, *more: str) -> doc.Text:
    """The first line of a screen."""
    facts = ", ".join((*model_facts(model), *more))
    return doc.text(doc.strong(shortened(clean(model.name))), "  ", doc.muted(shortened(facts)))


def advice_on_screen(title: str, why: str, advice: Iterable[str]) -> doc.Section:
    """What to do, why, and what would help further."""
    head = doc.text(doc.strong("Recommendation  "), doc.Span(title, "accent"))
    steps = doc.numbered(map(sentence, advice))
    return doc.Section("", (head, doc.text(shortened(sentence(why)), indent=2), steps))


def notes_on_screen(notes: Iterable[str]) -> Iterator[doc.Section]:
    """What the reader should know of a run."""
    if found := tuple(map(sentence, notes)):
        yield doc.Section("", (doc.Bullets(found, ("Note:",) * len(found)),))


def notes_on_page(notes: Iterable[str]) -> Iterator[doc.Section]:
    """The same below everything that they are about."""
    if found := tuple(map(sentence, notes)):
        yield doc.Section("Notes on this run", (doc.Bullets(found),))


def helping_further(advice: Iterable[str]) -> Iterator[doc.Part]:
    """At the end of the card that says what to do."""
    if found := tuple(map(sentence, advice)):
        yield from (doc.text("What would help further", kind="h3"), doc.numbered(found))


def page_head(model: ModelInfo, facts: dict[str, str], *more: str) -> tuple[doc.Part, ...]:
    """The name in large letters, what it is, and the setting."""
    lead = doc.text(" \u00b7 ".join((*model_facts(model), *more)), kind="lead")
    return doc.text(clean(model.name)), lead, *((doc.Facts(tuple(facts.items()), "facts"),) if facts else ())


def made_with(own: str, command: str) -> Iterator[doc.Part]:
    """The commands of a record and of its report."""
    yield from (doc.text("Record made with", kind="h3"), doc.Command(own, "Command of the record"))
    if command != own:
        yield from (doc.text("Report made with", kind="h3"), doc.Command(command, "Command of the report"))


def page_of_many(
    records: Sequence[Any],
    noun: str,
    lead: str,
    notice: Sequence[doc.Part],
    sections: Iterable[doc.Section],
    places: doc.Table,
    command: str,
) -> doc.Page:
    """Records beside each other: their sections, then their notes, where they were made, and by which commands."""
    count = plural(len(records), noun)
    head = (doc.text(count), doc.text(lead, kind="lead"), *notice)
    notes = tuple(f"{clean(each.name)}: {sentence(note)}" for each in records for note in each.notes)
    end = [doc.Section("Notes", (doc.Bullets(notes),))] if notes else []
    end.append(doc.Section("Where and when they ran", (places,)))
    own = tuple(doc.Command(each.command, f"Command of {clean(each.name)}") for each in records)
    foot = (
        doc.text("Records made with", kind="h3"),
        doc.Fold("Show the command of every record", own),
        doc.text("Report made with", kind="h3"),
        doc.Command(command, "Command of the report"),
    )
    return doc.Page(f"{count} compared", head, (*sections, *end), foot)


def categories(found: Iterable[Category]) -> doc.Terms:
    """What each category of memory is."""
    return doc.Terms(tuple((each, CATEGORY_TITLES[each], CATEGORY_MEANINGS[each]) for each in found))


def methods(found: dict[str, str]) -> doc.Terms:
    """What each method does, with what is said beside it."""
    terms = []
    for name, said in found.items():
        if name in METHODS:
            terms.append((None, method_title(name), METHODS[name].meaning + said))
        elif name.endswith(TILES):
            meaning = "What of a block acts on each token alone runs a tile of tokens at a time, forward and backward."
            terms.append((None, method_title(name), meaning + said))
    return doc.Terms(tuple(terms))
