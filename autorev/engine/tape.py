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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from autorev.couplings.arithmetic import Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.engine.digest import Comparison, Digest, looked_at, waited_for
from autorev.engine.grid import Dropped, Taken, check_largest, step_on_grid
from autorev.engine.host_store import OnHost
from autorev.engine.observed import observed_here
from autorev.engine.replay import Replay, Rest, hooks_of_others_off
from autorev.errors import FixedPointRangeError, ReconstructionError

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain

SMALL_CHANNEL = 0.05
TOLERANCE = 1e-3
"""Relative error of a reconstructed float stream beyond which its gradients are refused."""


@dataclass(eq=False)
class TapedStep:
    """One step of one forward pass."""

    coupling: Coupling
    replay: Replay
    out: Digest | None
    """Digest of what the branch returned."""
    arithmetic: Arithmetic
    """Of the state behind the step."""
    side: torch.Tensor | OnHost | None = None
    """Its packed side bits, uint8, while `position` is behind the step."""
    dropped: Dropped | None = None
    """What the state lost just before the step, where its grid had to be coarsened."""

    @property
    def arithmetic_before(self) -> Arithmetic:
        """That of the state which the step was taken from."""
        if self.dropped is not None and isinstance(self.arithmetic, FixedPoint):
            return FixedPoint(self.arithmetic.fraction_bits + self.dropped.bits)
        return self.arithmetic


@dataclass(eq=False)
class Peak:
    """The largest |H| of a forward pass so far, on devices where looking at it would hold the program up."""

    largest: torch.Tensor | None = None

    def add(self, largest: torch.Tensor) -> None:
        """A step was taken."""
        here = self.largest
        self.largest = largest if here is None else torch.maximum(here.to(largest.device), largest)


@dataclass(eq=False)
class Opened:
    """A step whose input is known again, and whose branch has run up to the tiled call at its end."""

    step: TapedStep
    value: torch.Tensor
    """The input of its branch."""
    rest: Rest | None = None


