"""Give the turns of an inline loop a function of their own.

A block that is a module can be wrapped where it is called. A turn of `x = x + f(x)` in somebody's forward cannot: so
the forward's captured graph is rebuilt with every turn as one call `turn(stream, *further inputs) -> stream`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autorev.capture.tracer import CapturedBlock
from autorev.detect.judge import Finding
from autorev.detect.pieces import LiveGraph


@dataclass(eq=False)
class Outlined:
    """A forward with its inline blocks taken out.

    The graph holds for the shapes of the recorded call: sizes that the code read from them are constants in it.
    """

    captured: CapturedBlock
    blocks: list[Finding] = field(default_factory=list)
    turns: list[fx.GraphModule] = field(default_factory=list)
    """One per block."""
    forward: fx.GraphModule | None = None
    """Takes the values of `captured.placeholders`, in order."""
    call_turn: Callable[..., Any] = lambda number, turn, stream, *inputs: turn(stream, *inputs)
    """Runs one block; may be replaced."""


def outline(captured: CapturedBlock, findings: list[Finding]) -> Outlined:
    """Rebuild the holder's forward; a turn whose inner values are read from outside stays as it is."""
    outlined = Outlined(captured)
    inner: dict[fx.Node, int] = {}
    for finding in findings:
        own = _nodes_of(finding)
        if all(user in own for n in own if n is not finding.end for user in n.users):
            inner |= dict.fromkeys(own, len(outlined.blocks))
            outlined.blocks.append(finding)

    def call_turn(number: int, stream: torch.Tensor, *inputs: Any) -> Any:
        return outlined.call_turn(number, outlined.turns[number], stream, *inputs)

    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        if node not in inner:
            copied[node] = _live_copy(captured, graph, node, copied)
            continue
        finding = outlined.blocks[inner[node]]
        if node is finding.end:
            start, end = finding.start, finding.end
            assert start is not None and end is not None
            nodes = [n for n in captured.graph.nodes if inner.get(n) == inner[end]]
            read = (i for n in nodes for i in n.all_input_nodes if i not in nodes and i is not start)
            outer = list(dict.fromkeys(read))
            outlined.turns.append(_turn(captured, nodes, start, outer))
            inputs = [copied[i] for i in outer]
            copied[end] = graph.call_function(call_turn, (inner[end], copied[start], *inputs))
    outlined.forward = LiveGraph(captured.module, captured.constants, graph)
    return outlined


def _nodes_of(finding: Finding) -> set[fx.Node]:
    """The adds of the block, what lies between them, and its branches as far as they depend on the stream."""
    nodes: set[fx.Node] = set()
    start, end = finding.start, finding.end
    assert start is not None and end is not None
    reached = _downstream(start)
    pending = [end]
    while pending:
        node = pending.pop()
        if node is start or node in nodes or node not in reached:
            continue
        nodes.add(node)
        pending += node.all_input_nodes
    return nodes


def _downstream(start: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += list(node.users)
    return seen


def _turn(captured: CapturedBlock, nodes: list[fx.Node], start: fx.Node, outer: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copied = {start: graph.placeholder("stream")}
    for number, node in enumerate(outer):
        copied[node] = graph.placeholder(f"input_{number}")
    for node in nodes:
        copied[node] = _live_copy(captured, graph, node, copied)
    graph.output(copied[nodes[-1]])
    return LiveGraph(captured.module, captured.constants, graph)


def _live_copy(captured: CapturedBlock, graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of `node` that finds modules, parameters and constants where `LiveGraph` has them."""
    new = graph.node_copy(node, lambda n: copied[n])
    if node.op in ("get_attr", "call_module"):
        new.target = f"{'constants' if node.target in captured.constants else 'block'}.{node.target}"
    return new
