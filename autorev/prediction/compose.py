"""Put a step's segments together: every block of the model, its own segments or its stand-in's, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from autorev.analysis import Category
from autorev.prediction.collectives import with_collectives
from autorev.prediction.layout import Layout
from autorev.prediction.sharding import Division
from autorev.prediction.simulate import StepTrace
from autorev.prediction.tracker import Segment


@dataclass(frozen=True, slots=True)
class StepCost:
    """A whole step: memory by phase, work in total."""

    phase_peaks: dict[str, int]
    """Highest number of live bytes in the forward, backward and optimizer phase."""
    peak_categories: dict[str, dict[Category, int]]
    """For each phase, what was alive at its peak."""
    kept_bytes: int
    """Alive between forward and backward beyond what was alive before the step."""
    flops: int
    matmul_bytes: int
    other_bytes: int
    host_bytes: int
    """Moved between host and device, one direction."""


def compose(
    trace: StepTrace,
    layout: Layout,
    optimizer_state: int,
    optimizer_temporary: int,
    division: Division | None = None,
) -> StepCost:
    """Roll the segments of every block up into one step, of one GPU of several where there is a `division`.

    `optimizer_state` bytes live throughout (a warm step); `optimizer_temporary` bytes live during the update.
    """
    totals: Counter[Category] = Counter(trace.start)
    if division is not None:
        totals.update(division.standing())
    totals[Category.OPTIMIZER_STATE] += optimizer_state
    before = sum(totals.values())
    peaks: dict[str, int] = {}
    categories: dict[str, dict[Category, int]] = {}
    kept = flops = matmul_bytes = other_bytes = 0

    def reach(phase: str, alive: Counter[Category]) -> None:
        size = sum(alive.values())
        if size > peaks.get(phase, -1):
            peaks[phase], categories[phase] = size, {c: n for c, n in alive.items() if n}

    segments = expand(trace.segments, layout)
    for segment in segments if division is None else with_collectives(segments, division):
        if segment.phase != "forward" and not kept:
            kept = sum(totals.values()) - before
        reach(segment.phase, _sum(totals, segment.top))
        totals = _sum(totals, segment.change)
        flops += segment.flops
        matmul_bytes += segment.matmul_bytes
        other_bytes += segment.other_bytes
    reach("optimizer", _sum(totals, Counter({Category.OTHER: optimizer_temporary})))
    host = sum(trace.host_bytes.get(layout.stand_in(site.number), 0) for site in layout.sites)
    return StepCost(peaks, categories, kept, flops, matmul_bytes, other_bytes, host)


def expand(segments: list[Segment], layout: Layout) -> Iterator[Segment]:
    """The segments of the run, with the stand-in's inserted for every block that was not run.

    A block's stretch reaches to where the next one begins: in forward, what the model's loop does after the block (it
    lets go of the stream that went in) belongs to it.
    """
    stretches = _stretches(segments)
    own = {(stretch[0].phase, stretch[0].block): stretch for stretch in stretches}
    ran = sorted({s.block for s in segments if s.block is not None})
    after = {a: range(a + 1, b) for a, b in pairwise([*ran, len(layout.sites)])}
    before = {b: range(b - 1, a, -1) for a, b in pairwise(ran)}
    for stretch in stretches:
        for segment in stretch:
            yield segment
            yield from _freed_of_others(segment, layout)
        phase, block = stretch[0].phase, stretch[0].block
        if block is None:
            continue
        for number in after[block] if phase == "forward" else before.get(block, ()):
            for segment in own.get((phase, layout.stand_in(number)), ()):
                yield segment if segment.block is None else replace(segment, block=number)


def _freed_of_others(segment: Segment, layout: Layout) -> Iterator[Segment]:
    """What the segment would have freed of the blocks that were not run."""
    for number in range(len(layout.sites)) if segment.freed else ():
        freed = segment.freed.get(layout.stand_in(number))
        if freed and number not in layout.active:
            change = Counter({category: -size for category, size in freed.items()})
            yield Segment(segment.phase, None, change=change)


def _stretches(segments: list[Segment]) -> list[list[Segment]]:
    """Segments grouped: each block's own with what follows it in the same phase; the rest by themselves."""
    stretches: list[list[Segment]] = []
    for segment in segments:
        follows = stretches and stretches[-1][0].block is not None and segment.block is None
        if follows and stretches[-1][0].phase == segment.phase == "forward":
            stretches[-1].append(segment)
        else:
            stretches.append([segment])
    return stretches


def _sum(a: Counter[Category], b: Counter[Category]) -> Counter[Category]:
    total = a.copy()
    total.update(b)
    return total
