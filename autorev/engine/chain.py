"""A reversible chain at run time: where a block's call finds the state that the block before it left, and one step.

The model's own loop carries the stream from block to block. The rest of the state travels beside it: it is looked up by
the stream's memory (the tensor object may change on the way: FSDP and backward hooks hand on an alias). A stream that
is not what a block of this chain returned (replaced, written to, cut off from autograd, or read a second time) begins
anew, with the first state of the coupling.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from autorev.couplings.arithmetic import Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.engine.couple import couple, enter, read_out
from autorev.engine.grid import advance, check_range
from autorev.engine.replay import Branch, Replay
from autorev.engine.tape import Tape, TapedStep
from autorev.errors import ConversionError

REVERSIBLE, ORACLE, ORIGINAL = "reversible", "oracle", "original"
_modes = [REVERSIBLE]
"""The last one counts. For all threads: autograd runs backward, and second runs in it, in threads of its own."""


@contextmanager
def running(mode: str) -> Iterator[None]:
    """While it lasts, converted models run reversibly, as the ORACLE (the same coupling, every activation stored by
    ordinary autograd), or as the ORIGINAL blocks."""
    _modes.append(mode)
    try:
        yield
    finally:
        _modes.pop()


def mode() -> str:
    """How converted models run at the moment."""
    return _modes[-1]


@dataclass(eq=False)
class ReversibleChain:
    """What the blocks of one chain share. Everything that belongs to one forward pass is elsewhere."""

    name: str
    couplings: list[Coupling]
    """One per step."""
    arithmetic: Arithmetic
    stored_from: int
    """The first step that is stored instead of recomputed."""
    averages: bool
    """Is the read-out the mean of both streams? Otherwise it is the one the last branch was added to."""
    generator: random.Random
    """For couplings that are drawn anew in each call."""
    paths: list[str]
    """The block of each step."""
    drift: float | None = None
    """What was left of the integrity check in the last backward pass: 0 when exact."""
    largest: float | None = None
    """While a grid is being chosen: the largest value of either stream so far."""


@dataclass(frozen=True, eq=False)
class Site:
    """The branch that is run as one step."""

    module: nn.Module
    path: str
    branch: Branch
    written: tuple[str, ...]
    """Buffers that it updates, by path below `module`."""
    overwrites: bool
    """Does it add to its input in place?"""
    once: bool = False
    """Can it not be run again (it fills a cache)? Then its activations are stored."""


@dataclass(eq=False)
class _Carried:
    """The rest of the state, beside the stream that a step returned."""

    chain: ReversibleChain
    number: int
    identity: Any
    partner: torch.Tensor | None
    """The partner as autograd knows it; without values, but for the oracle. None: no gradient goes there."""
    state: State | None
    """The state, where no tape holds it."""
    tape: Tape | None
    position: int


_carried: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Storage of a stream -> what travels with it."""


def _identity(stream: torch.Tensor) -> Any:
    version = 0 if stream.is_inference() else stream._version
    return stream.storage_offset(), stream.shape, stream.stride(), stream.dtype, version, _history(stream)


def _history(stream: torch.Tensor) -> tuple[bool, bool]:
    """A stream that was cut off from autograd, or that began anew there, is not what the block returned."""
    return stream.requires_grad, stream.is_leaf


def _find(chain: ReversibleChain, stream: torch.Tensor) -> _Carried | None:
    found: _Carried | None = _carried.get(stream.untyped_storage())
    if found is None or found.chain is not chain:
        return None
    if found.identity != _identity(stream):
        if found.identity[:-1] == _identity(stream)[:-1] and not found.identity[-1][0] and not stream.is_leaf:
            raise ConversionError(
                f"a block of {chain.name} ran without gradients, and what it returned has a gradient now, as with a "
                "reentrant checkpoint: the chain's state cannot follow. Reversible blocks need no checkpoint; remove it"
            )
        return None
    if found.tape is not None and found.tape.position != found.position:
        return None  # the state went on with another reader of this stream
    return found


def last_number(chain: ReversibleChain, stream: torch.Tensor) -> int | None:
    """The step of `chain` that returned `stream`; None where it begins the chain."""
    found = _find(chain, stream)
    return None if found is None else found.number


