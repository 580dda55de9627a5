"""One profile's memory, times, fidelity and predictions as tables: a row per method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_change,
    format_error,
    format_flops,
    format_integer,
    format_rate,
    format_ratio,
    format_seconds,
    format_share,
    plural,
)
from autorev.profiler.readings import PHASES, Fidelity, Holder, Memory, Timeline
from autorev.profiler.record import Environment, Profile, Result, Status
from autorev.report.document import NO_FIGURE, Cell, Content, Row, Table
from autorev.report.profile import view
from autorev.words import AGAINST, CATEGORY_TITLES

_FOLD = "Show as a table"


def optional_bytes(count: int | None) -> str:
    """`512 MiB`, or the sign for nothing."""
    return NOTHING if count is None else format_bytes(count)


def optional_seconds(seconds: float | None) -> str:
    """`35.2 ms`, or the sign for nothing."""
    return NOTHING if seconds is None else format_seconds(seconds)


def state(result: Result) -> str:
    """How it ended, with the reason; empty where everything was measured."""
    if result.status is Status.MEASURED:
        return ""
    reason = clean(result.reason)
    if result.status is Status.PENDING and not reason and not result.memory:
        reason = "the run ended before it"
    return f"{view.ended(result)}: {reason}" if reason else view.ended(result)


def doubt(result: Result) -> str:
    """A warning where differences of times mean little; empty elsewhere."""
    if not result.samples or not result.in_doubt:
        return ""
    if result.spread is None:
        return f"{len(result.samples)} steps only: small differences mean nothing"
    return f"spread {100 * result.spread:.0f} %: small differences mean nothing"


def loss_change(each: Result) -> str:
    """From the model as it was, before any training."""
    return f"{each.fidelity.loss - each.fidelity.original_loss:+.3f}" if each.fidelity else NOTHING


def gradient_error(each: Result) -> str:
    """Relative to what its gradient is compared with."""
    return format_error(each.fidelity.gradient_error) if each.fidelity else NOTHING


def peak_phase(each: Result) -> str:
    """Where the peak stands."""
    if each.memory:
        return clean(each.memory.phase)
    return clean(each.prediction.phase) if view.peak_bytes(each) and each.prediction else NOTHING


def share_of(profile: Profile, method: str, each: Result) -> str:
    """The peak as a share of another method's."""
    peak, other = view.peak_bytes(each), view.by_method(profile, method)
    return format_share(peak, view.peak_bytes(other) if other else None) if peak else NOTHING


def slower(profile: Profile, each: Result) -> str:
    """The step against plain training's."""
    plain, seconds = view.by_method(profile, "plain"), each.step_seconds
    if not seconds or plain is None or plain is each or not plain.step_seconds:
        return NOTHING
    return format_change(seconds, plain.step_seconds)


def _by_method(
    profile: Profile,
    label: str,
    columns: dict[str, Callable[[Result], Content]],
    found: Iterable[Result] | None = None,
    notes: Callable[[Result], str] = lambda each: "",
    **rest: Any,
) -> Table:
    """A row per method under its label, how it ended and what is noted of it."""
    names, best, rows = view.labels(profile), view.chosen(profile), []
    for each in view.results(profile) if found is None else found:
        said = tuple(words for words in (state(each), notes(each)) if words)
        cells = tuple(cell_of(each) for cell_of in columns.values())
        rows.append(Row(names[each.method.spec], cells, said, chosen=best is each))
    return Table(("Method", *columns), tuple(rows), label, **rest)


def glance(profile: Profile) -> Table:
    """One row per method with the figures that decide."""
    return _by_method(
        profile,
        "Every method at a glance",
        {
            "Peak": partial(_peak_cell, profile),
            "Of plain": partial(share_of, profile, "plain"),
            "Of checkpoint": partial(share_of, profile, "checkpoint"),
            "Peak in": peak_phase,
            "Step": lambda r: Cell(format_seconds(r.step_seconds), doubt(r)) if r.step_seconds else NO_FIGURE,
            "Against plain": partial(slower, profile),
            f"{profile.units.capitalize()}/s": lambda r: format_rate(profile.per_second(r.step_seconds)),
            "Gradient error": gradient_error,
            "Loss change": loss_change,
        },
        notes=lambda r: r.method.known.source,
        words=(4,),
    )


