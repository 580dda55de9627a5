"""One step of a reversible chain, from the stream that arrives at a branch to the stream that leaves it.

    step = open_step(chain, arrival, site)
    with step.running():
        out = x + f(x), by the model's own code, of x = step.x
    new = step.close(out)

Three kinds: recomputed (on a tape, nothing that the branch saves is kept), stored (the branch's activations are kept,
no state is needed to come back), and the oracle (the same code and coupling, by ordinary autograd).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from autorev.couplings.arithmetic import Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.engine.chain import Arrival, Carried, ReversibleChain, leave, memory_of
from autorev.engine.couple import couple, enter, read_out
from autorev.engine.digest import Comparison
from autorev.engine.grid import advance, grid_at_start
from autorev.engine.mode import ORACLE, mode
from autorev.engine.modules import Owned, version_of
from autorev.engine.replay import Branch, Replay
from autorev.engine.saved import SavedTensors
from autorev.engine.tape import InputLike, Tape, TapedStep
from autorev.errors import ConversionError, ReconstructionError


@dataclass(frozen=True, eq=False)
class Site:
    """The branch that is run as one step."""

    module: nn.Module | None
    """The module that it is the whole of; None: the step's own recording adds modules as they are called."""
    path: str
    training: bool
    writes: Callable[[nn.Module, str], bool]
    """(module, name): does the branch update that buffer?"""
    overwrites: bool = False
    """Does it add to its input in place?"""
    once: bool = False
    """Can it not be run again (it fills a cache)? Then its activations are stored."""


def open_step(chain: ReversibleChain, arrival: Arrival, site: Site) -> Step:
    """Begin the step that `arrival` has come to."""
    number = arrival.number
    coupling, seed = chain.couplings[number], None if arrival.carried is None else arrival.carried.seed
    if coupling.random and site.training and seed is None:
        seed = chain.seed_for(arrival.stream)
    coupling = coupling.drawn(site.training, random.Random(f"{seed} {number}").getrandbits(8))
    if mode() == ORACLE:
        return OracleStep(chain, arrival, site, coupling, seed)
    recomputed = torch.is_grad_enabled() and coupling.invertible and number < chain.stored_from and not site.once
    return (RecomputedStep if recomputed else StoredStep)(chain, arrival, site, coupling, seed)