def tape_of(stream: torch.Tensor) -> Tape | None:
    """The tape behind a stream that a step returned, for whoever wants to know what it holds."""
    found: _Carried | None = _carried.get(stream.untyped_storage())
    return None if found is None else found.tape


def take_step(
    chain: ReversibleChain, number: int, stream: torch.Tensor, site: Site, inputs: Any, last: bool
) -> tuple[Any, torch.Tensor]:
    """Run step `number` on `stream`: what the branch returned, and the new stream in place of `x + f(x)`.

    `last`: no further step follows, so no state is handed on and the read-out is due.

    Raises:
        ConversionError: the block returns a stream of another shape than it was given.
        FixedPointRangeError: an activation does not fit the grid.
    """
    coupling = chain.couplings[number].drawn(site.module.training, chain.generator)
    if mode() == ORACLE:
        return _oracle_step(chain, number, coupling, stream, site, inputs, last)
    found = _find(chain, stream)
    at = _arrive(chain, number, coupling, stream, found)
    step: tuple[_OnTape, TapedStep] | None = None
    if torch.is_grad_enabled() and coupling.invertible and number < chain.stored_from and not site.once:
        returned, out, step = _recomputed(site, coupling, at.x, inputs)
    else:
        returned, out = _checked(site, at.x, *site.branch(_own(at.x, site), inputs))
    if step is not None and any(t is not None and t.requires_grad for t in (out, at.x, at.partner)):
        tape = at.on_tape(chain)
        on_tape, taped = step
        on_tape.tape, on_tape.index = tape, tape.position
        new, partner = couple(coupling, lambda: tape.append(taped, at.x.detach(), out.detach()), at.x, at.partner, out)
    else:
        # The tape, if there is one, stays where it is: what comes after needs nothing that it could rebuild.
        state = at.off_tape()
        new, partner = couple(
            coupling, lambda: _advance(chain, site, coupling, state, at.x, out), at.x, at.partner, out
        )
    if found is not None:
        _carried.pop(stream.untyped_storage(), None)  # whoever reads this stream once more begins anew
    if not last:
        position = 0 if at.tape is None else at.tape.position
        _carried[new.untyped_storage()] = _Carried(chain, number, _identity(new), partner, at.state, at.tape, position)
    elif chain.averages:
        new = read_out(chain.arithmetic, at.now(), new, partner)
    return returned, new


@dataclass(eq=False)
class _Arrived:
    """Where a step begins: its input, and the state, which either a tape holds or nobody else."""

    x: torch.Tensor
    partner: torch.Tensor | None
    state: State | None
    tape: Tape | None
    fresh: bool

    def now(self) -> State:
        """The state."""
        if self.state is not None:
            return self.state
        assert self.tape is not None
        return self.tape.state

    def on_tape(self, chain: ReversibleChain) -> Tape:
        """The tape that holds the state from now on."""
        if self.tape is None:
            assert self.state is not None
            self.tape, self.state = Tape(chain, self.state, self.fresh), None
        return self.tape

    def off_tape(self) -> State:
        """A state apart from any tape."""
        if self.state is None:
            self.state, self.tape = self.now().clone(), None
        return self.state


def _arrive(
    chain: ReversibleChain, number: int, coupling: Coupling, stream: torch.Tensor, found: _Carried | None
) -> _Arrived:
    if found is not None:
        return _Arrived(stream, found.partner, found.state, found.tape, fresh=False)
    if number and torch._C._current_graph_task_id() != -1:
        raise ConversionError(
            f"a block of {chain.name} was run again in backward, apart from the blocks before it, as with a checkpoint "
            "around it. Reversible blocks need no checkpoint; remove it, or put one around the whole chain"
        )
    state = coupling.begin(chain.arithmetic.encode(stream.detach()))
    if isinstance(chain.arithmetic, FixedPoint):
        check_range(chain.arithmetic, state.stream, f"the input of {chain.name}", None, at_once=not stream.is_cuda)
    x = enter(chain.arithmetic, state, stream)
    return _Arrived(x, coupling.first_partner(x), state, None, fresh=True)


