"""What the passes read off one method, as frozen data: times, memory with its cause, work, fidelity.

Sizes are bytes, times seconds, work floating-point operations (a multiply-add counts as two).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

PHASES = ("forward", "backward", "optimizer")


def check(right: bool, rule: str) -> None:
    """Raise unless a rule holds that figures follow, and that what reads them relies on.

    Raises:
        ValueError: it does not; a record that says so was not written by a measurement.
    """
    if not right:
        raise ValueError(rule)


def are_times(seconds: Iterable[float]) -> bool:
    """Are all of them more than nothing, and no more than can be waited for?"""
    return all(0 < each < inf for each in seconds)


@dataclass(frozen=True, slots=True)
class Round:
    """The timed steps of one fresh process; rounds of all methods take turns. One entry per step."""

    number: int
    forward: tuple[float, ...]
    """Loss included."""
    backward: tuple[float, ...]
    optimizer: tuple[float, ...]

    def __post_init__(self) -> None:
        check(len(self.forward) == len(self.backward) == len(self.optimizer), "every step has every phase")
        check(are_times((*self.forward, *self.backward, *self.optimizer)), "a phase takes some time")

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds of whole steps."""
        return tuple(map(sum, zip(self.forward, self.backward, self.optimizer, strict=True)))


@dataclass(frozen=True, slots=True)
class Holder:
    """Memory that one module allocated and that was alive at the peak."""

    path: str
    """The module's full name; `(others)` for the rest of many small ones, `(loss)`, `(optimizer)`, `(inputs)`."""
    category: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Live bytes over the traced step, thinned to at most 2,000 points of which the peak is one.

    All tuples but `marks` have one entry per point."""

    seconds: tuple[float, ...]
    """Since the step began. The traced step is slower than a timed one."""
    categories: dict[str, tuple[int, ...]]
    """`Category` -> bytes; categories that never hold a byte are left out."""
    marks: tuple[tuple[str, float, float], ...]
    """(phase, begin, end) in seconds."""
    blocks: tuple[int, ...]
    """The number of the block at work, -1 between and outside of them."""
    peak_at: int
    """Index of the highest point."""

    def __post_init__(self) -> None:
        points = len(self.seconds)
        check(0 <= self.peak_at < points, "the peak is one of the points")
        check(all(len(each) == points for each in (self.blocks, *self.categories.values())), "every point has all")
        check(all(0 <= each < inf for each in self.seconds), "time goes on")
        check(all(phase in PHASES and 0 <= a <= b < inf for phase, a, b in self.marks), "a phase begins, then ends")


@dataclass(frozen=True, slots=True)
class Memory:
    """One warm step's memory, by the allocator, and its cause, by following every tensor."""

    peak_bytes: int
    """By the allocator's own events: the figure to go by."""
    phase: str
    """The phase in which it stands, of forward, backward and optimizer."""
    phase_peaks: dict[str, int]
    kept_bytes: int
    """Alive between forward and backward beyond parameters, optimiser state and inputs."""
    process_bytes: int
    """Largest resident set of the process, Python and libraries included: beside the point, recorded all the same."""
    host_bytes: int
    """Moved to host memory between forward and backward (offload); not part of the peak."""
    reserved_bytes: int | None = None
    """What CUDA's caching allocator held; None on a CPU."""
    snapshot: str | None = None
    """A file that PyTorch's memory viz opens; CUDA only."""
    attributed_bytes: int | None = None
    """The peak of the traced step, in which every storage was followed; None where that cannot be done."""
    categories: dict[str, int] = field(default_factory=dict)
    """`Category` -> bytes at the traced peak; they sum to `attributed_bytes`."""
    holders: tuple[Holder, ...] = ()
    """Who allocated what was alive at the traced peak, largest first; they sum to `attributed_bytes`."""
    block_bytes: tuple[int, ...] = ()
    """What each block (in order) keeps between forward and backward, side bits included, streams not."""
    timeline: Timeline | None = None

    def __post_init__(self) -> None:
        check(self.peak_bytes > 0 and self.phase in PHASES, "a step has a peak, in one of its phases")
        sizes = (self.kept_bytes, self.host_bytes, self.process_bytes, *self.categories.values(), *self.block_bytes)
        check(all(size >= 0 for size in sizes), "no size is below 0")


@dataclass(frozen=True, slots=True)
class BlockTime:
    """One block in the instrumented step."""

    path: str
    forward: float
    """Seconds."""
    backward: float
    """Seconds, recomputation included."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes, and where an instrumented step spends its time."""

    flops: int
    """Of matrix products, convolutions and attention, what is computed twice included."""
    instrumented_seconds: float
    """Of the whole instrumented step."""
    overhead: dict[str, float]
    """Seconds of that step by what they were spent on beside ordinary forward and backward: recomputation,
    coupling (the arithmetic of the streams), packing (of side bits); empty where there is none."""
    blocks: tuple[BlockTime, ...]

    def __post_init__(self) -> None:
        check(self.flops >= 0 and are_times([self.instrumented_seconds]), "a step computes something, in some time")
        times = (*self.overhead.values(), *(t for block in self.blocks for t in (block.forward, block.backward)))
        check(all(0 <= each < inf for each in times), "no time is below 0")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Is the method right, and what does it do to the model's function?"""

    against: str
    """`oracle`: the same coupling under ordinary autograd; `plain`: the model as it was."""
    gradient_error: float
    """|g - g_reference| / |g_reference| over all trained parameters."""
    gradient_cosine: float
    drift: dict[str, float]
    """By chain, what the integrity check of the backward pass found: 0 when exact."""
    loss: float
    """Mean loss over the text, in nats a token (or the model's own loss), before any training."""
    original_loss: float
    """The same of the model as it was."""
    tokens: int
    """Tokens of that text; 0: the training batch was used."""
