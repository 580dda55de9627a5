"""The page of one profile."""

from __future__ import annotations

from collections.abc import Iterator

from autorev.format import clean, format_bytes, format_flop_rate, plural
from autorev.profiler.readings import Memory, Timeline
from autorev.profiler.record import Environment, Profile, Result
from autorev.report import document as doc
from autorev.report import shared
from autorev.report.profile import figures, sweep_tables, tables, view
from autorev.report.profile.content import advice_card
from autorev.report.profile.paper import paper
from autorev.report.profile.peak import explain, explained
from autorev.words import GOALS, setting_facts

_MOST_HOLDERS = 12
"""In sight; the rest is folded away."""
_PREDICTED = (
    "Predicted from shapes: forward, loss and backward ran on tensors without data, and every storage was counted from "
    "its birth to its death.",
    "The least time in which the device can do the work and move its data, at its published figures. A real step takes "
    "longer.",
)
"""How memory and time were obtained."""
_MEASURED = (
    "The peak is the allocator's own, of one warm step: gradients and optimizer state exist. Who holds it comes from a "
    "traced step in which every storage was followed from its birth to its death; the two are compared under "
    "Prediction against measurement.",
    "Whole steps, in rounds: every round of a method is a fresh process, and the rounds of all methods take turns, "
    "so that a machine that slows down slows all of them. Figures are medians over all timed steps.",
)
_TIMELINES = (
    "What is alive at every moment of the step in which every tensor was followed; all drawings have the same scale. "
    "The tinted part is the backward pass, the dot the highest point. The traced step is slower than a timed one."
)


def page(profile: Profile, command: str) -> doc.Page:
    """Everything that the record holds."""
    return doc.Page(
        f"{clean(profile.model.name)}: training steps",
        tuple(_head(profile)),
        tuple(_sections(profile)),
        tuple(shared.made_with(profile.command, command)),
    )


def _head(profile: Profile) -> Iterator[doc.Part]:
    start = "pretrained" if profile.pretrained else "random weights"
    budget = "none" if profile.budget_bytes is None else format_bytes(profile.budget_bytes)
    if profile.memory_limit and profile.memory_limit.startswith("+"):
        budget += f" ({clean(profile.memory_limit)} beside weights, gradients and optimizer)"
    facts = setting_facts(profile.setting) | {"Machine": clean(profile.environment.machine), "Budget": budget}
    facts["Wanted"] = GOALS.get(profile.goal, clean(profile.goal))
    yield from shared.page_head(profile.model, facts, plural(profile.blocks, "block"), start)
    if not profile.complete:
        count = view.waiting(profile)
        said = (
            f" The run ended before it was done: {count} of {plural(len(profile.results), 'method')} "
            f"{'is' if count == 1 else 'are'} not measured to the end. What is shown is what was measured; `--resume` "
            "goes on with it."
        )
        yield doc.text(doc.strong("This record is incomplete."), *doc.prose(said).spans, kind="notice")
    if view.only_predicted(profile):
        said = " Every figure on this page is a prediction (`--predict`)."
        yield doc.text(doc.strong("Nothing was measured."), *doc.prose(said).spans, kind="notice")


def _sections(profile: Profile) -> Iterator[doc.Section]:
    if card := advice_card(profile):
        yield card
    yield doc.Section("Every method at a glance", tuple(_glance(profile)))
    if figure := figures.memory_against_throughput(profile):
        yield doc.Section("Memory against speed", (_tradeoff(profile, figure),))
    if parts := tuple(timelines(profile)):
        yield doc.Section("Memory over one step", parts)
    if explained(profile):
        yield doc.Section("Why the peak is where it is", tuple(_why(profile)))
    by_block = [each for each in (figures.kept_by_block(profile), *figures.time_by_block(profile)) if each]
    if by_block:
        yield doc.Section("Block by block", (_by_block(profile, by_block),))
    yield doc.Section("Time of one step", tuple(_time(profile)))
    if view.has_fidelity(profile):
        yield doc.Section("Does it compute the same?", tuple(_fidelity(profile)))
    if view.axes(profile):
        yield doc.Section("How far the memory reaches", tuple(_sweeps(profile)))
    if figure := figures.prediction_against_measurement(profile):
        said = (
            "Dots: the peak that the analysis predicted, over the measured one. Strokes: what following every tensor "
            "added up to, over the same. On the dashed line, both agree."
        )
        yield doc.Section(
            "Prediction against measurement", (doc.captioned(figure, tables.prediction_table(profile), caption=said),)
        )
    yield from shared.notes_on_page(profile.notes)
    yield doc.Section("How every figure was obtained", (_method(profile),))
    yield doc.Section("Where and when it ran", (facts_of(profile.environment),))


