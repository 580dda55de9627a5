"""What one block hands on to the next, and what the model's own loop does with it in between."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.utils._pytree import tree_leaves

from autorev.capture.record import RecordedCall
from autorev.capture.source import definition_line
from autorev.detect.ends import argument_of
from autorev.detect.finding import Finding
from autorev.detect.graph_queries import NORM_NAMES, is_norm_module
from autorev.detect.obstacles import Obstacle

State = tuple[int, int]
"""A tensor, and how often it had been written to: what one block returns is what the next receives."""


def entry_of(finding: Finding) -> tuple[State, ...]:
    """What it receives of every stream that it carries."""
    return tuple(sorted(map(enters, finding.lanes)) if finding.deferred else map(enters, finding.lanes))


def exit_of(finding: Finding) -> tuple[State, ...]:
    """What it returns of every stream."""
    # The parts of a sum have no order.
    return tuple(sorted(map(leaves, finding.lanes)) if finding.deferred else map(leaves, finding.lanes))


def enters(lane: Finding) -> State:
    """The stream as it is given."""
    return id(lane.stream_in), 0 if lane.inline else lane.call.entered.get(id(lane.stream_in), 0)


def leaves(lane: Finding) -> State:
    """The stream as it is returned."""
    return id(lane.stream_out), 0 if lane.inline else lane.call.left.get(id(lane.stream_out), 0)


def link(findings: list[Finding], recorded: RecordedCall) -> None:
    """Notice what the model's own loop does between two neighbouring blocks."""
    given = {exit_of(f) for f in findings if f.reversible}
    taken = {entry_of(f) for f in findings if f.reversible}
    linked = {id(f) for f in findings if exit_of(f) in taken or entry_of(f) in given}
    broken: dict[int, Obstacle] = {}
    for before, after in pairwise(findings):
        if not (before.reversible and after.reversible) or before.call.parent is not after.call.parent:
            continue
        if exit_of(before) in taken or entry_of(after) in given:
            continue
        shared = set(exit_of(before)) & set(entry_of(after))
        if shared and len(before.lanes) != len(after.lanes):
            broken[id(after)] = _other_streams(before, after)
            continue
        if type(before.call.module) is not type(after.call.module) or before.inline or after.inline:
            continue
        if before.call.path.rpartition(".")[0] != after.call.path.rpartition(".")[0]:
            continue
        replaced = next(lane.stream_in for lane in after.lanes if enters(lane) not in shared)
        written = any(lane.stream_out is replaced for lane in before.lanes)
        made = recorded.writers if written else recorded.producers
        name, line = made.get(id(replaced), ("an in-place operation", "unknown source"))
        text = (
            f"between {before.path} and {after.path} the model replaces the stream (`{name}`), so the one does not "
            "receive what the other returned"
        )
        if _is_normed(replaced, name, recorded):
            text = (
                f"between {before.path} and {after.path} the stream passes through a norm (`{name}`): this is "
                "post-norm, outside of the blocks, and mean and scale of what a norm is given are lost; put it into "
                "the branch, x + f(norm(x)), or checkpoint the blocks"
            )
        broken[id(before)] = broken[id(after)] = Obstacle("stream-replaced", text, line)
    receivers = {id(lane.stream_in): f for f in reversed(findings) if f.reversible and not f.inline for lane in f.lanes}
    for finding in findings:
        for lane in finding.lanes if finding.reversible else ():
            receiver = receivers.get(id(lane.stream_out))
            if receiver is not None and lane.stream_in is not lane.stream_out:  # it is, where blocks add in place
                finding.caveats += _read_outside(lane, receiver, recorded)
    for finding in findings:
        obstacle = broken.get(id(finding))
        if obstacle is not None:
            if id(finding) in linked:
                finding.caveats.append(obstacle)
            else:
                finding.obstacles.append(obstacle)
        parent = finding.call.parent
        if finding.reversible and parent is not None and parent.scalar_draws:
            text = "the model may drop whole layers at random; a dropped layer is simply not part of that step's chain"
            finding.caveats.append(Obstacle("layer-drop", text, definition_line(parent.module)))


def _is_normed(replaced: torch.Tensor | None, name: str, recorded: RecordedCall) -> bool:
    """Has a norm returned it, a module or a function called `name`?"""
    norms = (call for call in recorded.root.walk() if is_norm_module(call.module))
    return name in NORM_NAMES or any(call.output is replaced for call in norms)


def _other_streams(before: Finding, after: Finding) -> Obstacle:
    first, second = (", ".join(argument_of(lane.start) for lane in f.lanes if lane.start) for f in (before, after))
    text = (
        f"it carries on {second}, and {before.path} before it {first}; a chain has the same streams from its first "
        "block to its last"
    )
    return Obstacle("other-streams", text, definition_line(after.call.module))


def _read_outside(before: Finding, after: Finding, recorded: RecordedCall) -> list[Obstacle]:
    """Long skips, deep supervision: what else keeps the state between two blocks."""
    assert before.stream_out is not None
    own = {id(call) for finding in (before, after) for call in finding.call.walk()}
    for call, function, line in recorded.readers.get(id(before.stream_out), []):
        if id(call) not in own:
            text = (
                f"the model reads the stream between {before.path} and {after.path} for something else as well "
                f"(`{function}`), so that state stays in memory"
            )
            return [Obstacle("stream-read", text, line)]
    if any(leaf is before.stream_out for leaf in tree_leaves(recorded.root.output)):
        text = f"the model also returns the stream as {before.path} leaves it, so that state stays in memory"
        return [Obstacle("stream-read", text, definition_line(recorded.root.module))]
    return []
