"""What a report of one profile says: on a screen, as Markdown, and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_change,
    format_error,
    format_integer,
    format_rate,
    format_ratio,
    format_seconds,
    format_share,
    plural,
    sentence,
    unit_for,
)
from autorev.profiler.points import largest_points, point_per_second
from autorev.profiler.record import Profile, Result, Status
from autorev.report import document as doc
from autorev.report import shared
from autorev.report.profile import view
from autorev.report.profile.figures import peak_by_category
from autorev.report.profile.tables import (
    doubt,
    gradient_error,
    loss_change,
    optional_seconds,
    peak_phase,
    share_of,
    state,
)
from autorev.report.terminal import shortened
from autorev.words import GOALS, headline, setting_facts

_ROOM_FOR_BARS = 96
"""Columns of a terminal: below, the figures need the room."""
_MEANINGS = (
    "Peak: the most that the allocator held during a step. Kept: between forward and backward, beyond parameters, "
    "optimiser state and inputs. Spread: the distance of the quartiles relative to the median. Gradient error: "
    "relative to ordinary autograd. Loss change: before any training, in nats."
)


def screen(profile: Profile) -> Iterator[doc.Section]:
    """One screen of a terminal: the setting, every method, how far each gets, what to do."""
    yield doc.Section("", tuple(_heading(profile)))
    yield doc.Section("", tuple(_methods(profile)))
    for axis in view.axes(profile):
        if view.sought_largest(profile, axis):
            yield doc.Section(f"Largest {clean(axis)} that fits", (_reach(profile, axis),))
    if advice := profile.recommendation:
        title = headline_of(profile)
        best = view.chosen(profile)
        if best and (name := view.labels(profile)[best.method.spec]) != best.method.name:
            title += f": {shortened(name, 60)}"
        yield shared.advice_on_screen(title, advice.why, advice.advice)
    yield from shared.notes_on_screen(profile.notes)


def headline_of(profile: Profile) -> str:
    """The recommendation as an imperative."""
    best = view.chosen(profile)
    assert profile.recommendation
    return headline(best.method.name if best else profile.recommendation.method)


def _heading(profile: Profile) -> Iterator[doc.Part]:
    facts, where = setting_facts(profile.setting), profile.environment
    setting = ", ".join([f"batch {profile.setting.batch}", *(v for name, v in facts.items() if name != "Batch")])
    start = () if profile.pretrained else ("random weights",)
    machine = f"On {clean(where.machine)}, {plural(where.threads, 'thread')}, {clean(where.date)}"
    yield shared.name_on_screen(profile.model, plural(profile.blocks, "block"), *start)
    yield doc.text(f"One training step: {setting}")
    yield doc.text(doc.muted(shortened(machine)))
    if profile.budget_bytes is not None:
        yield doc.text(f"Budget: {format_bytes(profile.budget_bytes)}; wanted: {_goal(profile)}")
    if not profile.complete:
        count = f"{view.waiting(profile)} of {plural(len(profile.results), 'method')}"
        words = f"Incomplete: {count} not measured to the end; --resume goes on with it."
        yield doc.text(doc.Span(words, "warn"))
    if view.only_predicted(profile):
        yield doc.text(doc.Span("Nothing was measured: every figure is a prediction.", "warn"))


def _goal(profile: Profile) -> str:
    return GOALS.get(profile.goal, clean(profile.goal))


def _methods(profile: Profile) -> Iterator[doc.Part]:
    rows = view.results(profile)
    peaks = [peak for each in rows if (peak := view.peak_bytes(each))]
    unit, scale = unit_for(peaks), max(peaks, default=1)
    budget = profile.budget_bytes if profile.budget_bytes and profile.budget_bytes <= 2 * scale else None
    made = []
    for each in rows:
        held, peak, _fidelity, seconds = (
            view.peak_categories(each),
            view.peak_bytes(each),
            each.fidelity,
            each.step_seconds,
        )
        over = not view.fits(profile, peak)
        number = NOTHING if peak is None else unit.number(peak)
        predicted = each.prediction.peak_bytes if each.prediction else None
        bar = doc.Bar(held, max(scale, budget or 0), budget) if held else doc.Cell(view.ended(each), tone="muted")
        cells: dict[str, doc.Content] = {
            "memory at the peak,\nby category": bar,
            f"peak\n{unit.name}": doc.Cell(f"!{number}" if over else number, bad=over, strong=True),
            "of\nplain": share_of(profile, "plain", each),
            "peak\nphase": peak_phase(each)[:9],
            "step": NOTHING if seconds is None else format_seconds(seconds) + ("~" if each.in_doubt else ""),
            f"{profile.units}\n/s": format_rate(profile.per_second(seconds)),
            "gradient\nerror": gradient_error(each),
            "loss\nchange": loss_change(each),
            "predicted/\nmeasured": format_ratio(predicted, each.memory.peak_bytes if each.memory else None),
        }
        name = shortened(view.labels(profile)[each.method.spec], 58) + ("*" if _changes(profile, each) else "")
        made.append((doc.Row(name, chosen=view.chosen(profile) is each), cells))
    yield doc.table("method", made, words=(4,), room=_ROOM_FOR_BARS)
    mark = f"| the budget, {format_bytes(budget)}" if budget else ""
    yield doc.Legend(tuple(view.peak_categories_shown(profile)), mark, _ROOM_FOR_BARS)
    yield from _marks(profile, rows)


def _changes(profile: Profile, each: Result) -> bool:
    """Does a pretrained model lose its function under this method? A model from scratch has none to lose."""
    return profile.pretrained and not each.method.preserves_function


def _marks(profile: Profile, rows: list[Result]) -> Iterator[doc.Part]:
    """What the table's signs mean, only those that occur; and why a method has no figures."""
    if not all(view.fits(profile, view.peak_bytes(each)) for each in rows):
        yield doc.text(doc.muted("! over the budget"))
    if view.doubtful(profile):
        yield doc.text(doc.muted("~ the steps lie so far apart that small differences mean nothing"))
    if any(_changes(profile, each) for each in rows):
        yield doc.text(doc.muted("* a pretrained model does not keep its function; it needs fine-tuning to recover"))
    reasons = [(shortened(view.labels(profile)[each.method.spec], 24), state(each)) for each in rows if each.reason]
    if reasons:
        yield doc.Bullets(tuple(said for _, said in reasons), tuple(f"{name}:" for name, _ in reasons))