class Step:
    """The base: where the step begins."""

    def __init__(
        self, chain: ReversibleChain, arrival: Arrival, site: Site, coupling: Coupling, seed: int | None
    ) -> None:
        self.seed = seed
        self.chain, self.arrival, self.site, self.coupling = chain, arrival, site, coupling
        self.number = arrival.number
        self.last = self.number == len(chain.couplings) - 1
        carried = arrival.carried
        self.tape: Tape | None = None
        self.state: State | None = None
        """Where no tape holds it."""
        stream = arrival.stream
        self.through = stream.dtype
        if carried is None:
            self.arithmetic = grid_at_start(chain.arithmetic, stream, chain.name)
            self.state = coupling.begin(self.arithmetic.encode(stream.detach()))
            self.x, self.partner = self._enter(stream)
            self.version = version_of(self.x)
            return
        self.through = carried.dtype
        self.tape, self.state, self.x, self.partner = carried.tape, carried.state, stream, carried.partner
        self.version = version_of(self.x)
        self.arithmetic = carried.arithmetic if self.tape is None else self.tape.arithmetic
        if self.partner is not None and arrival.cut:
            self.partner = self.partner.detach()
        if self.partner is not None and self.partner.device != stream.device:
            self.partner = self.partner.to(stream.device)

    def _enter(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.state is not None
        x = enter(self.arithmetic, self.state, stream)
        return x, self.coupling.first_partner(x)

    def given(self) -> torch.Tensor:
        """What the branch is called with: the input, or a copy for a block that writes to it."""
        return self.x.clone() if self.site.overwrites else self.x

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the run of the branch."""
        yield

    def close(self, out: torch.Tensor) -> torch.Tensor:
        """The new stream in place of `out = x + f(x)`.

        Raises:
            ConversionError: the block returns a stream of another shape than it was given.
            FixedPointRangeError: it returns something that is not a number.
        """
        if out.shape != self.x.shape:
            raise ConversionError(
                f"{self.site.path} returned a stream of shape {tuple(out.shape)} for one of shape "
                f"{tuple(self.x.shape)}, which it did not when it was analysed; convert with example arguments like "
                "these, or exclude it"
            )
        new, partner = self._couple(out)
        carried = None
        if not self.last:
            carried = Carried(
                chain=self.chain,
                number=self.number,
                memory=memory_of(new),
                dtype=new.dtype,
                requires_grad=new.requires_grad,
                partner=partner,
                state=self.state,
                tape=self.tape,
                position=0 if self.tape is None else self.tape.position,
                arithmetic=self.arithmetic,
                seed=self.seed,
            )
        elif self.chain.averages:
            new = self._read_out(new, partner)
        leave(self.chain, self.arrival, new, carried)
        return new

    def _couple(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError

    def _value(self, state: State, arithmetic: Arithmetic) -> torch.Tensor:
        """The input's values: those of the state, where the branch has written to the input since."""
        if version_of(self.x) == self.version and not self.x.is_inference():
            return self.x.detach()
        return arithmetic.decode(state.stream, self.through).to(self.x.dtype)

    def _read_out(self, new: torch.Tensor, partner: torch.Tensor | None) -> torch.Tensor:
        state = self.state if self.tape is None else self.tape.state
        assert state is not None
        return read_out(self.arithmetic if self.tape is None else self.tape.arithmetic, state, new, partner)

    def _advance_state(self, out: torch.Tensor) -> torch.Tensor:
        """A step of a state that nobody will need to go back from; returns the new stream."""
        state, chain = self.state, self.chain
        assert state is not None
        if state.stream.device != out.device:
            state.stream, state.partner = state.stream.to(out.device), state.partner.to(out.device)
        value = self._value(state, self.arithmetic)
        taken = advance(self.coupling, state, out.detach(), value, self.arithmetic, self.site.path, at_once=True)
        if taken.dropped is not None:
            chain.coarsen(self.arithmetic, taken.arithmetic, self.site.path)
        self.arithmetic = taken.arithmetic
        if chain.reach is not None:
            chain.reach.add(self.coupling.reach(state), state.stream)
        return self.arithmetic.decode(state.stream, out.dtype)


class StoredStep(Step):
    """The activations of the branch are kept; its state is apart from any tape."""

    def __init__(
        self, chain: ReversibleChain, arrival: Arrival, site: Site, coupling: Coupling, seed: int | None
    ) -> None:
        super().__init__(chain, arrival, site, coupling, seed)
        self.owned: list[Owned] = []
        if torch.is_grad_enabled() and site.module is not None:
            self.owned = [Owned.found(f"{site.path}.{name}", p) for name, p in site.module.named_parameters()]

    def _couple(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.tape is not None:
            # The tape stays where it is: what comes after needs nothing that it could rebuild.
            self.tape.go_to_end()  # a gradient may have been taken within the branch
            self.state, self.tape = self.tape.state.clone(), None
        check = _unchanged(self.owned, self.site.path) if self.owned else None
        return couple(self.coupling, lambda: self._advance_state(out), self.x, self.partner, out, check)


def _unchanged(owned: list[Owned], path: str) -> Callable[[], None]:
    """Values written through `.data` are seen by no version counter, and autograd would use them."""

    def check() -> None:
        for one in owned:
            what = one.change()
            if what is not None and "in place" not in what:  # that is for autograd to judge, which saved some of them
                raise ReconstructionError(
                    f"{one.path} {what} between forward and backward, so the gradients of {path} would be wrong; "
                    "change weights after backward"
                )

    return check


class RecomputedStep(Step):
    """Nothing that the branch saves is kept; see NOTE [ Reconstruction ]."""

    def __init__(
        self, chain: ReversibleChain, arrival: Arrival, site: Site, coupling: Coupling, seed: int | None
    ) -> None:
        super().__init__(chain, arrival, site, coupling, seed)
        self.replay = Replay(site.path, self.x)
        if site.module is not None:
            self.replay.add_module(site.module, site.path, site.writes)
        self.comparison = (
            self.tape.comparison if self.tape is not None else Comparison(isinstance(self.arithmetic, FixedPoint))
        )
        self.again = _Again(site.path)
        self.saved = SavedTensors(site.path, self.again, self.comparison, self.replay.modules)
        self.overwrites = site.overwrites

    @property
    def like(self) -> InputLike:
        """What the branch's input is like."""
        return InputLike.of(self.x, self.through)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the run of the branch: what it saves is dropped."""
        self.replay.begins()
        with self.saved.dropped():
            yield
        self.replay.ran()

    def runs_again_by(self, branch: Branch) -> None:
        """How the branch is run again; it holds neither its input nor a history."""
        self.replay.again = branch

    def _couple(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.saved.any and not any(t is not None and t.requires_grad for t in (out, self.x, self.partner)):
            if self.tape is not None:
                self.tape.go_to_end()
                self.state, self.tape = self.tape.state.clone(), None
            return couple(self.coupling, lambda: self._advance_state(out), self.x, self.partner, out)
        tape = self._on_tape()
        tape.go_to_end()
        self.again.tape, self.again.index = tape, tape.position
        value = self._value(tape.state, tape.arithmetic)
        taped = TapedStep(
            self.coupling, self.replay, self.like, self.overwrites, tape.comparison.first(out), tape.arithmetic
        )
        new = couple(self.coupling, lambda: tape.append(taped, value, out.detach()), self.x, self.partner, out)
        self.arithmetic = tape.arithmetic
        return new

    def _on_tape(self) -> Tape:
        """The tape that holds the state from now on."""
        if self.tape is None:
            assert self.state is not None
            label = self.arrival.label if self.arrival.carried is None else None
            self.tape, self.state = Tape(self.chain, self.state, self.arithmetic, label, self.comparison), None
        return self.tape

    def leave_open(self) -> None:
        """The forward pass ended without another step: what ran since the last one only reads the stream."""
        tape = self._on_tape()
        self.again.tape, self.again.last = tape, (self.replay, self.like, self.overwrites)
        carried = self.arrival.carried
        if carried is not None:
            carried.tape, carried.state, carried.position = tape, None, tape.position


class _Again:
    """What a saved tensor is made again by: asks the tape. Holds no input, and no node of autograd's graph."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tape: Tape | None = None
        self.index = 0
        self.last: tuple[Replay, InputLike, bool] | None = None

    def __call__(self) -> None:
        if self.tape is None:
            raise ReconstructionError(
                f"a gradient was taken through {self.path} while it was running (`torch.autograd.grad` in its forward, "
                "or in a hook), before the step that it is could be completed; exclude it from the conversion"
            )
        if self.last is not None:
            self.tape.evaluate_last(*self.last)
        else:
            self.tape.evaluate_again(self.index)


class OracleStep(Step):
    """The same numbers with nothing rebuilt: gradients go straight through the rounding to the grid."""

    def _enter(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.state is not None
        return _straight_through(self.arithmetic.decode(self.state.stream, stream.dtype), stream), None

    def _couple(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.state is not None
        self.state = self.state.clone()
        self.wide = self.x.dtype if self.x.dtype is torch.float64 else torch.float32
        formula, partner = self.coupling.plain(self.x.to(self.wide), self.partner, out.to(self.wide))
        with torch.no_grad():
            value = self._advance_state(out)
        return _straight_through(value, formula.to(out.dtype)), partner

    def _read_out(self, new: torch.Tensor, partner: torch.Tensor | None) -> torch.Tensor:
        assert self.state is not None
        assert partner is not None
        q, p = (self.arithmetic.decode(stream, self.wide) for stream in (self.state.stream, self.state.partner))
        return _straight_through((q + p).div(2).to(new.dtype), ((new.to(self.wide) + partner) / 2).to(new.dtype))


def _straight_through(value: torch.Tensor, formula: torch.Tensor) -> torch.Tensor:
    return value.detach() + (formula - formula.detach())
