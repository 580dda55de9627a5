"""Every figure of one profile's times, blocks and sweeps as tables."""

from __future__ import annotations

from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_flops,
    format_integer,
    format_rate,
    format_seconds,
    plural,
)
from autorev.profiler.readings import PHASES
from autorev.profiler.record import Point, Profile, Status
from autorev.report.profile.rows import (
    before_and_after,
    by_method,
    labels,
    largest,
    results,
    throughput_at,
)
from autorev.report.profile.tables import doubt, optional_bytes, row
from autorev.report.profile.time_figures import block_results
from autorev.report.tables import NO_FIGURE, Cell, Row, Table
from autorev.words import AXIS_TITLES


def optional_seconds(seconds: float | None) -> str:
    """`35.2 ms`, or the sign for nothing."""
    return NOTHING if seconds is None else format_seconds(seconds)


def time_table(profile: Profile) -> Table:
    """Medians, their spread and what they come to."""
    heads = ("Method", "Step, median", "Quartiles apart", *PHASES, f"{profile.units.capitalize()}/s")
    more = ("Work", "Utilisation", "Steps timed")
    made = []
    for each in results(profile):
        used = profile.utilisation(each)
        count = f"{format_integer(len(each.samples))} in {plural(len(each.rounds), 'round')}"
        cells: list[Cell | str] = [
            Cell(optional_seconds(each.step_seconds), strong=True),
            NO_FIGURE if each.spread is None else Cell(f"{100 * each.spread:.1f} %", bad=each.in_doubt),
            *(optional_seconds(each.phase_seconds(phase)) for phase in PHASES),
            format_rate(profile.per_second(each.step_seconds)),
            format_flops(each.work.flops) if each.work else NOTHING,
            NOTHING if used is None else f"{100 * used:.0f} %",
            count if each.samples else NOTHING,
        ]
        made.append(row(profile, each, cells, [doubt(each)]))
    return Table((*heads, *more), tuple(made))


def roofline_table(profile: Profile) -> Table:
    """Predicted work, and the least time in which the device can do it."""
    made = []
    for each in results(profile):
        found = each.prediction
        cells = (format_flops(found.step_flops), format_seconds(found.step_seconds)) if found else (NOTHING,) * 2
        made.append(row(profile, each, cells))
    return Table(("Method", "Work", "Roofline time, a lower bound"), tuple(made))


def steps_table(profile: Profile) -> Table:
    """Every timed step of every round, as it was read."""
    made = []
    for each in results(profile):
        for number in each.rounds:
            times = ", ".join(format_seconds(seconds) for seconds in number.steps)
            made.append(Row(f"{labels(profile)[each.method.spec]}, round {number.number}", (times,)))
    return Table(("Method and round", "seconds of its steps"), tuple(made))


def blocks_table(profile: Profile) -> Table:
    """What every block keeps, and how long it takes, under plain, checkpoint and one reversible method."""
    names = labels(profile)
    kept = [(each, each.memory.block_bytes) for each in before_and_after(profile) if each.memory]
    timed = [(each, each.work.blocks) for each in block_results(profile) if each.work]
    paths = next(([clean(block.path) for block in blocks] for _, blocks in timed), [])
    count = max([len(sizes) for _, sizes in kept] + [len(blocks) for _, blocks in timed], default=0)
    heads = ["Block"]
    for title, found in (("kept", kept), ("forward", timed), ("backward", timed)):
        heads += [f"{title}, {names[each.method.spec]}" for each, _ in found]
    made = []
    for i in range(count):
        cells = [format_bytes(sizes[i]) if i < len(sizes) else NOTHING for _, sizes in kept]
        for phase in ("forward", "backward"):
            cells += [format_seconds(getattr(blocks[i], phase)) if i < len(blocks) else NOTHING for _, blocks in timed]
        made.append(Row(f"{i}: {paths[i]}" if i < len(paths) else str(i), tuple(cells)))
    return Table(tuple(heads), tuple(made))


def overhead_table(profile: Profile) -> Table:
    """The instrumented step by what it was spent on."""
    rows = [(each, each.work) for each in results(profile) if each.work]
    kinds = list(dict.fromkeys(kind for _, work in rows for kind in work.overhead))
    made = []
    for each, work in rows:
        cells = [_seconds_and_share(work.overhead.get(kind, 0.0), work.instrumented_seconds) for kind in kinds]
        made.append(row(profile, each, [*cells, format_seconds(work.instrumented_seconds)]))
    return Table(("Method", *map(clean, kinds), "whole instrumented step"), tuple(made))


def _seconds_and_share(seconds: float, whole: float) -> Cell:
    return Cell(format_seconds(seconds), f"{100 * seconds / whole:.0f} %" if whole else "") if seconds else Cell("0")


def sweep_table(profile: Profile, axis: str) -> Table:
    """Peak, and throughput where it was timed, of every method at every value of `axis`."""
    points = {(point.value, point.method): point for point in profile.points if point.axis == axis}
    specs = list(dict.fromkeys(spec for _, spec in points))
    names = labels(profile)
    made = []
    for value in sorted({value for value, _ in points}):
        cells = [_point_cell(profile, points.get((value, spec))) for spec in specs]
        made.append(Row(format_integer(value), tuple(cells)))
    return Table((AXIS_TITLES.get(axis, clean(axis)), *(names[spec] for spec in specs)), tuple(made))


def _point_cell(profile: Profile, point: Point | None) -> Cell:
    if point is None:
        return NO_FIGURE
    if point.peak_bytes is None:
        return Cell("did not fit" if point.status is Status.OUT_OF_MEMORY else point.status.value, clean(point.reason))
    rate = throughput_at(profile, point.axis, point.value, point.step_seconds)
    note = f"{format_rate(rate)} {profile.units}/s" if rate else ""
    return Cell(format_bytes(point.peak_bytes), note, strong=point.largest)


def reach_table(profile: Profile, axis: str) -> Table:
    """The largest value of `axis` that fits, and throughput there, per method and against plain."""
    specs = dict.fromkeys([each.method.spec for each in results(profile)] + [p.method for p in profile.points])
    plain = by_method(profile, "plain")
    most, fastest = (plain and largest(profile, plain.method.spec, axis)) or (0, None)
    made = []
    for spec in specs:
        reached = largest(profile, spec, axis)
        notes: tuple[str, ...] = ()
        cells: tuple[Cell | str, ...] = (NO_FIGURE,) * 5
        if reached is None:
            notes = ("no largest value was sought",)
        else:
            value, rate = reached
            peak = next(p.peak_bytes for p in profile.points if p.method == spec and p.axis == axis and p.largest)
            cells = (
                Cell(format_integer(value), strong=True),
                f"{value / most:.1f} x" if most else NOTHING,
                optional_bytes(peak),
                format_rate(rate),
                f"{100 * (rate / fastest - 1):+.1f} %" if rate and fastest else NOTHING,
            )
        made.append(Row(labels(profile)[spec], cells, notes))
    heads = (f"Largest {clean(axis)}", "fits", "of plain", "peak there", f"{profile.units}/s there", "against plain")
    return Table(heads, tuple(made))