def _own(x: torch.Tensor, site: Site) -> torch.Tensor:
    return x.clone() if site.overwrites else x


def _advance(
    chain: ReversibleChain, site: Site, coupling: Coupling, state: State, x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """A step of a state that nobody will need to go back from; returns the new stream."""
    advance(coupling, state, out.detach(), x.detach(), chain.arithmetic, site.path)
    if chain.largest is not None:
        reach = coupling.reach(state)
        chain.largest = chain.largest if reach <= chain.largest else reach  # NaN included
    if isinstance(chain.arithmetic, FixedPoint):
        check_range(chain.arithmetic, state.stream, site.path, None, at_once=True)
    return chain.arithmetic.decode(state.stream, out.dtype)


class _OnTape:
    """The function given to `checkpoint`: runs the branch on its input once, and later asks the tape for that input."""

    def __init__(self, site: Site, x: torch.Tensor, inputs: Any) -> None:
        self.site, self.first = site, [(x, inputs)]
        self.tape: Tape | None = None
        self.index = 0

    def __call__(self) -> tuple[Any, torch.Tensor]:
        if self.first:
            x, inputs = self.first.pop()
            return _checked(self.site, x, *self.site.branch(_own(x, self.site), inputs))
        assert self.tape is not None
        return self.tape.evaluate_again(self.index)


def _recomputed(
    site: Site, coupling: Coupling, x: torch.Tensor, inputs: Any
) -> tuple[Any, torch.Tensor, tuple[_OnTape, TapedStep]]:
    """The branch, with nothing kept of what it saved; see NOTE [ Reconstruction ], Rule 1."""
    replay = Replay(site.module, site.path, site.branch, x, inputs, site.written)
    on_tape = _OnTape(site, x, inputs)
    returned, out = checkpoint(on_tape, use_reentrant=False, early_stop=False, preserve_rng_state=False)
    replay.ran()
    return returned, out, (on_tape, TapedStep(coupling, replay, x.dtype, x.requires_grad, site.overwrites))


def _checked(site: Site, x: torch.Tensor, returned: Any, out: torch.Tensor) -> tuple[Any, torch.Tensor]:
    if out.shape != x.shape:
        raise ConversionError(
            f"{site.path} returned a stream of shape {tuple(out.shape)} for one of shape {tuple(x.shape)}, which it "
            "did not when it was analysed; convert with example arguments like these, or exclude it"
        )
    return returned, out


def _oracle_step(
    chain: ReversibleChain,
    number: int,
    coupling: Coupling,
    stream: torch.Tensor,
    site: Site,
    inputs: Any,
    last: bool,
) -> tuple[Any, torch.Tensor]:
    """The same numbers with nothing rebuilt: gradients go straight through the rounding to the grid."""
    found = _find(chain, stream)
    if found is None:
        state = coupling.begin(chain.arithmetic.encode(stream.detach()))
        x = _straight_through(chain.arithmetic.decode(state.stream, stream.dtype), stream)
        partner = None
    else:
        assert found.state is not None
        state, x, partner = found.state.clone(), stream, found.partner
    returned, out = _checked(site, x, *site.branch(_own(x, site), inputs))
    wide = x.dtype if x.dtype is torch.float64 else torch.float32
    formula, new_partner = coupling.plain(x.to(wide), partner, out.to(wide))
    with torch.no_grad():
        value = _advance(chain, site, coupling, state, x, out)
    new = _straight_through(value, formula.to(out.dtype))
    if last and chain.averages:
        mean = chain.arithmetic.decode(state.stream, wide).add(chain.arithmetic.decode(state.partner, wide)).div(2)
        new = _straight_through(mean.to(out.dtype), ((new.to(wide) + new_partner) / 2).to(out.dtype))
    if found is not None:
        _carried.pop(stream.untyped_storage(), None)
    if not last:
        _carried[new.untyped_storage()] = _Carried(chain, number, _identity(new), new_partner, state, None, 0)
    return returned, new


def _straight_through(value: torch.Tensor, formula: torch.Tensor) -> torch.Tensor:
    return value.detach() + (formula - formula.detach())
