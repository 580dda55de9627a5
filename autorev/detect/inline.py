"""Blocks without a module of their own: a loop of `x = x + f(x)` in a module's forward.

The module that holds the loop is traced, its sub-modules as leaves, and the same cuts are looked for inside. One turn
of the loop is one block: where the places of the adds in the code repeat with a period of p, p steps make a block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import fx

from autorev.capture.record import ModuleCall
from autorev.capture.tracer import CapturedBlock, capture
from autorev.detect.ends import drop_unread_items
from autorev.detect.finding import Finding
from autorev.detect.graph_queries import BlockView
from autorev.detect.judge import own_backward
from autorev.detect.obstacles import Obstacle, between_sums, projected_shortcut, scaled_shortcut
from autorev.detect.on_stream import obstacles_on_stream
from autorev.detect.runs import Run, residual_runs, stream_like_sums
from autorev.detect.stream import ResidualStep, follow, is_stream_like
from autorev.detect.sums import add_operands
from autorev.detect.ways import reaches


def inline_blocks(call: ModuleCall, opened: frozenset[str] = frozenset()) -> list[Finding]:
    """Inline blocks in `call`'s own code, and in that of the sub-modules `opened`, which are no more than part of it.

    A module that cannot be traced has no inline block that could be converted; it contributes nothing.
    """
    captured = _captured(call, opened)
    if captured is None:
        return []
    return [finding for run in residual_runs(captured.graph) for finding in _blocks_of(call, captured, run)]


def refused_loops(root: ModuleCall) -> list[Finding]:
    """Loops anywhere below `root` that do something to the residual sum before the next turn."""
    calls = (call for call in root.walk() if not type(call.module).__module__.startswith("torch.nn"))
    return [finding for call in calls for finding in _refused_loop(call)]


def _captured(call: ModuleCall, opened: frozenset[str] = frozenset()) -> CapturedBlock | None:
    """`call`'s code; modules that may be no more than an add of what they are given are looked into."""
    if not call.children:
        return None
    adders: frozenset[str] = frozenset()
    while True:
        try:
            captured = capture(call.path, call.module, call.args, call.kwargs, opened | adders)
        except Exception:  # the recorded call succeeded; only this second look at it did not
            return None
        drop_unread_items(captured)
        more = frozenset(str(node.target) for node in captured.graph.nodes if _may_be_an_add(node, captured))
        if not more:
            return captured
        adders |= more


def _may_be_an_add(node: fx.Node, captured: CapturedBlock) -> bool:
    """Is it a call of a module without parts that makes one tensor of two like it (`Residual()(f(x), x)`)?"""
    value = node.meta.get("val")
    if node.op != "call_module" or not isinstance(value, torch.Tensor):
        return False
    alike = [n for n in node.all_input_nodes if getattr(n.meta.get("val"), "shape", None) == value.shape]
    module = captured.module.get_submodule(str(node.target))
    return len(alike) > 1 and not [*module.children()] and not type(module).__module__.startswith("torch.nn")


def _blocks_of(call: ModuleCall, captured: CapturedBlock, run: Run) -> list[Finding]:
    steps = _told_by_place(run)
    if not steps:
        end = run.steps[-1].after
        text = "this add ends a step of the loop at one time and is none of its chain at another, so it marks no step"
        obstacle = Obstacle("shared-add", text, end.meta["source"])
        path = _path(call, run.steps, 0)
        return [Finding(call, captured, run.steps[0].before, [], [obstacle], path=path, end=end, inline=True)]
    period = turn_of(steps)
    obstacles = obstacles_on_stream(captured, run.stream, run.path) + own_backward(call)
    findings = []
    # Every turn ends with the same add. The first one may lack steps: of those that read a tensor which is read later.
    whole = range(len(steps) % period, len(steps) + 1, period)
    for number, (first, end) in enumerate(pairwise(sorted({0, *whole}))):
        group = steps[first:end]
        finding = Finding(call, captured, group[0].before, group, list(obstacles), end=group[-1].after, inline=True)
        finding.path = _path(call, group, number)
        findings.append(finding)
    return findings


def _told_by_place(run: Run) -> list[ResidualStep]:
    """The run's steps; those that end with an add which in another turn ends none are one with the step behind.

    None are left where such an add ends the last one (a U-Net's second half adds more).
    """
    steps = list(run.steps)
    nodes = list(run.stream.start.graph.nodes)
    adds = [n for n in nodes[nodes.index(steps[0].before) + 1 :] if add_operands(n) is not None]
    while True:
        ends = {step.after for step in steps}
        others = {n.meta["place"] for n in adds if n not in ends}
        number = next((i for i, step in enumerate(steps) if step.after.meta["place"] in others), None)
        if number is None or number == len(steps) - 1:
            return steps if number is None else []
        first, second = steps[number : number + 2]
        steps[number : number + 2] = [ResidualStep((*first.adds, *second.adds), first.before)]


def turn_of(steps: list[ResidualStep]) -> int:
    """The number of steps in a turn of the loop: with it, the places of the adds in the code repeat; 1 where they do
    not."""
    places = [step.after.meta["place"] for step in steps]
    for period in range(1, len(places) // 2 + 1):
        if all(place == places[i + period] for i, place in enumerate(places[:-period])):
            return period
    return 1


def recur(ends: list[fx.Node]) -> bool:
    """Do adds recur in the code? Then it is a loop, and not merely adds that follow one another."""
    return len({end.meta["place"] for end in ends}) < len(ends)


def _path(call: ModuleCall, steps: list[ResidualStep], number: int) -> str:
    """The sub-module that the whole block runs (`layers.3`), or the holder's path with the turn of its loop."""
    called = [str(n.target) for step in steps for n in step.own_nodes() if n.op == "call_module"]
    shared = common_start([path.split(".") for path in called])
    prefix = f"{call.path}." if call.path else ""
    if shared and any(part.isdigit() for part in shared):
        return prefix + ".".join(shared)
    return f"{prefix}loop[{number}]"


def common_start(paths: list[list[str]]) -> list[str]:
    """The names with which all paths begin."""
    shared: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return shared


def _refused_loop(call: ModuleCall) -> list[Finding]:
    """Sums `x + f(x)` of a loop that do something to the sum before the next turn, as post-norm does, or to x before
    they add: a learned factor, a matrix."""
    captured = _captured(call)
    if captured is None:
        return []
    findings: list[Finding] = []
    for node in stream_like_sums(captured.graph):
        skip = _skip_of(node)
        if skip is None:
            continue
        stream = follow(skip)
        view = BlockView(captured, stream, node)
        free = skip in node.all_input_nodes
        obstacle = between_sums(view, node) if free else scaled_shortcut(view) or projected_shortcut(view)
        if free == (node in stream) and obstacle is not None:
            finding = Finding(call, captured, skip, [], [obstacle], end=node, inline=True)
            finding.path = _path(call, stream.steps_to(node) if free else [], len(findings))
            findings.append(finding)
    return findings if len(findings) > 1 else []


def _skip_of(total: fx.Node) -> fx.Node | None:
    """What a sum adds to a function of it, or to a function of what that is made of."""
    for operand in total.all_input_nodes:
        others = [n for n in total.all_input_nodes if n is not operand]
        behind: list[fx.Node] = [] if operand.op == "call_module" else operand.all_input_nodes
        for skip in (operand, *behind):
            if is_stream_like(skip.meta.get("val")) and others and all(reaches(skip, other) for other in others):
                return skip
    return None
