"""Give some nodes of a graph a function of their own, on the live sub-modules: the turns of an inline loop, above all.

A block that is a module can be wrapped where it is called. A turn of `x = x + f(x)` in somebody's forward cannot: so
the forward's captured graph is rebuilt with every turn as one call `turn(stream, *further inputs) -> stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from autorev.capture.tracer import CapturedBlock
from autorev.detect.finding import Finding
from autorev.detect.ways import downstream


class LiveGraph(fx.GraphModule):
    """A graph that finds the block's sub-modules at call time, and registers none of them as its own."""

    def __init__(self, block: nn.Module, constants: Mapping[str, torch.Tensor], graph: fx.Graph) -> None:
        # Attributes that `fx.GraphModule` finds in place already are not copied.
        self.__dict__["block"] = block
        self.__dict__["constants"] = SimpleNamespace(**constants)
        holder = nn.Module()
        holder.__dict__.update(block=block, constants=self.__dict__["constants"])
        super().__init__(holder, graph)


def subgraph(
    nodes: list[fx.Node], start: fx.Node, end: fx.Node, constants: Collection[str] = ()
) -> tuple[fx.Graph, list[fx.Node]]:
    """`(start, *further inputs) -> end` for a `LiveGraph`, and the nodes whose values the further inputs are."""
    own = set(nodes)
    read = (i for n in nodes for i in n.all_input_nodes if i not in own and i is not start)
    outer = list(dict.fromkeys(read))
    graph = fx.Graph()
    copied = {start: graph.placeholder("stream")}
    for node in outer:
        copied[node] = graph.placeholder(node.name)
    for node in nodes:
        copied[node] = _live_copy(graph, node, copied, constants)
    graph.output(copied[end])
    return graph, outer


def _live_copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node], constants: Collection[str]) -> fx.Node:
    """A copy of `node` that finds modules, parameters and constants where `LiveGraph` has them."""
    new = graph.node_copy(node, lambda n: copied[n])
    if node.op in ("get_attr", "call_module"):
        new.target = f"{'constants' if node.target in constants else 'block'}.{node.target}"
    return new


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
            copied[node] = _live_copy(graph, node, copied, captured.constants)
            continue
        finding = outlined.blocks[inner[node]]
        if node is finding.end:
            start, end = finding.start, finding.end
            assert start is not None and end is not None
            nodes = [n for n in captured.graph.nodes if inner.get(n) == inner[end]]
            turn, outer = subgraph(nodes, start, end, captured.constants)
            outlined.turns.append(LiveGraph(captured.module, captured.constants, turn))
            inputs = [copied[i] for i in outer]
            copied[end] = graph.call_function(call_turn, (inner[end], copied[start], *inputs))
    outlined.forward = LiveGraph(captured.module, captured.constants, graph)
    return outlined


def _nodes_of(finding: Finding) -> set[fx.Node]:
    """The adds of the block, what lies between them, and its branches as far as they depend on the stream."""
    nodes: set[fx.Node] = set()
    start, end = finding.start, finding.end
    assert start is not None and end is not None
    reached = downstream(start)
    pending = [end]
    while pending:
        node = pending.pop()
        if node is start or node in nodes or node not in reached:
            continue
        nodes.add(node)
        pending += node.all_input_nodes
    return nodes
