"""One step of a reversible chain, from the stream that arrives at a branch to the stream that leaves it.

NOTE [ Reconstruction ]

A chain computes with a state of two streams: x, which the model's own loop carries from block to block, and its partner
p, the velocity or the other stream, which travels beside it (`chain`). A block's branch f is one step of the chain.
Where a block carries several tensors side by side, each is a lane with an x and a p of its own (`lane`); f reads all,
and returns a sum for each. Here it is written down for one.

Forward, with any coupling:

    step = Step(chain, (stream,), numbers, branch)  the state that goes with the stream
    with step.running():
        out = x + f(x), by the model's own code, of (x,) = step.given()
    (new,) = step.take((out,))                      (x, p), f(x) -> (x', p'); x' goes on in the place of `out`

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
from autorev.engine.carried import Carried, CarriedLane, arrive, pass_of
from autorev.engine.chain import ReversibleChain
from autorev.engine.grid import grid_at_start
from autorev.engine.host_store import HostStore
from autorev.engine.kept import KeptOutputs
from autorev.engine.lane import Lane, LaneStep
from autorev.engine.mode import ORACLE, mode
from autorev.engine.owned import Owned, version_of
from autorev.engine.replay import BranchRun, InputLike, Replay, branch_run
from autorev.engine.saved import SavedTensors
from autorev.engine.tape import Tape, TapedStep
from autorev.errors import ConversionError, ReconstructionError

Coupled = tuple[torch.Tensor, torch.Tensor]
"""(x', p') of one lane as autograd knows them: the new stream, and a partner without values, but for the oracle."""


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

    def __init__(
        self, chain: ReversibleChain, streams: tuple[torch.Tensor, ...], numbers: tuple[int, ...], branch: Branch
    ) -> None:
        """`streams`: one for each lane; `numbers`: the steps of the chain that the branch may be (several: shared
        weights).

        Raises:
            ConversionError: the state that goes with `streams` cannot be known.
            FixedPointRangeError: one of `streams` holds something that is not a number.
        """
        self.chain, self.branch = chain, branch
        self.carried, self.number, label = arrive(chain, streams, numbers)
        carried, coupling, self.keeps = self.carried, chain.couplings[self.number], chain.keeps[self.number]
        self.seed = None if carried is None else carried.seed
        if coupling.random:
            if branch.training and self.seed is None:
                self.seed = chain.seeds.draw(streams[0], chain.name)
            coupling = coupling.sample(branch.training, random.Random(f"{self.seed} {self.number}").getrandbits(8))
        self.coupling = coupling
        self.oracle = mode() == ORACLE
        # x_BTD is in the model's dtype; the partner, p_BTD float32, has no values (`autograd`). Both are known to
        # autograd, whose node `couple` joins them to `out`; the numbers are those of the tape's lanes, int32.
        self.xs: tuple[torch.Tensor, ...]
        self.partners: tuple[torch.Tensor | None, ...]
        if carried is None:
            self.tape = Tape(chain, [self._lane(stream) for stream in streams], label)
            self.through = [stream.dtype for stream in streams]
            begun = [self._begun(lane, stream) for lane, stream in zip(self.tape.lanes, streams, strict=True)]
        else:
            self.tape, self.through = carried.tape, [lane.dtype for lane in carried.lanes]
            begun = [(x, _partner_of(lane, x)) for lane, x in zip(carried.lanes, streams, strict=True)]
        self.xs, self.partners = tuple(x for x, _ in begun), tuple(partner for _, partner in begun)
        self.versions = [version_of(x) for x in self.xs]
        self.owned: list[Owned] = []
        """Parameters of a stored branch, which have to be the same in backward."""
        self.replay: Replay | None = None
        """How the branch is run again in backward, if it is."""
        if torch.is_grad_enabled() and not self.oracle:
            if coupling.invertible and self.number < chain.stored_from and branch.recomputable:
                inputs = tuple(InputLike.of(x, dtype) for x, dtype in zip(self.xs, self.through, strict=True))
                self.replay = Replay(branch.path, inputs, branch.mutates_input)
                self.replay.kept = KeptOutputs(self._host_for("attention")) if self.keeps.attention else None
                self.saved = SavedTensors(branch.path, self.tape.comparison, self.replay.modules, branch.mutates_input)
            if branch.module is not None:
                self.add_module(branch.module, branch.path)

    def _lane(self, stream: torch.Tensor) -> Lane:
        arithmetic = grid_at_start(self.chain, stream)
        return Lane(self.coupling.initial_state(arithmetic.encode(stream.detach())), arithmetic)

    def _begun(self, lane: Lane, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The chain's input as its first branch reads it, and its first partner."""
        if self.oracle:
            return straight_through(lane.decoded(stream.dtype), stream), None
        x = enter(lane.arithmetic, lane.state, stream)
        return x, self.coupling.first_partner(x)

    def add_module(self, module: nn.Module, path: str) -> None:
        """`module` is about to run as part of the branch."""
        if self.replay is not None:
            self.replay.add_module(module, path, self.branch.writes)
        elif torch.is_grad_enabled() and not self.oracle:
            self.owned += [Owned.found(f"{path}.{name}", p, wholly=True) for name, p in module.named_parameters()]

    def given(self) -> tuple[torch.Tensor, ...]:
        """What the branch is called with: the inputs, or copies for a block that writes to them."""
        return tuple(x.clone() for x in self.xs) if self.branch.mutates_input else self.xs

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

    def take(self, outs: tuple[torch.Tensor, ...], factors: tuple[float, ...] = ()) -> tuple[torch.Tensor, ...]:
        """The new streams in place of `out = factor x + f(x)`, lane by lane; without `factors` these are 1.

        Raises:
            ConversionError: the block returns a stream of another shape than it was given.
            FixedPointRangeError: it returns something that is not a number.
        """
        self.factors = factors or (1.0,) * len(outs)
        for out, x in zip(outs, self.xs, strict=True):
            if out.shape != x.shape:
                raise ConversionError(
                    f"{self.branch.path} returned a stream of shape {tuple(out.shape)} for one of shape "
                    f"{tuple(x.shape)}, which it did not when it was analysed; convert with example arguments like "
                    "these, or exclude it"
                )
        if self.oracle:
            coupled = self._as_oracle(outs)
        elif self.replay is not None and self._may_be_asked_for(outs):
            coupled = self._on_tape(self.replay, outs)
        else:
            coupled = self._stored(outs)
        return self._hand_on(coupled)

    def is_one_tiled_call(self, module: nn.Module) -> bool:
        """Was the branch one call of `module`, which is tiled, and whose tiles autograd will all ask for?"""
        tiled = [] if self.replay is None else self.replay.tiled
        alone = len(tiled) == 1 and tiled[0].module is module and not self.saved.any
        return alone and len(self.xs) == 1 and tiled[0].wholly_asked_for

    # -- the three cases

    def _on_tape(self, replay: Replay, outs: tuple[torch.Tensor, ...]) -> list[Coupled]:
        """Nothing that the branch saved is kept: the tape makes it again, and goes back over the step."""
        tape = self.tape
        tape.go_to_end()  # a gradient may have been taken within the branch (Rule 4)
        self._made_by(replay, partial(tape.run_again, tape.position))  # autograd's graph refers to the tape (Rule 5)
        kept = [
            LaneStep(tape.comparison.first(out), lane.arithmetic, lane.arithmetic, factor)
            for lane, out, factor in zip(tape.lanes, outs, self.factors, strict=True)
        ]
        step = TapedStep(self.coupling, replay, kept, self._host_for("side_bits"))
        with torch.no_grad():
            news = tape.append(step, self._values(), [out.detach() for out in outs])
        return self._coupled(outs, news)

    def _stored(self, outs: tuple[torch.Tensor, ...]) -> list[Coupled]:
        """Autograd keeps what the branch saved, and the state goes on without a way back."""
        if self.tape.steps:
            # The tape stays where it is: what comes after needs nothing that it could rebuild.
            self.tape.go_to_end()
            self.tape = self.tape.fork()
        with torch.no_grad():
            news = self._off_tape(outs)
        check = partial(_check_unchanged, self.owned, self.branch.path) if self.owned else None
        return self._coupled(outs, news, check)

    def _coupled(
        self, outs: tuple[torch.Tensor, ...], news: list[torch.Tensor], check: Callable[[], None] | None = None
    ) -> list[Coupled]:
        every = zip(news, self.xs, self.partners, outs, self.factors, strict=True)
        return [couple(self.coupling, new, x, p, out, factor, check) for new, x, p, out, factor in every]

    def _as_oracle(self, outs: tuple[torch.Tensor, ...]) -> list[Coupled]:
        """The values of `_stored`, with the gradients of the equations; those of the rounding to the grid are 1."""
        assert not self.tape.steps
        self.tape = self.tape.fork()
        with torch.no_grad():
            news = self._off_tape(outs)
        coupled = []
        for new, x, p, out, factor in zip(news, self.xs, self.partners, outs, self.factors, strict=True):
            wide = _wide(x)
            p = p if p is None else factor * p
            formula, partner = self.coupling.equations(factor * x.to(wide), p, out.to(wide))
            coupled.append((straight_through(new, formula.to(out.dtype)), partner))
        return coupled

    # -- what they share

    def _host_for(self, what: str) -> HostStore | None:
        return self.chain.host if what in self.keeps.on_host else None

    def _may_be_asked_for(self, outs: tuple[torch.Tensor, ...]) -> bool:
        """Was anything saved, or does anything here need a gradient?"""
        return self.saved.any or any(t is not None and t.requires_grad for t in (*outs, *self.xs, *self.partners))

    def _values(self) -> list[torch.Tensor]:
        """The inputs' values: those of the state, where the branch has written to an input since."""
        values = []
        for x, version, lane, dtype in zip(self.xs, self.versions, self.tape.lanes, self.through, strict=True):
            as_it_was = version_of(x) == version and not x.is_inference()
            values.append(x.detach() if as_it_was else lane.decoded(dtype).to(x.dtype))
        return values

    def _off_tape(self, outs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        tape, magnitudes = self.tape, self.chain.magnitudes
        for lane, out in zip(tape.lanes, outs, strict=True):
            lane.bring(out.device)
        values, given = self._values(), [out.detach() for out in outs]
        news = tape.step(self.coupling, values, given, self.branch.path, self.factors, magnitudes is not None)
        unchecked = pass_of(self.chain).unchecked
        is_known = all(lane.peak.largest is None for lane in tape.lanes) or tape.looked_at_in_backward
        if not is_known and tape not in unchecked:
            unchecked.append(tape)
        if magnitudes is not None:
            for number, lane in enumerate(tape.lanes):
                scale = abs(lane.arithmetic.factor)  # of floats: while a grid is being chosen there is none
                magnitudes[number].add(self.coupling.max_abs(lane.state) * scale, lane.state.stream * scale)
        return news

    def _hand_on(self, coupled: list[Coupled]) -> tuple[torch.Tensor, ...]:
        """The state travels beside the new streams; behind the last step, that is what is read out."""
        chain, carried, news = self.chain, None, tuple(new for new, _ in coupled)
        if self.number < len(chain.couplings) - 1:
            lanes = tuple(CarriedLane.of(new, partner) for new, partner in coupled)
            carried = Carried(self.number, lanes, self.tape, self.tape.position, self.seed)
        elif chain.averages:
            news = tuple(self._mean(lane, *both) for lane, both in zip(self.tape.lanes, coupled, strict=True))
        if carried is None:
            pass_of(chain).ends()
        if self.carried is not None:
            chain.carried.pop(self.xs[0].untyped_storage(), None)  # whoever reads this again starts a new chain
        pass_of(chain).latest = carried
        if carried is not None:
            chain.carried[news[0].untyped_storage()] = carried
        return news

    def _mean(self, lane: Lane, new: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        if not self.oracle:
            return read_out(lane.arithmetic, lane.state, new, partner)
        wide = _wide(new)
        q, p = (lane.arithmetic.decode(stream, wide) for stream in (lane.state.stream, lane.state.partner))
        formula = (new.to(wide) + partner) / 2
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


def _partner_of(carried: CarriedLane, x: torch.Tensor) -> torch.Tensor | None:
    """The partner that travelled beside `x`."""
    partner = carried.partner
    if partner is None:
        return None
    if carried.requires_grad and (not x.requires_grad or x.is_leaf):
        partner = partner.detach()  # as the stream was since: the gradients of both end here
    return partner.to(x.device)


def _wide(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype is torch.float64 else torch.float32


def _check_unchanged(owned: list[Owned], path: str) -> None:
    """Values written through `.data` are seen by no version counter, and autograd would use them."""
    for one in owned:
        what = one.change()
        if what is not None and "in place" not in what:  # that is for autograd to judge, which saved some of them
            raise ReconstructionError(
                f"{one.path} {what} between forward and backward, so the gradients of {path} would be wrong; "
                "change weights after backward"
            )
