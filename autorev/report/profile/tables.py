"""Every figure of one profile's memory, fidelity and predictions as tables."""

from __future__ import annotations

from collections.abc import Sequence

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
)
from autorev.profiler.readings import PHASES, Holder, Memory, Timeline
from autorev.profiler.record import Profile, Result, Status
from autorev.report.profile.rows import (
    by_method,
    chosen,
    ended,
    fits,
    labels,
    measured_memory,
    only_predicted,
    peak_bytes,
    peak_categories,
    peak_categories_shown,
    results,
)
from autorev.report.profile.time_figures import prediction_ratios
from autorev.report.tables import NO_FIGURE, Cell, Row, Table
from autorev.words import AGAINST, CATEGORY_TITLES


def optional_bytes(count: int | None) -> str:
    """`512 MiB`, or the sign for nothing."""
    return NOTHING if count is None else format_bytes(count)


def state(result: Result) -> str:
    """How it ended, with the reason; empty where everything was measured."""
    if result.status is Status.MEASURED:
        return ""
    reason = clean(result.reason)
    if result.status is Status.PENDING and not reason and not result.memory:
        reason = "the run ended before it"
    return f"{ended(result)}: {reason}" if reason else ended(result)


def row(profile: Profile, result: Result, cells: Sequence[Cell | str], notes: Sequence[str] = ()) -> Row:
    """One method's row, under its label and how it ended."""
    best = chosen(profile)
    ended = [each for each in (state(result), *notes) if each]
    return Row(labels(profile)[result.method.spec], tuple(cells), tuple(ended), chosen=best is result)


def glance(profile: Profile) -> Table:
    """One row per method with the figures that decide."""
    heads = ("Method", "Peak", "Of plain", "Of checkpoint", "Peak in", "Step", "Against plain")
    more = (f"{profile.units.capitalize()}/s", "Gradient error", "Loss change")
    return Table((*heads, *more), tuple(_glance_row(profile, each) for each in results(profile)))


def _glance_row(profile: Profile, each: Result) -> Row:
    plain, checkpoint = by_method(profile, "plain"), by_method(profile, "checkpoint")
    peak, fidelity = peak_bytes(each), each.fidelity
    phase = each.memory.phase if each.memory else each.prediction.phase if peak and each.prediction else NOTHING
    seconds, slower = each.step_seconds, NOTHING
    if seconds and plain and plain is not each and plain.step_seconds:
        slower = format_change(seconds, plain.step_seconds)
    cells: list[Cell | str] = [
        _peak_cell(profile, peak),
        *(format_share(peak, peak_bytes(it) if it else None) if peak else NOTHING for it in (plain, checkpoint)),
        clean(phase),
        Cell(format_seconds(seconds), doubt(each)) if seconds else NO_FIGURE,
        slower,
        format_rate(profile.per_second(seconds)),
        Cell(format_error(fidelity.gradient_error)) if fidelity else NO_FIGURE,
        Cell(f"{fidelity.loss - fidelity.original_loss:+.3f}") if fidelity else NO_FIGURE,
    ]
    return row(profile, each, cells, [clean(each.method.known.source)])


def _peak_cell(profile: Profile, peak: int | None) -> Cell:
    if peak is None:
        return NO_FIGURE
    over = not fits(profile, peak)
    return Cell(format_bytes(peak), "over the budget" if over else "", bad=over, strong=True)


def doubt(result: Result) -> str:
    """A warning where differences of times mean little; empty elsewhere."""
    if not result.samples or not result.in_doubt:
        return ""
    if result.spread is None:
        return f"{len(result.samples)} steps only: small differences mean nothing"
    return f"spread {100 * result.spread:.0f} %: small differences mean nothing"


def peak_table(profile: Profile) -> Table:
    """The categories at the peak of every method, and what the allocator counted."""
    rows = results(profile)
    categories = peak_categories_shown(profile)
    last = ("sum", "peak, predicted") if only_predicted(profile) else ("sum, attributed", "peak, allocator")
    heads = ("Method", *(CATEGORY_TITLES[name] for name in categories), *last)
    made = []
    for each in rows:
        held, peak = peak_categories(each), peak_bytes(each)
        cells = [optional_bytes(held.get(name, 0)) if held else NOTHING for name in categories]
        whole = Cell(format_bytes(sum(held.values()))) if held else NO_FIGURE
        made.append(row(profile, each, (*cells, whole, _peak_cell(profile, peak))))
    return Table(heads, tuple(made))


