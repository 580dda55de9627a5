"""What stands in for the `forward` of a module that is run a tile of positions at a time.

A block that runs twice anyway is tiled as a whole where that can be, attention and all. In its place, and in blocks
whose activations are stored, the parts of it that act on each position alone are: attention would run once more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from autorev.capture.record import ModuleCall
from autorev.detect.finding import Finding
from autorev.detect.masks import mask_among
from autorev.detect.positions import MixesError
from autorev.detect.tokenwise import (
    HERE,
    HOOKED,
    Mixing,
    TokenWise,
    has_hooks_inside,
    kind_of,
    token_wise,
)
from autorev.engine.mask import is_causal
from autorev.engine.mode import ORACLE, is_written_down, mode
from autorev.engine.owned import is_fake
from autorev.engine.replay import branch_run_here
from autorev.engine.tiles import Tiling, in_a_tile, run_tiled
from autorev.errors import ConversionError, one_line
from autorev.methods import Method
from autorev.rewrite.in_steps import fake_call, shape_of
from autorev.rewrite.replacement import CompilingReplacement

SMALLEST = 128
"""Positions of a tile, at least, where the number is chosen: below that, matrix products become slow."""
KEPT_BY_A_TILE = 0.5
"""What one tile may keep for backward, in sizes of the module's input."""

WORTH_BEHIND = 1.0
"""What a module behind the blocks keeps at least, likewise: a norm that is written out keeps as much, and its backward,
at the very peak, makes several times as much on the way."""

MOST_KINDS = 8
"""Of calls that are analysed; code whose attributes count something would be analysed at every call."""

TileSize = int | Literal["auto"]


