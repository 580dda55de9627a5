"""A reversible chain at run time: what its blocks share, and where a block's call finds the state that goes with its
input.

The model's own loop carries the stream from block to block. The rest of the state travels beside it, and follows the
stream by what it is: by its memory (the tensor object may change on the way: FSDP and backward hooks hand on an alias;
`detach` another history), and, where a hook, a cast or another device has made a copy of it, by its values. A stream
that is neither (replaced, written to, or read a second time) begins a new chain, with velocity 0; that is said once,
with the place.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from autorev.couplings.arithmetic import Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.engine.digest import digest, looked_at
from autorev.engine.grid import say_coarsened
from autorev.engine.mode import ORACLE as ORACLE
from autorev.engine.mode import ORIGINAL as ORIGINAL
from autorev.engine.mode import REVERSIBLE as REVERSIBLE
from autorev.engine.mode import mode
from autorev.engine.mode import running as running
from autorev.engine.modules import version_of
from autorev.engine.tape import Tape
from autorev.errors import ConversionError

MOST_SEEDS = 256


@dataclass(eq=False)
class Reach:
    """How far the streams of a chain go in one forward pass."""

    largest: float = 0.0
    """The largest value that the grid has to hold."""
    size_behind: float = math.inf
    """The smallest root mean square of the stream since it was that large."""

    def add(self, largest: float, stream: torch.Tensor) -> None:
        """A step was taken; NaN stays."""
        size = float(stream.float().square().mean().sqrt())
        if largest > self.largest or largest != largest:
            self.largest, self.size_behind = largest, size
        elif size:
            self.size_behind = min(self.size_behind, size)


@dataclass(eq=False)
class ReversibleChain:
    """What the blocks of one chain share. Everything that belongs to one forward pass is elsewhere."""

    name: str
    couplings: list[Coupling]
    """One per step."""
    arithmetic: Arithmetic
    """What a forward pass begins with."""
    stored_from: int
    """The first step that is stored instead of recomputed."""
    averages: bool
    """Is the read-out the mean of both streams? Otherwise it is the one the last branch was added to."""
    paths: list[str]
    """The block of each step."""
    drifts: dict[str, float] = field(default_factory=dict)
    """What was left of the integrity check in the last backward pass: 0 when exact. By the chain's name; where it began
    anew within a forward pass, each further piece has an entry of its own."""
    reach: Reach | None = None
    """While a grid is being chosen: how far the streams went so far."""
    grids: dict[str, int] = field(default_factory=dict)
    """The config's entry of fraction bits by chain, kept up to date."""
    seeds: dict[int, int] = field(default_factory=dict)
    """Of the latest forward passes, by their inputs; see `seed_for`."""
    restarts: dict[str, str] = field(default_factory=dict)
    """Blocks at which the chain began anew within a forward pass, with the reason; each was said once."""

    def seed_for(self, stream: torch.Tensor) -> int:
        """What a forward pass draws its couplings from. A pass that is run again in backward (an outer checkpoint, with
        or without `preserve_rng_state`) has the same input, and is given the same seed.

        Raises:
            ConversionError: it is run again, and its first run is not remembered.
        """
        drawn = int(torch.randint(2**62, (), device="cpu")) if looked_at() else 0
        found = digest(stream, exact=True)
        key = int(found) if isinstance(found, int | torch.Tensor) else 0
        if torch._C._current_graph_task_id() == -1:
            self.seeds[key] = drawn
            if len(self.seeds) > MOST_SEEDS:
                del self.seeds[next(iter(self.seeds))]
        elif key not in self.seeds:
            raise ConversionError(
                f"{self.name} is run again in backward, and its signs of the first run are not known any more (the "
                f"latest {MOST_SEEDS} are); call backward sooner, or remove the checkpoint around it"
            )
        return self.seeds[key]

    def coarsen(self, before: Arithmetic, after: Arithmetic, path: str) -> None:
        """A stream outgrew its grid: further forward passes begin with the coarser one."""
        assert isinstance(before, FixedPoint)
        assert isinstance(after, FixedPoint)
        usual = self.arithmetic
        if not isinstance(usual, FixedPoint) or after.fraction_bits >= usual.fraction_bits:
            return  # begun on a finer grid, for a small input
        self.arithmetic = after
        if self.name in self.grids:
            self.grids[self.name] = after.fraction_bits
        say_coarsened(self.name, path, before, after)


