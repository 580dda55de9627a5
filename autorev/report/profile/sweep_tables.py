"""One profile's steps, blocks and sweeps as tables."""

from __future__ import annotations

from autorev.format import NOTHING, clean, format_bytes, format_integer, format_rate, format_seconds
from autorev.profiler.record import Point, Profile, Status
from autorev.report.document import NO_FIGURE, Cell, Content, Row, Table
from autorev.report.profile import view
from autorev.report.profile.tables import optional_bytes
from autorev.words import AXIS_TITLES

_FOLD = "Show as a table"


def steps_table(profile: Profile) -> Table:
    """Every timed step of every round, as it was read."""
    names = view.labels(profile)
    rows = [
        Row(f"{names[each.method.spec]}, round {r.number}", (", ".join(map(format_seconds, r.steps)),))
        for each in view.results(profile)
        for r in each.rounds
    ]
    heads = ("Method and round", "seconds of its steps")
    return Table(heads, tuple(rows), "Every timed step", words=(1,), fold=_FOLD)


def blocks_table(profile: Profile) -> Table:
    """What every block keeps, and how long it takes, under plain, checkpoint and one reversible method."""
    names = view.labels(profile)
    columns: dict[str, list[str]] = {}
    for each in view.before_and_after(profile):
        if each.memory:
            columns[f"kept, {names[each.method.spec]}"] = [format_bytes(size) for size in each.memory.block_bytes]
    timed = [(each, each.work.blocks) for each in view.block_results(profile) if each.work]
    for phase in ("forward", "backward"):
        for each, blocks in timed:
            columns[f"{phase}, {names[each.method.spec]}"] = [format_seconds(getattr(b, phase)) for b in blocks]
    paths = next(([clean(block.path) for block in blocks] for _, blocks in timed), [])
    rows = []
    for i in range(max(map(len, columns.values()), default=0)):
        cells = tuple(found[i] if i < len(found) else NOTHING for found in columns.values())
        rows.append(Row(f"{i}: {paths[i]}" if i < len(paths) else str(i), cells))
    return Table(("Block", *columns), tuple(rows), "Memory and time of every block", fold=_FOLD)


def sweep_table(profile: Profile, axis: str, fold: str = "") -> Table:
    """Peak, and throughput where it was timed, of every method at every value of `axis`."""
    points = {(point.value, point.method): point for point in profile.points if point.axis == axis}
    specs, names = list(dict.fromkeys(spec for _, spec in points)), view.labels(profile)
    rows = [
        Row(format_integer(value), tuple(_point_cell(profile, points.get((value, spec))) for spec in specs))
        for value in sorted({value for value, _ in points})
    ]
    heads = (AXIS_TITLES.get(axis, clean(axis)), *(names[spec] for spec in specs))
    return Table(heads, tuple(rows), "Peak and throughput at every size", fold=fold)


def _point_cell(profile: Profile, point: Point | None) -> Cell:
    if point is None:
        return NO_FIGURE
    if point.peak_bytes is None:
        return Cell("did not fit" if point.status is Status.OUT_OF_MEMORY else point.status.value, clean(point.reason))
    rate = view.throughput_at(profile, point.axis, point.value, point.step_seconds)
    note = f"{format_rate(rate)} {profile.units}/s" if rate else ""
    return Cell(format_bytes(point.peak_bytes), note, strong=point.largest)


def reach_table(profile: Profile, axis: str) -> Table:
    """The largest value of `axis` that fits, and throughput there, per method and against plain."""
    specs = dict.fromkeys([r.method.spec for r in view.results(profile)] + [p.method for p in profile.points])
    plain, names = view.by_method(profile, "plain"), view.labels(profile)
    most, fastest = (plain and view.largest(profile, plain.method.spec, axis)) or (0, None)
    peaks = {p.method: p.peak_bytes for p in profile.points if p.axis == axis and p.largest}
    rows = []
    for spec in specs:
        reached = view.largest(profile, spec, axis)
        if reached is None:
            rows.append(Row(names[spec], (NO_FIGURE,) * 5, ("no largest value was sought",)))
            continue
        value, rate = reached
        cells: tuple[Content, ...] = (
            Cell(format_integer(value), strong=True),
            f"{value / most:.1f} x" if most else NOTHING,
            optional_bytes(peaks[spec]),
            format_rate(rate),
            f"{100 * (rate / fastest - 1):+.1f} %" if rate and fastest else NOTHING,
        )
        rows.append(Row(names[spec], cells))
    heads = (f"Largest {clean(axis)}", "fits", "of plain", "peak there", f"{profile.units}/s there", "against plain")
    return Table(heads, tuple(rows), f"The largest {clean(axis)} that fits")