@dataclass(eq=False)
class TiledForward(CompilingReplacement):
    """A module's own forward, on a tile of positions at a time."""

    found: TokenWise
    size: TileSize
    proved: dict[Any, TokenWise | Mixing]
    """What was found of each kind of call: which tensor is a mask, and `kind_of`."""
    said: set[str]
    """Why calls ran whole, as was logged; shared by the forwards of a model."""
    analysing: bool = field(default=False, init=False)

    @property
    def passes_through(self) -> bool:
        """Not while a forward pass that was made before is run again."""
        return self.reverted and branch_run_here() is None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward."""
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        axis, forward = self.found.axis, self.own()
        whole = (
            in_a_tile()
            or not inputs
            or inputs[0].dim() != self.found.dims
            or torch._C._functorch.peek_interpreter_stack() is not None
            or hasattr(inputs[0], "placements")  # spread over processes
            or is_written_down()
        )
        size = 0 if whole else self._size(inputs[0].shape[axis])
        if whole or inputs[0].shape[axis] <= size or isinstance(found := self._judged(args, kwargs), Mixing):
            return forward(*args, **kwargs)
        tiling = Tiling(axis, size, found.causal, found.mask)
        function = _Function(forward, [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves], spec)
        if mode() == ORACLE:
            return self._as_oracle(function, inputs, tiling) if found.draws_random else forward(*args, **kwargs)
        del args, kwargs, leaves
        out = run_tiled(self.block, self.path, function, inputs, tiling)
        return tree_map(lambda leaf: out if leaf is HERE else leaf, found.returned)

    def _as_oracle(self, function: _Function, inputs: list[torch.Tensor], tiling: Tiling) -> Any:
        """Tiles draw random numbers one after the other."""
        past, tiles = tiling.past(inputs), []
        for start, length in tiling.pieces(inputs[0]):
            with nullcontext() if past is None else past.joined():
                tiles.append(function(*tiling.cut(inputs, start, length)))
        return tree_map(lambda leaf: torch.cat(tiles, tiling.axis) if leaf is HERE else leaf, self.found.returned)

    def _judged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenWise | Mixing:
        """Does the module, as it is now and is called now, act on each position alone? Hooks, adapters and other modes
        may have come since the conversion."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        try:
            found: TokenWise | Mixing = self._proved_of(inputs, args, kwargs)
        except MixesError as error:
            found = Mixing(self.path, str(error))
        if isinstance(found, Mixing) and found.reason not in self.said:
            self.said.add(found.reason)
            logging.getLogger("autorev").warning(
                "%s was to be run a tile at a time, and is run whole: %s", self.path, found.reason
            )
        return found

    def _proved_of(
        self, inputs: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TokenWise | Mixing:
        """What holds for such a call.

        Raises:
            MixesError: none can be run a tile at a time that is like this one.
        """
        if has_hooks_inside(self.block):
            raise MixesError(HOOKED)
        number = mask_among(inputs, self.found.axis, self.found.causal)
        if self.found.causal and self._is_compiled():
            raise MixesError("it is compiled, and attention in compiled code cannot be seen")
        kind = number, kind_of(self.block, (args, kwargs))
        if kind not in self.proved and len(self.proved) < MOST_KINDS:
            self.proved[kind] = self._analysed(args, kwargs)
        found = self.proved.get(kind, Mixing(self.path, "it is called in too many ways"))
        if isinstance(found, TokenWise) and number is not None:
            mask = inputs[number]
            if not (found.unmasked if is_fake(mask) else is_causal(mask)):
                raise MixesError("its mask lets positions look at later ones")
        return found

    def _analysed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenWise | Mixing:
        if self.analysing:  # a copy of the module ran this forward, by a wrapper that is no part of the copy
            raise ConversionError("its forward was wrapped since, by code that holds on to the module")
        self.analysing = True
        try:
            with fake_call(self.block, *tree_map_only(torch.Tensor, shape_of, (args, kwargs))) as recorded:
                return token_wise(recorded.root, self.found.axis, self.found.causal)
        except ConversionError as error:
            return Mixing(self.path, one_line(error))
        finally:
            self.analysing = False

    def _is_compiled(self) -> bool:
        inside = (vars(module).get("_compiled_call_impl") for module in self.block.modules())
        original = self.original
        return self.compiling.compiled(original) is not original or any(call is not None for call in inside)

    def _size(self, positions: int) -> int:
        if self.size != "auto":
            return self.size
        return max(SMALLEST, math.ceil(positions * KEPT_BY_A_TILE / self.found.saved))


@dataclass(frozen=True)
class _Function:
    """A forward as a function of its tensors."""

    forward: Callable[..., Any]
    leaves: list[tuple[Any] | None]
    """None: a tensor."""
    spec: TreeSpec

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf[0] for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        found: torch.Tensor = next(
            leaf for leaf in tree_leaves(self.forward(*args, **kwargs)) if isinstance(leaf, torch.Tensor)
        )
        return found


@dataclass(frozen=True)
class Tiled:
    """The forwards that tile a model, and the parts of its blocks that they do not, with the reason."""

    forwards: tuple[TiledForward, ...] = ()
    untiled: tuple[tuple[str, str], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the modules that are tiled, but for those within others."""
        every = {forward.path for forward in self.forwards}
        within = {path for path in every if any(path.startswith(f"{other}.") for other in every)}
        return tuple(forward.path for forward in self.forwards if forward.path not in within)


def tiled_forwards(
    model: nn.Module,
    findings: Iterable[Finding],
    size: TileSize,
    in_pieces: bool = False,
    as_long: bool = True,
    twice: Collection[str] = (),
) -> Tiled:
    """What tiles the blocks of `findings`, for `model`; nothing is installed.

    Args:
        in_pieces: does each residual add of a block end a step?
        as_long: is the call that they were found in as long as others will be?
        twice: the paths of blocks that run a second time in backward, so that attention does, too.

    Raises:
        ConversionError: nothing can be tiled, or `size` is as long as the sequence.
    """
    proved: dict[str, TokenWise] = {}
    kinds: dict[str, dict[Any, TokenWise | Mixing]] = {}
    untiled: dict[str, str] = {}
    positions = 0
    blocks = [finding for finding in findings if not finding.inline]
    for finding in blocks if in_pieces else ():
        untiled |= dict.fromkeys(finding.opened, "a residual add stands in it, and ends a step")
    parts = [(finding.call, found) for finding in blocks for found in _parts_of(finding, in_pieces, twice)]
    for call, found in [*parts, *_beside(blocks)]:
        path = found.path
        if isinstance(found, Mixing):
            untiled.setdefault(path, found.reason)
        elif path not in proved or proved[path].axis == found.axis:
            proved[path] = found
            below = next(child for child in call.walk() if child.path == path)
            kinds.setdefault(path, {})[found.mask, kind_of(below.module, (below.args, below.kwargs))] = found
            given = tree_flatten((below.args, below.kwargs))[0]
            positions = max(positions, *(leaf.shape[found.axis] for leaf in given if isinstance(leaf, torch.Tensor)))
        else:
            untiled[path] = "it is called with its positions in one axis and in another"
    proved = {path: found for path, found in proved.items() if path not in untiled}
    if not proved:
        which = [f"{path}: {reason}" for path, reason in untiled.items()][:1] or ["no part of them is a module"]
        raise ConversionError(f"no part of the blocks can be run a tile at a time ({which[0]}); leave tile= out")
    if as_long and size != "auto" and size >= positions:
        raise ConversionError(
            f"tile={size} leaves nothing to tile: the blocks are called with {positions} positions; choose fewer, or "
            "tile='auto'"
        )
    said: set[str] = set()
    forwards = (
        TiledForward(model.get_submodule(path), path, found, size, kinds[path], said) for path, found in proved.items()
    )
    return Tiled(tuple(forwards), tuple(untiled.items()))


def blocks_run_twice(
    method: Method, chains: Sequence[Sequence[Finding]], stored: Sequence[int], others: Iterable[Finding]
) -> frozenset[str]:
    """The paths of the blocks whose attention `method` tiles; so many at the end of each chain are `stored`."""
    if not method.tiles_attention:
        return frozenset()
    several = list(zip(chains, stored, strict=True))
    again = {finding.call.path for chain, kept in several for finding in chain[: len(chain) - kept]}
    once = {finding.call.path for chain, kept in several for finding in chain[len(chain) - kept :]}
    alone = () if method.reversible else (finding for finding in others if finding.can_be_checkpointed)
    return frozenset(again - once) | {finding.call.path for finding in alone}


def _parts_of(finding: Finding, in_pieces: bool, twice: Collection[str]) -> Iterator[TokenWise | Mixing]:
    """The block, or what is tiled of it."""
    if finding.call.path not in twice:
        yield from finding.parts
    elif not in_pieces and isinstance(finding.causal, TokenWise):
        yield finding.causal
        yield from (part for part in finding.parts if isinstance(part, TokenWise))  # where a call of it runs whole
    else:
        yield from finding.causal_parts


def _beside(blocks: Iterable[Finding]) -> Iterator[tuple[ModuleCall, TokenWise]]:
    """Modules that are called by what calls the blocks: the norm behind them."""
    taken = {finding.call.path for finding in blocks}
    for parent in {id(f.call.parent): f.call.parent for f in blocks if f.call.parent is not None}.values():
        for child in parent.children:
            if child.path not in taken and child.draws_random is False:
                found = token_wise(child)
                if isinstance(found, TokenWise) and found.saved >= WORTH_BEHIND:
                    yield parent, found