class Tape:
    """The state of one forward pass, and the steps that it can be taken back over."""

    def __init__(self, chain: ReversibleChain, state: State, arithmetic: Arithmetic, label: str | None = None) -> None:
        """`label`: the name that the integrity check's result goes by; None: `state` is not the chain's first one."""
        self.chain = chain
        self.arithmetic = arithmetic
        """Of `state`."""
        self.state = state
        self.steps: list[TapedStep] = []
        self.position = 0
        """Number of steps that `state` lies behind."""
        self.opened: Opened | None = None
        """That step, while its tiles run."""
        self.halfway = False
        """Is `state` half-way back: the last step's input known, its partner not yet?"""
        self.label = label
        self.exact = isinstance(arithmetic, FixedPoint)
        self.comparison = Comparison(self.exact)
        self.observed = observed_here()
        self.origin: torch.Tensor | None = None
        """What the first state is known by, where it is not the chain's first one."""
        self.peak = Peak()
        """A fork's is its own, too."""
        self.looked_at_in_backward = False
        """Is that a fork's of a tape with steps?"""

    def fork(self) -> Tape:
        """The state alone, on a tape of its own."""
        fork = Tape(self.chain, self.state.clone(), self.arithmetic)
        fork.peak, fork.looked_at_in_backward = self.peak, bool(self.steps) or self.looked_at_in_backward
        return fork

    # -- forward

    def step(
        self, coupling: Coupling, value: torch.Tensor, out: torch.Tensor, path: str, at_once: bool
    ) -> torch.Tensor:
        """Take a step that nobody will go back over; `out` is what the branch returned of `value`, and the new stream
        is returned in its dtype."""
        assert not self.steps
        self.label = None
        return self._new(self._take(coupling, value, out, path, at_once), out.dtype)

    def append(self, step: TapedStep, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Take a step; returns the new stream, in `out`'s dtype."""
        assert self.position == len(self.steps)
        if not self.steps and self.label is None:
            self.origin = _fingerprint(self.state)
        taken = self._forward(step, value, out)
        self.steps.append(step)
        return self._new(taken, out.dtype)

    def _forward(self, step: TapedStep, value: torch.Tensor, out: torch.Tensor) -> Taken:
        self.bring(step.replay.input.device)
        at_once = waited_for(self.state.stream.device)
        taken = self._take(step.coupling, value, out, step.replay.path, at_once)
        side, step.dropped = taken.side, taken.dropped
        step.side = side if side is None or self.chain.host is None else self.chain.host.put(side)
        step.arithmetic = self.arithmetic
        self.position += 1
        return taken

    def _take(self, coupling: Coupling, value: torch.Tensor, out: torch.Tensor, path: str, at_once: bool) -> Taken:
        taken = step_on_grid(coupling, self.state, out, value, self.arithmetic, path, at_once)
        if taken.dropped is not None:
            self.chain.coarsen(self.arithmetic, taken.arithmetic, path)
        if taken.largest is not None:
            self.peak.add(taken.largest)
        self.arithmetic = taken.arithmetic
        return taken

    def _new(self, taken: Taken, dtype: torch.dtype) -> torch.Tensor:
        return self.arithmetic.decode(self.state.stream, dtype) if taken.new is None else taken.new

    def bring(self, device: torch.device) -> None:
        """The model may be spread over devices: a step is taken, and undone, on its own."""
        if self.state.stream.device != device:
            self.state.stream = self.state.stream.to(device)
            self.state.partner = self.state.partner.to(device)

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
        self.bring(replay.input.device)
        replay.run(replay.input.made(self.state, self.arithmetic), asked_by_autograd=True)

    def go_to_end(self) -> None:
        """The state behind the last step: a forward pass goes on (Rule 4)."""
        self._go_to(len(self.steps))
        if self.halfway:
            self._recover_output(self.steps[-1])

    def _undo(self, step: TapedStep, asked: bool) -> None:
        """(x', p') -> (x, p), by one run of the branch (Rule 2)."""
        self.bring(step.replay.input.device)
        if not self.halfway:
            step.coupling.recover_input(self.state, step.arithmetic)
            if step.dropped is not None:
                step.dropped.refine_stream(self.state)
            self.halfway = True
        # out_BTD and value_BTD are floats in the model's dtype; the state is H_BTD, V_BTD int32 (or float32).
        self.opened = None
        for soon in self.steps[max(self.position - 2, 0) : self.position]:
            if isinstance(soon.side, OnHost):
                soon.side.fetch()  # while the branch runs
        value = step.replay.input.made(self.state, step.arithmetic_before)
        if asked and step.replay.again_but_for_tiles is not None:  # Rule 6
            opened = self.opened = Opened(step, value.detach())
            opened.rest = step.replay.run_but_for_tiles(value, partial(self._complete, opened))
            return
        out = self._run(step, value, asked)  # an error leaves the tape half-way
        self._undone(step, out, value.detach())

    def _complete(self, opened: Opened, result: Callable[[], torch.Tensor]) -> None:
        """All tiles have run, and `result` hands over what the tiled call returned."""
        if self.opened is opened:  # else the step was undone without them
            assert opened.rest is not None
            out = opened.rest(result)
            self._compare(opened.step, out)
            self.opened = opened.rest = None
            self._undone(opened.step, out, opened.value)

    def _undone(self, step: TapedStep, out: torch.Tensor, value: torch.Tensor) -> None:
        if self.observed is not None:
            self.observed.rebuilt[self.chain.name] = self.observed.rebuilt.get(self.chain.name, 0) + 1
        with torch.no_grad():
            # The partner is still on the grid of the state behind the step.
            side = step.side.back() if isinstance(step.side, OnHost) else step.side
            step.coupling.recover_partner(self.state, out, value, side, step.arithmetic)
        if step.dropped is not None:
            step.dropped.refine_partner(self.state)
        self.arithmetic = step.arithmetic_before
        step.side = step.dropped = None
        if step.replay.kept is not None:
            step.replay.kept.let_go()
        self.halfway = False
        self.position -= 1
        if self.position == 0:
            self._check_origin()  # Rule 7

    def _recover_output(self, step: TapedStep) -> None:
        if step.dropped is not None:
            step.dropped.coarsen_stream(self.state)
        step.coupling.recover_output(self.state, step.arithmetic)
        self.halfway, self.opened = False, None

    def _run(self, step: TapedStep, value: torch.Tensor, asked: bool) -> torch.Tensor:
        """What the branch returns of its input."""
        out = step.replay.run(value, asked)[1].detach()
        self._compare(step, out)
        return out

    def _compare(self, step: TapedStep, out: torch.Tensor) -> None:
        # A backward pass may end here: how far the stream is off is not left to the check at its beginning (Rule 7).
        if self.comparison.says_other(step.out, out, rounding=max(TOLERANCE, torch.finfo(out.dtype).eps)):
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
                self.bring(step.replay.input.device)
                value = step.replay.input.made(self.state, self.arithmetic)
                out = self._run(step, value, asked=False)
                with torch.no_grad():
                    self._forward(step, value.detach(), out)

    # -- checks

    def _check_peak(self) -> None:
        """Once per backward pass: no activation left the grid, and nothing differed in the last one."""
        at_the_end = self.position == len(self.steps) and not self.halfway
        if not at_the_end or waited_for(self.state.stream.device):
            return
        torch.autograd.Variable._execution_engine.queue_callback(self._settle)
        self.check_peak()

    def check_peak(self) -> None:
        """Look whether a stream has left its grid, which waits for the device.

        Raises:
            FixedPointRangeError: one has. The chain's next pass begins on a coarser grid.
        """
        if self.peak.largest is not None and isinstance(self.arithmetic, FixedPoint):
            try:
                check_largest(self.arithmetic, self.peak.largest, self.chain.name)
            except FixedPointRangeError:
                coarse = FixedPoint(self.arithmetic.fraction_bits - 4)
                self.chain.coarsen(self.arithmetic, coarse, self.chain.name)
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
        drift = self._left_over() if self.state.stream.numel() else 0.0
        self._note(self.label, drift)
        if (self.exact and drift) or not drift <= TOLERANCE:
            raise self._not_reconstructed(f"off by {drift:g} at its first block", drift)

    def _left_over(self) -> float:
        """Of the first partner: exact, its largest value; float, relative to the stream, channel by channel."""
        with torch.no_grad():
            left, stream = self.steps[0].coupling.initial_residual(self.state).abs(), self.state.stream
            if isinstance(self.arithmetic, FixedPoint):
                return float(left.amax()) * 2.0**-self.arithmetic.fraction_bits
            channels = left.flatten(0, -2).amax(0) if left.dim() > 1 else left
            sizes = stream.abs().flatten(0, -2).amax(0) if left.dim() > 1 else stream.abs()
            # A channel far below the others weighs as little in what reads the stream.
            floor = max(float(sizes.median()) * SMALL_CHANNEL, torch.finfo(torch.float32).tiny)
            return float((channels / sizes.clamp(min=floor)).amax())

    def _note(self, label: str, drift: float) -> None:
        for drifts in (self.chain.drifts, {} if self.observed is None else self.observed.drifts):
            drifts[label] = max(drift, drifts.get(label, 0.0))

    def _far_from_origin(self) -> bool:
        found = _fingerprint(self.state)
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


def _fingerprint(state: State) -> torch.Tensor | None:
    """Sums over both streams: what a chain that begins in the middle is compared by."""
    if state.stream.is_meta or not looked_at() or not state.stream.numel():
        return None
    if state.stream.is_floating_point():
        return torch.stack([s.double().abs().sum() for s in (state.stream, state.partner)])
    return torch.stack([state.stream.sum(), state.partner.sum()])
