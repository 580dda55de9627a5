"""Several profiles: how the methods stand to plain training, and what the number of blocks does."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_change,
    format_integer,
    format_rate,
    plural,
    sentence,
    unit_for,
)
from autorev.profiler.record import Profile, Result
from autorev.report import document as doc
from autorev.report import plots, shared
from autorev.report.palette import look_of
from autorev.report.profile import view
from autorev.report.profile.page import timelines
from autorev.report.profile.paper import paper
from autorev.report.profile.tables import environment_facts, glance, optional_bytes, optional_seconds, slower
from autorev.words import headline, method_title, setting_facts

MOST_WITH_TIMELINES = 4
"""Records on one page before their timelines would make it large and slow."""
_MOST_MARKS = 12
"""Numbers of blocks that can be told apart as marks on a line."""
_ALIKE = 0.01
"""Peaks within this share of each other are the same: no method lowers them."""


@dataclass(frozen=True, slots=True)
class Family:
    """Profiles of one kind of model under one setting that differ in their number of blocks, ascending."""

    name: str
    profiles: tuple[Profile, ...]
    batch: int
    """At which the most of their methods have a peak."""

    def peak(self, profile: Profile, spec: str) -> int | None:
        """The peak of a method at the family's batch."""
        return _peaks_by_batch(profile).get((self.batch, spec))

    @property
    def specs(self) -> list[str]:
        """Every method that one of them has, in the order of the records."""
        return list(dict.fromkeys(each.method.spec for profile in self.profiles for each in profile.results))

    def title(self, spec: str) -> str:
        """What the first record that has the method calls it."""
        return next((view.labels(p)[spec] for p in self.profiles if p.result(spec) is not None), spec)


@dataclass(frozen=True, slots=True)
class Standing:
    """One method of one record relative to plain training there."""

    profile: Profile
    result: Result
    memory: float | None
    """Peak over plain's."""
    time: float | None
    """Step over plain's."""


def screen(profiles: Sequence[Profile]) -> Iterator[doc.Section]:
    """One line per record: what it recommends, what that saves and costs."""
    unit = unit_for(peak for p in profiles for each in p.results if (peak := view.peak_bytes(each)))
    made = []
    for profile in profiles:
        best, plain = view.chosen(profile), view.by_method(profile, "plain")
        peak, whole = (view.peak_bytes(each) if each else None for each in (best, plain))
        seconds, others = (each.step_seconds if each else None for each in (best, plain))
        reached = view.largest(profile, best.method.spec, "batch") if best else None
        cells: dict[str, doc.Content] = {
            "recommended": doc.Cell(view.labels(profile)[best.method.spec] if best else NOTHING, tone="accent"),
            f"peak\n{unit.name}": NOTHING if peak is None else unit.number(peak),
            "peak vs\nplain": format_change(peak, whole) if peak else NOTHING,
            "step": optional_seconds(seconds),
            "step vs\nplain": format_change(seconds, others) if seconds else NOTHING,
            "largest\nbatch": format_integer(reached[0]) if reached else NOTHING,
        }
        made.append((doc.Row(clean(profile.name) + ("" if profile.complete else " (incomplete)")), cells))
    yield doc.Section("", (doc.table("record", made, words=(1,)),))


def page(profiles: Sequence[Profile], command: str) -> doc.Page:
    """What the records say together; `command` is what made the report."""
    models = len({profile.model.name for profile in profiles})
    lead, notice = f"Training steps of {plural(models, 'model')}, compared", []
    if unfinished := [clean(profile.name) for profile in profiles if not profile.complete]:
        said = f"{plural(len(unfinished), 'record')} {'is' if len(unfinished) == 1 else 'are'} incomplete:"
        words = f" {', '.join(unfinished)}. What is shown is what was measured."
        notice.append(doc.text(doc.strong(said), words, kind="notice"))
    facts = [environment_facts(profile.environment) for profile in profiles]
    rows = [doc.Row(clean(p.name), tuple(each.values())) for p, each in zip(profiles, facts, strict=True)]
    places = doc.Table(("Record", *facts[0]), tuple(rows), "Environments", words=(1, 2, 3, 7, 8))
    return shared.page_of_many(profiles, "profile", lead, notice, _sections(profiles), places, command)


