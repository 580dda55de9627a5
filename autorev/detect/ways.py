"""Ways through a graph: whose value does a node's depend on?"""

from __future__ import annotations

from typing import Any

from torch import fx


def reaches(start: fx.Node, end: fx.Node, without: fx.Node | None = None) -> bool:
    """Does a path of uses lead from `start` to `end`, not counting those through `without`?"""
    if without is end:
        return False
    seen: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node is end:
            return True
        if node not in seen and node is not without:
            seen.add(node)
            pending += [user for user in node.users if node in read_by(user)]
    return False


def read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values `node` reads: not those that only lend it their shape or dtype."""
    name = name_of(node)
    if name in _takes_after and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return [n for n in node.all_input_nodes if n is not node.args[1]]
    if node.op != "call_module" and (name.endswith("_like") or name.startswith("new_")):
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return node.all_input_nodes


_takes_after = {"type_as", "view_as", "reshape_as", "expand_as", "to"}


def depends(item: Any, start: fx.Node) -> bool:
    """Is it a node whose value depends on that of `start`?"""
    return isinstance(item, fx.Node) and reaches(start, item)


def name_of(node: fx.Node) -> str:
    """Of the function or method that it calls."""
    return str(getattr(node.target, "__name__", node.target))


def downstream(start: fx.Node) -> set[fx.Node]:
    """`start`, and whatever uses it or what comes of it."""
    seen: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += list(node.users)
    return seen
