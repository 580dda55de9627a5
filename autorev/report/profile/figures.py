"""The plots of one profile: memory, time, predictions and sweeps; what the record does not hold has no plot.

A method without memory keeps its row, and says why it has no bar.
"""

from __future__ import annotations

from typing import Any

from autorev.format import format_bytes, format_integer, format_rate, format_ratio, format_seconds, unit_for
from autorev.profiler.readings import Timeline
from autorev.profiler.record import Profile, Result
from autorev.report import maps, plots
from autorev.report.document import Figure
from autorev.report.palette import OVERHEAD_COLORS
from autorev.report.profile import view
from autorev.words import AXIS_TITLES

MOST_POINTS = 600
"""Of a timeline on a page, which is as many as a drawing has pixels to show."""


def peak_by_category(profile: Profile, id: str = "peak", rows: list[Result] | None = None) -> Figure | None:
    """The peak of every method as a bar stacked by category, its figure at the right, the budget as a line."""
    rows = view.results(profile) if rows is None else rows
    peaks, held = [view.peak_bytes(each) for each in rows], [view.peak_categories(each) for each in rows]
    if not any(peaks):
        return None
    highest = max(max(peak or 0, sum(each.values())) for peak, each in zip(peaks, held, strict=True))
    budget = profile.budget_bytes if view.budget_in_sight(profile) else None
    return plots.peak_bars(
        id,
        "Peak memory of every method by category",
        [view.row_label(profile, each) for each in rows],
        held,
        peaks,
        [format_bytes(peak) if peak else view.ended(each) for peak, each in zip(peaks, rows, strict=True)],
        bad=[not view.fits(profile, peak) for peak in peaks],
        scale=max(highest, budget or 0),
        limit=(budget, f"budget: {format_bytes(budget)}") if budget else None,
    )


def memory_against_throughput(profile: Profile) -> Figure | None:
    """One point per method; the line joins those that no other beats in both, the dashed line is the budget."""
    points = view.front_points(profile)
    if len(points) < 2:
        return None
    unit = unit_for(peak for _, peak, _ in points)
    names, look = view.labels(profile), view.looks(profile)
    best = sorted((rate, plots.in_unit(peak, unit)) for _, peak, rate in view.front(points))
    series = []
    if len(best) > 1:
        x, y = [rate for rate, _ in best], [peak for _, peak in best]
        series.append(plots.Series("no method is better in both", x, y, dash="dot", width=1.5, mode="lines"))
    for each, peak, rate in points:
        texts = [f"{format_bytes(peak)}, {format_rate(rate)} {profile.units}/s"]
        how: dict[str, Any] = {"size": 13, "mode": "markers", "outlined": True, "texts": texts}
        spec = each.method.spec
        series.append(plots.Series.like(look[spec], names[spec], [rate], [plots.in_unit(peak, unit)], **how))
    rates, peaks = [rate for _, _, rate in points], [peak for _, peak, _ in points]
    budget = profile.budget_bytes
    if budget and budget <= 1.5 * max(peaks):
        series.append(plots.Series.level(f"budget: {format_bytes(budget)}", sorted(rates), plots.in_unit(budget, unit)))
        peaks.append(budget)
    return plots.lines(
        "tradeoff",
        "Peak memory against throughput",
        series,
        f"{profile.units} a second (right is faster)",
        f"peak, {unit.name} (low is better)",
        height=400,
        x_axis={"range": _span(min(rates), max(rates)), "showgrid": True},
        y_axis={"range": _span(plots.in_unit(min(peaks), unit), plots.in_unit(max(peaks), unit))},
    )


def _span(low: float, high: float) -> list[float]:
    """An axis around the values that begins at zero, or high enough to tell them apart, but never shows only a sliver:
    it covers at least half of the highest value."""
    return [max(0.0, min(low - 0.08 * high, 0.5 * high)), 1.06 * high]


def kept_by_block(profile: Profile) -> Figure | None:
    """What every block keeps between forward and backward under plain, checkpoint and one reversible method."""
    found = [(each, each.memory.block_bytes) for each in view.before_and_after(profile) if each.memory]
    shown = [(each, sizes) for each, sizes in found if sizes]
    if not shown:
        return None
    unit = unit_for(size for _, sizes in shown for size in sizes)
    series = [
        (each, [plots.in_unit(size, unit) for size in of], [format_bytes(size) for size in of]) for each, of in shown
    ]
    label = "What every block keeps between forward and backward"
    return _along_blocks(profile, "kept-by-block", label, series, f"kept by the block, {unit.name}")


