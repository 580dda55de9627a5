"""What is shown of a plan: what to train with, what each step towards it buys, and what else there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autorev.format import NOTHING, clean, format_bytes, format_integer, format_seconds, sentence, unit_for
from autorev.plan import Option, Plan, Reached, Rung
from autorev.report import document as doc
from autorev.report import plots, shared
from autorev.report.palette import look_of
from autorev.words import device_facts, setting_facts


def screen(plan: Plan) -> Iterator[doc.Section]:
    """Of a terminal."""
    step = ", ".join(setting_facts(plan.setting).values())
    yield doc.Section("", (shared.name_on_screen(plan.model), doc.text(doc.muted(step))))
    yield doc.Section("", tuple(_answer(plan)))
    if plan.longest:
        yield doc.Section("", (_reached(plan),))
    if len(plan.rungs) > 1:
        yield doc.Section("", (_rungs(plan),))
    if plan.options:
        yield doc.Section("", (_options(plan), doc.text(doc.muted(_TIME))))
    yield from shared.notes_on_screen(plan.notes)


def screen_of_many(plans: Sequence[Plan]) -> Iterator[doc.Section]:
    """One after the other."""
    for plan in plans:
        yield from screen(plan)


def markdown(plans: Sequence[Plan]) -> Iterator[doc.Section]:
    """The answer and its tables."""
    for plan in plans:
        yield doc.Section(clean(plan.model.name), tuple(_answer(plan)))
        if plan.longest:
            yield doc.Section("How far each way reaches", (_reached(plan),), level=3)
        if len(plan.rungs) > 1:
            yield doc.Section("What each step buys", (_rungs(plan),), level=3)
        if plan.options:
            yield doc.Section("All that was looked at", (_options(plan), doc.text(_TIME)), level=3)


def page(plan: Plan, command: str) -> doc.Page:
    """With the chart of time against memory."""
    facts = {
        "Memory": format_bytes(plan.memory_bytes),
        **setting_facts(plan.setting),
        "Device": device_facts(plan.device),
    }
    sections = [doc.Section(_title(plan), tuple(_advice(plan)), eyebrow="Plan")]
    if plan.options:
        caption = (
            "Each mark is one way to train; the line joins those that nothing else beats both in memory and in time. "
            "What stands right of the dashed line does not fit."
        )
        sections.append(doc.Section("Time against memory", (doc.captioned(_chart(plan), caption=caption),)))
    if plan.longest:
        sections.append(doc.Section("How far each way reaches", (_reached(plan),)))
    if len(plan.rungs) > 1:
        sections.append(doc.Section("What each step buys", (_rungs(plan),)))
    if plan.options:
        sections.append(doc.Section("All that was looked at", (_options(plan), doc.text(_TIME, kind="hint"))))
    sections += shared.notes_on_page(plan.notes)
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    foot = (doc.text("Made with", kind="h3"), doc.text(versions), doc.Command(command))
    title = f"{clean(plan.model.name)}: a plan for {format_bytes(plan.memory_bytes)}"
    return doc.Page(title, shared.page_head(plan.model, facts), tuple(sections), foot)


_TIME = "Times are roofline times on the device: lower bounds, which compare methods."


def _title(plan: Plan) -> str:
    if plan.method is None:
        return "Nothing fits"
    other = plan.setting.optimizer if plan.setting.optimizer != plan.rungs[0].option.optimizer else ""
    ways = ([] if plan.method.spec == "plain" else [plan.method.spec]) + ([other] if other else [])
    return f"Train with {' and '.join(ways)}" if ways else "Train as it is"


def _by(plan: Plan, each: Option | Reached) -> dict[str, doc.Content]:
    """The optimiser, where there are several."""
    return {"optimizer": each.optimizer} if len({option.optimizer for option in plan.options}) > 1 else {}


def _answer(plan: Plan) -> Iterator[doc.Part]:
    yield doc.text(doc.strong("Plan  "), doc.Span(_title(plan), "accent" if plan.method else "bad"))
    yield doc.text(sentence(plan.why), indent=2)
    for line in _figures(plan):
        yield doc.text(line, indent=2)


def _figures(plan: Plan) -> Iterator[str]:
    chosen = plan.option
    if plan.axis and plan.longest and plan.longest[0].size:
        reached = plan.longest[0]
        what = "samples" if plan.axis == "batch" else "tokens a sample"
        yield f"Up to {format_integer(reached.size)} {what}"
    if chosen is not None:
        host = f", and {format_bytes(chosen.host_bytes)} on the host" if chosen.host_bytes else ""
        each = " per GPU" if plan.setting.gpus > 1 else ""
        yield f"Peak {format_bytes(chosen.peak_bytes)} of {format_bytes(plan.memory_bytes)}{each}{host}"
        yield f"A step takes {format_seconds(chosen.seconds)} at least"
    if (found := plan.measured) is not None:
        held = "within the memory" if found.holds else "MORE than the memory"
        peak, time = format_bytes(found.peak_bytes), format_seconds(found.seconds)
        yield f"Measured here: {peak} at the peak, which is {held}; {time} a step"


def _advice(plan: Plan) -> Iterator[doc.Part]:
    yield doc.text(sentence(plan.why), kind="why")
    chosen = plan.option
    if chosen is not None:
        tiles = [
            doc.Tile("Peak memory", format_bytes(chosen.peak_bytes), f"of {format_bytes(plan.memory_bytes)}"),
            doc.Tile("Time of a step, at least", format_seconds(chosen.seconds)),
            doc.Tile("On the host", format_bytes(chosen.host_bytes)),
        ]
        yield doc.Tiles(tuple(tiles))
    for line in _figures(plan):
        if line.startswith(("Measured", "Up to")):
            yield doc.text(sentence(line))


def _rungs(plan: Plan) -> doc.Table:
    unit = unit_for(rung.option.peak_bytes for rung in plan.rungs)
    before: Rung | None = None
    rows = []
    for rung in plan.rungs:
        option = rung.option
        bytes_, time = NOTHING, NOTHING
        if before is not None:
            bytes_ = f"{(option.peak_bytes - before.option.peak_bytes) / unit.size:+,.3g}"
            time = f"{option.seconds / before.option.seconds - 1:+.1%}"
        cells: dict[str, doc.Content] = {
            f"peak, {unit.name}": _peak(option, unit.number(option.peak_bytes)),
            "that is": bytes_,
            "step": format_seconds(option.seconds),
            "longer by": time,
        }
        rows.append((doc.Row(rung.what), cells))
        before = rung
    return doc.table("step by step", rows)


def _options(plan: Plan) -> doc.Table:
    unit = unit_for(option.peak_bytes for option in plan.options)
    best = plan.frontier
    rows = []
    for option in plan.options:
        cells: dict[str, doc.Content] = {
            **_by(plan, option),
            f"peak, {unit.name}": _peak(option, unit.number(option.peak_bytes)),
            f"on the host, {unit.name}": unit.number(option.host_bytes) if option.host_bytes else NOTHING,
            "step": format_seconds(option.seconds),
            "frontier": "yes" if option in best else "",
        }
        rows.append((doc.Row(option.method.spec, chosen=option == plan.option), cells))
    return doc.table("method", rows, code_heads=True)


def _reached(plan: Plan) -> doc.Table:
    head = "largest batch" if plan.axis == "batch" else "longest sequence"
    rows: list[tuple[doc.Row, dict[str, doc.Content]]] = [
        (doc.Row(each.method.spec), {**_by(plan, each), head: format_integer(each.size) if each.size else NOTHING})
        for each in plan.longest
    ]
    return doc.table("method", rows, code_heads=True)


def _peak(option: Option, number: str) -> doc.Cell:
    return doc.Cell(number if option.fits else f"!{number}", bad=not option.fits)


def _chart(plan: Plan) -> doc.Figure:
    unit = unit_for([*(option.peak_bytes for option in plan.options), plan.memory_bytes])
    series = []
    best = plan.frontier
    across = [plots.in_unit(option.peak_bytes, unit) for option in best]
    series.append(
        plots.Series("frontier", across, [option.seconds for option in best], dash="dot", width=1.5, mode="lines")
    )
    for name in dict.fromkeys(option.method.name for option in plan.options):
        those = [option for option in plan.options if option.method.name == name]
        x, y = [plots.in_unit(option.peak_bytes, unit) for option in those], [option.seconds for option in those]
        texts = [
            f"{each.method.spec}, {each.optimizer}: {format_bytes(each.peak_bytes)}, {format_seconds(each.seconds)}"
            for each in those
        ]
        series.append(plots.Series.like(look_of(name), name, x, y, texts=texts, mode="markers", size=11))
    room = plots.in_unit(plan.memory_bytes, unit)
    sizes = [*(option.peak_bytes for option in plan.options), plan.memory_bytes]
    axis = plots.log_axis(sizes, unit.size)
    label = "Time of a step against its peak memory, for every way to train"
    return plots.lines(
        "time-against-memory",
        label,
        series,
        f"peak, {unit.name} (log scale)",
        "seconds a step, at least",
        height=440,
        x_axis=axis,
        marked=[(room, "the memory")],
    )