def memory_table(profile: Profile) -> Table:
    """Peaks by phase, and what lies outside the peak."""
    found = measured_memory(profile)
    cuda = any(memory.reserved_bytes is not None for _, memory in found)
    heads = ("Method", *(f"peak in {phase}" for phase in PHASES), "kept between forward and backward", "on the host")
    heads += (*(["reserved by CUDA"] if cuda else []), "whole process")
    made = []
    for each, memory in found:
        cells: list[Cell | str] = [
            Cell(optional_bytes(memory.phase_peaks.get(phase)), strong=phase == memory.phase) for phase in PHASES
        ]
        cells += [format_bytes(memory.kept_bytes), format_bytes(memory.host_bytes)]
        cells += [optional_bytes(memory.reserved_bytes)] if cuda else []
        notes = [f"PyTorch's memory viz opens {clean(memory.snapshot)}"] if memory.snapshot else []
        made.append(row(profile, each, [*cells, format_bytes(memory.process_bytes)], notes))
    return Table(heads, tuple(made))


def holders_table(holders: Sequence[Holder], memory: Memory) -> Table:
    """Who holds what at the peak."""
    rows = [
        Row(
            clean(each.path),
            (_category(each.category), format_bytes(each.bytes), format_share(each.bytes, memory.attributed_bytes)),
        )
        for each in holders
    ]
    return Table(("Module", "holds", "bytes", "of the peak"), tuple(rows))


def _category(name: str) -> str:
    return next((title for known, title in CATEGORY_TITLES.items() if known == name), clean(name))


def timeline_table(line: Timeline) -> Table:
    """What is alive at the highest point of every phase of the traced step."""
    names = [name for name in CATEGORY_TITLES if any(line.categories.get(name, ()))]
    rows = []
    for phase, begin, end in line.marks:
        within = [i for i, seconds in enumerate(line.seconds) if begin <= seconds <= end]
        if not within:
            continue
        at = max(within, key=lambda i: sum(sizes[i] for sizes in line.categories.values()))
        cells = [format_bytes(line.categories[name][at]) for name in names]
        whole = sum(sizes[at] for sizes in line.categories.values())
        rows.append(Row(clean(phase), (format_seconds(line.seconds[at]), *cells, format_bytes(whole))))
    return Table(("Highest point of", "after", *(CATEGORY_TITLES[name] for name in names), "sum"), tuple(rows))


def fidelity_table(profile: Profile) -> Table:
    """Is every method right, and what does it do to the model's function?"""
    heads = ("Method", "Gradient error", "Cosine", "Compared with", "Drift", "Loss", "Loss as it was", "Change")
    made = []
    for each in results(profile):
        found = each.fidelity
        if found is None:
            made.append(row(profile, each, [NO_FIGURE] * (len(heads) - 1)))
            continue
        cells = (
            format_error(found.gradient_error),
            f"{found.gradient_cosine:.9f}",
            AGAINST.get(found.against, clean(found.against)),
            _drift(found.drift),
            Cell(f"{found.loss:.3f}", f"{format_integer(found.tokens)} tokens" if found.tokens else "training batch"),
            f"{found.original_loss:.3f}",
            f"{found.loss - found.original_loss:+.3f}",
        )
        made.append(row(profile, each, cells))
    return Table(heads, tuple(made))


def _drift(drift: dict[str, float]) -> Cell:
    """The largest, and the chain it was found in where it is not zero."""
    if not drift:
        return NO_FIGURE
    name, worst = max(drift.items(), key=lambda each: each[1])
    return Cell(format_error(worst), clean(name) if worst else "exact")


def prediction_table(profile: Profile) -> Table:
    """Predicted, attributed and measured peaks, and their ratios."""
    ratios = {each.method.spec: (predicted, followed) for each, predicted, followed in prediction_ratios(profile)}
    made = []
    for each in results(profile):
        predicted, followed = ratios.get(each.method.spec, (None, None))
        measured = each.memory.peak_bytes if each.memory else None
        attributed = each.memory.attributed_bytes if each.memory else None
        cells = (
            optional_bytes(each.prediction.peak_bytes if each.prediction else None),
            optional_bytes(measured),
            format_ratio(predicted, 1),
            optional_bytes(attributed),
            format_ratio(followed, 1),
        )
        made.append(row(profile, each, cells))
    heads = (
        "Method",
        "Predicted peak",
        "Measured peak",
        "Predicted / measured",
        "Attributed",
        "Attributed / measured",
    )
    return Table(heads, tuple(made))
