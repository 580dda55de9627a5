"""What of a training step each of several GPUs holds: weights, gradients and optimiser states divided, and what is not.

    none     DDP: nothing is divided, and all gradients stand a second time, in its buckets
    fsdp     FSDP2, `fully_shard` on every block and on the model
    zero1    DeepSpeed: the optimiser's states and fp32 weights
    zero2    and gradients
    zero3    and weights

Sources: torch/distributed/fsdp/_fully_shard of torch 2.13; DeepSpeed's documentation of its configuration and
deepspeed/runtime/zero of August 2026, with the defaults of both. The figures are those of the rank that holds most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import nn

from autorev.analysis import Category, Setting
from autorev.errors import SettingError
from autorev.prediction.layout import Layout
from autorev.prediction.tracker import Segment
from autorev.prediction.update import Update, Updated, update_of

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: elements of the buffer that gradients wait in until they are reduced.
(`allgather_bucket_size` takes no memory: weights are gathered where they are.)"""
PREFETCH_BUCKET = 50_000_000
"""`stage3_prefetch_bucket_size`, in elements."""
PERSISTENT = 100_000
"""`stage3_param_persistence_threshold`: smaller parameters are whole on every GPU."""
LIVE = 1_000_000_000
"""`stage3_max_live_parameters` and `stage3_max_reuse_distance`: parameters that are used again within so many elements
stay whole."""
SUBGROUP = 1_000_000_000
"""`sub_group_size`: elements that the optimiser updates at a time."""
FP32 = 4
ALIGNMENT = 2
"""Of DeepSpeed's flat partitions, in elements."""


def part_of(shape: torch.Size, gpus: int) -> int:
    """Elements of one GPU's part under FSDP2: rows of the first axis, the last part filled up to the size of the
    others."""
    return math.ceil(shape[0] / gpus) * math.prod(shape[1:]) if len(shape) else 1


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together: those of a block, or of all the rest."""

    parameters: tuple[nn.Parameter, ...]
    gpus: int

    @cached_property
    def whole(self) -> int:
        """Bytes."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    @cached_property
    def elements(self) -> int:
        """Their number."""
        return sum(p.numel() for p in self.parameters)

    @cached_property
    def part(self) -> int:
        """Bytes of one GPU's part under FSDP2."""
        return sum(part_of(p.shape, self.gpus) * p.element_size() for p in self.parameters)

    @property
    def gathered(self) -> int:
        """Bytes of all parts together."""
        return self.part * self.gpus

    @cached_property
    def gradient_part(self) -> int:
        """Of the gradients likewise."""
        return sum(part_of(p.shape, self.gpus) * p.element_size() for p in self.trained)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that have gradients."""
        return [p for p in self.parameters if p.requires_grad]

    @cached_property
    def gradients(self) -> int:
        """Bytes of these."""
        return sum(p.numel() * p.element_size() for p in self.trained)

    @cached_property
    def persistent(self) -> int:
        """Bytes of what DeepSpeed's stage 3 does not divide."""
        return sum(p.numel() * p.element_size() for p in self.parameters if p.numel() < PERSISTENT)

    @cached_property
    def largest_gradient(self) -> int:
        """Bytes of the largest of them."""
        return max((p.numel() * p.element_size() for p in self.trained), default=0)


