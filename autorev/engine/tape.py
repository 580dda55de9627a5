"""The tape of a reversible chain: its last state, and how to get from there to any other.

NOTE [ Reconstruction ]

One forward pass through a chain makes one tape. It holds a single state, at first the last one, and one entry per step
with what a step cannot do without: its coupling, its side bits, and how its branch is run again.

Rule 1. A branch is run under `torch.utils.checkpoint`, without its input: PyTorch's own graph of the branch stays, and
        only what that graph saved is dropped. When autograd asks for it, the checkpoint runs the branch again on the
        input that the tape reconstructs (`evaluate_again`).
Rule 2. That one run serves twice: its saved tensors go to autograd, its output undoes the step. So steps are undone in
        the order in which autograd asks, which is backwards.
Rule 3. Steps that autograd never asks for (nothing before them needs a gradient of theirs) are undone on the way to
        the next one it does ask for, without a gradient. Grad mode is on all the same, as attention kernels are
        chosen by it, and the exact arithmetic needs the same bits.
Rule 4. A step that was undone may be asked for again (`retain_graph`, two losses from one forward). Then the tape
        advances from where it stands, making new side bits, and is undone once more.
Rule 5. The tape refers to no node of autograd's graph, while that graph refers to the tape; otherwise a forward whose
        backward never runs would never be freed.
Rule 6. Back at its first state, the tape checks that this is the state it began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.engine.grid import advance, check_range
from autorev.engine.replay import Replay
from autorev.errors import ReconstructionError

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain


@dataclass(eq=False)
class TapedStep:
    """One step of one forward pass."""

    coupling: Coupling
    replay: Replay
    dtype: torch.dtype
    """Of the branch's input."""
    requires_grad: bool
    """Of the branch's input."""
    overwrites: bool
    """Does the block add to its input in place? Then it is given a copy."""
    side: torch.Tensor | None = None

    @property
    def path(self) -> str:
        """The module's full name."""
        return self.replay.path


class Tape:
    """See NOTE [ Reconstruction ]."""

    def __init__(self, chain: ReversibleChain, state: State, fresh: bool) -> None:
        """`fresh`: `state` is the chain's first one, with nothing taken yet."""
        self.chain = chain
        self.arithmetic = chain.arithmetic
        self.state = state
        self.steps: list[TapedStep] = []
        self.position = 0
        """Number of steps that `state` lies behind."""
        self.reopened = False
        """Is `state` half-way back: the last step's input known, its partner not yet?"""
        self.fresh = fresh
        exact = isinstance(self.arithmetic, FixedPoint)
        self.origin = _fingerprint(state) if exact and not fresh else None
        self.peak: torch.Tensor | None = None
        """Largest |H| so far, on devices where looking at it would stall."""

    # -- forward

    def append(self, step: TapedStep, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Take a step; returns the new stream, in `out`'s dtype."""
        assert self.position == len(self.steps)
        self._advance(step, value, out)
        self.steps.append(step)
        if isinstance(self.arithmetic, FixedPoint):
            self.peak = check_range(self.arithmetic, self.state.stream, step.path, self.peak, at_once=False)
        return self.arithmetic.decode(self.state.stream, out.dtype)

    def _advance(self, step: TapedStep, value: torch.Tensor, out: torch.Tensor) -> None:
        step.side = advance(step.coupling, self.state, out, value, self.arithmetic, step.path)
        self.position += 1

    # -- backward

    def evaluate_again(self, index: int) -> tuple[Any, torch.Tensor]:
        """Run step `index`'s branch on its reconstructed input, for autograd, and undo the step with the result."""
        self._check_peak()
        self._go_to(index + 1)
        return self._undo(self.steps[index])

    def _undo(self, step: TapedStep) -> tuple[Any, torch.Tensor]:
        if not self.reopened:
            step.coupling.reopen(self.state, self.arithmetic)
            self.reopened = True
        value = self._input_of(step)
        returned, out = step.replay.run(value)
        with torch.no_grad():
            plain = self.arithmetic.decode(self.state.stream, step.dtype) if step.overwrites else value.detach()
            step.coupling.retreat(self.state, out.detach(), plain, step.side, self.arithmetic)
        step.side = None
        self.reopened = False
        self.position -= 1
        if self.position == 0:
            self._check_origin()
        return returned, out

    def _input_of(self, step: TapedStep) -> torch.Tensor:
        value = self.arithmetic.decode(self.state.stream, step.dtype).detach().requires_grad_(step.requires_grad)
        return value.clone() if step.overwrites else value

    def _go_to(self, position: int) -> None:
        if position == self.position:
            return
        with torch.enable_grad(), _hooks_of_others_off():
            while self.position > position:
                self._undo(self.steps[self.position - 1])
            if self.reopened:
                self.steps[self.position - 1].coupling.close(self.state, self.arithmetic)
                self.reopened = False
            while self.position < position:
                step = self.steps[self.position]
                value = self._input_of(step)
                _, out = step.replay.run(value)
                with torch.no_grad():
                    plain = self.arithmetic.decode(self.state.stream, step.dtype) if step.overwrites else value.detach()
                    self._advance(step, plain, out.detach())

    # -- checks

    def _check_peak(self) -> None:
        """Once per backward pass: no activation left the grid."""
        at_the_end = self.position == len(self.steps) and not self.reopened
        if at_the_end and self.peak is not None and isinstance(self.arithmetic, FixedPoint):
            check_range(self.arithmetic, self.peak, self.chain.name, None, at_once=True)

    def _check_origin(self) -> None:
        if not self.fresh:
            if self.origin is not None and _fingerprint(self.state) != self.origin:
                raise self._not_reconstructed(float("nan"))
            self.chain.drift = None if self.origin is None else 0.0
            return
        exact = isinstance(self.arithmetic, FixedPoint)
        with torch.no_grad():
            left = float(self.steps[0].coupling.residue(self.state).abs().amax()) if self.state.stream.numel() else 0.0
            if isinstance(self.arithmetic, FixedPoint):
                drift = left * 2.0**-self.arithmetic.fraction_bits
            else:
                drift = left and left / max(float(self.state.stream.abs().amax()), torch.finfo(torch.float32).tiny)
        self.chain.drift = drift
        if exact and drift:
            raise self._not_reconstructed(drift)

    def _not_reconstructed(self, drift: float) -> ReconstructionError:
        return ReconstructionError(
            f"the chain {self.chain.name} was not rebuilt exactly (off by {drift:g} at its first block), so one of its "
            f"{len(self.steps)} blocks computed something else in backward than in forward; look for an operation that "
            "is not deterministic (torch.use_deterministic_algorithms(True)), or state outside parameters and buffers"
        )


def _fingerprint(state: State) -> tuple[int, int]:
    """Sums over the integers of both streams: what a chain that begins in the middle is compared by."""
    return int(state.stream.sum()), int(state.partner.sum())


@contextmanager
def _hooks_of_others_off() -> Iterator[None]:
    """Runs inside another step's checkpoint must not be taken for that step's."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor,), lambda packed: packed[0]):
        yield
