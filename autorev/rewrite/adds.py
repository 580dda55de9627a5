"""Which adds in a block's code end a residual step: known by their place in the code, from the analysis of a call.

The code itself decides anew at each call what it does; only what an add in it *means* is remembered. A call that comes
by an add which no analysis has seen is analysed itself, on fake tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from autorev.detect.ends import argument_of
from autorev.detect.finding import Finding
from autorev.detect.sums import add_operands
from autorev.errors import ConversionError

Place = tuple[str, int]
"""`file.py:line`, and the instruction within the function."""


@dataclass(frozen=True)
class Start:
    """Where the stream of an inline loop comes from."""

    argument: str | None
    """The holder's argument, where it is one."""
    place: Place | None
    """The call whose result it is, or an item of."""
    items: tuple[Any, ...] = ()
    after: int = 0
    """How many results of the same call in the code came before it."""


@dataclass(eq=False)
class KnownAdds:
    """The adds of one module's code."""

    closing: set[Place] = field(default_factory=set)
    """They end a step: what they return is the new stream."""
    others: set[Place] = field(default_factory=set)
    """They add to the stream within a branch: a position, a first term."""
    starts: set[Start] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    """Sub-modules, by path, in whose own code closing adds stand."""

    @classmethod
    def of_block(cls, finding: Finding, whole: bool = False) -> KnownAdds:
        """The adds of a block module: each of its residual steps ends with one; the block, if it is one step as a
        `whole`, with its last."""
        known = cls()
        ends = [step.after for step in finding.steps]
        known.learn(finding, ends[-1:] if whole else ends, None)
        return known

    @classmethod
    def of_loop(cls, findings: list[Finding]) -> KnownAdds:
        """The adds of a loop, one turn (or one step of a turn) per finding."""
        known = cls()
        assert findings[0].start is not None
        known.learn(findings[0], [f.end for f in findings if f.end is not None], findings[0].start)
        return known

    def learn(self, finding: Finding, ends: Iterable[fx.Node], start: fx.Node | None) -> None:
        """Take over what an analysis says; `ends`: the nodes that end a step.

        Raises:
            ConversionError: one place in the code both ends a step and does not.
        """
        captured = finding.captured
        assert captured is not None
        ending = set(ends)
        nodes = list(captured.graph.nodes)
        if start is not None:  # what the code adds up before the loop is none of the stream
            nodes = nodes[nodes.index(start) + 1 :]
        # New sets: the code may be running in another thread, which goes through those that are here now.
        self.opened = self.opened | captured.opened
        self.closing = self.closing | {node.meta["place"] for node in nodes if node in ending}
        self.others = self.others | {n.meta["place"] for n in nodes if n not in ending and add_operands(n) is not None}
        both = self.closing & self.others
        if both:
            raise ConversionError(
                f"{finding.path}: the add at {min(both)[0]} ends a residual step at one time and is part of a branch "
                "at another; use granularity='block', or write the two adds apart"
            )
        if start is not None:
            self.starts = self.starts | {_start(start)}

    def knows(self, place: Place) -> bool:
        """Has an analysis seen it?"""
        return place in self.closing or place in self.others


def _start(node: fx.Node) -> Start:
    items: list[Any] = []
    while node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        items.insert(0, node.args[1])
        node = node.args[0]
    before = sum(
        other.op != "placeholder" and other.meta.get("place") == node.meta["place"]
        for other in list(node.graph.nodes)[: list(node.graph.nodes).index(node)]
    )
    if node.op == "placeholder":
        return Start("".join([argument_of(node), *(f"[{item!r}]" for item in items)]), None)
    return Start(None, node.meta["place"], tuple(items), before)