@dataclass(eq=False)
class Carried:
    """The rest of the state, beside the stream that a step returned."""

    chain: ReversibleChain
    number: int
    memory: tuple[Any, ...]
    dtype: torch.dtype
    """In which the stream was handed on."""
    requires_grad: bool
    partner: torch.Tensor | None
    """The partner as autograd knows it; without values, but for the oracle. None: no gradient goes there."""
    state: State | None
    """The state, where no tape holds it."""
    tape: Tape | None
    position: int
    arithmetic: Arithmetic
    seed: int | None
    """What this pass draws its couplings from, where they are random."""

    def now(self) -> State:
        """The state."""
        if self.state is not None:
            return self.state
        assert self.tape is not None
        return self.tape.state


_carried: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Storage of a stream -> what travels with it."""


def memory_of(stream: torch.Tensor) -> tuple[Any, ...]:
    """Which part of its storage, and how often written to."""
    return stream.storage_offset(), stream.shape, stream.stride(), stream.dtype, version_of(stream)


# -- one forward pass


@dataclass(eq=False)
class Pass:
    """One forward pass through a chain."""

    latest: Carried | None = None
    """What the last step left, for a stream that was copied since."""
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """The arguments of the module that holds the loop; None where blocks are called one by one."""


_passes: ContextVar[dict[ReversibleChain, Pass] | None] = ContextVar("autorev passes", default=None)


class _Loose(threading.local):
    """Passes of blocks that are called one by one, outside of the module that holds their loop."""

    def __init__(self) -> None:
        self.passes: WeakKeyDictionary[ReversibleChain, Pass] = WeakKeyDictionary()


_loose = _Loose()


@contextmanager
def one_pass(chains: Sequence[ReversibleChain], given: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[None]:
    """Around the forward of the module that holds the loop, called with `given`: no state is kept beyond it."""
    token = _passes.set({**(_passes.get() or {}), **{chain: Pass(given=given) for chain in chains}})
    try:
        yield
    finally:
        _passes.reset(token)


def pass_of(chain: ReversibleChain) -> Pass:
    """The forward pass that this thread is in."""
    found = (_passes.get() or {}).get(chain)
    return found if found is not None else _loose.passes.setdefault(chain, Pass())


# -- a stream arrives at a block


@dataclass(eq=False)
class Arrival:
    """A stream that reaches a block, and the state that goes with it."""

    stream: torch.Tensor
    number: int
    """The step that comes next."""
    carried: Carried | None
    """None: the chain begins here."""
    cut: bool
    """Was it detached since the step that returned it? Then the velocity's gradient ends here, too."""
    label: str
    """The name of the piece of the chain that begins here."""


def arrive(chain: ReversibleChain, stream: torch.Tensor, numbers: Sequence[int]) -> Arrival:
    """Find the state of `stream`. `numbers`: steps that the block which it reaches may be (several: shared weights).

    Raises:
        ConversionError: the state cannot be known, as under a checkpoint around a single block.
    """
    here = pass_of(chain)
    found = _by_memory(chain, stream)
    if found is None and here.latest is not None and any(number > here.latest.number for number in numbers):
        found = here.latest if _is_copy(here.latest, stream) else None
    found = _still_there(found)
    number = numbers[0] if found is None else next((n for n in numbers if n > found.number), numbers[0])
    label = chain.name
    if found is None:
        if here.latest is not None and number > here.latest.number:
            label = f"{chain.name}, anew from {chain.paths[number]}"
            _say_restart(chain, here.latest, number, stream)
        elif number and torch._C._current_graph_task_id() != -1:
            raise ConversionError(
                f"a block of {chain.name} was run again in backward, apart from the blocks before it, as with a "
                "checkpoint around it. Reversible blocks need no checkpoint; remove it, or put one around the whole "
                "chain"
            )
        elif torch.is_grad_enabled() and mode() == REVERSIBLE:
            chain.drifts.clear()  # of an earlier forward pass
    cut = found is not None and found.requires_grad and (not stream.requires_grad or stream.is_leaf)
    return Arrival(stream, number, found, cut, label)


