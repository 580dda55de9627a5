"""The tape of a reversible chain: its last state, and how to get from there to any other.

NOTE [ Reconstruction ]

One forward pass through a chain makes one tape. It holds a single state, at first the last one, and one entry per step
with what a step cannot do without: its coupling, its side bits, and how its branch is run again.

Rule 1. A branch is run under a checkpoint without its input: PyTorch's own graph of the branch stays, and only what
        that graph saved is dropped. When autograd asks for it, the branch runs again on the input that the tape
        reconstructs (`evaluate_again`), and what it saves is compared with what it saved the first time (`saved`).
Rule 2. That one run serves twice: its saved tensors go to autograd, its output undoes the step. So steps are undone in
        the order in which autograd asks, which is backwards.
Rule 3. Steps that autograd never asks for (nothing before them needs a gradient of theirs) are undone on the way to
        the next one it does ask for, without a gradient. Grad mode is on all the same, as attention kernels are
        chosen by it, and the exact arithmetic needs the same bits.
Rule 4. A step that was undone may be asked for again (`retain_graph`, two losses from one forward), and a forward pass
        may go on behind a gradient that was taken half-way. Then the tape advances from where it stands, making new
        side bits.
Rule 5. The tape refers to no node of autograd's graph, while that graph refers to the tape; otherwise a forward whose
        backward never runs would never be freed.
Rule 6. Back at its first state, the tape checks that this is the state it began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from autorev.couplings.arithmetic import Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.engine.digest import Comparison, Digest, looked_at
from autorev.engine.grid import Dropped, advance, check_largest, largest_of
from autorev.engine.replay import Replay, hooks_of_others_off
from autorev.errors import FixedPointRangeError, ReconstructionError

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain

SMALL_CHANNEL = 0.05
TOLERANCE = 1e-3
"""Relative error of a reconstructed float stream beyond which its gradients are refused."""


@dataclass(eq=False)
class Observed:
    """What backward passes found, of forward passes that were made while this was in force in their thread."""

    rebuilt: dict[str, int] = field(default_factory=dict)
    """By chain: how many branches were run again."""
    drifts: dict[str, float] = field(default_factory=dict)


_observed: ContextVar[Observed | None] = ContextVar("autorev observed", default=None)


@contextmanager
def observing() -> Iterator[Observed]:
    """Tell apart what this thread's forward passes lead to from what others do with the same chains."""
    found = Observed()
    token = _observed.set(found)
    try:
        yield found
    finally:
        _observed.reset(token)


@dataclass(frozen=True)
class InputLike:
    """What the input of a branch is like, besides its values."""

    device: torch.device
    dtype: torch.dtype
    through: torch.dtype
    """The dtype in which the step before handed the stream on; another where the model casts it between blocks."""
    requires_grad: bool
    stride: tuple[int, ...]
    """Kernels sum in another order where the memory is laid out in another way."""

    @classmethod
    def of(cls, x: torch.Tensor, through: torch.dtype) -> InputLike:
        """What `x` is like."""
        return cls(x.device, x.dtype, through, x.requires_grad, x.stride())

    def made(self, state: State, arithmetic: Arithmetic) -> torch.Tensor:
        """The input, from a state whose stream it is; a new tensor without history."""
        value = arithmetic.decode(state.stream, self.through).to(self.dtype)
        if value.stride() != self.stride and 0 not in self.stride:
            laid_out = torch.empty_strided(value.shape, self.stride, dtype=value.dtype, device=value.device)
            value = laid_out.copy_(value)
        return value.detach().requires_grad_(self.requires_grad)