def _reach(profile: Profile, axis: str) -> doc.Table:
    made = []
    for spec, name in view.labels(profile).items():
        value, rate = view.largest(profile, spec, axis) or (None, None)
        made.append(doc.Row(name, (NOTHING if value is None else format_integer(value), format_rate(rate))))
    return doc.Table(("method", f"largest {clean(axis)}", f"{profile.units}/s there"), tuple(made), indent=2)


def markdown(profiles: Sequence[Profile]) -> Iterator[doc.Section]:
    """A table per record, and, where batches were swept, one of throughput by method and number of blocks."""
    yield from map(_record, profiles)
    yield doc.Section("", (doc.text(_MEANINGS),))
    yield from largest_batches([p for p in profiles if any(point.axis == "batch" for point in p.points)])


def _record(profile: Profile) -> doc.Section:
    parts: list[doc.Part] = [
        doc.Command(profile.command),
        doc.table("method", [_markdown_row(profile, each) for each in profile.results]),
    ]
    reasons = [f"{_markdown_name(profile, r)}: {r.status.value}; {r.reason}" for r in profile.results if r.reason]
    if reasons:
        parts.append(doc.Bullets(tuple(reasons)))
    if not profile.complete:
        parts.append(doc.prose("The run is not complete; `--resume` goes on with it."))
    setting, where = profile.setting, profile.environment
    size = f"batch {format_integer(setting.batch)}"
    if setting.sequence is not None:
        size += f" x {format_integer(setting.sequence)} tokens"
    trains = setting_facts(setting)["Trains"] + ("" if profile.pretrained else " (random weights)")
    day = where.date.split("T", 1)[0]
    return doc.Section(
        ", ".join((profile.model.name, trains, size, setting.dtype, where.machine, day)), tuple(parts), level=3
    )


def _markdown_row(profile: Profile, each: Result) -> tuple[doc.Row, dict[str, doc.Content]]:
    memory, predicted, plain = each.memory, each.prediction, profile.result("plain")
    whole = plain.memory.peak_bytes if plain and plain.memory else None
    cells: dict[str, doc.Content] = {
        "peak": _markdown_peak(each),
        "of plain": format_share(memory.peak_bytes, whole) if memory else NOTHING,
        "kept": format_bytes(memory.kept_bytes) if memory else NOTHING,
        "s/step (median)": optional_seconds(each.step_seconds),
        "spread": NOTHING if each.spread is None else f"{each.spread:.1%}{', in doubt' if each.in_doubt else ''}",
        f"{profile.units}/s": _rate(profile.per_second(each.step_seconds)),
        "gradient error": gradient_error(each),
        "loss change": loss_change(each),
        "predicted/measured peak": format_ratio(predicted.peak_bytes, memory.peak_bytes)
        if memory and predicted
        else NOTHING,
    }
    best = profile.recommendation is not None and profile.recommendation.method == each.method.spec
    return doc.Row(_markdown_name(profile, each), chosen=best), cells


def _markdown_name(profile: Profile, each: Result) -> str:
    return each.method.title + (" (from scratch only)" if _changes(profile, each) else "")


def _markdown_peak(each: Result) -> str:
    if each.memory:
        return format_bytes(each.memory.peak_bytes)
    if each.status is Status.PREDICTED and each.prediction:
        return f"{format_bytes(each.prediction.peak_bytes)}, predicted"
    return each.status.value


