"""A module run on a tile of positions at a time: forward, and again in backward.

        x --- read tile 0 --> f --> write --+
          \\-- read tile 1 --> f --> write --+--> out

NOTE [ Tiles ]

What f saves for backward is dropped, tile by tile, and made again one tile at a time when autograd asks for it. So at
no time is there more of f's activations than one tile's, and gradients reach parameters by autograd's own accumulation.

Where a tile's input comes from in backward:
    in a step of a reversible chain     from the second run of the step's branch, which autograd asks for, or a tile
    elsewhere                           it is saved, as a checkpoint saves its input: by whatever is around it

Rule 1. A second run of a branch computes the values of f without a graph: the graph is the first run's, whose tiles
        ask for theirs one by one.
Rule 2. Where nothing but the residual add comes after f, the second run does not need to run f at all. It stops there,
        the tiles run as autograd asks for them, and their results complete it (`Tape.run_again`). So f runs twice in
        all, once in each direction, as often as under a checkpoint.

Where positions meet in attention, tiles have a past: see NOTE [ Causal tiles ] in `past`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autorev.alike import typical
from autorev.engine.autograd import apply
from autorev.engine.digest import Comparison
from autorev.engine.past import Past
from autorev.engine.replay import BranchRun, Completes, InputLike, Replay, branch_run_here, hooks_of_others_off
from autorev.engine.saved import SavedTensors
from autorev.engine.surroundings import RandomStates
from autorev.engine.tile_nodes import Keep, Values, Write, cut, read
from autorev.errors import ReconstructionError

Function = Callable[..., torch.Tensor]
"""A tile of each input -> a tile of the output."""


@dataclass(frozen=True)
class Tiling:
    """How the positions of a call are cut."""

    axis: int
    size: int
    causal: bool = False
    """Does a position look at those before it, in one call of attention?"""
    mask: int | None = None
    """Which input is the mask that says at which of them; it is causal."""

    def pieces(self, first: torch.Tensor) -> list[tuple[int, int]]:
        """(start, length) of each tile of a call whose first input is `first`."""
        length = first.shape[self.axis]
        starts = [*range(0, length, self.size)]
        if self.causal and length % self.size == 1 and len(starts) > 1:
            starts.pop()  # code that attends has a way of its own for a single query
        return [(start, end - start) for start, end in zip(starts, [*starts[1:], length], strict=True)]

    def run(self, first: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        """(number, start, length) of each, while it is run."""
        pieces = self.pieces(first)
        for number in typical(len(pieces)):
            yield number, *pieces[number]

    def cut(self, inputs: Sequence[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
        """A tile of each."""
        return [cut(x, self.axis, start, length, number == self.mask) for number, x in enumerate(inputs)]

    def past(self, inputs: Sequence[torch.Tensor]) -> Past | None:
        """Of a run over the tiles."""
        mask = None if self.mask is None else inputs[self.mask]
        return Past(inputs[0].shape[self.axis], mask) if self.causal else None


def values_of(function: Function, inputs: Sequence[torch.Tensor], tiling: Tiling, graph: bool = False) -> torch.Tensor:
    """f tile by tile, without a graph. `graph`: as runs that have one compute it (Rule 3 of NOTE [ Causal tiles ])."""
    out: torch.Tensor | None = None
    past = tiling.past(inputs)
    for _, start, length in tiling.run(inputs[0]):
        tiles = [tile.detach() for tile in tiling.cut(inputs, start, length)]
        with (
            hooks_of_others_off(),
            torch.set_grad_enabled(graph and past is not None),
            _in_a_tile(past.values(start) if past else None),
        ):
            for tile, x in zip(tiles, inputs, strict=True):
                tile.requires_grad_(x.requires_grad and torch.is_grad_enabled())
            tile = function(*tiles).detach()
        out = _room_for(tile, inputs[0], tiling.axis) if out is None else out
        out.narrow(tiling.axis, start, length).copy_(tile)
        del tile, tiles
    assert out is not None
    return out


_running: ContextVar[bool] = ContextVar("autorev tile", default=False)


@contextmanager
def _in_a_tile(past: AbstractContextManager[Any] | None) -> Iterator[None]:
    """Around the run of one; `past`: what its attention looks back on."""
    token = _running.set(True)
    try:
        with nullcontext() if past is None else past:
            yield
    finally:
        _running.reset(token)


def in_a_tile() -> bool:
    """Is this thread in the run of a tile? What is called there is not cut once more."""
    return _running.get()


def _room_for(tile: torch.Tensor, first: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [*tile.shape]
    shape[axis] = first.shape[axis]
    return tile.new_empty(shape)


class TiledCall:
    """One call of f that is known to autograd."""

    def __init__(self, function: Function, tiling: Tiling, replay: Replay) -> None:
        """`replay`: that of the branch which f is a part of, or f's own."""
        self.function, self.tiling, self.replay = function, tiling, replay
        self.tiles = 0
        self.random: list[RandomStates] = []
        self.asked_for: set[int] = set()
        """Tiles that saved anything, so that backward may ask for them."""
        self.requires_grad: tuple[bool, ...] = ()
        self.reopen: Callable[[], tuple[torch.Tensor, ...] | None] = _nowhere
        """Makes the inputs again: returns them, or has a second run hand them over."""
        self.inputs: tuple[torch.Tensor, ...] | None = None
        self.left: set[int] = set()
        """Tiles that have not asked for the present inputs yet."""
        self.past: Past | None = None
        """The keys and values that go with `inputs`."""
        self.out: torch.Tensor | None = None
        """What the tiles have computed so far, where a second run waits for it."""
        self.completes: Completes | None = None

    def first(self, inputs: Sequence[torch.Tensor], comparison: Comparison) -> torch.Tensor:
        """The first run; what it saves is dropped."""
        self.requires_grad = tuple(x.requires_grad for x in inputs)
        out: torch.Tensor | None = None
        past = self.tiling.past(inputs)
        for number, start, length in self.tiling.run(inputs[0]):
            self.tiles += 1
            inputs, tiles = read(inputs, self.tiling.axis, start, length, self.tiling.mask)
            random = RandomStates(self.replay.devices) if self.replay.random is not None else None
            saved = SavedTensors(self.replay.path, comparison, self.replay.modules)
            saved.made_by(partial(self.again, number))
            with saved.dropped(), _in_a_tile(past.first(start) if past else None):
                tile = self.function(*tiles)
            if random is not None:
                random.keep_moved()
                self.random.append(random)
            if saved.any:
                self.asked_for.add(number)
            if out is None:
                out = _room_for(tile, inputs[0], self.tiling.axis)
            out = apply(Write, out, tile, self.tiling.axis, start)
            del tile, tiles
        assert out is not None
        return out

    def handed(self, inputs: Sequence[torch.Tensor]) -> None:
        """A second run of the branch has come to this call."""
        if self.asked_for:
            self.inputs, self.left, self.past = tuple(x.detach() for x in inputs), set(self.asked_for), None

    def again(self, number: int) -> None:
        """Run a tile once more: autograd asks for what it saved."""
        if self.inputs is None:
            found = self.reopen()
            if found is not None:
                self.handed(found)
        inputs = self.inputs
        if inputs is None:
            raise ReconstructionError(
                f"{self.replay.path} did something else in backward than in forward: a module that is tiled was not "
                "called; look for a decision that its Python code takes anew each time"
            )
        if self.past is None:
            self.past = self._past_of(inputs)
        axis, (start, length) = self.tiling.axis, self.tiling.pieces(inputs[0])[number]
        # The last one that asks has a copy: what it is a part of need not be kept for its backward.
        tiles = self._tiles_of(inputs, start, length, copied=self.left == {number})
        with self._as_it_was(number), _in_a_tile(self.past.again(start) if self.past else None):
            tile = self.function(*tiles).detach()
        completes = self.completes
        if completes is not None:
            self.out = _room_for(tile, inputs[0], axis) if self.out is None else self.out
            self.out.narrow(axis, start, length).copy_(tile)
        self.left.discard(number)
        if not self.left:
            self.inputs = self.completes = self.past = None
            del inputs, tiles, tile
            if completes is not None:
                completes(self._hand_over)

    def _past_of(self, inputs: Sequence[torch.Tensor]) -> Past | None:
        """The keys and values of all tiles (Rule 1 of NOTE [ Causal tiles ])."""
        past = self.tiling.past(inputs)
        if past is not None:
            with hooks_of_others_off(), torch.enable_grad():
                for number, start, length in self.tiling.run(inputs[0]):
                    tiles = self._tiles_of(inputs, start, length)
                    with self._as_it_was(number), _in_a_tile(past.keys(start)):
                        self.function(*tiles)
        return past

    def _tiles_of(
        self, inputs: Sequence[torch.Tensor], start: int, length: int, copied: bool = False
    ) -> list[torch.Tensor]:
        tiles = [tile.clone() if copied else tile.detach() for tile in self.tiling.cut(inputs, start, length)]
        return [tile.requires_grad_(known) for tile, known in zip(tiles, self.requires_grad, strict=True)]

    def _as_it_was(self, number: int) -> AbstractContextManager[None]:
        """The circumstances of a tile's first run."""
        return self.replay.circumstances(True, self.random[number] if self.random else None)

    def _hand_over(self) -> torch.Tensor:
        out, self.out = self.out, None
        assert out is not None
        return out