@dataclass(eq=False)
class TapedStep:
    """One step of one forward pass."""

    coupling: Coupling
    replay: Replay
    like: InputLike
    overwrites: bool
    """Does the block add to its input in place? Then it is given a copy."""
    out: Digest | None
    """Digest of what the branch returned."""
    arithmetic: Arithmetic
    side: torch.Tensor | None = None
    dropped: Dropped | None = None

    @property
    def path(self) -> str:
        """The module's full name."""
        return self.replay.path

    @property
    def arithmetic_before(self) -> Arithmetic:
        """That of the state which the step was taken from."""
        if self.dropped is not None and isinstance(self.arithmetic, FixedPoint):
            return FixedPoint(self.arithmetic.fraction_bits + self.dropped.bits)
        return self.arithmetic


class Tape:
    """See NOTE [ Reconstruction ]."""

    def __init__(
        self,
        chain: ReversibleChain,
        state: State,
        arithmetic: Arithmetic,
        label: str | None,
        comparison: Comparison,
    ) -> None:
        """`label`: the name that the integrity check's result goes by; None: `state` is not the chain's first one."""
        self.chain = chain
        self.arithmetic = arithmetic
        """Of `state`."""
        self.state = state
        self.steps: list[TapedStep] = []
        self.position = 0
        """Number of steps that `state` lies behind."""
        self.reopened = False
        """Is `state` half-way back: the last step's input known, its partner not yet?"""
        self.label = label
        self.exact = isinstance(arithmetic, FixedPoint)
        self.comparison = comparison
        self.observed = _observed.get()
        self.origin = None if label is not None else _fingerprint(state)
        self.peak: torch.Tensor | None = None
        """Largest |H| so far, on devices where looking at it would stall."""

    # -- forward

    def append(self, step: TapedStep, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Take a step; returns the new stream, in `out`'s dtype."""
        assert self.position == len(self.steps)
        self._advance(step, value, out)
        self.steps.append(step)
        if self.exact and self.state.stream.device.type != "cpu":
            self.peak = largest_of(self.state.stream, self.peak)
        return self.arithmetic.decode(self.state.stream, out.dtype)

    def _advance(self, step: TapedStep, value: torch.Tensor, out: torch.Tensor) -> None:
        self._bring(step.like.device)
        at_once = self.state.stream.device.type == "cpu"
        taken = advance(step.coupling, self.state, out, value, self.arithmetic, step.path, at_once)
        step.side, step.dropped, step.arithmetic = taken.side, taken.dropped, taken.arithmetic
        if taken.dropped is not None:
            self.chain.coarsen(self.arithmetic, taken.arithmetic, step.path)
        self.arithmetic = taken.arithmetic
        self.position += 1

    def _bring(self, device: torch.device) -> None:
        """The model may be spread over devices: a step is taken, and undone, on its own."""
        if self.state.stream.device != device:
            self.state.stream = self.state.stream.to(device)
            self.state.partner = self.state.partner.to(device)

    # -- backward

    def evaluate_again(self, index: int) -> None:
        """Run step `index`'s branch on its reconstructed input, for autograd, and undo the step with the result."""
        self._check_peak()
        if index + 1 >= self.position:  # a backward pass begins, or goes on: it has not reached the beginning yet
            self.chain.drifts.pop(self.chain.name if self.label is None else self.label, None)
        self._go_to(index + 1)
        self._undo(self.steps[index], asked=True)

    def evaluate_last(self, replay: Replay, like: InputLike, overwrites: bool) -> None:
        """Run, for autograd, what reads the state behind the last step without being a step itself."""
        self.go_to_end()
        self._bring(like.device)
        value = like.made(self.state, self.arithmetic)
        replay.run(value.clone() if overwrites else value, asked_by_autograd=True)

    def go_to_end(self) -> None:
        """The state behind the last step: a forward pass goes on (Rule 4)."""
        self._go_to(len(self.steps))
        if self.reopened:
            self._close(self.steps[-1])

    def _undo(self, step: TapedStep, asked: bool) -> None:
        self._bring(step.like.device)
        if not self.reopened:
            step.coupling.reopen(self.state, step.arithmetic)
            if step.dropped is not None:
                step.dropped.refine_stream(self.state)
            self.reopened = True
        out, plain = self._run(step, step.arithmetic_before, asked)
        if self.observed is not None:
            self.observed.rebuilt[self.chain.name] = self.observed.rebuilt.get(self.chain.name, 0) + 1
        with torch.no_grad():
            step.coupling.retreat(self.state, out, plain, step.side, step.arithmetic)
        if step.dropped is not None:
            step.dropped.refine_partner(self.state)
        self.arithmetic = step.arithmetic_before
        step.side = step.dropped = None
        self.reopened = False
        self.position -= 1
        if self.position == 0:
            self._check_origin()

    def _close(self, step: TapedStep) -> None:
        if step.dropped is not None:
            step.dropped.coarsen_stream(self.state)
        step.coupling.close(self.state, step.arithmetic)
        self.reopened = False

    def _run(self, step: TapedStep, arithmetic: Arithmetic, asked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the branch returns, its input) of a state whose stream is that input."""
        value = step.like.made(self.state, arithmetic)
        _, out = step.replay.run(value.clone() if step.overwrites else value, asked)
        out = out.detach()
        if self.comparison.says_other(step.out, out):
            raise self._not_reconstructed(f"{step.path} returned something else", float("nan"))
        return out, value.detach()

    def _go_to(self, position: int) -> None:
        if position == self.position:
            return
        with torch.enable_grad(), hooks_of_others_off():
            while self.position > position:
                self._undo(self.steps[self.position - 1], asked=False)
            if self.reopened:
                self._close(self.steps[self.position - 1])
            while self.position < position:
                step = self.steps[self.position]
                self._bring(step.like.device)
                out, value = self._run(step, self.arithmetic, asked=False)
                with torch.no_grad():
                    self._advance(step, value, out)

    # -- checks

    def _check_peak(self) -> None:
        """Once per backward pass: no activation left the grid, and nothing differed in the last one."""
        at_the_end = self.position == len(self.steps) and not self.reopened
        if not at_the_end or self.state.stream.device.type == "cpu":
            return
        torch.autograd.Variable._execution_engine.queue_callback(self._settle)
        if self.peak is not None and isinstance(self.arithmetic, FixedPoint):
            try:
                check_largest(self.arithmetic, self.peak, self.chain.name)
            except FixedPointRangeError:
                coarse = FixedPoint(self.arithmetic.fraction_bits - 4)
                self.chain.coarsen(self.arithmetic, coarse, self.chain.name)
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
            left, stream = self.steps[0].coupling.residue(self.state).abs(), self.state.stream
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
        if self.exact:
            return found != self.origin
        return any(abs(a - b) > TOLERANCE * max(abs(b), 1e-12) for a, b in zip(found, self.origin, strict=True))

    def _not_reconstructed(self, what: str, drift: float) -> ReconstructionError:
        if not self.exact and drift == drift and drift > TOLERANCE:
            remedy = (
                "rounding errors grew too large in float arithmetic, whose gradients would be wrong; convert with "
                "arithmetic='exact', which has none"
            )
        else:
            remedy = (
                "one of its blocks computed something else in backward than in forward; look for an operation that is "
                "not deterministic (torch.use_deterministic_algorithms(True)), or state outside parameters and buffers"
            )
        how = "exactly" if self.exact else "closely enough"
        return ReconstructionError(
            f"the chain {self.chain.name} was not rebuilt {how}: {what}, over {len(self.steps)} blocks; {remedy}"
        )


def _fingerprint(state: State) -> tuple[float, ...] | None:
    """Sums over both streams: what a chain that begins in the middle is compared by."""
    if state.stream.is_meta or not looked_at() or not state.stream.numel():
        return None
    if state.stream.is_floating_point():
        return tuple(float(s.double().abs().sum()) for s in (state.stream, state.partner))
    return int(state.stream.sum()), int(state.partner.sum())