def _sections(profiles: Sequence[Profile]) -> Iterator[doc.Section]:
    yield doc.Section("What each record recommends", (recommendations(profiles),))
    relative = [figure for name in _RELATIVE if (figure := _relative(profiles, name))]
    if relative:
        without = [clean(profile.name) for profile in profiles if not standings([profile])]
        said = (
            "One line per record, one mark per method; 1 is plain training in the same record. Left is less memory, "
            "and less time."
        )
        if without:
            said += f" Not here, because plain training has no figures there: {', '.join(without)}."
        yield doc.Section("Against plain training", (doc.captioned(doc.Grid(tuple(relative)), caption=said),))
    for i, family in enumerate(families(profiles)):
        said = (
            "Records of the same class, machine and setting, with the same name but for the number of blocks. Peaks "
            f"are compared at batch {family.batch}."
        )
        drawn = doc.Grid(tuple(_family_figures(family, f"family-{i}")), columns=3)
        yield doc.Section(family.name, (doc.captioned(drawn, family_table(family), caption=said),))
    if any(point.axis == "batch" for profile in profiles for point in profile.points):
        yield doc.Section("Beside the paper", tuple(paper()))
    yield doc.Section("Every method of every record", tuple(_every_method(profile) for profile in profiles))
    yield doc.Section("Memory over one step", tuple(_timelines(profiles)))


def recommendations(profiles: Sequence[Profile]) -> doc.Table:
    """What each record recommends, and what that saves and costs."""
    return doc.table("Record", list(map(_recommended, profiles)), label="Recommendations", words=(1, 2, 6))


def _recommended(profile: Profile) -> tuple[doc.Row, dict[str, doc.Content]]:
    best, plain, advice = view.chosen(profile), view.by_method(profile, "plain"), profile.recommendation
    peak, whole = (view.peak_bytes(each) if each else None for each in (best, plain))
    where = profile.environment
    name = view.labels(profile)[best.method.spec] if best else headline(advice.method) if advice else NOTHING
    none = "None." if profile.complete else "No recommendation yet."
    cells: dict[str, doc.Content] = {
        "Recommended": doc.Cell(name, strong=True),
        "Why": sentence(advice.why) if advice else none,
        "Peak": optional_bytes(peak),
        "Against plain": format_change(peak, whole) if peak and whole else NOTHING,
        "Step against plain": slower(profile, best) if best else NOTHING,
        "Machine and date": doc.Cell(clean(where.machine), clean(where.date)[:10]),
    }
    facts = setting_facts(profile.setting)
    notes = [] if profile.model.name == profile.name else [clean(profile.model.name)]
    notes.append(", ".join([f"batch {facts.pop('Batch')}", *facts.values()]))
    if not profile.complete:
        notes.append(f"incomplete: {view.waiting(profile)} of {len(profile.results)} methods are not measured")
    return doc.Row(clean(profile.name), notes=tuple(notes)), cells


def _every_method(profile: Profile) -> doc.Table:
    """One record's methods by their peak, folded below what they come to."""
    found = glance(profile)
    batches = any(point.axis == "batch" and point.largest for point in profile.points)
    rows = []
    for each, row in zip(view.results(profile), found.rows, strict=True):
        reached = view.largest(profile, each.method.spec, "batch")
        cells = (*row.cells, format_integer(reached[0]) if reached else NOTHING) if batches else row.cells
        name = f"{clean(profile.name)}: {row.head}"
        rows.append((view.peak_bytes(each) or float("inf"), replace(row, head=name, cells=cells)))
    rows.sort(key=lambda each: each[0])
    peaks = [peak for each in profile.results if (peak := view.peak_bytes(each))]
    said = f"{clean(profile.name)}: {plural(len(rows), 'method')}"
    if peaks and max(peaks) <= min(peaks) * (1 + _ALIKE):
        said += f", every peak {format_bytes(max(peaks))}"
    elif peaks:
        said += f", peaks from {format_bytes(min(peaks))} to {format_bytes(max(peaks))}"
    heads = (*found.heads, "Largest batch") if batches else found.heads
    label = f"Every method of {clean(profile.name)}"
    return replace(found, heads=heads, rows=tuple(row for _, row in rows), label=label, fold=said)


