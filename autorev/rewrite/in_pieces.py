"""Blocks whose residual steps are taken one by one: their captured graph is cut at the adds and run on live modules.

`InPieces` is a block module of several steps (`granularity="sublayer"`, and the two-stream couplings). `InlineLoop` is
a module whose own code holds the blocks, as turns of a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autorev.detect.chains import detect
from autorev.detect.cut import Branch, CutBlock, CutError, cut
from autorev.detect.ends import put
from autorev.detect.judge import Finding, judge
from autorev.detect.outline import outline
from autorev.detect.pieces import like
from autorev.engine.chain import ReversibleChain, Site, take_step
from autorev.errors import ConversionError
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.recapture import Made, Recapture, fake_call, on_live


@dataclass(eq=False)
class InPieces(ReversibleForward):
    """A block as several steps: prologue, branches, epilogue."""

    steps: int = 0
    cuts: Recapture = field(default_factory=Recapture)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All steps of the block."""
        place, stream = self._stream(args, kwargs)
        number = self._number(stream)
        inputs, once = self._inputs(args, kwargs, place)
        args, kwargs = put(inputs, place, stream)
        pieces: CutBlock = self.cuts.cut_for(self.block, self.path, self.original, args, kwargs, self._cut)
        values = pieces.inputs(args, kwargs)
        del args, kwargs
        values |= pieces.prologue.run(values)
        for branch in pieces.branches:
            read = {name: values[name] for name in branch.piece.reads if name != pieces.stream}
            piece = _Piece(branch, pieces.stream)
            site = Site(self.block, self.path, piece, self.written, overwrites=False, once=once)
            last = number == len(self.chain.couplings) - 1
            side, new = take_step(self.chain, number, values[pieces.stream], site, read, last)
            values |= side
            values[pieces.stream] = new
            number += 1
        return pieces.rebuild(pieces.epilogue.run(values)["output"])

    def _cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made:
        try:
            with fake_call(self.block, args, kwargs) as recorded:
                finding = judge(recorded.root)
                # A cache is only left among the arguments where nothing is run twice, and then it may be filled.
                finding.obstacles = [o for o in finding.obstacles if o.code != "argument-write"]
                if finding.obstacles or finding.captured is None or len(finding.steps) != self.steps:
                    reasons = "; ".join(map(str, finding.obstacles)) or f"it has {len(finding.steps)} residual steps"
                    raise ConversionError(
                        f"{self.path} was converted as {self.steps} steps; called like this: {reasons}"
                    )
                finding.captured = on_live(finding.captured, self.path, self.block)
                pieces = cut(finding, self.block)
        except CutError as error:
            raise ConversionError(
                f"{self.path} cannot be cut into its steps: {error}; use granularity='block'"
            ) from None
        return Made(pieces, _code(pieces), pieces.fold)


