"""One step of a reversible chain, from the stream that arrives at a branch to the stream that leaves it.

NOTE [ Reconstruction ]

A chain computes with a state of two streams: x, which the model's own loop carries from block to block, and its partner
p, the velocity or the other stream, which travels beside it (`chain`). A block's branch f is one step of the chain.

Forward, with any coupling:

    step = Step(chain, stream, numbers, branch)     the state that goes with the stream
    with step.running():
        out = x + f(x), by the model's own code, of x = step.given()
    new = step.take(out)                            (x, p), f(x) -> (x', p'); x' goes on in the place of `out`

There are three cases:

    on the tape     what the branch saves for backward is dropped, and the tape can go back over the step
    stored          what the branch saves is kept, so nobody has to go back
    oracle          stored, with the coupling's equations by ordinary autograd instead of its own inverse and vjp

Backward, of a step on the tape: autograd comes to the branch's graph, and asks for the first tensor that it saved.

    recover_input       (x', p') -> x       needs no branch
    replay              out = x + f(x) once more; what it saves goes to autograd, which continues
    recover_partner     x, out -> p         the state before the step

The gradients of the coupling itself need no values (`autograd`): it is a linear map of x, p and f(x).

Rule 1. A branch is run under a checkpoint without its input: PyTorch's own graph of the branch stays, and only what
        that graph saved is dropped. When autograd asks for it, the branch runs again on the input that the tape
        reconstructs (`Tape.run_again`), and what it saves is compared with what it saved the first time (`saved`).
Rule 2. That one run serves twice: its saved tensors go to autograd, its output undoes the step. So steps are undone in
        the order in which autograd asks, which is backwards.
Rule 3. Steps that autograd never asks for (nothing before them needs a gradient of theirs) are undone on the way to
        the next one it does ask for, without a gradient. Grad mode is on all the same, as attention kernels are
        chosen by it, and the exact arithmetic needs the same bits.
Rule 4. A step that was undone may be asked for again (`retain_graph`, two losses from one forward), and a forward pass
        may go on behind a gradient that was taken half-way. Then the tape goes forward from where it stands, making
        new side bits.
Rule 5. The tape refers to no node of autograd's graph, while that graph refers to the tape; otherwise a forward whose
        backward never runs would never be freed.
Rule 6. Where a branch ends in a call that is tiled (NOTE [ Tiles ] in `tiles`), its second run stops there; the tiles
        run one by one, as autograd asks for them, and the step is undone when all have.
Rule 7. Back at its first state, the tape checks that this is the state it began with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from autorev.engine.autograd import couple, enter, read_out, straight_through
from autorev.engine.chain import Carried, ReversibleChain, arrive, memory_of, pass_of, values_of
from autorev.engine.digest import waited_for
from autorev.engine.grid import grid_at_start
from autorev.engine.kept import KeptOutputs
from autorev.engine.mode import ORACLE, mode
from autorev.engine.modules import Owned, version_of
from autorev.engine.replay import BranchRun, Replay, branch_run
from autorev.engine.saved import SavedTensors
from autorev.engine.tape import Tape, TapedStep
from autorev.errors import ConversionError, ReconstructionError

Streams = tuple[torch.Tensor, torch.Tensor]
"""(x', p') as autograd knows them: the new stream, and a partner without values, but for the oracle."""


@dataclass(frozen=True, eq=False)
class Branch:
    """What is run as one step."""

    module: nn.Module | None
    """The module that it is the whole of; None: modules are added as they are called (`Step.add_module`)."""
    path: str
    training: bool
    writes: Callable[[nn.Module, str], bool]
    """(module, name): does the branch update that buffer?"""
    mutates_input: bool = False
    """Does it add to its input in place?"""
    recomputable: bool = True
    """False if it has side effects, such as filling a key-value cache; then it is stored."""


class Step:
    """See NOTE [ Reconstruction ]."""

    def __init__(self, chain: ReversibleChain, stream: torch.Tensor, numbers: tuple[int, ...], branch: Branch) -> None:
        """`numbers`: the steps of the chain that the branch may be (several: shared weights).

        Raises:
            ConversionError: the state that goes with `stream` cannot be known.
            FixedPointRangeError: `stream` holds something that is not a number.
        """
        self.chain, self.branch = chain, branch
        self.carried, self.number, label = arrive(chain, stream, numbers)
        carried, coupling = self.carried, chain.couplings[self.number]
        self.seed = None if carried is None else carried.seed
        if coupling.random:
            if branch.training and self.seed is None:
                self.seed = chain.seeds.draw(stream, chain.name)
            coupling = coupling.sample(branch.training, random.Random(f"{self.seed} {self.number}").getrandbits(8))
        self.coupling = coupling
        self.oracle = mode() == ORACLE
        if carried is None:
            arithmetic = grid_at_start(chain, stream)
            state = coupling.initial_state(arithmetic.encode(stream.detach()))
            self.tape = Tape(chain, state, arithmetic, label)
            self.through = stream.dtype
            if self.oracle:
                self.x, self.partner = straight_through(arithmetic.decode(state.stream, stream.dtype), stream), None
            else:
                self.x = enter(arithmetic, state, stream)
                self.partner = coupling.first_partner(self.x)
        else:
            self.tape, self.through, self.x, self.partner = carried.tape, carried.dtype, stream, carried.partner
            if self.partner is not None:
                if carried.requires_grad and (not stream.requires_grad or stream.is_leaf):
                    self.partner = self.partner.detach()  # as the stream was since: the gradients of both end here
                self.partner = self.partner.to(stream.device)
        # x_BTD is in the model's dtype; the partner, p_BTD float32, has no values (`autograd`). Both are known to
        # autograd, whose node `couple` joins them to `out`; the numbers are those of `tape.state`, int32.
        self.version = version_of(self.x)
        self.owned: list[Owned] = []
        """Parameters of a stored branch, which have to be the same in backward."""
        self.replay: Replay | None = None
        """How the branch is run again in backward, if it is."""
        if torch.is_grad_enabled() and not self.oracle:
            if coupling.invertible and self.number < chain.stored_from and branch.recomputable:
                self.replay = Replay(branch.path, self.x, self.through, branch.mutates_input)
                self.replay.kept = KeptOutputs() if chain.keeps_attention else None
                self.saved = SavedTensors(branch.path, self.tape.comparison, self.replay.modules)
            if branch.module is not None:
                self.add_module(branch.module, branch.path)

    def add_module(self, module: nn.Module, path: str) -> None:
        """`module` is about to run as part of the branch."""
        if self.replay is not None:
            self.replay.add_module(module, path, self.branch.writes)
        elif torch.is_grad_enabled() and not self.oracle:
            self.owned += [Owned.found(f"{path}.{name}", p, wholly=True) for name, p in module.named_parameters()]

    def given(self) -> torch.Tensor:
        """What the branch is called with: the input, or a copy for a block that writes to it."""
        return self.x.clone() if self.branch.mutates_input else self.x

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the run of the branch; what it saves is dropped if it is run again (Rule 1)."""
        if self.replay is None:
            with branch_run(None):
                yield
            return
        self.replay.begins()
        kept = self.replay.kept
        keeping = nullcontext() if kept is None else kept.first()
        with branch_run(BranchRun(self.replay, self.tape.comparison)), self.saved.dropped(), keeping:
            yield
        self.replay.ran()

    def take(self, out: torch.Tensor) -> torch.Tensor:
        """The new stream in place of `out = x + f(x)`.

        Raises:
            ConversionError: the block returns a stream of another shape than it was given.
            FixedPointRangeError: it returns something that is not a number.
        """
        if out.shape != self.x.shape:
            raise ConversionError(
                f"{self.branch.path} returned a stream of shape {tuple(out.shape)} for one of shape "
                f"{tuple(self.x.shape)}, which it did not when it was analysed; convert with example arguments like "
                "these, or exclude it"
            )
        if self.oracle:
            new, partner = self._as_oracle(out)
        elif self.replay is not None and self._may_be_asked_for(out):
            new, partner = self._on_tape(self.replay, out)
        else:
            new, partner = self._stored(out)
        return self._hand_on(new, partner)

    # -- the three cases

    def _on_tape(self, replay: Replay, out: torch.Tensor) -> Streams:
        """Nothing that the branch saved is kept: the tape makes it again, and goes back over the step."""
        tape = self.tape
        tape.go_to_end()  # a gradient may have been taken within the branch (Rule 4)
        self._made_by(replay, partial(tape.run_again, tape.position))  # autograd's graph refers to the tape (Rule 5)
        step = TapedStep(self.coupling, replay, tape.comparison.first(out), tape.arithmetic)

        def append() -> torch.Tensor:
            return tape.append(step, self._value(), out.detach())

        return couple(self.coupling, append, self.x, self.partner, out)

    def _stored(self, out: torch.Tensor) -> Streams:
        """Autograd keeps what the branch saved, and the state goes on without a way back."""
        if self.tape.steps:
            # The tape stays where it is: what comes after needs nothing that it could rebuild.
            self.tape.go_to_end()
            self.tape = self.tape.fork()
        check = partial(_check_unchanged, self.owned, self.branch.path) if self.owned else None
        return couple(self.coupling, partial(self._off_tape, out), self.x, self.partner, out, check)

    def _as_oracle(self, out: torch.Tensor) -> Streams:
        """The values of `_stored`, with the gradients of the equations; those of the rounding to the grid are 1."""
        assert not self.tape.steps
        self.tape = self.tape.fork()
        wide = self._wide
        formula, partner = self.coupling.equations(self.x.to(wide), self.partner, out.to(wide))
        with torch.no_grad():
            value = self._off_tape(out)
        return straight_through(value, formula.to(out.dtype)), partner

    # -- what they share

    def _may_be_asked_for(self, out: torch.Tensor) -> bool:
        """Was anything saved, or does anything here need a gradient?"""
        return self.saved.any or any(t is not None and t.requires_grad for t in (out, self.x, self.partner))

    def _value(self) -> torch.Tensor:
        """The input's values: those of the state, where the branch has written to the input since."""
        if version_of(self.x) == self.version and not self.x.is_inference():
            return self.x.detach()
        return self.tape.arithmetic.decode(self.tape.state.stream, self.through).to(self.x.dtype)

    def _off_tape(self, out: torch.Tensor) -> torch.Tensor:
        tape, magnitudes = self.tape, self.chain.magnitudes
        tape.bring(out.device)
        at_once = waited_for(out.device) or magnitudes is not None
        new = tape.step(self.coupling, self._value(), out.detach(), self.branch.path, at_once)
        unchecked = pass_of(self.chain).unchecked
        if not at_once and not tape.looked_at_in_backward and tape not in unchecked:
            unchecked.append(tape)
        if magnitudes is not None:
            magnitudes.add(self.coupling.max_abs(tape.state), tape.state.stream)
        return new

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.x.dtype is torch.float64 else torch.float32

    def _hand_on(self, new: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        """The state travels beside the new stream; behind the last step, that is what is read out."""
        chain, carried = self.chain, None
        if self.number < len(chain.couplings) - 1:
            carried = Carried(
                number=self.number,
                memory=memory_of(new),
                values=values_of(new),
                dtype=new.dtype,
                requires_grad=new.requires_grad,
                partner=partner,
                tape=self.tape,
                position=self.tape.position,
                seed=self.seed,
            )
        elif chain.averages:
            new = self._mean(new, partner)
        if carried is None:
            pass_of(chain).ends()
        if self.carried is not None:
            chain.carried.pop(self.x.untyped_storage(), None)  # whoever reads this stream again starts a new chain
        pass_of(chain).latest = carried
        if carried is not None:
            chain.carried[new.untyped_storage()] = carried
        return new

    def _mean(self, new: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        arithmetic, state = self.tape.arithmetic, self.tape.state
        if not self.oracle:
            return read_out(arithmetic, state, new, partner)
        q, p = (arithmetic.decode(stream, self._wide) for stream in (state.stream, state.partner))
        formula = (new.to(self._wide) + partner) / 2
        return straight_through((q + p).div(2).to(new.dtype), formula.to(new.dtype))

    def leave_open(self) -> None:
        """The forward pass ended without another step: what ran since the last one only reads the stream."""
        if self.replay is not None:
            self._made_by(self.replay, partial(self.tape.run_reader_again, self.replay))

    def _made_by(self, replay: Replay, again: Callable[[], None]) -> None:
        """`again` makes what the branch saved, and the inputs of its tiled calls."""
        self.saved.made_by(again)
        for seen in replay.tiled:
            if (call := seen.call()) is not None:
                call.reopen = self.saved.asked_by_another(again)


def _check_unchanged(owned: list[Owned], path: str) -> None:
    """Values written through `.data` are seen by no version counter, and autograd would use them."""
    for one in owned:
        what = one.change()
        if what is not None and "in place" not in what:  # that is for autograd to judge, which saved some of them
            raise ReconstructionError(
                f"{one.path} {what} between forward and backward, so the gradients of {path} would be wrong; "
                "change weights after backward"
            )
