"""A profile as one screen of a terminal, or as plain text; several as one table."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autorev.format import (
    NOTHING,
    ByteUnit,
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
from autorev.profiler.record import Profile, Result, Status
from autorev.report.analysis.terminal import bullet
from autorev.report.bars import CAPACITY_MARK, Bar, legend, uses_color
from autorev.report.profile.rows import (
    axes,
    by_method,
    chosen,
    doubtful,
    ended,
    fits,
    labels,
    largest,
    only_predicted,
    peak_bytes,
    peak_categories,
    peak_categories_shown,
    results,
    sought_largest,
    waiting,
)
from autorev.report.profile.tables import state
from autorev.words import GOALS, headline, model_facts, setting_facts

_ROOM_FOR_BARS = 96
"""Columns of a terminal: below, the figures need the room."""
_LONGEST_NOTE = 300


def print_profiles(profiles: Sequence[Profile], console: Console) -> None:
    """One screen for a single profile; one table for several."""
    sections = _sections(profiles[0], console) if len(profiles) == 1 else iter([_comparison(profiles)])
    for i, section in enumerate(sections):
        if i:
            console.print()
        console.print(section, highlight=False)


def render_text(profile: Profile) -> str:
    """The same screen as plain text, 100 columns wide."""
    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False, _environ={})
    with console.capture() as capture:
        print_profiles([profile], console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _sections(profile: Profile, console: Console) -> Iterator[RenderableType]:
    yield _heading(profile)
    yield _methods(profile, console)
    for axis in axes(profile):
        if sought_largest(profile, axis):
            yield _reach(profile, axis)
    if profile.recommendation:
        yield _advice(profile)
    if profile.notes:
        yield Group(*(bullet("Note:", _short(sentence(note))) for note in profile.notes))


def _heading(profile: Profile) -> RenderableType:
    facts = setting_facts(profile.setting)
    setting = ", ".join([f"batch {profile.setting.batch}", *(v for name, v in facts.items() if name != "Batch")])
    where = profile.environment
    start = () if profile.pretrained else ("random weights",)
    origin = (*model_facts(profile.model), plural(profile.blocks, "block"), *start)
    lines = [
        Text.assemble((_short(profile.model.name), "bold"), "  ", (_short(", ".join(origin)), "dim")),
        Text(f"One training step: {setting}"),
        Text(_short(f"On {clean(where.machine)}, {plural(where.threads, 'thread')}, {clean(where.date)}"), "dim"),
    ]
    if profile.budget_bytes is not None:
        goal = GOALS.get(profile.goal, clean(profile.goal))
        lines.append(Text(f"Budget: {format_bytes(profile.budget_bytes)}; wanted: {goal}"))
    if not profile.complete:
        count = f"{waiting(profile)} of {plural(len(profile.results), 'method')}"
        lines.append(Text(f"Incomplete: {count} not measured to the end; --resume goes on with it.", "bold yellow"))
    if only_predicted(profile):
        lines.append(Text("Nothing was measured: every figure is a prediction.", "bold yellow"))
    return Group(*lines)


def _methods(profile: Profile, console: Console) -> RenderableType:
    rows = results(profile)
    peaks = [peak for each in rows if (peak := peak_bytes(each))]
    unit, scale = unit_for(peaks), max(peaks, default=1)
    budget = profile.budget_bytes if profile.budget_bytes and profile.budget_bytes <= 2 * scale else None
    bars = console.width >= _ROOM_FOR_BARS and bool(peaks)

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="dim")
    table.add_column("\nmethod", max_width=18, ratio=None if bars else 1)
    if bars:
        table.add_column("memory at the peak,\nby category", ratio=1, no_wrap=True)
    for head in (f"peak\n{unit.name}", "of\nplain", "peak\nphase", "\nstep", f"{profile.units}\n/s"):
        table.add_column(head, justify="left" if head.endswith("phase") else "right", no_wrap=True)
    for head in ("gradient\nerror", "loss\nchange", "predicted/\nmeasured"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in rows:
        bar = Bar(peak_categories(each), max(scale, budget or 0), budget)
        cells = [bar if peak_categories(each) else Text(ended(each), "dim")] if bars else []
        table.add_row(_name(profile, each, bars), *cells, *_figures(profile, each, unit))
    lines: list[RenderableType] = [table]
    shown = peak_categories_shown(profile)
    if bars and shown:
        lines += [Text(), legend(shown, uses_color(console), console.width)]
    return Group(*lines, *_marks(profile, rows, budget if bars else None))


def _name(profile: Profile, each: Result, bars: bool) -> Text:
    name = _short(labels(profile)[each.method.spec], 60) + ("*" if _changes(profile, each) else "")
    if not bars and each.status is not Status.MEASURED:
        name += f" ({ended(each)})"
    return Text(name, "bold cyan" if chosen(profile) is each else "")


def _changes(profile: Profile, each: Result) -> bool:
    """Does a pretrained model lose its function under this method? A model from scratch has none to lose."""
    return profile.pretrained and not each.method.preserves_function


def _figures(profile: Profile, each: Result, unit: ByteUnit) -> list[Text]:
    peak, plain, fidelity = peak_bytes(each), by_method(profile, "plain"), each.fidelity
    whole = peak_bytes(plain) if plain else None
    phase = each.memory.phase if each.memory else each.prediction.phase if peak and each.prediction else NOTHING
    over = not fits(profile, peak)
    seconds = each.step_seconds
    predicted = each.prediction.peak_bytes if each.prediction else None
    number = NOTHING if peak is None else unit.number(peak)
    return [
        Text(f"!{number}" if over else number, "bold red" if over else "bold"),
        Text(format_share(peak, whole) if peak else NOTHING),
        Text(clean(phase)[:9]),
        Text(NOTHING if seconds is None else format_seconds(seconds) + ("~" if each.in_doubt else "")),
        Text(format_rate(profile.per_second(seconds))),
        Text(format_error(fidelity.gradient_error) if fidelity else NOTHING),
        Text(f"{fidelity.loss - fidelity.original_loss:+.3f}" if fidelity else NOTHING),
        Text(format_ratio(predicted, each.memory.peak_bytes if each.memory else None)),
    ]


def _marks(profile: Profile, rows: list[Result], budget: int | None) -> Iterator[RenderableType]:
    """What the table's signs mean, only those that occur; and why a method has no figures."""
    if budget:
        yield Text(f"{CAPACITY_MARK} the budget, {format_bytes(budget)}", "dim")
    if not all(fits(profile, peak_bytes(each)) for each in rows):
        yield Text("! over the budget", "dim")
    if doubtful(profile):
        yield Text("~ the steps lie so far apart that small differences mean nothing", "dim")
    if any(_changes(profile, each) for each in rows):
        yield Text("* a pretrained model does not keep its function; it needs fine-tuning to recover", "dim")
    for each in rows:
        if each.reason:
            yield bullet(f"{_short(labels(profile)[each.method.spec], 24)}:", _short(state(each)))


