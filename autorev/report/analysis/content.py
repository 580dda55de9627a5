"""What a report of an analysis says: the blocks, the memory of every method, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from autorev.analysis import Analysis, Block
from autorev.format import (
    NOTHING,
    clean,
    format_bytes,
    format_count,
    format_flops,
    format_integer,
    format_seconds,
    format_shape,
    format_share,
    plural,
    sentence,
    unit_for,
)
from autorev.report import document as doc
from autorev.report import shared
from autorev.report.analysis import figures, view
from autorev.report.analysis.method import method
from autorev.words import CATEGORY_TITLES, device_facts, headline, method_title, model_facts, setting_facts

_MOST_GROUPS = 10
"""Lines of blocks before the rest is only counted: a terminal is one screen, not the whole list."""
_MOST_RANGES = 3
_SIGNS = {"eligible": "\u2713", "caveat": "!", "refused": "\u00d7"}
_WORDS = (1, 3, 4, 5, 6)
_PHASES = ("Forward", "Backward", "Optimizer")
_AXES = {
    "batch": ("Memory against batch", "batch, samples"),
    "sequence": ("Memory against sequence length", "sequence, tokens per sample"),
}


def screen_of_many(analyses: Sequence[Analysis]) -> Iterator[doc.Section]:
    """One after the other."""
    for analysis in analyses:
        yield from screen(analysis)


def screen(analysis: Analysis) -> Iterator[doc.Section]:
    """One screen of a terminal: the model, its blocks, the memory of every method, what to do."""
    head = [shared.name_on_screen(analysis.model)]
    if analysis.setting:
        facts = setting_facts(analysis.setting)
        phrases = [f"batch {analysis.setting.batch}", *(value for name, value in facts.items() if name != "Batch")]
        phrases += [device_facts(analysis.device)] if analysis.device else []
        head.append(doc.text("One training step: " + ", ".join(phrases)))
    yield doc.Section("", tuple(head))
    yield doc.Section("", tuple(_blocks_on_screen(analysis)))
    if analysis.predictions:
        yield doc.Section("", tuple(_memory_on_screen(analysis)))
    if advice := analysis.recommendation:
        yield shared.advice_on_screen(headline(advice.method), advice.why, advice.advice)
    yield from shared.notes_on_screen(analysis.notes)


def _blocks_on_screen(analysis: Analysis) -> Iterator[doc.Part]:
    yield doc.text(doc.strong("Blocks"), f"  {_count(analysis)}")
    groups = [group for chain in analysis.chains for group in view.similar_groups(chain.blocks)]
    groups += view.similar_groups(analysis.refused)
    order = list(dict.fromkeys(first.reasons for first, _ in groups))
    groups.sort(key=lambda group: order.index(group[0].reasons))
    shown, rest = groups[:_MOST_GROUPS], groups[_MOST_GROUPS:]
    cells = [_group_cells(first, runs) for first, runs in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for reasons, members in groupby(zip(shown, cells, strict=True), lambda each: each[0][0].reasons):
        for (first, _), found in members:
            name, kind, count, verdict, steps = (c.ljust(width) for c, width in zip(found, widths, strict=True))
            yield doc.text(f"{name} {kind} {count} ", doc.Span(verdict, first.verdict), f" {steps.rstrip()}", indent=2)
        for reason in reasons:
            yield doc.text(doc.muted(clean(reason)), indent=4)
    if rest:
        left = sum(len(run.blocks) for _, runs in rest for run in runs)
        yield doc.text(doc.muted(f"and {plural(left, 'block')} of {plural(len(rest), 'more kind')}"), indent=2)


def _group_cells(first: Block, runs: list[view.Run]) -> tuple[str, ...]:
    labels = [run.label for run in runs]
    named = ", ".join(labels[:_MOST_RANGES]) + (", ..." if len(labels) > _MOST_RANGES else "")
    count = sum(len(run.blocks) for run in runs)
    return named, clean(first.class_name), f"x{count}", first.verdict.value, view.step_kinds(first)


def _memory_on_screen(analysis: Analysis) -> Iterator[doc.Part]:
    rows, scratch = view.kept_and_scratch(analysis)
    unit = unit_for(row.prediction.peak_bytes for row in [*rows, *scratch])
    scale, capacity = view.bar_scale(analysis, rows)
    made = []
    for row in rows:
        p, fitting = row.prediction, view.fits(row, analysis)
        batch, sequence = _reach(row)
        cells: dict[str, doc.Content] = {
            "memory at the peak,\nby category": doc.Bar(p.categories, scale, capacity),
            f"peak\n{unit.name}": doc.Cell(
                ("" if fitting else "!") + unit.number(p.peak_bytes), bad=not fitting, strong=True
            ),
            f"kept\n{unit.name}": unit.number(p.kept_bytes),
            "roofline\ntime": format_seconds(p.step_seconds),
            "peak\nphase": clean(p.phase),
            "largest\nbatch": batch,
            "longest\nsequence": sequence,
        }
        made.append((doc.Row(row.label, chosen=view.is_chosen(row, analysis)), cells))
    yield doc.without_empty(doc.table("method", made, words=(5,)), keep=5)
    yield doc.Legend(tuple(view.shown_categories(rows)))
    yield doc.text(doc.muted("kept: between forward and backward. Roofline time: a lower bound."))
    over = not all(view.fits(row, analysis) for row in [*rows, *scratch])
    if capacity and analysis.device:
        mark = f"| {format_bytes(capacity)}, the memory of {clean(analysis.device.title)}"
        yield doc.text(doc.muted(mark + (";  ! does not fit" if over else "")))
    if scratch:
        peaks = [f"{row.label} {_marked(row, analysis, unit.number(row.prediction.peak_bytes))}" for row in scratch]
        yield doc.text(doc.muted(f"From scratch only, peak in {unit.name}: {', '.join(peaks)}."))
        yield doc.text(
            doc.muted("With these a pretrained model does not keep its function; it needs fine-tuning to recover.")
        )


def _marked(row: view.MethodRow, analysis: Analysis, peak: str) -> str:
    return peak if view.fits(row, analysis) else f"!{peak}"


def _reach(row: view.MethodRow) -> tuple[str, str]:
    found = (row.reach.largest_batch, row.reach.longest_sequence) if row.reach else (None, None)
    batch, sequence = (NOTHING if figure is None else format_integer(figure) for figure in found)
    return batch, sequence


def markdown(analyses: Sequence[Analysis]) -> Iterator[doc.Section]:
    """The recommendation, the methods, the chains, and the refusals with their reasons."""
    (analysis,) = analyses
    head = [doc.text(clean(analysis.model.name), kind="h1"), doc.text(", ".join(model_facts(analysis.model)) + ".")]
    if analysis.setting:
        facts = [f"{name.lower()} {value}" for name, value in setting_facts(analysis.setting).items()]
        facts += [device_facts(analysis.device)] if analysis.device else []
        head.append(doc.text("One training step: " + ", ".join(facts) + "."))
    yield doc.Section("", tuple(head))
    if advice := analysis.recommendation:
        steps = [doc.numbered(map(sentence, advice.advice))] if advice.advice else []
        yield doc.Section(f"Recommendation: {headline(advice.method)}", (doc.text(sentence(advice.why)), *steps))
    if analysis.predictions:
        found = _methods(analysis, view.method_rows(analysis), without=_PHASES)
        meaning = doc.text("Kept after forward: between forward and backward. Roofline time: a lower bound.")
        yield doc.Section("Memory by method", (replace(found, words=(2,)), meaning))
    chained = [(chain.name, run) for chain in analysis.chains for run in view.identical_runs(chain.blocks)]
    chained += [("", run) for run in view.identical_runs(analysis.refused)]
    rows = [doc.Row(chain or NOTHING, _block_words(run)) for chain, run in chained]
    heads = ("Chain", "Blocks", "Count", "Class", "Steps", "Verdict", "Reasons")
    blocks = doc.Table(heads, tuple(rows), words=_WORDS, code_heads=True)
    yield doc.Section("Blocks", (doc.text(f"{_count(analysis).partition(', in')[0]}."), blocks))
    if analysis.notes:
        yield doc.Section("Notes", (doc.Bullets(tuple(map(sentence, analysis.notes))),))
    versions = ", ".join(f"{name} {version}" for name, version in analysis.versions.items())
    made = f"Made with {versions}; couplings after " if versions else "Reversible couplings after "
    yield doc.Section("", (doc.text(made, doc.Span("arXiv 2512.02056", "link"), "."),))


def _block_words(run: view.Run) -> tuple[doc.Cell | str, ...]:
    first = run.first
    return (
        doc.Cell(run.label, tone="code"),
        str(len(run.blocks)),
        doc.Cell(first.class_name, tone="code"),
        "; ".join(f"{step.kind} ({step.source})" for step in first.steps),
        first.verdict.value,
        doc.Cell("\n".join(first.reasons) or NOTHING),
    )


def page(analysis: Analysis, command: str) -> doc.Page:
    """The whole report; `command` is what made it, shown at its end."""
    facts = dict(setting_facts(analysis.setting)) if analysis.setting else {}
    if facts and analysis.device:
        facts["Device"] = device_facts(analysis.device)
    versions = ", ".join(f"{name} {version}" for name, version in analysis.versions.items())
    foot = (doc.text("Made with", kind="h3"), doc.text(versions), doc.Command(command))
    title, head = f"{clean(analysis.model.name)}: training memory", shared.page_head(analysis.model, facts)
    return doc.Page(title, head, tuple(_sections(analysis)), foot)


def _sections(analysis: Analysis) -> Iterator[doc.Section]:
    if advice := analysis.recommendation:
        yield doc.Section(headline(advice.method), tuple(_advice(analysis)), eyebrow="Recommendation")
    if analysis.predictions:
        yield doc.Section("Memory of one training step", tuple(_memory(analysis)))
    curves = tuple(_curve(analysis, axis) for axis in _AXES if view.sweep_rows(analysis, axis))
    if curves:
        yield doc.Section("How far the memory reaches", curves)
    yield doc.Section("Blocks", tuple(_blocks(analysis)))
    yield from shared.notes_on_page(analysis.notes)
    yield doc.Section("How every figure was obtained", (method(analysis),))


def _advice(analysis: Analysis) -> Iterator[doc.Part]:
    """The comparison first, then what the recommended method needs beside what it stands against."""
    advice = analysis.recommendation
    assert advice
    yield doc.text(sentence(advice.why), kind="why")
    rows = view.method_rows(analysis)
    lead = [row for row in rows if view.is_chosen(row, analysis) or {"plain", "checkpoint"} & set(row.names)]
    if len(lead) > 1:
        yield figures.peaks(analysis, lead, "lead", "Peak memory of what is recommended and of what it stands against")
    chosen = analysis.prediction(advice.method) if advice.method else None
    rival = analysis.prediction("plain" if advice.method != "plain" else "checkpoint")
    if chosen:
        reaches = {each.method: each for each in analysis.frontier}
        own, other = reaches.get(chosen.method), reaches.get(rival.method) if rival else None
        over = analysis.device and chosen.peak_bytes > analysis.device.usable_bytes
        found: list[tuple[str, str, Any]] = [
            ("Peak memory", format_bytes(chosen.peak_bytes), rival and format_bytes(rival.peak_bytes))
        ]
        for title, field in (("Largest batch", "largest_batch"), ("Longest sequence", "longest_sequence")):
            if own and (most := getattr(own, field)) is not None:
                found.append((title, format_integer(most), other and format_integer(getattr(other, field) or 0)))
        seconds = rival and format_seconds(rival.step_seconds)
        found.append(("Time of a step, at least", format_seconds(chosen.step_seconds), seconds))
        name = method_title(rival.method) if rival else ""
        tiles = [doc.Tile(title, figure, f"{name}: {others}" if others else "") for title, figure, others in found]
        yield doc.Tiles((replace(tiles[0], warning="does not fit" if over else ""), *tiles[1:]))
    yield from shared.helping_further(advice.advice)


def _memory(analysis: Analysis) -> Iterator[doc.Part]:
    rows, scratch = view.kept_and_scratch(analysis)
    device, (_, capacity) = analysis.device, view.bar_scale(analysis, rows)
    said = "What is alive at the highest point of a step, by method."
    if device and capacity:
        said += (
            f" The dashed line is the memory of {clean(device.title)}; a figure after ! does not fit it, and a bar "
            "that ends in \u203a\u203a is cut."
        )
    elif device:
        said += f" Every method stays far below the {format_bytes(device.memory_bytes)} of {clean(device.title)}."
    label = "Peak memory of every method by category"
    figure = figures.peaks(analysis, rows, "memory-by-method", label)
    yield doc.captioned(figure, doc.Legend(tuple(view.shown_categories(rows))), _categories(rows), caption=said)
    yield doc.text("Every method in numbers", kind="h3")
    yield _methods(analysis, rows, without=("Phase",))
    yield doc.text("Bold: the phase in which the peak stands.", kind="hint")
    if scratch:
        why = "A pretrained model converted this way starts from another function, and needs fine-tuning to recover."
        parts = (
            doc.text(why),
            doc.captioned(figures.peaks(analysis, scratch, "from-scratch", label), _categories(scratch)),
            _methods(analysis, scratch, without=("Phase",)),
        )
        count = plural(sum(len(row.names) for row in scratch), "coupling")
        yield doc.Fold(f"From scratch: {count} that a pretrained model would not keep its function with", parts)
    if any(row.prediction.phase_peaks for row in rows):
        caption = (
            "The highest of the three decides what fits. Where the optimizer is highest, storing fewer activations "
            "does not help."
        )
        caption += " The dashed line is the device's memory." if device else ""
        yield doc.captioned(figures.phase_peaks(analysis, rows), title="Peak in each phase", caption=caption)


def _categories(rows: list[view.MethodRow]) -> doc.Table:
    categories = view.shown_categories(rows)
    heads = ("Method", *(CATEGORY_TITLES[category] for category in categories), "peak")
    made = []
    for row in rows:
        cells = [format_bytes(row.prediction.categories.get(category, 0)) for category in categories]
        made.append(doc.Row(row.label, (*cells, doc.Cell(format_bytes(row.prediction.peak_bytes), strong=True))))
    return doc.Table(heads, tuple(made), "The figures of the plot above", fold="Show as a table")


def _methods(analysis: Analysis, rows: list[view.MethodRow], without: tuple[str, ...]) -> doc.Table:
    """Every figure of every method; columns in which none has one are left out."""
    rivals = {f"Of {name}": analysis.prediction(name) for name in ("plain", "checkpoint")}
    made = []
    for row in rows:
        p = row.prediction
        over = not view.fits(row, analysis)
        batch, sequence = _reach(row)
        columns: dict[str, doc.Content] = {
            "Peak": doc.Cell(format_bytes(p.peak_bytes), "does not fit" if over else "", bad=over, strong=over),
            "Phase": p.phase,
            **{head: format_share(p.peak_bytes, rival.peak_bytes if rival else None) for head, rival in rivals.items()},
            **{head: _phase_peak(p.phase_peaks.get(head.lower()), head.lower() == p.phase) for head in _PHASES},
            "Kept after forward": format_bytes(p.kept_bytes),
            "Work": format_flops(p.step_flops),
            "Roofline time": format_seconds(p.step_seconds),
            "Largest batch": batch,
            "Longest sequence": sequence,
            "Keeps the pretrained function": "yes" if p.preserves_function else "no",
        }
        shown = {head: cell for head, cell in columns.items() if head not in without}
        made.append((doc.Row(row.label, notes=row.notes, chosen=view.is_chosen(row, analysis)), shown))
    return doc.table("Method", made, label="Every method in numbers")


def _phase_peak(peak: int | None, highest: bool) -> doc.Cell:
    return doc.Cell(NOTHING if peak is None else format_bytes(peak), strong=highest)


def _curve(analysis: Analysis, axis: str) -> doc.Part:
    """The peak of every method along an axis, and how far each fits; a table alone where a curve has few points."""
    title, x_title = _AXES[axis]
    rows = view.sweep_rows(analysis, axis)
    figure = figures.along(analysis, axis, title, x_title)
    values = sorted({value for _, line in rows for value in line.values})
    found = [(label, dict(zip(line.values, line.peak_bytes, strict=True))) for label, line in rows]
    made = [
        doc.Row(format_integer(value), tuple(format_bytes(p[value]) if value in p else NOTHING for _, p in found))
        for value in values
    ]
    heads = (axis.capitalize(), *(label for label, _ in rows))
    table = doc.Table(heads, tuple(made), f"{title} in figures", fold="Show as a table" if figure else "")
    said = "Everything else as set above. A method fits while its line is below the dashed one."
    return doc.captioned(figure, table, title=title, caption=said if figure else "Everything else as set above.")


def _count(analysis: Analysis) -> str:
    chains = f", in {plural(len(analysis.chains), 'chain')}" if analysis.chains else ""
    count = plural(len(view.all_blocks(analysis)), "block")
    return f"{view.reversible_count(analysis)} of {count} can be made reversible{chains}"


def _blocks(analysis: Analysis) -> Iterator[doc.Part]:
    yield doc.text(f"{_count(analysis)}.")
    for chain in analysis.chains:
        yield doc.text("Chain ", doc.Span(chain.name, "code"), kind="h3")
        yield _block_table(chain.blocks)
    if analysis.refused:
        yield doc.text("Refused", kind="h3")
        yield _block_table(analysis.refused)


def _block_table(blocks: Sequence[Block]) -> doc.Table:
    """One row for each run of identical blocks."""
    heads = ("Blocks", "Class", "Stream", "Residual steps", "Also reads", "Writes", "Random", "Verdict")
    return doc.Table(
        heads, tuple(map(_block_row, view.identical_runs(blocks))), "Blocks", tuple(range(1, 8)), kind="blocks"
    )


def _block_row(run: view.Run) -> doc.Row:
    first, count = run.first, len(run.blocks)
    cells = (
        doc.Cell(first.class_name, f"{format_count(first.parameters)} parameters\n{clean(first.source)}", tone="code"),
        doc.Cell(first.stream, f"{format_shape(first.shape)}, {clean(first.dtype)}", tone="code"),
        tuple(doc.Cell(s.kind, f"{', '.join(map(clean, s.branch))}\n{clean(s.source)}") for s in first.steps) or "none",
        tuple(doc.Cell(name, tone="code") for name in first.extra_inputs) or "none",
        tuple(doc.Cell(name, tone="code") for name in first.buffers_written) or "none",
        "yes" if first.draws_random else "no",
        doc.Cell(f"{_SIGNS[first.verdict]} {first.verdict}", tone=first.verdict),
    )
    below: list[doc.Part] = [doc.Bullets(first.reasons, kind="reasons")] if first.reasons else []
    if count > 1:
        paths = tuple(each.path + (f" call {each.call + 1}" if each.call else "") for each in run.blocks)
        below.append(doc.Fold(f"Show all {count}", (doc.Bullets(paths, kind="paths"),)))
    return doc.Row(run.label, cells, (f"\u00d7{count}",) if count > 1 else (), below=tuple(below))
