"""The pieces of a cut block, and how they are put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from autorev.capture.record import named_arguments


class CutError(Exception):
    """The block cannot be cut, or is called in another way than it was cut for."""


@dataclass(frozen=True)
class Piece:
    """A part of the block: the values it `reads` -> those it `returns`, by their names in the block's graph."""

    graph: fx.GraphModule
    reads: tuple[str, ...]
    returns: tuple[str, ...]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What it returns, by name."""
        return dict(zip(self.returns, self.graph(*(values[name] for name in self.reads)), strict=True))


@dataclass(frozen=True)
class Join:
    """How one add of the block joins its operands to the stream."""

    function: Callable[..., torch.Tensor]
    """torch.add, torch.sub, torch.addcmul or torch.addcdiv."""
    operands: tuple[Any, ...]
    """Names of values, or numbers."""
    options: dict[str, Any]
    """`alpha` or `value`."""

    def __call__(self, stream: torch.Tensor, values: Mapping[str, Any]) -> torch.Tensor:
        operands = [values[o] if isinstance(o, str) else o for o in self.operands]
        return self.function(stream, *operands, **self.options)


@dataclass(frozen=True)
class Branch:
    """One residual step; its piece reads the stream first and returns the operands of `joins`, then side values."""

    piece: Piece
    joins: tuple[Join, ...]
    rounds_to: torch.dtype | None = None
    """The narrower dtype to which the block rounds the stream behind this step, if it added in a wider one."""

    def delta(self, values: Mapping[str, Any], like: torch.Tensor) -> torch.Tensor:
        """What the step adds to a stream shaped `like`, as one tensor: equal to the joins up to rounding."""
        total = torch.zeros_like(like)
        for join in self.joins:
            total = join(total, values)
        return total


@dataclass(frozen=True)
class CutBlock:
    """A block (or a chain of inline blocks) as prologue, residual branches and epilogue."""

    prologue: Piece
    """Arguments -> the stream's first value and what several pieces share."""
    branches: tuple[Branch, ...]
    epilogue: Piece
    """The stream's last value -> the block's whole output."""
    stream: str
    """The name that the stream has among the values."""
    arguments: tuple[str, ...]
    """The arguments that hold tensors or objects; the others are constants of the cut."""
    block: nn.Module
    rebuild: Callable[[Any], Any]
    """Makes the type that the block returns of the epilogue's plain dicts."""

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's tensors and objects by argument name.

        Raises:
            CutError: the call has other tensors than the recorded one.
        """
        named = dict(named_arguments(self.block, args, kwargs))
        given = {k: v for k, v in named.items() if not is_constant(v)}
        if set(given) != set(self.arguments):
            raise CutError(
                f"the block was cut for a call with the tensors {sorted(self.arguments)}, and is called with "
                f"{sorted(given)}"
            )
        return {f"argument:{name}": value for name, value in given.items()}

    def fold(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, computed piece by piece."""
        values = self.inputs(args, kwargs)
        values |= self.prologue.run(values)
        for branch in self.branches:
            values |= branch.piece.run(values)
            for join in branch.joins:
                values[self.stream] = join(values[self.stream], values)
            if branch.rounds_to is not None:
                values[self.stream] = values[self.stream].to(branch.rounds_to)
        return self.rebuild(self.epilogue.run(values)["output"])


def is_constant(value: Any) -> bool:
    """Does the capture bake this argument in?"""
    return value is None or isinstance(value, bool | int | float | str)


class LiveGraph(fx.GraphModule):
    """A graph that finds the block's sub-modules at call time, and registers none of them as its own."""

    def __init__(self, block: nn.Module, constants: Mapping[str, torch.Tensor], graph: fx.Graph) -> None:
        # Attributes that `fx.GraphModule` finds in place already are not copied.
        self.__dict__["block"] = block
        self.__dict__["constants"] = SimpleNamespace(**constants)
        holder = nn.Module()
        holder.__dict__.update(block=block, constants=self.__dict__["constants"])
        super().__init__(holder, graph)


def like(template: Any, structure: Any) -> Any:
    """`structure` with dicts turned into the dataclasses that stand in the same places of `template`."""
    if is_dataclass(template) and not isinstance(template, type) and isinstance(structure, Mapping):
        return type(template)(**{k: like(getattr(template, k), v) for k, v in structure.items()})
    if isinstance(template, list | tuple) and not hasattr(template, "_fields"):
        return type(template)(like(t, s) for t, s in zip(template, structure, strict=True))
    return structure