def facts_of(where: Environment) -> doc.Facts:
    """Every field of an environment."""
    return doc.Facts(tuple(tables.environment_facts(where).items()))


def _glance(profile: Profile) -> Iterator[doc.Part]:
    said = (
        "Predicted: what is alive at the highest point of a step, by method."
        if view.only_predicted(profile)
        else "What is alive at the highest point of a step, by method. The bar's parts come from following every "
        "tensor; the figure at its right is the allocator's, the one to go by."
    )
    if profile.budget_bytes is not None:
        budget = format_bytes(profile.budget_bytes)
        near = f" The dashed line is the budget of {budget}."
        said += near if view.budget_in_sight(profile) else f" The budget of {budget} is far above every bar."
    if figure := figures.peak_by_category(profile):
        legend = doc.Legend(tuple(view.peak_categories_shown(profile)))
        yield doc.captioned(figure, legend, tables.peak_table(profile), caption=said)
    yield tables.glance(profile)
    yield doc.text(
        "Against plain: the median step time. Gradient error: how far the gradient is from the one it is compared "
        "with, relative to its size. Loss change: from the model as it was, before any training.",
        kind="hint",
    )


def _tradeoff(profile: Profile, figure: doc.Figure) -> doc.Part:
    best = view.front(view.front_points(profile))
    said = "One mark per measured method: further right is faster, lower needs less memory. "
    if len(best) > 1:
        said += "Compared with those on the dotted line, no other method is better in one and as good in the other."
    else:
        said += f"{view.labels(profile)[best[0][0].method.spec]} is at least as good as every other in both."
    return doc.captioned(figure, caption=f"{said} The table above has the figures.")


def timelines(profile: Profile, prefix: str = "") -> Iterator[doc.Part]:
    """Memory over time of every method that was traced; those that are compared first are in sight.

    `prefix` tells the records of a page apart."""
    first, rest = view.with_timeline(profile)
    drawn = figures.timelines(profile, prefix)
    if not drawn:
        return
    cells = [_timeline(profile, *each) for each in drawn]
    shown, folded = tuple(cells[: len(first)]), tuple(cells[len(first) :])
    legend = doc.Legend(tuple(view.shown_categories(first + rest)))
    yield doc.captioned(doc.Grid(shown, columns=3), legend, caption=_TIMELINES)
    if rest:
        yield doc.Fold(f"Show the other {plural(len(rest), 'method')} over time", (doc.Grid(folded, columns=3),))


def _timeline(profile: Profile, result: Result, line: Timeline, figure: doc.Figure) -> doc.Part:
    return doc.stack(doc.text(view.labels(profile)[result.method.spec], kind="h4"), figure, tables.timeline_table(line))


def _why(profile: Profile) -> Iterator[doc.Part]:
    yield doc.Grid(tuple(_explained(profile, *each) for each in explained(profile)), kind="pair")
    yield doc.text("Who allocated what was alive at the highest point, largest first.", kind="hint")
    yield doc.text("Peak by phase, and what lies beside it", kind="h3")
    yield tables.memory_table(profile)
    yield doc.text(
        "Bold: the phase in which the peak stands. The whole process is its largest resident set, Python and libraries "
        "included.",
        kind="hint",
    )


def _explained(profile: Profile, result: Result, memory: Memory) -> doc.Part:
    name = view.labels(profile)[result.method.spec]
    parts: list[doc.Part] = [
        doc.text(name, kind="h3"),
        doc.Bullets(tuple(explain(profile, result, memory)), kind="because"),
    ]
    first, rest = memory.holders[:_MOST_HOLDERS], memory.holders[_MOST_HOLDERS:]
    if first:
        parts.append(tables.holders_table(first, memory, f"Who holds the memory at the peak under {name}"))
    if rest:
        parts.append(
            tables.holders_table(rest, memory, "The rest of who holds the memory", f"Show the other {len(rest)}")
        )
    return doc.stack(*parts)


