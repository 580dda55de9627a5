"""Several profiles as tables: what each recommends, where it ran, every method of every record."""

from __future__ import annotations

from collections.abc import Sequence

from autorev.format import NOTHING, clean, format_bytes, format_change, format_integer, format_rate, sentence
from autorev.profiler.record import Environment, Profile
from autorev.report.profile import paper
from autorev.report.profile.comparison import Family, largest_batch, spec_title, throughput_there
from autorev.report.profile.rows import by_method, chosen, labels, largest, peak_bytes, results, waiting
from autorev.report.profile.tables import glance, optional_bytes
from autorev.report.tables import NO_FIGURE, Cell, Row, Table
from autorev.words import headline, setting_facts


def recommendations(profiles: Sequence[Profile]) -> Table:
    """What each record recommends, and what that saves and costs."""
    heads = ("Record", "Recommended", "Why", "Peak", "Against plain", "Step against plain", "Machine and date")
    return Table(heads, tuple(_recommended(profile) for profile in profiles))


def _recommended(profile: Profile) -> Row:
    best, plain = chosen(profile), by_method(profile, "plain")
    advice, peak = profile.recommendation, None if best is None else peak_bytes(best)
    whole = peak_bytes(plain) if plain else None
    slower = NOTHING
    if best and plain and best.step_seconds and plain.step_seconds:
        slower = format_change(best.step_seconds, plain.step_seconds)
    where = profile.environment
    name = labels(profile)[best.method.spec] if best else headline(advice.method) if advice else NOTHING
    cells = (
        Cell(name, strong=True),
        sentence(advice.why) if advice else "No recommendation yet." if not profile.complete else "None.",
        optional_bytes(peak),
        format_change(peak, whole) if peak and whole else NOTHING,
        slower,
        Cell(clean(where.machine), clean(where.date)[:10]),
    )
    facts = setting_facts(profile.setting)
    notes = [] if profile.model.name == profile.name else [clean(profile.model.name)]
    notes.append(", ".join([f"batch {facts.pop('Batch')}", *facts.values()]))
    if not profile.complete:
        notes.append(f"incomplete: {waiting(profile)} of {len(profile.results)} methods are not measured")
    return Row(clean(profile.name), cells, tuple(notes))


def every_method(profiles: Sequence[Profile]) -> Table:
    """One row per record and method: the columns of `glance`, and the largest batch where one was sought."""
    batches = any(point.axis == "batch" and point.largest for profile in profiles for point in profile.points)
    heads: tuple[str, ...] = ()
    made = []
    for profile in profiles:
        table = glance(profile)
        # Records may count tokens or samples, so the heading cannot say which: the cells do.
        heads = tuple("Per second" if head.endswith("s/s") else head for head in table.heads[1:])
        rate = table.heads.index(f"{profile.units.capitalize()}/s") - 1
        for each, row in zip(results(profile), table.rows, strict=True):
            cells = list(row.cells)
            if cells[rate] != NOTHING:
                cells[rate] = Cell(str(cells[rate]), profile.units)
            reached = largest(profile, each.method.spec, "batch")
            if batches:
                cells.append(format_integer(reached[0]) if reached else NOTHING)
            made.append(Row(f"{clean(profile.name)}: {row.head}", tuple(cells), row.notes, row.chosen))
    return Table(("Record and method", *heads, *(["Largest batch"] if batches else [])), tuple(made))


def environment_facts(where: Environment) -> dict[str, str]:
    """Every field of an environment, by what it is called."""
    versions = ", ".join(f"{clean(name)} {clean(version)}" for name, version in where.versions.items())
    return {
        "Date": clean(where.date),
        "Machine": clean(where.machine),
        "System": clean(where.system),
        "Cores": format_integer(where.cores),
        "Threads of PyTorch": format_integer(where.threads),
        "Memory": format_bytes(where.memory_bytes),
        "Versions": versions or NOTHING,
        "Commit of autorev": clean(where.commit) if where.commit else "none: it was installed",
    }


def environments(profiles: Sequence[Profile]) -> Table:
    """Where and when each record was made, one row per record."""
    facts = [environment_facts(profile.environment) for profile in profiles]
    heads = tuple(facts[0]) if facts else ()
    rows = [Row(clean(p.name), tuple(each.values())) for p, each in zip(profiles, facts, strict=True)]
    return Table(("Record", *heads), tuple(rows))


def family_table(family: Family) -> Table:
    """Peak at the common batch, largest batch and throughput there, by number of blocks."""
    specs = family.specs
    batches = any(largest_batch(p, spec) for p in family.profiles for spec in specs)
    heads = ["Blocks", *(f"peak, {spec_title(family.profiles, spec)}" for spec in specs)]
    if batches:
        heads += [f"largest batch, {spec_title(family.profiles, spec)}" for spec in specs]
    made = []
    for profile in family.profiles:
        cells: list[Cell | str] = [optional_bytes(family.peak(profile, spec)) for spec in specs]
        if batches:
            cells += [_reach(profile, spec) for spec in specs]
        made.append(Row(format_integer(profile.blocks), tuple(cells), (clean(profile.name),)))
    return Table(tuple(heads), tuple(made))


def _reach(profile: Profile, spec: str) -> Cell:
    batch, rate = largest_batch(profile, spec), throughput_there(profile, spec)
    if batch is None:
        return NO_FIGURE
    return Cell(format_integer(batch), f"{format_rate(rate)} {profile.units}/s" if rate else "")


def paper_batches() -> Table:
    """The founding paper's largest batches."""
    rows = [
        Row(each.device, (format_integer(each.stored), format_integer(each.reversible), _times(each)))
        for each in paper.LARGEST_BATCHES
    ]
    return Table(("GPU", "activations stored", "reversible", "times"), tuple(rows))


def _times(each: paper.LargestBatch) -> str:
    return f"{each.reversible / each.stored:.1f}"


def paper_gains() -> Table:
    """The founding paper's throughput at the largest batch, reversible against stored."""
    batches = f"batch {paper.BATCH_AT_96_BLOCKS[0]} against {paper.BATCH_AT_96_BLOCKS[1]}"
    rows = [
        Row(format_integer(each.blocks), (Cell(f"{each.percent:+.1f} %", batches if each.blocks == 96 else ""),))
        for each in paper.GAINS
    ]
    return Table(("Blocks (width 512)", "throughput at the largest batch"), tuple(rows))
