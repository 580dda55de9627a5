"""Judge one recorded module call: which argument carries the stream, through which steps, with what verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autorev.capture.fake import DATA_DEPENDENT
from autorev.capture.record import ModuleCall
from autorev.capture.source import definition_line, raised_line
from autorev.capture.tracer import CapturedBlock, capture
from autorev.detect.arguments import changed_argument, contents
from autorev.detect.deferred import deferred_parts, last_of_deferred, read_apart
from autorev.detect.ends import (
    drop_unread_items,
    flatten_with_path,
    most_likely_start,
    outputs_of,
    starts_of,
)
from autorev.detect.finding import Finding
from autorev.detect.graph_queries import BlockView, is_single_input_layer, sum_operands_before
from autorev.detect.obstacles import Obstacle, obstacles_to_stream
from autorev.detect.on_stream import caveats_on_stream, obstacles_on_stream
from autorev.detect.order import keeps_order
from autorev.detect.slices import put_together
from autorev.detect.stream import ResidualStep, Stream, follow
from autorev.detect.ways import reaches
from autorev.errors import first_line

MOST_OPENED = 8
"""Rounds of opening a sub-module that may hide an add; real models need two or three."""


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
            for finding in found:
                if finding.reversible and finding is not first:
                    first.beside.append(finding)
                elif finding is not first:
                    first.leave_out(finding)
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
    """Every output that is an input plus something; no input is taken twice.

    The something reads that input, or another that is taken: of RevNet's two streams each adds a function of the other.
    """
    lanes = [
        _Lane(stream, at, output, steps)
        for at, output in outputs
        for stream in streams.values()
        if output in stream and not stream.within(output) and (steps := stream.steps_to(output))
    ]
    found: list[_Lane] = []
    while True:
        free = [lane for lane in lanes if all(lane.is_beside(other) for other in found)]
        known = [lane.stream.start for lane in found]
        reading = [lane for lane in free if captured.lost or lane.reads(known)]
        reading = reading or [lane for lane in free if lane.crosses(free)]
        if not reading:
            break
        found.append(reading[0])
    paths = [lane.stream.path_to(lane.output) for lane in found]
    return [_on_stream(call, captured, lane.stream, lane.steps, lane.at, lane.output, paths) for lane in found]


@dataclass(frozen=True, eq=False)
class _Lane:
    """A stream that may be one of the block's."""

    stream: Stream
    at: tuple[Any, ...]
    output: fx.Node
    steps: list[ResidualStep]

    def is_beside(self, other: _Lane) -> bool:
        return self.at != other.at and self.stream.start is not other.stream.start

    def reads(self, others: list[fx.Node]) -> bool:
        """Does what it adds depend on the stream itself, or on one of `others`?"""
        return any(step.reads_stream() or any(map(step.reads, others)) for step in self.steps)

    def crosses(self, others: list[_Lane]) -> bool:
        """Does it read one of `others` that reads it?"""
        beside = (other for other in others if self.is_beside(other))
        return any(self.reads([other.stream.start]) and other.reads([self.stream.start]) for other in beside)


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
    paths: Sequence[list[fx.Node]] = (),
) -> Finding:
    """`paths`: those of all of the block's streams."""
    path = stream.path_to(output)
    obstacles = obstacles_on_stream(captured, stream, path, paths) + _aux_obstacles(captured, path, at)
    if not keeps_order(stream, output):
        text = "the skip comes out with its axes permuted, so the block adds to a rearranged stream"
        obstacles.append(Obstacle("permuted-shortcut", text, output.meta["source"]))
    obstacles += own_backward(call)
    finding = Finding(call, captured, stream.start, steps, obstacles, output_at=at, path=call.path, end=output)
    finding.factor = stream.factor_to(output)
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