def _by_block(profile: Profile, found: list[doc.Figure]) -> doc.Part:
    kept, timed = [each for each in found if each.id == "kept-by-block"], [f for f in found if f.id != "kept-by-block"]
    grid = [doc.Grid(tuple(timed))] if timed else []
    said = (
        "What every block keeps between forward and backward, and how long its two passes take in the instrumented "
        "step; what is computed again counts as backward."
    )
    return doc.captioned(*kept, *grid, sweep_tables.blocks_table(profile), caption=said)


def _time(profile: Profile) -> Iterator[doc.Part]:
    if figure := figures.every_step(profile):
        said = (
            "Every dot is one timed step, every line of dots one round in a fresh process; the bar and the figure are "
            "the median."
        )
        if view.doubtful(profile):
            said += " *: the steps lie so far apart that small differences mean nothing."
        yield doc.captioned(figure, sweep_tables.steps_table(profile), caption=said)
    else:
        yield doc.text("No step was timed.")
    if view.only_predicted(profile):
        yield tables.roofline_table(profile)
    else:
        yield tables.time_table(profile)
        said = (
            "Quartiles apart: the middle half of the steps lies within this share of the median. Work: what a step "
            "computes, what is computed twice included."
        )
        if profile.device:
            rate, title = format_flop_rate(profile.device.peak_flops), clean(profile.device.title)
            said += f" Utilisation: relative to the {rate} of {title}."
        yield doc.text(said, kind="hint")
    if figure := figures.overhead(profile):
        said = (
            "One instrumented step. Recomputation is running a forward again in the backward pass, coupling the "
            "arithmetic of the streams, packing the handling of side bits."
        )
        shown = view.overhead_results(profile)
        left_out = [each for each in profile.results if each.work and not any(each is other for other, _ in shown)]
        if left_out:
            names = ", ".join(view.labels(profile)[each.method.spec] for each in left_out)
            said += f" Not here, as PyTorch recomputes within its backward pass and that is not told apart: {names}."
        title = "Where the extra time goes"
        yield doc.captioned(figure, tables.overhead_table(profile), caption=said, title=title)


def _fidelity(profile: Profile) -> Iterator[doc.Part]:
    yield doc.text(
        "The gradient error says whether a method is right; the loss says what it does to the model before any "
        "training."
    )
    yield tables.fidelity_table(profile)
    yield doc.text(
        "Drift: how far the recomputed stream is from the one of the forward pass, by the integrity check; exact "
        f"means not by one bit. Losses in nats per token, or the model's own loss. Tokens from: {clean(profile.text)}.",
        kind="hint",
    )


def _sweeps(profile: Profile) -> Iterator[doc.Part]:
    names = {"batch": "batch", "sequence": "sequence length", "depth": "number of blocks"}
    for axis in view.axes(profile):
        figure = figures.sweep(profile, axis)
        fitted = any(point.peak_bytes for point in profile.points if point.axis == axis)
        said = "The measured peak at every size, everything else as set above."
        if profile.budget_bytes is not None:
            said += f" A cross is a size that did not fit {format_bytes(profile.budget_bytes)}." if figure else ""
        nothing = None if fitted else doc.text("No size fitted, so there is nothing to draw.")
        table = sweep_tables.sweep_table(profile, axis, fold="Show as a table" if figure else "")
        yield doc.captioned(
            figure, nothing, table, caption=said, title=f"Memory against {names.get(axis, clean(axis))}"
        )
        if view.sought_largest(profile, axis):
            bars = figures.throughput_at_largest_batch(profile) if axis == "batch" else None
            if bars:
                said = "Every method at the largest batch that fits its budget; at the right, that batch."
                yield doc.captioned(bars, caption=said, title="Throughput at the largest batch")
            yield sweep_tables.reach_table(profile, axis)
    if "batch" in view.axes(profile):
        yield from paper()


def _method(profile: Profile) -> doc.Facts:
    memory, time = _PREDICTED if view.only_predicted(profile) else _MEASURED
    categories = shared.categories(view.shown_categories(view.results(profile)))
    methods = shared.methods(dict.fromkeys(view.methods(profile), ""))
    entries = (("Memory", memory), ("Categories", categories), ("Methods", methods), ("Time", time))
    return doc.Facts(entries, "method")