def _peak_cell(profile: Profile, each: Result) -> Cell:
    if (peak := view.peak_bytes(each)) is None:
        return NO_FIGURE
    over = not view.fits(profile, peak)
    return Cell(format_bytes(peak), "over the budget" if over else "", bad=over, strong=True)


def peak_table(profile: Profile) -> Table:
    """The categories at the peak of every method, and what the allocator counted."""
    whole, last = ("sum, attributed", "peak, allocator")
    if view.only_predicted(profile):
        whole, last = ("sum", "peak, predicted")

    def held(category: str, each: Result) -> str:
        found = view.peak_categories(each)
        return format_bytes(found.get(category, 0)) if found else NOTHING

    def total(each: Result) -> str:
        found = view.peak_categories(each)
        return format_bytes(sum(found.values())) if found else NOTHING

    categories = view.peak_categories_shown(profile)
    columns: dict[str, Callable[[Result], Content]] = {
        CATEGORY_TITLES[name]: partial(held, name) for name in categories
    }
    columns |= {whole: total, last: partial(_peak_cell, profile)}
    return _by_method(profile, "Peak memory by category", columns, fold=_FOLD)


def memory_table(profile: Profile) -> Table:
    """Peaks by phase, and what lies outside the peak."""
    found = view.measured_memory(profile)

    def of(cell_of: Callable[[Memory], Content]) -> Callable[[Result], Content]:
        return lambda each: cell_of(each.memory) if each.memory else NO_FIGURE

    def in_phase(phase: str, memory: Memory) -> Cell:
        return Cell(optional_bytes(memory.phase_peaks.get(phase)), strong=phase == memory.phase)

    columns = {f"peak in {phase}": of(partial(in_phase, phase)) for phase in PHASES}
    columns["kept between forward and backward"] = of(lambda memory: format_bytes(memory.kept_bytes))
    columns["on the host"] = of(lambda memory: format_bytes(memory.host_bytes))
    if any(memory.reserved_bytes is not None for _, memory in found):
        columns["reserved by CUDA"] = of(lambda memory: optional_bytes(memory.reserved_bytes))
    columns["whole process"] = of(lambda memory: format_bytes(memory.process_bytes))

    def snapshot(each: Result) -> str:
        return (
            f"PyTorch's memory viz opens {clean(each.memory.snapshot)}" if each.memory and each.memory.snapshot else ""
        )

    return _by_method(profile, "Peak by phase", columns, [each for each, _ in found], snapshot)


def holders_table(holders: Sequence[Holder], memory: Memory, label: str, fold: str = "") -> Table:
    """Who holds what at the peak."""
    rows = [
        Row(
            clean(each.path),
            (
                CATEGORY_TITLES.get(each.category, clean(each.category)),  # type: ignore[call-overload]  # as text
                format_bytes(each.bytes),
                format_share(each.bytes, memory.attributed_bytes),
            ),
        )
        for each in holders
    ]
    return Table(("Module", "holds", "bytes", "of the peak"), tuple(rows), label, words=(1,), fold=fold)


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
    heads = ("Highest point of", "after", *(CATEGORY_TITLES[name] for name in names), "sum")
    return Table(heads, tuple(rows), "Live memory by phase", fold=_FOLD)


def fidelity_table(profile: Profile) -> Table:
    """Is every method right, and what does it do to the model's function?"""

    def of(cell_of: Callable[[Fidelity], Content]) -> Callable[[Result], Content]:
        return lambda each: cell_of(each.fidelity) if each.fidelity else NO_FIGURE

    return _by_method(
        profile,
        "Gradient and loss of every method",
        {
            "Gradient error": gradient_error,
            "Cosine": of(lambda found: f"{found.gradient_cosine:.9f}"),
            "Compared with": of(lambda found: AGAINST.get(found.against, clean(found.against))),
            "Drift": of(lambda found: _drift(found.drift)),
            "Loss": of(_loss),
            "Loss as it was": of(lambda found: f"{found.original_loss:.3f}"),
            "Change": loss_change,
        },
    )