def _timelines(profiles: Sequence[Profile]) -> Iterator[doc.Part]:
    if len(profiles) > MOST_WITH_TIMELINES:
        yield doc.text(
            f"Timelines are left out of a page of more than {MOST_WITH_TIMELINES} records; the report of one record "
            "has them."
        )
        return
    for i, profile in enumerate(profiles):
        yield doc.text(clean(profile.name), kind="h3")
        yield from tuple(timelines(profile, f"r{i}-")) or (doc.text("This record has no timeline."),)


def standings(profiles: Sequence[Profile]) -> list[Standing]:
    """Every method that can be set against plain training in its record, plain itself left out."""
    found = []
    for profile in profiles:
        plain = view.by_method(profile, "plain")
        for each in profile.results:
            if plain is None or each is plain:
                continue
            memory = each.memory.peak_bytes / plain.memory.peak_bytes if each.memory and plain.memory else None
            time = each.step_seconds / plain.step_seconds if each.step_seconds and plain.step_seconds else None
            if memory is not None or time is not None:
                found.append(Standing(profile, each, memory, time))
    return found


_RELATIVE: dict[str, tuple[str, str, Callable[[Standing], float | None]]] = {
    "memory": ("Peak of every method as a share of plain's", "peak, as a share of plain's", lambda s: s.memory),
    "time": (
        "Step time of every method as a multiple of plain's",
        "step time, as a multiple of plain's",
        lambda s: s.time,
    ),
}


def _relative(profiles: Sequence[Profile], name: str) -> doc.Figure | None:
    """One row per record, one dot per method; 1 is plain training."""
    label, title, value_of = _RELATIVE[name]
    rows = [p for p in profiles if any(value_of(s) is not None for s in standings([p]))]
    if not rows:
        return None
    places = {id(profile): place for place, profile in enumerate(rows)}
    groups: dict[str, list[tuple[Standing, float]]] = defaultdict(list)
    for each in standings(rows):
        if (value := value_of(each)) is not None:
            groups[each.result.method.name].append((each, value))
    series = []
    for method, members in groups.items():
        x, y = [value for _, value in members], [places[id(each.profile)] for each, _ in members]
        texts = [f"{clean(each.result.method.title)}: {value:.2f} of plain" for each, value in members]
        how: dict[str, Any] = {"texts": texts, "mode": "markers", "size": 9}
        series.append(plots.Series.like(look_of(method), method_title(method), x, y, **how))
    names = [plots.row_name(profile.name, 24) for profile in rows]
    return plots.dots(
        f"relative-{name}", label, names, series, f"{title} (1 = plain)", limit=plots.Limit(1, color=plots.MUTED)
    )


def families(profiles: Sequence[Profile]) -> list[Family]:
    """Two or more records each: same class, machine, setting, and name but for its number of blocks; other `blocks`.

    The batch may differ between the settings: they are compared at a batch that all have, if there is one."""
    groups: dict[object, list[Profile]] = defaultdict(list)
    for profile in profiles:
        # A record has no width; a name such as `gpt2-512-16` has, and only its number of blocks may differ.
        name = re.sub(rf"(?<!\d){profile.blocks}(?!\d)", "#", clean(profile.model.name))
        s = profile.setting
        setting = (s.sequence, s.dtype, s.optimizer, s.trains, s.lora_rank, s.loss)
        groups[(profile.model.class_name, name, profile.environment.machine, setting)].append(profile)
    found = []
    for group in groups.values():
        group.sort(key=lambda profile: profile.blocks)
        if len({profile.blocks for profile in group}) > 1:
            name = f"{clean(group[0].model.class_name)} with {group[0].blocks} to {group[-1].blocks} blocks"
            found.append(Family(name, tuple(group), _common_batch(group)))
    return found


