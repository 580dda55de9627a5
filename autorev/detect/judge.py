"""Judge one recorded module call: which argument carries the stream, through which steps, with what verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from autorev.analysis import Block, Verdict
from autorev.capture.fake import DATA_DEPENDENT
from autorev.capture.record import ModuleCall
from autorev.capture.source import definition_line, raised_line
from autorev.capture.tracer import CapturedBlock, capture
from autorev.detect.arguments import changed_argument, contents
from autorev.detect.deferred import deferred_parts, last_of_deferred, read_apart
from autorev.detect.ends import (
    argument_of,
    drop_unread_items,
    flatten_with_path,
    is_read,
    most_likely_start,
    outputs_of,
    starts_of,
)
from autorev.detect.graph_queries import BlockView, is_single_input_layer, sum_operands_before
from autorev.detect.kinds import public_step
from autorev.detect.obstacles import GENERIC, Obstacle, caveats_on_stream, obstacles_on_stream, obstacles_to_stream
from autorev.detect.slices import in_slices, put_together
from autorev.detect.stream import ResidualStep, Stream, follow, keeps_order, reaches
from autorev.detect.tokenwise import Mixing, TokenWise, tileable, token_wise
from autorev.errors import first_line

MOST_OPENED = 8
"""Rounds of opening a sub-module that may hide an add; real models need two or three."""


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

    @property
    def lanes(self) -> tuple[Finding, ...]:
        """This stream, and those beside it."""
        return self, *self.beside

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
        return {str(n.target) for step in self.steps for n in step.branch_nodes() if n.op == "call_module"}

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
            steps=tuple(public_step(step, module) for lane in self.lanes for step in lane.steps),
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


def judge(call: ModuleCall, deferred: bool = True) -> Finding:
    """Trace the call's module and decide; sub-modules that may hide the add are opened one after the other.

    `deferred`: may its last residual add be the next block's?
    """
    opened: frozenset[str] = frozenset()
    before = contents(call)
    for _ in range(MOST_OPENED):
        try:
            captured = capture(call.path, call.module, call.args, call.kwargs, opened)
        except DATA_DEPENDENT as error:
            return _untraced(
                call,
                Obstacle(
                    "data-dependent",
                    "the block's course depends on the values of its tensors, so running it again could take "
                    "another path",
                    raised_line(error),
                ),
            )
        except Exception as error:  # whatever a stranger's forward may raise when it is run a second time
            if changed := changed_argument(call, before):
                return _untraced(call, changed)
            return _untraced(
                call,
                Obstacle(
                    "not-repeatable",
                    f"its forward, run a second time with the same arguments, raised {first_line(error)}",
                    raised_line(error),
                ),
            )
        drop_unread_items(captured)
        starts, outputs = starts_of(captured), outputs_of(captured)
        if not starts or not outputs:
            return _untraced(
                call,
                Obstacle(
                    "not-residual",
                    "it takes or returns no floating-point tensor",
                    definition_line(call.module),
                ),
            )
        streams = {start: follow(start, through_cat=True, further=put_together) for start in starts}
        if deferred and (finding := _deferred(call, captured, streams, outputs)) is not None:
            finding.obstacles += filter(None, [changed_argument(call, before)])
            return finding
        if found := _on_streams(call, captured, streams, outputs):
            first = next((finding for finding in found if finding.reversible), found[0])
            first.obstacles += filter(None, [changed_argument(call, before)])
            first.beside = [finding for finding in found if finding is not first and finding.reversible]
            if first is not found[0]:
                first.caveats += found[0].obstacles  # why that stream is not reversed beside it
            return first
        hidden = _may_hide_an_add(captured, starts, [output for _, output in outputs]) - opened
        if not hidden:
            break
        opened |= hidden
    at, output = outputs[0]
    start = most_likely_start(starts, output)
    obstacles = obstacles_to_stream(BlockView(captured, follow(start), output))
    return Finding(call, captured, start, [], obstacles, output_at=at, path=call.path)


def judge_first(call: ModuleCall, opened: frozenset[str]) -> Finding | None:
    """The call that begins a loop of deferred residuals: it is given none, and its input is the stream.

    `opened`: the sub-modules that hide adds, as they were found in the calls behind it.
    """
    captured = capture(call.path, call.module, call.args, call.kwargs, opened)
    drop_unread_items(captured)
    outputs = outputs_of(captured)
    for start in starts_of(captured):
        stream = follow(start)
        same = [(at, node) for at, node in outputs if node.meta["val"].shape == start.meta["val"].shape]
        residuals = [(at, node) for at, node in same if node in stream]
        branches = [(at, node) for at, node in same if node not in stream and reaches(start, node)]
        if residuals and branches:
            (at, output), (added_at, added) = residuals[0], branches[0]
            steps = [*stream.steps_to(output), last_of_deferred(output, output, added)]
            finding = _on_stream(call, captured, stream, steps, at, output)
            finding.deferred = True
            finding.beside = [Finding(call, captured, None, [], [], output_at=added_at, path=call.path, end=added)]
            return finding
    return None


def _untraced(call: ModuleCall, obstacle: Obstacle) -> Finding:
    return Finding(call, None, None, [], [obstacle], path=call.path)


def _on_streams(
    call: ModuleCall,
    captured: CapturedBlock,
    streams: dict[fx.Node, Stream],
    outputs: list[tuple[tuple[Any, ...], fx.Node]],
) -> list[Finding]:
    """Every output that is an input plus something, in order; no input is taken twice."""
    found: list[Finding] = []
    for at, output in outputs:
        for start, stream in streams.items():
            if start in (finding.start for finding in found) or output not in stream or stream.within(output):
                continue
            steps = stream.steps_to(output)
            reads = any(step.reads_stream() for step in steps) or any(
                step.reads(finding.start) for finding in found for step in steps if finding.start is not None
            )
            if reads or (steps and captured.lost):
                found.append(_on_stream(call, captured, stream, steps, at, output))
                break
    return found


def _deferred(
    call: ModuleCall,
    captured: CapturedBlock,
    streams: dict[fx.Node, Stream],
    outputs: list[tuple[tuple[Any, ...], fx.Node]],
) -> Finding | None:
    """`r = r + h; h = f(norm(r)); return h, r`: the stream is r + h, which the next block adds up."""
    leaves = [leaf for _, leaf in flatten_with_path(captured.output)]
    for total in captured.graph.nodes:
        parts = deferred_parts(total, streams)
        if parts is None or read_apart(parts, total, leaves):
            continue
        stream, shape = follow(total), total.meta["val"].shape
        rest = [(at, node) for at, node in outputs if node not in stream and node.meta["val"].shape == shape]
        for at, output in outputs:
            if output in stream and rest:
                (added_at, added), (first, second) = rest[0], parts
                steps = [*stream.steps_to(output), last_of_deferred(total, output, added)]
                finding = _on_stream(call, captured, stream, steps, at, output)
                finding.start, finding.deferred = first, True
                finding.beside = [
                    Finding(call, captured, second, [], [], output_at=added_at, path=call.path, end=added)
                ]
                return finding
    return None


def _on_stream(
    call: ModuleCall,
    captured: CapturedBlock,
    stream: Stream,
    steps: list[ResidualStep],
    at: tuple[Any, ...],
    output: fx.Node,
) -> Finding:
    path = stream.path_to(output)
    obstacles = obstacles_on_stream(captured, stream, path) + _aux_obstacles(captured, path, at)
    if not keeps_order(stream, output):
        text = "the skip comes out with its axes permuted, so the block adds to a rearranged stream"
        obstacles.append(Obstacle("permuted-shortcut", text, output.meta["source"]))
    obstacles += own_backward(call)
    finding = Finding(call, captured, stream.start, steps, obstacles, output_at=at, path=call.path, end=output)
    finding.caveats = _caveats(finding, path)
    return finding


def own_backward(call: ModuleCall) -> list[Obstacle]:
    """Where a user's `autograd.Function` runs the call, nothing of autograd's comes by it in backward."""
    if not call.function:
        return []
    text = f"it runs inside of {call.function}, an autograd.Function whose own backward computes its gradients"
    return [Obstacle("own-backward", text, definition_line(call.module))]


def _aux_obstacles(captured: CapturedBlock, path: list[fx.Node], at: tuple[Any, ...]) -> list[Obstacle]:
    found = []
    where = definition_line(captured.module)
    for other, leaf in flatten_with_path(captured.output):
        name = "".join(f"[{key!r}]" for key in other)
        if other == at or leaf is None or isinstance(leaf, bool | int | float):
            continue
        if isinstance(leaf, fx.Node):
            value = leaf.meta.get("val")
            if leaf in path and leaf.op != "placeholder":
                text = f"it also returns the stream from between its steps (output{name}), which would be kept"
                found.append(Obstacle("aux-output", text, where))
            elif not isinstance(value, torch.Tensor) and leaf.op != "placeholder":
                text = f"it also returns a {type(value).__name__} (output{name}), which cannot be rebuilt in backward"
                found.append(Obstacle("aux-output", text, where))
        elif type(leaf).__name__ == "_Opaque":
            text = f"it also returns a {leaf} object (output{name}), which cannot be rebuilt in backward"
            found.append(Obstacle("aux-output", text, where))
    return found


def _caveats(finding: Finding, path: list[fx.Node]) -> list[Obstacle]:
    captured = finding.captured
    assert captured is not None
    where = definition_line(captured.module)
    found = []
    if finding.call.buffers_written:
        names = ", ".join(finding.call.buffers_written[:3]) + (", ..." if len(finding.call.buffers_written) > 3 else "")
        text = f"it updates buffers while it runs ({names}); a second run in backward must not update them again"
        found.append(Obstacle("buffer-write", text, where))
    if finding.call.scalar_draws:
        text = "it draws a random number and decides by it what to run; backward draws the same once more"
        found.append(Obstacle("layer-drop", text, where))
    found += caveats_on_stream(path)
    for name, tensor in captured.constants.items():
        if tensor.requires_grad and name:
            text = "its branch reads a tensor with gradient that is neither an argument nor a parameter"
            found.append(Obstacle("closure", text, where))
            break
    return found


def _may_hide_an_add(captured: CapturedBlock, starts: list[fx.Node], outputs: list[fx.Node]) -> frozenset[str]:
    """Sub-modules right before an output that are not a plain layer: the residual add may be inside (BLOOM, T5), or
    the stream be laid out anew (windows)."""
    sizes = {start.meta["val"].numel() for start in starts}
    hidden = set()
    for node in (operand for output in outputs for operand in sum_operands_before(output)):
        if node.op != "call_module":
            continue
        module = captured.module.get_submodule(str(node.target))
        value = node.meta["val"]
        first = value if isinstance(value, torch.Tensor) else next((v for _, v in flatten_with_path(value)), None)
        plain = (
            type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
        ) or is_single_input_layer(node, module)
        if not plain and isinstance(first, torch.Tensor) and first.numel() in sizes:
            hidden.add(str(node.target))
    return frozenset(hidden)