def _nowhere() -> None:
    raise AssertionError("a tile has no place to have its input from")


# -- the runs of a branch


@dataclass(frozen=True)
class SeenTiled:
    """A tiled call of a first run, for the later ones."""

    call: weakref.ref[TiledCall]
    """Autograd's graph holds it."""
    module: nn.Module
    like: torch.Tensor
    """One element of what it returned."""
    shape: torch.Size
    requires_grad: bool

    @property
    def wholly_asked_for(self) -> bool:
        """May autograd ask for every tile?"""
        call = self.call()
        return call is not None and len(call.asked_for) == call.tiles


def run_tiled(
    module: nn.Module, path: str, function: Function, inputs: Sequence[torch.Tensor], tiling: Tiling
) -> torch.Tensor:
    """`module`, whose own code is `function`, on `inputs`.

    `function` holds no tensor but those of its modules.
    """
    run = branch_run_here()
    if run is not None and run.comparison is None:
        return _later(run, function, inputs, tiling)
    if not torch.is_grad_enabled():
        return values_of(function, inputs, tiling)
    if run is None:
        return _by_itself(module, path, function, inputs, tiling)
    assert run.comparison is not None
    call = TiledCall(function, tiling, run.replay)
    out = call.first(inputs, run.comparison)
    like = out.detach().new_empty(())
    run.replay.tiled.append(SeenTiled(weakref.ref(call), module, like, out.shape, out.requires_grad))
    return out


