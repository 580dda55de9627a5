"""Blocks without a module of their own: a loop of `x = x + f(x)` in a module's forward.

The module that holds the loop is traced, its sub-modules as leaves, and the same cuts are looked for inside. One turn
of the loop is one block: where the places of the adds in the code repeat with a period of p, p steps make a block.
"""

from __future__ import annotations

from typing import Any

from autorev.capture.record import ModuleCall
from autorev.capture.tracer import CapturedBlock, capture
from autorev.detect.ends import drop_unread_items
from autorev.detect.graph_queries import BlockView
from autorev.detect.judge import Finding, own_backward
from autorev.detect.obstacles import Obstacle, between_sums, obstacles_on_stream
from autorev.detect.runs import Run, residual_runs, stream_like_sums
from autorev.detect.stream import ResidualStep, follow, is_stream_like, reaches


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
    return [finding for run in residual_runs(captured.graph) for finding in _blocks_of(call, captured, run)]


def _captured(call: ModuleCall) -> CapturedBlock | None:
    if not call.children:
        return None
    try:
        captured = capture(call.path, call.module, call.args, call.kwargs)
    except Exception:  # the recorded call succeeded; only this second look at it did not
        return None
    drop_unread_items(captured)
    return captured


def _blocks_of(call: ModuleCall, captured: CapturedBlock, run: Run) -> list[Finding]:
    period = _period([step.after.meta["place"] for step in run.steps])
    obstacles = obstacles_on_stream(captured, run.stream, run.path) + own_backward(call)
    findings = []
    for number, first in enumerate(range(0, len(run.steps), period)):
        group = run.steps[first : first + period]
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
    for node in stream_like_sums(captured.graph):
        for skip in node.all_input_nodes:
            others = [n for n in node.all_input_nodes if n is not skip]
            if not (is_stream_like(skip.meta.get("val")) and others and all(reaches(skip, other) for other in others)):
                continue
            stream = follow(skip)
            obstacle: Obstacle | None = between_sums(BlockView(captured, stream, node), node)
            if node in stream and obstacle is not None:
                finding = Finding(call, captured, skip, [], [obstacle], end=node, inline=True)
                finding.path = _path(call, stream.steps_to(node), len(findings))
                findings.append(finding)
            break
    return findings if len(findings) > 1 else []
