"""What GPUs gather and reduce on the way through a step, and for how long each of them holds it (see `sharding`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from autorev.analysis import Category
from autorev.prediction.sharding import Division, Group
from autorev.prediction.tracker import Segment

PREFETCH_BUCKET = 50_000_000
"""`stage3_prefetch_bucket_size`, in elements."""
LIVE = 1_000_000_000
"""`stage3_max_live_parameters` and `stage3_max_reuse_distance`: parameters that are used again within so many elements
stay whole."""


def with_collectives(segments: Iterable[Segment], division: Division) -> Iterator[Segment]:
    """The segments of a whole step with what is gathered and reduced meanwhile."""
    return _Walk(division).through(segments)


class _Walk:
    """One way through a step's segments; what is held at the moment is in `held`."""

    def __init__(self, division: Division) -> None:
        self.division = division
        self.held: Counter[Category] = Counter()
        self.reducing = 0
        """Bytes of FSDP2's latest reduce-scatter, which may be under way until the next one."""
        self.born = 0
        """Bytes of gradients of what is in no block: FSDP2 reduces them at the end of backward."""
        self.last = -1
        """The block that ran last."""

    def through(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        """See `with_collectives`."""
        phase = "forward"
        for (now, number), stretch in groupby(segments, lambda s: (s.phase, s.block)):
            if now != phase:
                yield from self._ends(phase)
                phase, self.last = now, len(self.division.blocks)
            if now == "forward" and number is not None and self.division.shard == "fsdp":
                gathered = self.division.blocks[number].gathered  # the buffer before is there still
                yield Segment(now, None, top=Counter({Category.PARAMETERS: gathered}))
            yield self._hold(now, self._in_flight(now, number))
            parts = list(stretch)
            yield from map(self._without_gradients, parts)
            if number is not None:
                self.last = number
            if now == "backward" and self.division.shard == "fsdp":
                born = sum(part.change[Category.GRADIENTS] for part in parts)
                if number is None:
                    self.born += born
                else:
                    yield from self._reduce(self.division.blocks[number], born)
        yield from self._ends(phase)

    def _hold(self, phase: str, wanted: Counter[Category]) -> Segment:
        change = wanted.copy()
        change.subtract(self.held)
        self.held = wanted
        return Segment(phase, None, change=change)

    def _in_flight(self, phase: str, number: int | None) -> Counter[Category]:
        division, held = self.division, Counter[Category]()
        if phase == "optimizer":
            return held
        if division.shard == "fsdp":
            own = 0 if number is None else division.blocks[number].gathered
            held[Category.PARAMETERS] = own + division.rest.gathered + self._buffer(phase, number)
            held[Category.GRADIENTS] = self.reducing
            if division.accumulated and phase == "backward" and number is not None:
                held[Category.GRADIENTS] += division.blocks[number].gradients
        if division.shard == "zero3":
            held[Category.PARAMETERS] = self._gathered(phase, number)
        if division.shard.startswith("zero") and phase == "backward":
            held[Category.GRADIENTS] = self._gradients_by_deepspeed(number)
        return held

    def _buffer(self, phase: str, number: int | None) -> int:
        """FSDP2's all-gather: in forward a block's own, which stays until the next one's has been copied out; in
        backward that of the block that comes next."""
        at = self.last if number is None else number
        gathered = at if phase == "forward" else at - 1
        if phase == "forward" and gathered < 0:
            return self.division.rest.gathered
        return self.division.blocks[gathered].gathered if gathered >= 0 else 0

    def _gathered(self, phase: str, number: int | None) -> int:
        """By stage 3: what is used, what is used again soon, and what is fetched meanwhile; not what always is."""
        blocks, at = self.division.blocks, self.last if number is None else number
        behind, soon = 0, set() if number is None else {number}
        for other in range(len(blocks) - 1, -1, -1):
            behind += 2 * blocks[other].elements
            if behind <= LIVE and (other <= at if phase == "forward" else other < at):
                soon.add(other)
        coming = range(at + 1, len(blocks)) if phase == "forward" else range(at - 1, -1, -1)
        live = [blocks[other] for other in soon] + ([self.division.rest] if number is None else [])
        size = max((p.element_size() for group in (*blocks, *live) for p in group.parameters), default=0)
        fetched = min(PREFETCH_BUCKET, sum(blocks[other].elements for other in coming if other not in soon))
        fetched = min(fetched, max(LIVE - sum(group.elements for group in live), 0))
        return sum(group.whole - group.persistent for group in live) + fetched * size

    def _gradients_by_deepspeed(self, number: int | None) -> int:
        division = self.division
        held = 0
        if division.shard != "zero3":  # whose bucket and part are there throughout
            held = division.bucket
            held += 0 if division.accumulated and division.shard == "zero2" else division.gradient_partition
        if division.shard != "zero1":  # one goes to the bucket as soon as it is complete
            held += (division.rest if number is None else division.blocks[number]).largest_gradient
        return held

    def _without_gradients(self, segment: Segment) -> Segment:
        """DeepSpeed's stages 2 and 3 keep none whole."""
        if self.division.shard not in ("zero2", "zero3"):
            return segment
        change, top = segment.change.copy(), segment.top.copy()
        del change[Category.GRADIENTS], top[Category.GRADIENTS]
        return replace(segment, change=change, top=top)

    def _reduce(self, group: Group, born: int) -> Iterator[Segment]:
        """FSDP2: gradients are copied together, and reduced to one GPU's part. The weights are let go of before."""
        accumulated = self.division.accumulated
        self.reducing = 0
        kept = 0 if group is self.division.rest else self.division.rest.gathered + self._buffer("backward", self.last)
        yield self._hold("backward", Counter({Category.PARAMETERS: kept}))
        buffer, part = group.gradient_part * self.division.gpus, group.gradient_part
        top = Counter({Category.GRADIENTS: buffer + part + (group.gradients if accumulated else 0)})
        yield Segment(
            "backward", None, change=Counter({Category.GRADIENTS: (0 if accumulated else part) - born}), top=top
        )
        self.reducing = buffer

    def _ends(self, phase: str) -> Iterator[Segment]:
        if phase == "backward" and self.division.shard == "fsdp":
            yield from self._reduce(self.division.rest, self.born)
        yield self._hold(phase, Counter())
        if phase == "backward" and self.division.shard == "zero1":  # fp32 ones are made of its part of them
            yield Segment("backward", None, change=Counter({Category.GRADIENTS: -self.division.gradients}))
