"""Blocks without a module of their own: a loop of `x = x + f(x)` in a module's forward.

The module that holds the loop is traced, its sub-modules as leaves, and the same cuts are looked for inside. One turn
of the loop is one block: where the places of the adds in the code repeat with a period of p, p steps make a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autorev.capture.record import ModuleCall
from autorev.capture.tracer import CapturedBlock, capture
from autorev.detect.around import Question
from autorev.detect.judge import Finding, drop_unread_items, path_nodes
from autorev.detect.obstacles import Obstacle, between_sums, obstacles_on_stream
from autorev.detect.stream import ResidualStep, Stream, add_operands, follow, reaches


def inline_blocks(call: ModuleCall, alone: bool = False) -> list[Finding]:
    """Inline blocks in `call`'s own code; with `alone`, in everything below it too, and refusals among them.

    A module that cannot be traced has no inline block that could be converted; it contributes nothing.
    """
    if alone:
        found: list[Finding] = []
        for inner in call.walk():
            if not type(inner.module).__module__.startswith("torch.nn"):
                found += _refused_loop(inner)
        return found
    captured = _captured(call)
    if captured is None:
        return []
    findings: list[Finding] = []
    taken: set[fx.Node] = set()
    while (longest := _longest_stream(captured, taken)) is not None:
        stream, steps = longest
        taken |= path_nodes(stream, steps[-1].after)
        findings += _blocks_of(call, captured, stream, steps)
    return findings


def _captured(call: ModuleCall) -> CapturedBlock | None:
    if not call.children:
        return None
    try:
        captured = capture(call.path, call.module, call.args, call.kwargs)
    except Exception:  # the recorded call succeeded; only this second look at it did not
        return None
    drop_unread_items(captured)
    return captured


def _sums(captured: CapturedBlock) -> list[fx.Node]:
    return [n for n in captured.graph.nodes if add_operands(n) is not None and _is_wide(n)]


def _is_wide(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2


def _longest_stream(captured: CapturedBlock, taken: set[fx.Node]) -> tuple[Stream, list[ResidualStep]] | None:
    """The stream with the most steps (two at least) among the sums that are not `taken` yet."""
    best: tuple[Stream, list[ResidualStep]] | None = None
    covered: set[fx.Node] = set(taken)
    for node in _sums(captured):
        for operand in node.all_input_nodes:
            if operand in covered or not _is_wide(operand) or node in taken:
                continue
            stream = follow(operand)
            for end in reversed(stream.nodes):
                steps = stream.steps_to(end)
                if not all(step.reads_stream() for step in steps) or len(steps) < 2:
                    continue
                if best is None or len(steps) > len(best[1]):
                    best = stream, steps
                break
            covered |= set(stream.nodes) - {operand} if best and best[0] is stream else set()
    return best


def _blocks_of(call: ModuleCall, captured: CapturedBlock, stream: Stream, steps: list[ResidualStep]) -> list[Finding]:
    period = _period([step.after.meta["place"] for step in steps])
    obstacles = obstacles_on_stream(captured, stream, path_nodes(stream, steps[-1].after))
    findings = []
    for number, first in enumerate(range(0, len(steps), period)):
        group = steps[first : first + period]
        finding = Finding(call, captured, group[0].before, group, list(obstacles), end=group[-1].after, inline=True)
        finding.path = _path(call, group, number)
        findings.append(finding)
    return findings


def _period(places: list[Any]) -> int:
    for period in range(1, len(places) // 2 + 1):
        if all(p == places[i % period] for i, p in enumerate(places)):
            return period
    return 1


def _path(call: ModuleCall, steps: list[ResidualStep], number: int) -> str:
    """The sub-module that the whole block runs (`layers.3`), or the holder's path with the turn of its loop."""
    called = [str(n.target) for step in steps for n in step.branch_nodes() if n.op == "call_module"]
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
    """Sums `x + f(x)` of a loop that do something to the sum before the next turn: post-norm and its kin."""
    captured = _captured(call)
    if captured is None:
        return []
    findings: list[Finding] = []
    for node in _sums(captured):
        for skip in node.all_input_nodes:
            others = [n for n in node.all_input_nodes if n is not skip]
            if not (_is_wide(skip) and others and all(reaches(skip, other) for other in others)):
                continue
            stream = follow(skip)
            obstacle: Obstacle | None = between_sums(Question(captured, stream, node), node)
            if node in stream and obstacle is not None:
                finding = Finding(call, captured, skip, [], [obstacle], end=node, inline=True)
                finding.path = _path(call, stream.steps_to(node), len(findings))
                findings.append(finding)
            break
    return findings if len(findings) > 1 else []
