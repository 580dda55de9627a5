"""A module that acts on each position alone, run on a tile of positions at a time: forward, and again in backward.

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
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autorev.alike import stand_for, standing_for, typical
from autorev.engine.autograd import apply
from autorev.engine.digest import Comparison
from autorev.engine.replay import BranchRun, Completes, InputLike, Replay, branch_run_here
from autorev.engine.saved import SavedTensors
from autorev.engine.surroundings import RandomStates
from autorev.errors import ReconstructionError

Function = Callable[..., torch.Tensor]
"""A tile of each input -> a tile of the output."""


@dataclass(frozen=True)
class Tiling:
    """How the positions of a call are cut."""

    axis: int
    size: int

    def pieces(self, first: torch.Tensor) -> list[tuple[int, int]]:
        """(start, length) of each tile of a call whose first input is `first`."""
        length = first.shape[self.axis]
        return [(start, min(self.size, length - start)) for start in range(0, length, self.size)]

    def run(self, first: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        """(number, start, length) of each, while it is run."""
        pieces = self.pieces(first)
        for number in typical(len(pieces)):
            yield number, *pieces[number]


def values_of(function: Function, inputs: Sequence[torch.Tensor], tiling: Tiling) -> torch.Tensor:
    """f tile by tile, without a graph."""
    out: torch.Tensor | None = None
    with torch.no_grad():
        for _, start, length in tiling.run(inputs[0]):
            tile = function(*(cut(x, tiling.axis, start, length) for x in inputs))
            out = _room_for(tile, inputs[0], tiling.axis) if out is None else out
            out.narrow(tiling.axis, start, length).copy_(tile)
            del tile
    assert out is not None
    return out


def cut(x: torch.Tensor, axis: int, start: int, length: int) -> torch.Tensor:
    """A tile, in memory of its own layout in every run: kernels sum in another order where it is another."""
    return x.narrow(axis, start, length).contiguous()


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
        self.out: torch.Tensor | None = None
        """What the tiles have computed so far, where a second run waits for it."""
        self.completes: Completes | None = None

    def first(self, inputs: Sequence[torch.Tensor], comparison: Comparison) -> torch.Tensor:
        """The first run; what it saves is dropped."""
        self.requires_grad = tuple(x.requires_grad for x in inputs)
        out: torch.Tensor | None = None
        for number, start, length in self.tiling.run(inputs[0]):
            self.tiles += 1
            inputs, tiles = _read(inputs, self.tiling.axis, start, length)
            random = RandomStates(self.replay.devices) if self.replay.random is not None else None
            saved = SavedTensors(self.replay.path, comparison, self.replay.modules)
            saved.made_by(partial(self.again, number))
            with saved.dropped():
                tile = self.function(*tiles)
            if random is not None:
                random.keep_moved()
                self.random.append(random)
            if saved.any:
                self.asked_for.add(number)
            if out is None:
                out = _room_for(tile, inputs[0], self.tiling.axis)
            out = apply(_Write, out, tile, self.tiling.axis, start)
            del tile, tiles
        assert out is not None
        return out

    def handed(self, inputs: Sequence[torch.Tensor]) -> None:
        """A second run of the branch has come to this call."""
        if self.asked_for:
            self.inputs, self.left = tuple(x.detach() for x in inputs), set(self.asked_for)

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
        axis, (start, length) = self.tiling.axis, self.tiling.pieces(inputs[0])[number]
        tiles = []
        for x, requires_grad in zip(inputs, self.requires_grad, strict=True):
            tile = cut(x, axis, start, length)
            # The last one that asks has a copy: what it is a part of need not be kept for its backward.
            tile = tile.clone() if self.left == {number} else tile.detach()
            tiles.append(tile.requires_grad_(requires_grad))
        with self.replay.circumstances(True, self.random[number] if self.random else None):
            tile = self.function(*tiles).detach()
        completes = self.completes
        if completes is not None:
            self.out = _room_for(tile, inputs[0], axis) if self.out is None else self.out
            self.out.narrow(axis, start, length).copy_(tile)
        self.left.discard(number)
        if not self.left:
            self.inputs = self.completes = None
            del inputs, tiles, tile, x
            if completes is not None:
                completes(self._hand_over)

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
        return values_of(function, inputs, tiling)
    seen = tiled[number]
    call = seen.call()
    if call is not None:
        call.handed(inputs)
        if run.last_completes is not None and number == len(tiled) - 1:
            call.completes, call.out = run.last_completes, None
            return seen.like.expand(seen.shape)
    made = partial(values_of, function, inputs, tiling)
    if not seen.requires_grad:
        return made()
    values: torch.Tensor = apply(_Values, seen.like.detach().requires_grad_(), made)
    return values


def _by_itself(
    module: nn.Module, path: str, function: Function, inputs: Sequence[torch.Tensor], tiling: Tiling
) -> torch.Tensor:
    """Outside of a reversible chain: what is around it (nothing, or a checkpoint) keeps the inputs."""
    replay = Replay(path, (InputLike.of(inputs[0], inputs[0].dtype),), mutates_input=False)
    replay.add_module(module, path, lambda module, name: False)
    replay.begins()
    call = TiledCall(function, tiling, replay)
    kept = apply(_Keep, torch.empty((), requires_grad=True), *inputs)
    node = kept.grad_fn
    call.reopen = lambda: node.saved_tensors
    out = call.first(inputs, Comparison(exact=True))
    replay.ran()
    return out


# -- autograd


def _read(
    inputs: Sequence[torch.Tensor], axis: int, start: int, length: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs, and a tile of each."""
    whole, tiles = [], []
    for x in inputs:
        known = x.requires_grad
        passed, tile = apply(_Read, x, axis, start, length) if known else (x, cut(x, axis, start, length))
        whole.append(passed)
        tiles.append(tile)
    return whole, tiles


class _Read(torch.autograd.Function):
    """x -> x, its tile. In backward, tiles put their gradients into one tensor, the last tile first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: int, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.place, ctx.shape = (axis, start, length), x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), cut(x, axis, start, length)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, grad_tile = grads
        if grad_tile is not None:
            # Only tiles behind this one have written to it: nobody else has seen it.
            grad = grad_tile.new_zeros(ctx.shape) if grad is None else grad
            grad.narrow(*ctx.place).copy_(grad_tile)
        return grad, None, None, None


class _Write(torch.autograd.Function):
    """Puts a tile into its place in `out`."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, tile: torch.Tensor, axis: int, start: int) -> torch.Tensor:
        ctx.place, ctx.stands_for = (axis, start, tile.shape[axis]), standing_for()
        ctx.mark_dirty(out)
        out.narrow(*ctx.place).copy_(tile)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        stand_for(ctx.stands_for)  # until the tile before it: autograd finishes one first
        return grads[0], grads[0].narrow(*ctx.place), None, None


class _Values(torch.autograd.Function):
    """Values that require a gradient and may be written to, unlike a leaf; nobody asks for the gradient."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, made: Callable[[], torch.Tensor]) -> torch.Tensor:
        return made()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("the first run's graph has the gradients of a tiled call")


class _Keep(torch.autograd.Function):
    """Saves tensors, for whoever asks its node for them."""

    @staticmethod
    def forward(ctx: Any, dummy: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return dummy.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("nothing is computed from what this returned")