def _loss(found: Fidelity) -> Cell:
    return Cell(f"{found.loss:.3f}", f"{format_integer(found.tokens)} tokens" if found.tokens else "training batch")


def _drift(drift: dict[str, float]) -> Cell:
    """The largest, and the chain it was found in where it is not zero."""
    if not drift:
        return NO_FIGURE
    name, worst = max(drift.items(), key=lambda each: each[1])
    return Cell(format_error(worst), clean(name) if worst else "exact")


def prediction_table(profile: Profile) -> Table:
    """Predicted, attributed and measured peaks, and their ratios."""
    ratios = {each.method.spec: (predicted, followed) for each, predicted, followed in view.prediction_ratios(profile)}

    def ratio(place: int, each: Result) -> str:
        return format_ratio(ratios.get(each.method.spec, (None, None))[place], 1)

    return _by_method(
        profile,
        "Predicted, attributed and measured peaks",
        {
            "Predicted peak": lambda r: optional_bytes(r.prediction.peak_bytes if r.prediction else None),
            "Measured peak": lambda r: optional_bytes(r.memory.peak_bytes if r.memory else None),
            "Predicted / measured": partial(ratio, 0),
            "Attributed": lambda r: optional_bytes(r.memory.attributed_bytes if r.memory else None),
            "Attributed / measured": partial(ratio, 1),
        },
        fold=_FOLD,
    )


def time_table(profile: Profile) -> Table:
    """Medians, their spread and what they come to."""

    def spread(each: Result) -> Cell:
        return NO_FIGURE if each.spread is None else Cell(f"{100 * each.spread:.1f} %", bad=each.in_doubt)

    def utilisation(each: Result) -> str:
        used = profile.utilisation(each)
        return NOTHING if used is None else f"{100 * used:.0f} %"

    def timed(each: Result) -> str:
        count, rounds = format_integer(len(each.samples)), plural(len(each.rounds), "round")
        return f"{count} in {rounds}" if each.samples else NOTHING

    def in_phase(phase: str, each: Result) -> str:
        return optional_seconds(each.phase_seconds(phase))

    return _by_method(
        profile,
        "Times of every method",
        {
            "Step, median": lambda r: Cell(optional_seconds(r.step_seconds), strong=True),
            "Quartiles apart": spread,
            **{phase: partial(in_phase, phase) for phase in PHASES},
            f"{profile.units.capitalize()}/s": lambda r: format_rate(profile.per_second(r.step_seconds)),
            "Work": lambda r: format_flops(r.work.flops) if r.work else NOTHING,
            "Utilisation": utilisation,
            "Steps timed": timed,
        },
        notes=doubt,
    )


def roofline_table(profile: Profile) -> Table:
    """Predicted work, and the least time in which the device can do it."""
    return _by_method(
        profile,
        "Predicted times of every method",
        {
            "Work": lambda r: format_flops(r.prediction.step_flops) if r.prediction else NOTHING,
            "Roofline time, a lower bound": lambda r: optional_seconds(
                r.prediction.step_seconds if r.prediction else None
            ),
        },
    )


def overhead_table(profile: Profile) -> Table:
    """The instrumented step by what it was spent on."""
    found = [each for each in view.results(profile) if each.work]
    kinds = dict.fromkeys(kind for each in found if each.work for kind in each.work.overhead)

    def spent(kind: str, each: Result) -> Cell:
        assert each.work
        seconds, whole = each.work.overhead.get(kind, 0.0), each.work.instrumented_seconds
        return Cell(format_seconds(seconds), f"{100 * seconds / whole:.0f} %") if seconds else Cell("0")

    columns: dict[str, Callable[[Result], Content]] = {clean(kind): partial(spent, kind) for kind in kinds}
    columns["whole instrumented step"] = lambda r: optional_seconds(r.work.instrumented_seconds if r.work else None)
    return _by_method(profile, "The instrumented step in figures", columns, found, fold=_FOLD)


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