def time_by_block(profile: Profile) -> list[Figure]:
    """Forward and backward of every block under plain, checkpoint and one reversible method, on one scale."""
    shown = [(each, each.work.blocks) for each in view.block_results(profile) if each.work]
    highest = max((max(block.forward, block.backward) for _, blocks in shown for block in blocks), default=0) * 1e3
    made = []
    for phase in ("forward", "backward") if shown else ():
        timed = [(each, [getattr(block, phase) for block in blocks]) for each, blocks in shown]
        series = [(each, [t * 1e3 for t in of], [format_seconds(t) for t in of]) for each, of in timed]
        label, title = f"{phase.capitalize()} time of every block", f"{phase}, milliseconds"
        made.append(_along_blocks(profile, f"{phase}-by-block", label, series, title, [0, highest * 1.05]))
    return made


def _along_blocks(
    profile: Profile,
    id: str,
    label: str,
    found: list[tuple[Result, list[float], list[str]]],
    title: str,
    ends: list[float] | None = None,
) -> Figure:
    names, look = view.labels(profile), view.looks(profile)
    series = []
    for each, values, texts in found:
        said = [f"block {i}: {words}" for i, words in enumerate(texts)]
        drawn, x = look[each.method.spec], list(range(len(values)))
        series.append(
            plots.Series(names[each.method.spec], x, values, said, drawn.color, drawn.symbol, width=1.5, size=6)
        )
    y_axis = {"range": ends} if ends else {"rangemode": "tozero"}
    return plots.lines(id, label, series, "block", title, y_axis=y_axis)


def every_step(profile: Profile) -> Figure | None:
    """Every timed step as a dot, the median as a bar: what lies apart is different, what overlaps may not be."""
    rows = [each for each in profile.results if each.samples]
    if not rows:
        return None
    names, look = view.labels(profile), view.looks(profile)
    series = []
    for place, each in enumerate(rows):
        # Rounds stand below each other within the row, so that a slow round is seen as one.
        count = len(each.rounds)
        heights = [
            place + (0 if count < 2 else 0.5 * (i / (count - 1) - 0.5))
            for i, r in enumerate(each.rounds)
            for _ in r.steps
        ]
        texts, spec = [format_seconds(seconds) for seconds in each.samples], each.method.spec
        how: dict[str, Any] = {"mode": "markers", "size": 6, "opacity": 0.6}
        series.append(plots.Series(names[spec], each.samples, heights, texts, look[spec].color, **how))
    medians = [each.step_seconds or 0.0 for each in rows]
    notes = [format_seconds(m) + ("*" if each.in_doubt else "") for m, each in zip(medians, rows, strict=True)]
    called = [plots.row_name(names[each.method.spec]) for each in rows]
    label = "Every timed step of every method"
    return plots.dots("steps", label, called, series, "seconds of a step", notes, medians=medians, legend=False)


def overhead(profile: Profile) -> Figure | None:
    """The instrumented step of every method of which it was told apart, by what it was spent on."""
    rows = view.overhead_results(profile)
    if not any(work.overhead for _, work in rows):
        return None
    kinds = list(dict.fromkeys([*OVERHEAD_COLORS, *(kind for _, work in rows for kind in work.overhead)]))
    rest = [max(0.0, work.instrumented_seconds - sum(work.overhead.values())) for _, work in rows]
    parts = [plots.Part("the rest of the step", plots.LINE, rest, [format_seconds(s) for s in rest])]
    for kind in kinds:
        seconds = [work.overhead.get(kind, 0.0) for _, work in rows]
        if any(seconds):
            parts.append(
                plots.Part(kind, OVERHEAD_COLORS.get(kind, plots.MUTED), seconds, [format_seconds(s) for s in seconds])
            )
    names = [plots.row_name(view.labels(profile)[each.method.spec]) for each, _ in rows]
    label = "The instrumented step by what it was spent on"
    return plots.bars("overhead", label, names, parts, "seconds of the instrumented step", legend=True)


def prediction_against_measurement(profile: Profile) -> Figure | None:
    """The predicted peak and the sum of the followed tensors, each over the peak that the allocator measured."""
    rows = view.prediction_ratios(profile)
    if not rows:
        return None
    series = []
    for name, ratios, symbol, color in (
        ("predicted / measured", [ratio for _, ratio, _ in rows], "circle", plots.INK),
        ("attributed / measured", [ratio for _, _, ratio in rows], "line-ns", plots.ACCENT),
    ):
        texts = [format_ratio(ratio, 1) for ratio in ratios]
        look: dict[str, Any] = {
            "color": color,
            "symbol": symbol,
            "size": 11,
            "mode": "markers",
            "outlined": symbol != "circle",
        }
        series.append(plots.Series(name, ratios, list(range(len(rows))), texts, **look))
    off = max(abs(ratio - 1) for _, *pair in rows for ratio in pair if ratio is not None)
    reach = max(0.1, 1.15 * off)
    names = [plots.row_name(view.labels(profile)[each.method.spec]) for each, _, _ in rows]
    axis = {"range": [max(0, 1 - reach), 1 + reach]}
    label = "Predicted and attributed peak over the measured one"
    return plots.dots(
        "prediction", label, names, series, "1 = as measured", limit=plots.Limit(1, color=plots.MUTED), axis=axis
    )