def _reach(profile: Profile, axis: str) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("method", max_width=28)
    for head in (f"largest {clean(axis)}", f"{profile.units}/s there"):
        table.add_column(head, justify="right", no_wrap=True)
    for spec, name in labels(profile).items():
        reached = largest(profile, spec, axis)
        value, rate = reached if reached else (None, None)
        table.add_row(
            Text(_short(name, 60)),
            Text(NOTHING if value is None else format_integer(value)),
            Text(format_rate(rate)),
        )
    return Group(Text(f"Largest {clean(axis)} that fits", "bold"), Padding(table, (0, 0, 0, 2)))


def _advice(profile: Profile) -> RenderableType:
    advice, best = profile.recommendation, chosen(profile)
    assert advice is not None
    title = headline(best.method.name if best else advice.method)
    name = labels(profile)[best.method.spec] if best else ""
    if best and name != best.method.name:
        title += f": {_short(name, 60)}"
    lines: list[RenderableType] = [
        Text.assemble(("Recommendation  ", "bold"), (title, "bold cyan")),
        Padding(Text(_short(sentence(advice.why))), (0, 0, 0, 2)),
    ]
    lines += [bullet(f"  {i}.", _short(sentence(step))) for i, step in enumerate(advice.advice, 1)]
    return Group(*lines)


def _comparison(profiles: Sequence[Profile]) -> RenderableType:
    """One line per record: what it recommends, what that saves and costs."""
    unit = unit_for(peak for p in profiles for each in p.results if (peak := peak_bytes(each)))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="dim")
    table.add_column("\nrecord", ratio=1)
    table.add_column("\nrecommended", ratio=1)
    for head in (f"peak\n{unit.name}", "against\nplain", "\nstep", "against\nplain", "largest\nbatch"):
        table.add_column(head, justify="right", no_wrap=True)
    for profile in profiles:
        best, plain = chosen(profile), by_method(profile, "plain")
        peak, whole = (peak_bytes(each) if each else None for each in (best, plain))
        seconds, others = (each.step_seconds if each else None for each in (best, plain))
        reached = largest(profile, best.method.spec, "batch") if best else None
        table.add_row(
            Text(_short(profile.name, 60) + ("" if profile.complete else " (incomplete)")),
            Text(_short(labels(profile)[best.method.spec], 60) if best else NOTHING, "bold cyan"),
            Text(NOTHING if peak is None else unit.number(peak)),
            Text(format_change(peak, whole) if peak else NOTHING),
            Text(NOTHING if seconds is None else format_seconds(seconds)),
            Text(format_change(seconds, others) if seconds else NOTHING),
            Text(format_integer(reached[0]) if reached else NOTHING),
        )
    return table


def _short(text: str, limit: int = _LONGEST_NOTE) -> str:
    """`text` on one line of at most `limit` letters: a screen is no place for a whole traceback."""
    text = clean(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
