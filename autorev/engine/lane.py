"""One tensor of a chain's state: a lane, with its own coupling state, its own grid and its own side bits.

Most chains have one lane. Blocks that take and return several tensors side by side (image and text) have one for each:
the branch reads all of them and adds something to each, and the coupling acts on each as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from autorev.couplings.arithmetic import Arithmetic, FixedPoint, wide
from autorev.couplings.coupling import Coupling, State
from autorev.engine.digest import Digest, looked_at, waited_for
from autorev.engine.grid import Dropped, Taken, step_on_grid
from autorev.engine.host_store import OnHost

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain

SMALL_CHANNEL = 0.05


@dataclass(eq=False)
class LaneStep:
    """What one lane keeps of one step."""

    out: Digest | None
    """Digest of what the branch returned."""
    before: Arithmetic
    """Of the state that the step was taken from."""
    arithmetic: Arithmetic
    """Of the state behind it."""
    factor: float = 1.0
    """What the branch has multiplied its input with, besides what it has added."""
    side: torch.Tensor | OnHost | None = None
    """Its packed side bits, uint8, while the tape stands behind the step."""
    dropped: Dropped | None = None
    """What the state lost just before the step, where its grid had to be coarsened."""


@dataclass(eq=False)
class Peak:
    """The largest |H| of a forward pass so far, on devices where looking at it would hold the program up."""

    largest: torch.Tensor | None = None

    def add(self, largest: torch.Tensor) -> None:
        """A step was taken."""
        here = self.largest
        self.largest = largest if here is None else torch.maximum(here.to(largest.device), largest)


@dataclass(eq=False)
class Lane:
    """The state that a tape stands at, of one of its tensors."""

    state: State
    arithmetic: Arithmetic
    """Of `state`."""
    peak: Peak = field(default_factory=Peak)
    """A clone's is its own, too."""
    finest: int = field(init=False)
    """Fraction bits of the grid that it began on; smaller factors make it no finer (`step_on_grid`)."""

    def __post_init__(self) -> None:
        self.finest = self.arithmetic.fraction_bits if isinstance(self.arithmetic, FixedPoint) else 0

    def clone(self) -> Lane:
        """A state of its own."""
        clone = Lane(self.state.clone(), self.arithmetic, self.peak)
        clone.finest = self.finest
        return clone

    def bring(self, device: torch.device) -> None:
        """The model may be spread over devices: a step is taken, and undone, on its own."""
        if self.state.stream.device != device:
            self.state.stream = self.state.stream.to(device)
            self.state.partner = self.state.partner.to(device)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The stream as the model is given it, a new tensor."""
        return self.arithmetic.decode(self.state.stream, dtype)

    def take(
        self,
        chain: ReversibleChain,
        coupling: Coupling,
        value: torch.Tensor,
        out: torch.Tensor,
        path: str,
        at_once: bool = False,
        factor: float = 1.0,
    ) -> Taken:
        """The step whose branch returned `out` of `value`, which it has multiplied by `factor`; see `step_on_grid`.
        `at_once`: look at the new stream even where that waits for the device."""
        at_once = at_once or waited_for(self.state.stream.device)
        # h' = factor h + f(h): both streams are multiplied first, and the step is one of what that gives.
        grid, value = self.arithmetic.multiplied(factor), times(value, factor)
        taken = step_on_grid(coupling, self.state, out, value, grid, path, at_once, self.finest)
        if taken.outgrown:
            chain.coarsen(self.arithmetic, taken.arithmetic, path)
        if taken.largest is not None:
            self.peak.add(taken.largest)
        self.arithmetic = taken.arithmetic
        return taken

    def new(self, taken: Taken, dtype: torch.dtype) -> torch.Tensor:
        """The stream behind the step that was just `taken`, as the model is given it."""
        return self.decoded(dtype) if taken.new is None else taken.new

    def recover_input(self, coupling: Coupling, kept: LaneStep) -> None:
        """(x', p') -> (x, p')."""
        coupling.recover_input(self.state, kept.arithmetic)
        if kept.dropped is not None:
            kept.dropped.refine_stream(self.state)

    def recover_output(self, coupling: Coupling, kept: LaneStep) -> None:
        """Undo `recover_input`."""
        if kept.dropped is not None:
            kept.dropped.coarsen_stream(self.state)
        coupling.recover_output(self.state, kept.arithmetic)

    def recover_partner(self, coupling: Coupling, kept: LaneStep, out: torch.Tensor, value: torch.Tensor) -> None:
        """(x, p') -> (x, p); the step is undone."""
        # The partner is still on the grid of the state behind the step.
        side = kept.side.back() if isinstance(kept.side, OnHost) else kept.side
        coupling.recover_partner(self.state, out, times(value, kept.factor), side, kept.arithmetic)
        if kept.dropped is not None:
            kept.dropped.refine_partner(self.state)
        self.arithmetic = kept.before
        kept.side = kept.dropped = None

    def left_over(self, coupling: Coupling) -> float:
        """Of the first partner: exact, its largest value; float, relative to the stream, channel by channel."""
        if not self.state.stream.numel():
            return 0.0
        with torch.no_grad():
            left, stream = coupling.initial_residual(self.state).abs(), self.state.stream
            if isinstance(self.arithmetic, FixedPoint):
                return float(left.amax()) * 2.0**-self.arithmetic.fraction_bits
            channels = left.flatten(0, -2).amax(0) if left.dim() > 1 else left
            sizes = stream.abs().flatten(0, -2).amax(0) if left.dim() > 1 else stream.abs()
            # A channel far below the others weighs as little in what reads the stream.
            floor = max(float(sizes.median()) * SMALL_CHANNEL, torch.finfo(torch.float32).tiny)
            return float((channels / sizes.clamp(min=floor)).amax())


def times(value: torch.Tensor, factor: float) -> torch.Tensor:
    """What a branch has made of the stream that it was given: not rounded to 16 bits, the same in both runs."""
    return value if factor == 1 else wide(value) * factor


def fingerprint(lanes: Iterable[Lane]) -> torch.Tensor | None:
    """Sums over all streams: what a chain that begins in the middle is compared by."""
    streams = [stream for lane in lanes for stream in (lane.state.stream, lane.state.partner)]
    if not looked_at() or any(stream.is_meta or not stream.numel() for stream in streams):
        return None
    sums = [stream.double().abs().sum() if stream.is_floating_point() else stream.sum() for stream in streams]
    return torch.stack([total.to(sums[0].device) for total in sums])
