"""What is known about one call of a would-be block."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autorev.analysis import Block, Verdict
from autorev.capture.record import ModuleCall
from autorev.capture.source import definition_line
from autorev.capture.tracer import CapturedBlock
from autorev.detect.ends import argument_of, flatten_with_path, is_read
from autorev.detect.kinds import public_step
from autorev.detect.obstacles import GENERIC, Obstacle
from autorev.detect.scaling import Factor
from autorev.detect.slices import in_slices
from autorev.detect.stream import ResidualStep
from autorev.detect.tokenwise import Mixing, TokenWise, tileable, token_wise


@dataclass(eq=False)
class Finding:
    """What is known about one call of a would-be block; `block()` is its public form."""

    call: ModuleCall
    captured: CapturedBlock | None
    start: fx.Node | None
    """The argument (or an item of one) that carries the stream."""
    steps: list[ResidualStep]
    obstacles: list[Obstacle]
    caveats: list[Obstacle] = field(default_factory=list)
    output_at: tuple[Any, ...] = ()
    """Where in the returned structure the stream leaves: () for a bare tensor, (0,) for a tuple's first item."""
    path: str = ""
    """The module's path; an inline block has one of its own."""
    end: fx.Node | None = None
    """The node that is the stream after the last step."""
    beside: list[Finding] = field(default_factory=list)
    """The block's other streams, which are reversed together with this one."""
    deferred: bool = False
    """Does the next block add up the two streams of this one, its residual and what its last branch returned?"""
    inline: bool = False
    """A turn of a loop in `call`'s own code, not a module of its own."""
    factor: Factor = field(default_factory=Factor)
    """What a block that is a module multiplies its stream by, all in all."""

    @property
    def lanes(self) -> tuple[Finding, ...]:
        """This stream, and those beside it."""
        return self, *self.beside

    def leave_out(self, lane: Finding) -> None:
        """`lane` is not reversed beside this one: what is written to it is written to an argument."""
        for caveat in lane.caveats:
            if caveat.code == "in-place-add" and lane.start is not None:
                text = (
                    f"it adds to its argument {argument_of(lane.start)} in place, which is no stream that this chain "
                    "carries, and would do so once more in backward"
                )
                self.obstacles.append(Obstacle("argument-write", text, caveat.source))

    @property
    def adds_in_place(self) -> bool:
        """Does it write to the tensor that it is given for this stream?"""
        return any(caveat.code == "in-place-add" for caveat in self.caveats)

    @property
    def overwritten(self) -> tuple[str, ...]:
        """The arguments that it adds to in place, of the streams of a block that is a module."""
        return tuple(argument_of(lane.start) for lane in self.lanes if lane.adds_in_place and lane.start is not None)

    @property
    def multiplies(self) -> bool:
        """Does it multiply a stream by a constant?"""
        return any(lane.factor != Factor() for lane in self.lanes)

    @property
    def factor_known(self) -> float:
        """What this stream is multiplied by; 1 where that is not known."""
        factor = Factor() if self.inline else self.factor
        for step in self.steps if self.inline else ():
            for add in step.adds:
                factor *= add.factor
        return 1.0 if factor.known is None else factor.known

    @property
    def reversible(self) -> bool:
        """Eligible, with or without a caveat."""
        return not self.obstacles

    @property
    def can_be_checkpointed(self) -> bool:
        """Is it a module that may run a second time on its own input, and returns a tensor of that shape?"""
        into, out = self.stream_in, self.stream_out
        alike = into is not None and out is not None and into.shape == out.shape
        once = any(o.code in ("not-repeatable", "argument-write", "own-backward") for o in self.obstacles)
        return alike and not (self.inline or once or "random" in self.call.scalar_draws)

    @property
    def residual(self) -> bool:
        """Is it a residual block at all, if perhaps one that cannot be reversed?"""
        return self.reversible or any(o.code not in GENERIC for o in self.obstacles)

    @property
    def stream_in(self) -> torch.Tensor | None:
        """The recorded tensor that entered."""
        value: torch.Tensor | None = None if self.start is None else self.start.meta["val"]
        return value

    @property
    def stream_out(self) -> torch.Tensor | None:
        """The recorded tensor that left."""
        if self.inline and self.end is not None:
            value: torch.Tensor = self.end.meta["val"]
            return value
        return dict(flatten_with_path(self.call.output)).get(self.output_at)

    @property
    def in_slices(self) -> bool:
        """Does it add to slices of its stream? Then it is one step always: no line of its code holds the whole sum."""
        return any(in_slices(add) for step in self.steps for add in step.adds)

    @property
    def modules(self) -> set[str]:
        """Paths, below the call's module, of the sub-modules that the steps run."""
        return {str(n.target) for step in self.steps for n in step.own_nodes() if n.op == "call_module"}

    @cached_property
    def parts(self) -> tuple[TokenWise | Mixing, ...]:
        """Which modules of the block may run on a few positions at a time, and why others may not."""
        return () if self.inline else tuple(tileable(self.call))

    @cached_property
    def causal(self) -> TokenWise | Mixing:
        """May the block itself run so, of whose positions each looks at those before it?"""
        return Mixing(self.path, "it is no module") if self.inline else token_wise(self.call, causal=True)

    @cached_property
    def causal_parts(self) -> tuple[TokenWise | Mixing, ...]:
        """As `parts`, and which modules may attend so."""
        return () if self.inline else tuple(tileable(self.call, causal=True))

    @cached_property
    def opened(self) -> frozenset[str]:
        """Paths of the modules in whose own code residual adds stand, as calls of them are recorded."""
        inner = () if self.captured is None else self.captured.opened
        holders = {id(self.call.module.get_submodule(path)) for path in inner}
        return frozenset(call.path for call in self.call.walk() if id(call.module) in holders)

    def block(self) -> Block:
        """The finding as frozen data."""
        module, start = self.call.module, self.start
        reasons = self.obstacles or [caveat for lane in self.lanes for caveat in lane.caveats]
        verdict = Verdict.REFUSED if self.obstacles else Verdict.CAVEAT if reasons else Verdict.ELIGIBLE
        value: Any = None if start is None else start.meta["val"]
        return Block(
            path=self.path,
            class_name=type(module).__name__,
            verdict=verdict,
            reasons=tuple(dict.fromkeys(map(str, reasons))),
            steps=tuple(public_step(step, module, self.inline) for lane in self.lanes for step in lane.steps),
            stream=", ".join(argument_of(lane.start) for lane in self.lanes if lane.start is not None),
            shape=() if value is None else tuple(value.shape),
            dtype="" if value is None else str(value.dtype).removeprefix("torch."),
            extra_inputs=self._extra_inputs(),
            buffers_written=self.call.buffers_written,
            draws_random=self.call.draws_random,
            parameters=sum(p.numel() for p in module.parameters()),
            source=definition_line(module),
            call=self.call.index,
        )

    def _extra_inputs(self) -> tuple[str, ...]:
        if self.captured is None or self.start is None:
            return ()
        if self.inline:  # the holder reads more than this turn of its loop does
            turn = {node for step in self.steps for node in step.branch_nodes()}
            return tuple(name for name, node in self.captured.placeholders.items() if node in turn)
        arguments, starts = self.captured.placeholders.items(), [lane.start for lane in self.lanes]
        return tuple(name for name, node in arguments if is_read(node, apart_from=starts))
