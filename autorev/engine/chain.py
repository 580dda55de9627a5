"""A reversible chain: what its blocks share, in all forward passes."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from autorev.couplings.arithmetic import MOST_FRACTION_BITS, Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling
from autorev.engine.grid import say_coarsened
from autorev.engine.host_store import HostStore
from autorev.engine.seeds import Seeds
from autorev.errors import ConversionError
from autorev.keeps import NOTHING, Keeps


@dataclass(eq=False)
class Magnitudes:
    """How large the streams of a chain become in one forward pass."""

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
    """What was left of the integrity check in the last backward pass: 0 when exact. By the chain's name; where a
    new chain started within a forward pass, each further piece has an entry of its own."""
    keeps: list[Keeps] = field(default_factory=list)
    """What each step keeps beyond its side bits, and what waits in the memory of `host`."""
    host: HostStore = field(default_factory=HostStore)
    magnitudes: dict[int, Magnitudes] | None = None
    """While a grid is being chosen: how large the streams of each lane were so far."""
    finest: int = MOST_FRACTION_BITS
    """No forward pass begins with more: one that did outgrew its grid on a device that is not waited for."""
    grids: dict[str, int] = field(default_factory=dict)
    """The config's entry of fraction bits by chain, kept up to date."""
    seeds: Seeds = field(default_factory=Seeds)
    """What its couplings are drawn from, where they are random."""
    restarts: dict[str, str] = field(default_factory=dict)
    """Blocks at which a new chain started within a forward pass, with the reason; each was said once."""
    warned: set[str] = field(default_factory=set)
    """What the user was told; see `warn_once`."""
    carried: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    """Storage of a stream that is between two blocks -> the `Carried` that goes with it."""

    key: str = field(init=False)
    """What compiled code calls it (`chain_called`). With other couplings it has another, so that code is compiled
    anew."""
    traced: Any = None
    """The pass that a compiler traces at the moment (`traced.TracedPass`)."""

    def __post_init__(self) -> None:
        self.keeps = self.keeps or [NOTHING] * len(self.couplings)
        self._name_anew()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has no part in the calls of the original."""
        return {name: value for name, value in vars(self).items() if name not in ("carried", "key", "traced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, carried=WeakIdKeyDictionary(), traced=None)
        self._name_anew()

    def _name_anew(self) -> None:
        self.key = f"{self.name} #{next(_count)}"
        _called[self.key] = self

    def couple_by(self, couplings: Sequence[Coupling]) -> None:
        """Take these instead, one per step."""
        self.couplings[:] = couplings
        self._name_anew()

    def warn_once(self, what: str) -> None:
        """Log that the blocks are reversible and `what`, unless that was said."""
        if what not in self.warned:
            self.warned.add(what)
            logging.getLogger("autorev").warning("the blocks of %s are reversible and %s", self.name, what)

    def coarsen(self, before: Arithmetic, after: Arithmetic, path: str) -> None:
        """A stream outgrew its grid: further forward passes begin with the coarser one."""
        assert isinstance(before, FixedPoint)
        assert isinstance(after, FixedPoint)
        usual = self.arithmetic
        if not isinstance(usual, FixedPoint) or after.fraction_bits >= usual.fraction_bits:
            return  # begun on a finer grid, for a small input
        self.begin_on(FixedPoint(after.fraction_bits))
        say_coarsened(self.name, path, before, after)

    def begin_on(self, grid: FixedPoint) -> None:
        """Further forward passes do, and so does the model once it is saved and loaded."""
        self.arithmetic = grid
        if self.name in self.grids:
            self.grids[self.name] = grid.fraction_bits

    def begin_coarser(self, grid: Arithmetic) -> None:
        """A stream left `grid`, which was seen too late to take the step again: further passes begin far below."""
        assert isinstance(grid, FixedPoint)
        coarse = FixedPoint(grid.fraction_bits - 4)
        self.coarsen(grid, coarse, self.name)
        self.finest = min(self.finest, coarse.fraction_bits)


_count = itertools.count()
_called: WeakValueDictionary[str, ReversibleChain] = WeakValueDictionary()


def chain_called(key: str) -> ReversibleChain:
    """The chain of that key.

    Raises:
        ConversionError: it is gone.
    """
    chain = _called.get(key)
    if chain is None:
        raise ConversionError("this compiled graph belongs to a model that is gone, or was converted anew")
    return chain