@dataclass(frozen=True, eq=False)
class _Piece:
    """One branch of a cut block."""

    branch: Branch
    stream: str

    def __call__(self, x: torch.Tensor, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        returned = self.branch.piece.run({**inputs, self.stream: x})
        out = x
        for join in self.branch.joins:
            out = join(out, {**inputs, **returned})
        if self.branch.rounds_to is not None:
            out = out.to(self.branch.rounds_to)
        operands = {name for join in self.branch.joins for name in join.operands if isinstance(name, str)}
        return {name: value for name, value in returned.items() if name not in operands}, out


def _code(pieces: CutBlock) -> str:
    graphs = [pieces.prologue.graph, *(b.piece.graph for b in pieces.branches), pieces.epilogue.graph]
    joins = [(j.function.__name__, j.operands, j.options) for b in pieces.branches for j in b.joins]
    return "\n".join([*(str(graph.code) for graph in graphs), repr(joins)])


@dataclass(eq=False)
class InlineLoop(ReversibleForward):
    """A module that holds blocks as turns of a loop: its captured forward is run, with each turn as a step."""

    turns: int = 0
    in_steps: bool = False
    """Is every residual step a turn of its own?"""
    outlines: Recapture = field(default_factory=Recapture)

    @classmethod
    def of(cls, holder: nn.Module, findings: list[Finding], chain: ReversibleChain, in_steps: bool) -> InlineLoop:
        """The forward for `holder`, whose code holds the blocks of `findings`, one for each step of `chain`."""
        return cls(
            block=holder,
            path=findings[0].call.path or "(the model itself)",
            chain=chain,
            numbers=tuple(range(len(findings))),
            argument="",
            output_at=(),
            written=findings[0].call.buffers_written,
            overwrites=False,
            replaced=holder.__dict__.get("forward"),
            turns=len(findings),
            in_steps=in_steps,
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The holder's forward."""
        self._refuse_transforms()
        (args, kwargs), once = self._inputs(args, kwargs, None)
        run = self.outlines.cut_for(self.block, self.path, self.original, args, kwargs, self._outline)
        return run(partial(self._take, once), args, kwargs)

    def _take(
        self, once: bool, number: int, turn: Callable[..., Any], stream: torch.Tensor, *inputs: Any
    ) -> torch.Tensor:
        group, written = modules_of(turn, self.block, self.written)
        site = Site(group, f"{self.path} (turn {number})", _Turn(turn), written, overwrites=False, once=once)
        step = self.numbers[number]
        last = step == len(self.chain.couplings) - 1
        return take_step(self.chain, step, stream, site, inputs, last)[1]

    def _outline(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made:
        with fake_call(self.block, args, kwargs) as recorded:
            for chain in detect(recorded).chains:
                first = chain[0]
                chain = by_steps(chain) if self.in_steps else chain
                if first.inline and first.call is recorded.root and len(chain) == self.turns and first.captured:
                    outlined = outline(on_live(first.captured, self.path, self.block), chain)
                    break
            else:
                raise ConversionError(
                    f"{self.path} was converted as a loop of {self.turns} residual blocks, and called like this it "
                    "is none; convert again with example arguments like this call's"
                )
            template = recorded.root.output
        if len(outlined.blocks) != self.turns or outlined.forward is None:
            raise ConversionError(
                f"{self.path}: a value inside one turn of its loop is read outside of it, so the turn cannot be run "
                "again by itself; give the loop's body a module of its own"
            )
        forward, placeholders = outlined.forward, outlined.captured.placeholders

        def run(call_turn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = dict(self._named(args, kwargs))
            outlined.call_turn = call_turn
            return like(template, forward(*(named[name] for name in placeholders)))

        def plain_turn(number: int, turn: Callable[..., Any], stream: torch.Tensor, *inputs: Any) -> Any:
            return turn(stream, *inputs)

        code = "\n".join(str(graph.code) for graph in (forward, *outlined.turns))
        return Made(run, code, lambda *args, **kwargs: run(plain_turn, args, kwargs))


def by_steps(findings: list[Finding]) -> list[Finding]:
    """The turns of a loop, taken apart into one finding per residual step."""
    return [
        replace(finding, path=f"{finding.path} (step {number})", start=step.before, steps=[step], end=step.after)
        for finding in findings
        for number, step in enumerate(finding.steps)
    ]


@dataclass(frozen=True, eq=False)
class _Turn:
    """One turn of the loop as a branch."""

    turn: Callable[..., Any]

    def __call__(self, x: torch.Tensor, inputs: tuple[Any, ...]) -> tuple[None, torch.Tensor]:
        return None, self.turn(x, *inputs)


def modules_of(turn: Any, holder: nn.Module, written: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]]:
    """The sub-modules whose parameters a turn uses, as a module, and the buffers among `written` that are theirs."""
    paths: dict[str, None] = {}
    for node in turn.graph.nodes:
        if node.op in ("call_module", "get_attr") and str(node.target).startswith("block."):
            path = str(node.target).removeprefix("block.")
            paths[path if node.op == "call_module" else path.rpartition(".")[0]] = None
    group = nn.ModuleList(holder.get_submodule(path) for path in paths)
    group.training = holder.training
    own = tuple(
        f"{number}.{name.removeprefix(f'{path}.')}"
        for name in written
        for number, path in enumerate(paths)
        if not path or name.startswith(f"{path}.")
    )
    return group, own
