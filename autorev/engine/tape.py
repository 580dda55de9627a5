"""The tape of a reversible chain: its state, and how to get from there to any earlier one.

One forward pass through a chain makes one tape; the Rules are those of NOTE [ Reconstruction ] in `step`. It holds a
single state, at first the last one, and one entry per step with what a step cannot do without: its coupling, its side
bits, and how its branch is run again. Steps whose activations are stored leave no entry.

        H_0 --> H_1 --> H_2 --> ... --> H_n       steps[0], ..., steps[n - 1]
                         ^
                         position = 2: `state` is here. Side bits are kept of the steps before it, and are made
                         again by going forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.coupling import Coupling
from autorev.engine.digest import Comparison, looked_at, waited_for
from autorev.engine.grid import Taken, check_largest
from autorev.engine.host_store import HostStore, OnHost
from autorev.engine.lane import Lane, LaneStep, fingerprint
from autorev.engine.observed import observed_here
from autorev.engine.replay import Replay, Rest, hooks_of_others_off
from autorev.errors import FixedPointRangeError, ReconstructionError

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain

TOLERANCE = 1e-3
"""Relative error of a reconstructed float stream beyond which its gradients are refused."""
Tensors = Sequence[torch.Tensor]
"""One for each lane."""


@dataclass(eq=False)
class TapedStep:
    """One step of one forward pass."""

    coupling: Coupling
    replay: Replay
    lanes: list[LaneStep]
    host: HostStore | None = None
    """Where its side bits wait; None: on their device."""


@dataclass(eq=False)
class Opened:
    """A step whose input is known again, and whose branch has run up to the tiled call at its end."""

    step: TapedStep
    values: tuple[torch.Tensor, ...]
    """The input of its branch, lane by lane."""
    rest: Rest | None = None


class Tape:
    """The state of one forward pass, and the steps that it can be taken back over."""

    def __init__(self, chain: ReversibleChain, lanes: list[Lane], label: str | None = None) -> None:
        """`lanes`: where it stands; `label`: the name that the integrity check's result goes by; None: that is not the
        chain's first state."""
        self.chain = chain
        self.lanes = lanes
        self.steps: list[TapedStep] = []
        self.position = 0
        """Number of steps that the lanes' states lie behind."""
        self.opened: Opened | None = None
        """That step, while its tiles run."""
        self.halfway = False
        """Are the states half-way back: the last step's input known, its partner not yet?"""
        self.label = label
        self.exact = isinstance(lanes[0].arithmetic, FixedPoint)
        self.comparison = Comparison(self.exact)
        self.observed = observed_here()
        self.origin: torch.Tensor | None = None
        """What the first state is known by, where it is not the chain's first one."""
        self.looked_at_in_backward = False
        """Is that a fork's of a tape with steps?"""

    def fork(self) -> Tape:
        """The state alone, on a tape of its own."""
        fork = Tape(self.chain, [lane.clone() for lane in self.lanes])
        fork.looked_at_in_backward = bool(self.steps) or self.looked_at_in_backward
        return fork

    # -- forward

    def step(
        self, coupling: Coupling, values: Tensors, outs: Tensors, path: str, at_once: bool = False
    ) -> list[torch.Tensor]:
        """Take a step that nobody will go back over: `outs` are what the branch returned of `values`, lane by lane.

        Returns: the new streams, in the dtypes of `outs`.
        """
        assert not self.steps
        self.label = None
        news = []
        for lane, value, out in zip(self.lanes, values, outs, strict=True):
            taken = lane.take(self.chain, coupling, value, out, path, at_once)
            news.append(lane.new(taken, out.dtype))
        return news

    def append(self, step: TapedStep, values: Tensors, outs: Tensors) -> list[torch.Tensor]:
        """Take a step; returns the new streams, in the dtypes of `outs`."""
        assert self.position == len(self.steps)
        if not self.steps and self.label is None:
            self.origin = fingerprint(self.lanes)
        every = self._forward(step, values, outs)
        self.steps.append(step)
        return [lane.new(taken, out.dtype) for lane, taken, out in zip(self.lanes, every, outs, strict=True)]

    def _forward(self, step: TapedStep, values: Tensors, outs: Tensors) -> list[Taken]:
        self.bring(step.replay)
        every = []
        for lane, kept, value, out in zip(self.lanes, step.lanes, values, outs, strict=True):
            taken = lane.take(self.chain, step.coupling, value, out, step.replay.path)
            side, kept.dropped = taken.side, taken.dropped
            kept.side = side if side is None or step.host is None else step.host.put(side)
            kept.arithmetic = lane.arithmetic
            every.append(taken)
        self.position += 1
        return every

    def bring(self, replay: Replay) -> None:
        """Each lane to where the branch reads it."""
        for lane, like in zip(self.lanes, replay.inputs, strict=True):
            lane.bring(like.device)

    # -- backward

    def run_again(self, index: int) -> None:
        """Run step `index`'s branch on its reconstructed input, for autograd, and undo the step with the result."""
        self._check_peak()
        if index + 1 >= self.position:  # a backward pass begins, or goes on: it has not reached the beginning yet
            self.chain.drifts.pop(self.chain.name if self.label is None else self.label, None)
        self._go_to(index + 1)
        self._undo(self.steps[index], asked=True)

    def run_reader_again(self, replay: Replay) -> None:
        """Run, for autograd, what reads the state behind the last step without being a step itself."""
        self.go_to_end()
        self.bring(replay)
        replay.run(self._inputs(replay), asked_by_autograd=True)

    def go_to_end(self) -> None:
        """The state behind the last step: a forward pass goes on (Rule 4)."""
        self._go_to(len(self.steps))
        if self.halfway:
            self._recover_output(self.steps[-1])

    def _undo(self, step: TapedStep, asked: bool) -> None:
        """(x', p') -> (x, p), by one run of the branch (Rule 2)."""
        self.bring(step.replay)
        if not self.halfway:
            for lane, kept in zip(self.lanes, step.lanes, strict=True):
                lane.recover_input(step.coupling, kept)
            self.halfway = True
        # Outputs and values are floats in the model's dtype, out_BTD; a state is H_BTD, V_BTD int32 (or float32).
        self.opened = None
        for kept in step.lanes:
            if isinstance(kept.side, OnHost):
                kept.side.fetch()  # while the branch runs
        values = self._inputs(step.replay, step)
        if asked and step.replay.again_but_for_tiles is not None:  # Rule 6
            opened = self.opened = Opened(step, tuple(value.detach() for value in values))
            opened.rest = step.replay.run_but_for_tiles(values, partial(self._complete, opened))
            return
        outs = self._run(step, values, asked)  # an error leaves the tape half-way
        self._undone(step, outs, values)

    def _inputs(self, replay: Replay, step: TapedStep | None = None) -> tuple[torch.Tensor, ...]:
        """What the branch is run again with; of a `step` that is half undone, the grid is still the one behind it."""
        grids = [lane.arithmetic for lane in self.lanes] if step is None else [k.arithmetic_before for k in step.lanes]
        every = zip(replay.inputs, self.lanes, grids, strict=True)
        return tuple(like.made(lane.state, arithmetic) for like, lane, arithmetic in every)

    def _complete(self, opened: Opened, result: Callable[[], torch.Tensor]) -> None:
        """All tiles have run, and `result` hands over what the tiled call returned."""
        if self.opened is opened:  # else the step was undone without them
            assert opened.rest is not None
            outs = (opened.rest(result),)
            self._compare(opened.step, outs)
            self.opened = opened.rest = None
            self._undone(opened.step, outs, opened.values)

    def _undone(self, step: TapedStep, outs: Tensors, values: Tensors) -> None:
        if self.observed is not None:
            self.observed.rebuilt[self.chain.name] = self.observed.rebuilt.get(self.chain.name, 0) + 1
        with torch.no_grad():
            for lane, kept, out, value in zip(self.lanes, step.lanes, outs, values, strict=True):
                lane.recover_partner(step.coupling, kept, out, value.detach())
        self.halfway = False
        self.position -= 1
        if self.position == 0:
            self._check_origin()  # Rule 7

    def _recover_output(self, step: TapedStep) -> None:
        for lane, kept in zip(self.lanes, step.lanes, strict=True):
            lane.recover_output(step.coupling, kept)
        self.halfway, self.opened = False, None

    def _run(self, step: TapedStep, values: tuple[torch.Tensor, ...], asked: bool) -> tuple[torch.Tensor, ...]:
        """What the branch returns of its input."""
        outs = tuple(out.detach() for out in step.replay.run(values, asked)[1])
        self._compare(step, outs)
        return outs

    def _compare(self, step: TapedStep, outs: Tensors) -> None:
        # A backward pass may end here: how far the stream is off is not left to the check at its beginning (Rule 7).
        for kept, out in zip(step.lanes, outs, strict=True):
            if self.comparison.says_other(kept.out, out, rounding=max(TOLERANCE, torch.finfo(out.dtype).eps)):
                raise self._not_reconstructed(f"{step.replay.path} returned something else", float("nan"))

    def _go_to(self, position: int) -> None:
        """Undo steps that autograd does not ask for (Rule 3), or take undone ones again (Rule 4)."""
        if position == self.position:
            return
        with torch.enable_grad(), hooks_of_others_off():
            while self.position > position:
                self._undo(self.steps[self.position - 1], asked=False)
            if self.halfway:
                self._recover_output(self.steps[self.position - 1])
            while self.position < position:
                step = self.steps[self.position]
                self.bring(step.replay)
                values = self._inputs(step.replay)
                outs = self._run(step, values, asked=False)
                with torch.no_grad():
                    self._forward(step, [value.detach() for value in values], outs)

    # -- checks

    def _check_peak(self) -> None:
        """Once per backward pass: no activation left the grid, and nothing differed in the last one."""
        at_the_end = self.position == len(self.steps) and not self.halfway
        if not at_the_end or all(waited_for(lane.state.stream.device) for lane in self.lanes):
            return
        torch.autograd.Variable._execution_engine.queue_callback(self._settle)
        self.check_peak()

    def check_peak(self) -> None:
        """Look whether a stream has left its grid, which waits for the device.

        Raises:
            FixedPointRangeError: one has. The chain's next pass begins on a coarser grid.
        """
        for lane in self.lanes:
            if lane.peak.largest is not None and isinstance(lane.arithmetic, FixedPoint):
                try:
                    check_largest(lane.arithmetic, lane.peak.largest, self.chain.name)
                except FixedPointRangeError:
                    coarse = FixedPoint(lane.arithmetic.fraction_bits - 4)
                    self.chain.coarsen(lane.arithmetic, coarse, self.chain.name)
                    self.chain.finest = min(self.chain.finest, coarse.fraction_bits)
                    raise

    def _settle(self) -> None:
        """At the end of a backward pass: comparisons that the device had not answered yet."""
        if self.comparison.settle():
            raise self._not_reconstructed("one of its branches saved or returned something else", float("nan"))

    def _check_origin(self) -> None:
        if not looked_at():
            return
        if self.label is None:
            if self._far_from_origin():
                raise self._not_reconstructed("the state it began with was not met again", float("nan"))
            if self.exact:
                self._note(self.chain.name, 0.0)
            return
        left_over = [lane.left_over(self.steps[0].coupling) for lane in self.lanes]
        drift = float("nan") if any(map(math.isnan, left_over)) else max(left_over)
        self._note(self.label, drift)
        if math.isnan(drift):
            raise ReconstructionError(
                f"the stream of {self.chain.name} holds values that are not numbers (inf or NaN), and cannot be "
                "rebuilt: the input or the weights hold some, or the training diverged"
            )
        if (self.exact and drift) or not drift <= TOLERANCE:
            raise self._not_reconstructed(f"off by {drift:g} at its first block", drift)

    def _note(self, label: str, drift: float) -> None:
        for drifts in (self.chain.drifts, {} if self.observed is None else self.observed.drifts):
            drifts[label] = max(drift, drifts.get(label, 0.0))

    def _far_from_origin(self) -> bool:
        found = fingerprint(self.lanes)
        if self.origin is None or found is None:
            return False
        origin = self.origin.to(found.device)
        if self.exact:
            return not torch.equal(found, origin)
        return bool(((found - origin).abs() > TOLERANCE * origin.abs().clamp(min=1e-12)).any())

    def _not_reconstructed(self, what: str, drift: float) -> ReconstructionError:
        rounding = (
            "rounding errors grew too large in float arithmetic, whose gradients would be wrong; convert with "
            "arithmetic='exact', which has none"
        )
        remedy = (
            "one of its blocks computed something else in backward than in forward; look for an operation that is "
            "not deterministic (torch.use_deterministic_algorithms(True)), or state outside parameters and buffers"
        )
        if not self.exact:
            remedy = rounding if drift > TOLERANCE else f"{rounding}; or {remedy}"
        how = "exactly" if self.exact else "closely enough"
        return ReconstructionError(
            f"the chain {self.chain.name} was not rebuilt {how}: {what}, over {len(self.steps)} blocks; {remedy}"
        )