def leave(chain: ReversibleChain, arrival: Arrival, new: torch.Tensor, carried: Carried | None) -> None:
    """A step returned `new`; `carried` goes on with it (None: the chain has ended)."""
    if arrival.carried is not None:
        _carried.pop(arrival.stream.untyped_storage(), None)  # whoever reads this stream once more begins anew
    pass_of(chain).latest = carried
    if carried is not None:
        _carried[new.untyped_storage()] = carried


def tape_of(stream: torch.Tensor) -> Tape | None:
    """The tape behind a stream that a step returned, for whoever wants to know what it holds."""
    found: Carried | None = _carried.get(stream.untyped_storage())
    return None if found is None else found.tape


def _by_memory(chain: ReversibleChain, stream: torch.Tensor) -> Carried | None:
    found: Carried | None = _carried.get(stream.untyped_storage())
    if found is None or found.chain is not chain or found.memory != memory_of(stream):
        return None
    if stream.is_inference() and not _is_copy(found, stream):
        return None  # these do not count how often they are written to
    if not found.requires_grad and stream.requires_grad and not stream.is_leaf:
        raise ConversionError(
            f"a block of {chain.name} ran without gradients, and what it returned has a gradient now, as with a "
            "reentrant checkpoint: the chain's state cannot follow. Reversible blocks need no checkpoint; remove it"
        )
    return found


def _is_copy(latest: Carried, stream: torch.Tensor) -> bool:
    """Does `stream` hold what the last step returned, in another tensor, dtype or on another device?"""
    tape = latest.tape
    if tape is not None and tape.position != latest.position:
        tape.go_to_end()
    state = latest.now()
    if state.stream.shape != stream.shape:
        return False
    if not looked_at() or stream.is_meta:
        return True  # without values, what is of the same shape is taken for the same
    arithmetic = latest.arithmetic if tape is None else tape.arithmetic
    same: torch.Tensor = arithmetic.decode(state.stream, latest.dtype).to(stream.device, stream.dtype)
    return bool(torch.equal(same, stream.detach()))


def _still_there(found: Carried | None) -> Carried | None:
    """The state, unless another reader of the same stream went on with it; the tape goes forward to it again."""
    if found is None or found.tape is None or found.tape.position == found.position:
        return found
    if found.position != len(found.tape.steps):
        return None
    found.tape.go_to_end()
    return found


def _say_restart(chain: ReversibleChain, latest: Carried, number: int, stream: torch.Tensor) -> None:
    path, before = chain.paths[number], chain.paths[latest.number]
    if path in chain.restarts:
        return
    shape = latest.memory[1]
    what = (
        f"of shape {tuple(stream.shape)} instead of {tuple(shape)}"
        if stream.shape != shape
        else "read a second time, or changed on the way"
    )
    chain.restarts[path] = f"the stream that reaches it is not what {before} returned ({what})"
    logging.getLogger("autorev").warning(
        "%s: the stream that reaches %s is not what %s returned (%s). The chain begins anew there, with velocity 0: "
        "that is part of the function that is trained, and each further piece keeps two streams more. Exclude the "
        "blocks behind it, or change the stream inside of a block",
        chain.name,
        path,
        before,
        what,
    )