def _rate(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:,.3g}"


def largest_batches(profiles: Sequence[Profile]) -> Iterator[doc.Section]:
    """Throughput at the largest batch within the memory, by method and number of blocks."""
    if not profiles:
        return
    ordered = sorted(profiles, key=lambda profile: profile.blocks)
    limits = dict.fromkeys(profile.memory_limit or "the whole memory" for profile in ordered)
    units = " or ".join(dict.fromkeys(profile.units for profile in ordered))
    blocks = [profile.blocks for profile in ordered]
    heads = [
        f"{p.blocks} blocks" if blocks.count(p.blocks) == 1 else f"{clean(p.name)}, {p.blocks} blocks" for p in ordered
    ]
    titles = {result.method.spec: result.method.title for p in ordered for result in p.results}
    swept = dict.fromkeys(point.method for p in ordered for point in p.points if point.axis == "batch")
    rows = [doc.Row(titles.get(spec, spec), tuple(_at_largest(p, spec) for p in ordered)) for spec in swept]
    said = doc.text(f"In {units} a second within {', '.join(limits)}; the batch in brackets.")
    yield doc.Section("Throughput at the largest batch", (said, doc.Table(("method", *heads), tuple(rows))), level=3)


def _at_largest(profile: Profile, spec: str) -> str:
    point = largest_points(profile, "batch").get(spec)
    if point is None:
        tried = (p.axis == "batch" and p.method == spec and p.status is Status.OUT_OF_MEMORY for p in profile.points)
        return "does not fit" if any(tried) else NOTHING
    return f"{_rate(point_per_second(profile, point))} ({format_integer(point.value)})"


def advice_card(profile: Profile) -> doc.Section | None:
    """What to do: the comparison first, then what it saves and costs, and what would help further."""
    advice, best = profile.recommendation, view.chosen(profile)
    if not advice:
        return None
    parts: list[doc.Part] = []
    if best and (name := view.labels(profile)[best.method.spec]) != best.method.name:
        parts.append(doc.text("As ", doc.Span(name, "code"), kind="lead"))
    parts.append(doc.text(sentence(advice.why), kind="why"))
    rivals = (view.by_method(profile, "plain"), view.by_method(profile, "checkpoint"), best)
    lead = [each for each in view.results(profile) if any(each is other for other in rivals)]
    if best and len(lead) > 1 and (figure := peak_by_category(profile, "lead", lead)):
        parts.append(figure)
    if found := tiles(profile):
        parts.append(doc.Tiles(tuple(found)))
    parts += shared.helping_further(advice.advice)
    return doc.Section(headline_of(profile), tuple(parts), eyebrow="Recommendation")


def tiles(profile: Profile) -> list[doc.Tile]:
    """What the recommended method needs, costs and gains; only what is known of it."""
    best, other = view.chosen(profile), view.rival(profile)
    if best is None:
        return []
    found = []
    name = "" if other is None else view.labels(profile)[other.method.spec]
    peak, others = view.peak_bytes(best), view.peak_bytes(other) if other else None
    if peak is not None:
        over = "" if view.fits(profile, peak) else "over the budget"
        against = _against(name, peak, others, format_bytes)
        if other and not others:
            against = f"{name}: {view.ended(other)}"
        found.append(doc.Tile("Peak memory", format_bytes(peak), against, over))
    seconds, others_seconds = best.step_seconds, other.step_seconds if other else None
    rate, others_rate = profile.per_second(seconds), profile.per_second(others_seconds)
    if seconds and rate:
        against = _against(name, seconds, others_seconds, format_seconds)
        found.append(doc.Tile("Time of a step", format_seconds(seconds), against, doubt(best)))
        title = f"{profile.units.capitalize()} a second"
        found.append(doc.Tile(title, format_rate(rate), _against(name, rate, others_rate, format_rate)))
    if view.only_predicted(profile) and best.prediction:
        found.append(doc.Tile("Time of a step, at least", format_seconds(best.prediction.step_seconds)))
    for axis, title in (("batch", "Largest batch"), ("sequence", "Longest sequence"), ("depth", "Most blocks")):
        reached = view.largest(profile, best.method.spec, axis)
        theirs = view.largest(profile, other.method.spec, axis) if other else None
        if reached:
            against = f"{name}: {format_integer(theirs[0])}" if theirs else ""
            found.append(doc.Tile(title, format_integer(reached[0]), against))
    if best.fidelity:
        found.append(doc.Tile("Gradient error", format_error(best.fidelity.gradient_error)))
        found.append(doc.Tile("Loss change before training", loss_change(best)))
    return found


def _against(name: str, figure: float, other: float | None, words: Callable[[Any], str]) -> str:
    """`-40 % against plain's 3.56 GiB`; empty where there is nothing to compare with."""
    return f"{format_change(figure, other)} against {name}'s {words(other)}" if other else ""