def _later(run: BranchRun, function: Function, inputs: Sequence[torch.Tensor], tiling: Tiling) -> torch.Tensor:
    number, run.count = run.count, run.count + 1
    tiled = run.replay.tiled
    if number >= len(tiled):  # it was not tiled in the first run
        return values_of(function, inputs, tiling, graph=True)
    seen = tiled[number]
    call = seen.call()
    if call is not None:
        call.handed(inputs)
        if run.last_completes is not None and number == len(tiled) - 1:
            call.completes, call.out = run.last_completes, None
            return seen.like.expand(seen.shape)
    made = partial(values_of, function, inputs, tiling, graph=True)
    if not seen.requires_grad:
        return made()
    values: torch.Tensor = apply(Values, seen.like.detach().requires_grad_(), made)
    return values


def _by_itself(
    module: nn.Module, path: str, function: Function, inputs: Sequence[torch.Tensor], tiling: Tiling
) -> torch.Tensor:
    """Outside of a reversible chain: what is around it (nothing, or a checkpoint) keeps the inputs."""
    replay = Replay(path, (InputLike.of(inputs[0], inputs[0].dtype),), mutates_input=False)
    replay.add_module(module, path, lambda module, name: False)
    replay.begins()
    call = TiledCall(function, tiling, replay)
    kept = apply(Keep, torch.empty((), requires_grad=True), *inputs)
    node = kept.grad_fn
    call.reopen = lambda: node.saved_tensors
    out = call.first(inputs, Comparison(exact=True))
    replay.ran()
    return out