def _common_batch(profiles: Sequence[Profile]) -> int:
    counts: dict[int, int] = defaultdict(int)
    for profile in profiles:
        for batch, _ in _peaks_by_batch(profile):
            counts[batch] += 1
    return max(counts, key=lambda batch: (counts[batch], batch), default=profiles[0].setting.batch)


def _peaks_by_batch(profile: Profile) -> dict[tuple[int, str], int]:
    """Peaks by (batch, spec): those of the record's own setting and those of its sweep."""
    found = {(p.value, p.method): p.peak_bytes for p in profile.points if p.axis == "batch" and p.peak_bytes}
    own = {(profile.setting.batch, r.method.spec): r.memory.peak_bytes for r in profile.results if r.memory}
    return found | own


def _reached(profile: Profile, spec: str) -> tuple[int | None, float | None]:
    """The largest batch that fits under a method, and tokens (or samples) a second there, where it was timed."""
    return view.largest(profile, spec, "batch") or (None, None)


def _family_figures(family: Family, id: str) -> Iterator[doc.Figure]:
    """Peak at one batch, the largest batch within the budget, and throughput there, against the number of blocks."""
    unit = unit_for(peak for p in family.profiles for spec in family.specs if (peak := family.peak(p, spec)))
    units = family.profiles[0].units
    kinds: list[tuple[str, str, str, Callable[[Profile, str], float | None], Callable[[float], str]]] = [
        (
            "memory",
            "Peak memory",
            f"peak at batch {format_integer(family.batch)}, {unit.name}",
            lambda p, spec: None if (peak := family.peak(p, spec)) is None else plots.in_unit(peak, unit),
            lambda value: f"{value:.3g} {unit.name}",
        ),
        (
            "batch",
            "Largest batch",
            "largest batch, samples",
            lambda p, spec: _reached(p, spec)[0],
            lambda value: format_integer(int(value)),
        ),
        (
            "throughput",
            "Throughput at the largest batch",
            f"{units}/s at the largest batch",
            lambda p, spec: _reached(p, spec)[1],
            lambda value: f"{format_rate(value)} {units}/s",
        ),
    ]
    depths = sorted({profile.blocks for profile in family.profiles})
    for name, label, title, value_of, words in kinds:
        series = []
        for spec in family.specs:
            found = [(p.blocks, v) for p in family.profiles if (v := value_of(p, spec)) is not None]
            look = next(view.looks(p)[spec] for p in family.profiles if p.result(spec) is not None)
            texts = [f"{blocks} blocks: {words(value)}" for blocks, value in found]
            mode = "lines+markers" if len(depths) <= _MOST_MARKS else "lines"
            x, y = [blocks for blocks, _ in found], [value for _, value in found]
            series += (
                [plots.Series.like(look, family.title(spec), x, y, texts=texts, mode=mode, size=8)] if found else []
            )
        if series or name == "memory":
            y_axis = {"rangemode": "tozero"}
            label = f"{label} against the number of blocks"
            yield plots.lines(
                f"{id}-{name}", label, series, "blocks", title, x_axis=plots.whole_numbers(depths), y_axis=y_axis
            )


def family_table(family: Family) -> doc.Table:
    """Peak at the common batch, largest batch and throughput there, by number of blocks."""
    specs = family.specs
    batches = any(_reached(p, spec)[0] for p in family.profiles for spec in specs)
    heads = ["Blocks", *(f"peak, {family.title(spec)}" for spec in specs)]
    if batches:
        heads += [f"largest batch, {family.title(spec)}" for spec in specs]
    made = []
    for profile in family.profiles:
        cells: list[doc.Cell | str] = [optional_bytes(family.peak(profile, spec)) for spec in specs]
        if batches:
            cells += [_reach_cell(profile, spec) for spec in specs]
        made.append(doc.Row(format_integer(profile.blocks), tuple(cells), (clean(profile.name),)))
    return doc.Table(tuple(heads), tuple(made), "Figures against the number of blocks", fold="Show as a table")


def _reach_cell(profile: Profile, spec: str) -> doc.Cell:
    batch, rate = _reached(profile, spec)
    if batch is None:
        return doc.NO_FIGURE
    return doc.Cell(format_integer(batch), f"{format_rate(rate)} {profile.units}/s" if rate else "")
