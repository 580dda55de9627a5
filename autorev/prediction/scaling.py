"""Peaks at other batch sizes and sequence lengths, from a few simulated steps.

Every segment's bytes are a polynomial of the batch size (degree 1) and of the sequence length (degree 2: an attention
mask, eager attention). Simulating at as many points as the degree asks for gives each segment's polynomial; composing
the segments anew gives the peak anywhere, wherever in the step the peak has moved to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autorev.analysis import Category
from autorev.prediction.simulate import StepTrace
from autorev.prediction.tracker import Segment


@dataclass(frozen=True, eq=False)
class ScaledTrace:
    """Traces of the same step at several sizes along one axis, smallest first."""

    points: tuple[int, ...]
    traces: tuple[StepTrace, ...]

    def with_point(self, size: int, trace: StepTrace) -> ScaledTrace:
        """The same with one more simulated size, in place of the one farthest from it."""
        known = dict(zip(self.points, self.traces, strict=True))
        farthest = max(self.points, key=lambda point: abs(point - size))
        del known[farthest]
        known[size] = trace
        points = tuple(sorted(known))
        return ScaledTrace(points, tuple(known[p] for p in points))

    def at(self, size: int) -> StepTrace:
        """The step's trace at `size`, by the polynomial through the simulated points."""
        if size in self.points:
            return self.traces[self.points.index(size)]
        weights = lagrange(self.points, size)
        start = _combine([Counter(t.start) for t in self.traces], weights)
        segments = [_segment(same, weights) for same in zip(*(t.segments for t in self.traces), strict=True)]
        streams = {
            block: round(sum(w * t.stream_bytes[block] for w, t in zip(weights, self.traces, strict=True)))
            for block in self.traces[0].stream_bytes
        }
        host = {
            block: round(sum(w * t.host_bytes[block] for w, t in zip(weights, self.traces, strict=True)))
            for block in self.traces[0].host_bytes
        }
        return StepTrace(dict(start), segments, streams, self.traces[0].side_bits, host)


def lagrange(points: Sequence[int], at: int) -> list[float]:
    """Weights of the values at `points` in the value that their polynomial takes at `at`."""
    weights = []
    for i, p in enumerate(points):
        weight = 1.0
        for j, q in enumerate(points):
            if i != j:
                weight *= (at - q) / (p - q)
        weights.append(weight)
    return weights


def _segment(same: Sequence[Segment], weights: Sequence[float]) -> Segment:
    first = same[0]

    def mix(values: Sequence[int]) -> int:
        return round(sum(w * v for w, v in zip(weights, values, strict=True)))

    return Segment(
        first.phase,
        first.block,
        change=_combine([s.change for s in same], weights),
        top=_combine([s.top for s in same], weights),
        top_bytes=mix([s.top_bytes for s in same]),
        flops=mix([s.flops for s in same]),
        matmul_bytes=mix([s.matmul_bytes for s in same]),
        other_bytes=mix([s.other_bytes for s in same]),
        grown=mix([s.grown for s in same]),
        grown_top=mix([s.grown_top for s in same]),
        freed={block: _combine([s.freed[block] for s in same], weights) for block in first.freed},
    )


def _combine(counts: Sequence[Counter[Category]], weights: Sequence[float]) -> Counter[Category]:
    keys = {key for count in counts for key in count}
    return Counter({k: round(sum(w * c[k] for w, c in zip(weights, counts, strict=True))) for k in keys})