def sweep(profile: Profile, axis: str) -> Figure | None:
    """The peak of every method along `axis`, on linear axes; a cross where a size did not fit the budget."""
    points = [point for point in profile.points if point.axis == axis]
    values = sorted({point.value for point in points if point.peak_bytes})
    if len(values) < plots.FEWEST_POINTS:
        return None
    budget = profile.budget_bytes
    unit = unit_for([point.peak_bytes or 0 for point in points])
    names, look = view.labels(profile), view.looks(profile)
    series = []
    for spec in dict.fromkeys(point.method for point in points):
        found = sorted((p.value, p.peak_bytes, p.largest) for p in points if p.method == spec and p.peak_bytes)
        texts = [
            f"{axis} {format_integer(v)}: {format_bytes(peak)}" + (", the largest that fits" if largest else "")
            for v, peak, largest in found
        ]
        x, y = [v for v, _, _ in found], [plots.in_unit(peak, unit) for _, peak, _ in found]
        series.append(plots.Series.like(look[spec], names[spec], x, y, texts=texts))
    if budget:
        top = plots.in_unit(budget, unit)
        series.append(plots.Series.level(f"budget: {format_bytes(budget)}", values, top))
        stopped = [point for point in points if point.peak_bytes is None]
        x, texts = [p.value for p in stopped], [f"{names[p.method]}, {format_integer(p.value)}" for p in stopped]
        how: dict[str, Any] = {"color": plots.BAD, "symbol": "x-thin", "size": 9, "mode": "markers", "outlined": True}
        series.append(plots.Series("did not fit", x, [top] * len(x), texts, **how))
    title, label = AXIS_TITLES.get(axis, axis), f"Peak memory against {axis}"
    x_axis = plots.whole_numbers([*values, *(point.value for point in points if point.peak_bytes is None)])
    return plots.lines(f"sweep-{axis}", label, series, title, f"peak, {unit.name}", height=430, x_axis=x_axis)


def throughput_at_largest_batch(profile: Profile) -> Figure | None:
    """Tokens (or samples) a second at the largest batch that fits, one bar per method."""
    rows = view.largest_batches(profile)
    if not any(rate for _, _, rate in rows):
        return None
    names, look = view.labels(profile), view.looks(profile)
    texts = [f"batch {format_integer(batch)}: {format_rate(rate)} {profile.units}/s" for _, batch, rate in rows]
    part = plots.Part(
        "throughput", [look[spec].color for spec, _, _ in rows], [rate or 0.0 for *_, rate in rows], texts
    )
    notes = [f"batch {format_integer(batch)}" + ("" if rate else ", not timed") for _, batch, rate in rows]
    called = [plots.row_name(names[spec]) for spec, _, _ in rows]
    label = "Throughput at the largest batch that fits"
    return plots.bars("largest-batch", label, called, [part], f"{profile.units} a second", notes)


def timelines(profile: Profile, prefix: str = "") -> list[tuple[Result, Timeline, Figure]]:
    """Memory over the traced step of every method that has a timeline, all on one scale, the first ones first."""
    first, rest = view.with_timeline(profile)
    found = [(each, each.memory.timeline) for each in (*first, *rest) if each.memory and each.memory.timeline]
    highest = max((_total(line, i) for _, line in found for i in range(len(line.seconds))), default=0)
    names = view.labels(profile)
    return [
        (each, line, _timeline(f"{prefix}timeline-{i}", names[each.method.spec], line, highest))
        for i, (each, line) in enumerate(found)
    ]


def _timeline(id: str, name: str, line: Timeline, highest: int) -> Figure:
    kept = thinned(line)
    held = {category: [sizes[i] for i in kept] for category, sizes in line.categories.items()}
    doing = [f"block {line.blocks[i]}" if line.blocks[i] >= 0 else "no block" for i in kept]
    at, size = line.seconds[line.peak_at], _total(line, line.peak_at)
    peak = (at, size, f"peak: {format_bytes(size)} after {format_seconds(at)}")
    label = f"Memory over the step under {name}"
    return maps.areas(id, label, [line.seconds[i] for i in kept], held, doing, line.marks, peak, highest)


def thinned(line: Timeline) -> list[int]:
    """The indices of at most `MOST_POINTS` points: of every stretch the highest and the lowest, so also the peak."""
    count = len(line.seconds)
    if count <= MOST_POINTS:
        return list(range(count))
    stretches = MOST_POINTS // 2 - 1
    kept = {0, count - 1}
    for i in range(stretches):
        stretch = range(i * count // stretches, (i + 1) * count // stretches)
        kept |= {max(stretch, key=lambda at: _total(line, at)), min(stretch, key=lambda at: _total(line, at))}
    return sorted(kept)


def _total(line: Timeline, at: int) -> int:
    return sum(sizes[at] for sizes in line.categories.values())