@dataclass(frozen=True)
class Division:
    """Among how many GPUs what is divided, and how."""

    gpus: int
    shard: str
    accumulated: bool
    """Are there gradients of a pass before?"""
    blocks: tuple[Group, ...]
    """By the block's number."""
    rest: Group

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """All that train."""
        return [p for group in (*self.blocks, self.rest) for p in group.trained]

    @cached_property
    def gradients(self) -> int:
        """Bytes of all gradients, whole."""
        return sum(p.numel() * p.element_size() for p in self.trained)

    @cached_property
    def partition(self) -> int:
        """Elements of one GPU's part of the trained parameters under DeepSpeed."""
        if self.shard == "zero3":
            return sum(math.ceil(p.numel() / self.gpus) for p in self.trained)
        whole = sum(p.numel() for p in self.trained)
        return math.ceil(whole / (ALIGNMENT * self.gpus)) * ALIGNMENT

    @property
    def gradient_size(self) -> int:
        """Bytes of an element of a gradient."""
        return max((p.element_size() for p in self.trained), default=0)

    @property
    def gradient_partition(self) -> int:
        """Bytes of one GPU's gradients under DeepSpeed."""
        return self.partition * self.gradient_size

    @property
    def bucket(self) -> int:
        """Bytes of the buffer that they are reduced in."""
        return REDUCE_BUCKET * self.gradient_size

    def update(self, each: list[Updated]) -> Update:
        """What the optimiser takes of one GPU, for all parameters that train.

        DeepSpeed updates fp32 weights of its own, on fp32 gradients: one flat tensor of them.
        """
        if self.shard == "none" or not each:
            return update_of(each)
        if self.shard == "fsdp":
            return update_of([replace(one, part=part_of(one.parameter.shape, self.gpus)) for one in each])
        flat = nn.Parameter(torch.empty(self.partition, dtype=torch.float32, device="meta"))
        update = update_of([replace(each[0], parameter=flat, embeds=False)])
        at_once = min(self.partition, SUBGROUP) if self.shard == "zero3" else self.partition
        temporary = update.temporary * at_once // self.partition
        narrow = at_once * self.gradient_size if self.shard != "zero3" else 0  # what the fp32 ones are made from
        return replace(
            update,
            state=self.partition * FP32 + update.state,
            temporary=at_once * FP32 + max(temporary, narrow),
        )

    def standing(self) -> Counter[Category]:
        """What is alive throughout, beyond what it is on one GPU."""
        more: Counter[Category] = Counter()
        groups = (*self.blocks, self.rest)
        held = self.gradients if self.accumulated else 0
        if self.shard == "none":
            more[Category.GRADIENTS] = self.gradients  # `gradient_as_bucket_view=False`
        if self.shard == "fsdp":
            more[Category.PARAMETERS] = sum(group.part - group.whole for group in groups)
            more[Category.GRADIENTS] = sum(group.gradient_part for group in groups) - held if self.accumulated else 0
        if self.shard == "zero2":
            more[Category.GRADIENTS] = self.gradient_partition - held if self.accumulated else 0
        if self.shard == "zero3":
            parts = (math.ceil(p.numel() / self.gpus) * p.element_size() for g in groups for p in g.parameters)
            persistent = sum(group.persistent for group in groups)
            more[Category.PARAMETERS] = sum(parts) + persistent - sum(group.whole for group in groups)
            more[Category.GRADIENTS] = self.gradient_partition + self.bucket - held
        return more

    def applied(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        """The segments of a whole step with what is gathered and reduced meanwhile."""
        return _Walk(self).through(segments)


def division_of(twin: nn.Module, layout: Layout, setting: Setting) -> Division | None:
    """How the setting divides the model; None: one GPU.

    Raises:
        SettingError: this model cannot be divided that way.
    """
    if setting.gpus == 1:
        return None
    if setting.shard in ("fsdp", "zero3"):
        if setting.weights:
            raise SettingError(
                f"weights quantised to {setting.weights} are not predicted divided; use `shard=zero2` or zero1"
            )
        if any(site.turn is not None for site in layout.sites):
            raise SettingError(
                f"the blocks of {type(twin).__name__} are no modules of their own, so {setting.shard} cannot gather "
                "one at a time; use `shard=zero2` or zero1"
            )
    seen: set[int] = set()

    def group(parameters: Iterable[nn.Parameter]) -> Group:
        own = tuple(p for p in parameters if id(p) not in seen)
        seen.update(map(id, own))
        return Group(tuple(dict.fromkeys(own)), setting.gpus)

    blocks = tuple(group(() if site.turn is not None else site.module.parameters()) for site in layout.sites)
    return Division(setting.gpus, setting.shard, setting.accumulate > 1, blocks, group(twin.parameters()))


def notes_on(setting: Setting) -> list[str]:
    """What a reader of the figures should know."""
    if setting.gpus == 1:
        return []
    notes = [
        f"memory is that of one GPU of {setting.gpus}, and `batch` is what each "
        + ("is" if setting.sequence_parallel == 1 else f"group of {setting.sequence_parallel} is")
        + " given; what GPUs send each other is not in the times"
    ]
    if setting.shard.startswith("zero"):
        notes.append(
            "DeepSpeed trains fp32 weights beside the model's own, and reduces gradients in a buffer of "
            f"{REDUCE_BUCKET:,} elements (`reduce_bucket_size`, as documented): a smaller one takes less"
        )
    return notes


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
        """See `Division.applied`."""
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
