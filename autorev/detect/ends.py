"""Where tensors enter and leave a captured block."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx

from autorev.capture.tracer import CapturedBlock
from autorev.detect.stream import is_stream_like
from autorev.detect.ways import reaches


def flatten_with_path(structure: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(place, leaf) of every leaf in nested tuples, lists, dicts and dataclasses; () for a bare value."""
    if isinstance(structure, list | tuple):
        for i, item in enumerate(structure):
            yield from flatten_with_path(item, (*at, i))
    elif isinstance(structure, Mapping):
        for key, item in structure.items():
            yield from flatten_with_path(item, (*at, key))
    elif is_dataclass(structure) and not isinstance(structure, type):
        for f in fields(structure):
            yield from flatten_with_path(getattr(structure, f.name), (*at, f.name))
    else:
        yield at, structure


def argument_of(node: fx.Node) -> str:
    """`hidden_states`, or `states[0]` for an item of an argument."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return f"{argument_of(node.args[0])}[{node.args[1]!r}]"
    return str(node.meta.get("argument", node.target))


def drop_unread_items(captured: CapturedBlock) -> None:
    """Erase the `getitem` nodes of arguments and results that nothing reads."""
    for node in reversed(list(captured.graph.nodes)):
        if node.op == "call_function" and node.target is operator.getitem and not node.users:
            captured.graph.erase_node(node)


def is_read(node: fx.Node, apart_from: Sequence[fx.Node | None]) -> bool:
    """Does anything use the argument, or an item of it, other than the streams `apart_from`?"""
    if node in apart_from:
        return False
    items = [u for u in node.users if u.op == "call_function" and u.target is operator.getitem]
    return len(items) < len(node.users) or any(is_read(item, apart_from) for item in items)


def starts_of(captured: CapturedBlock) -> list[fx.Node]:
    """Arguments that may carry the stream: floating tensors with an axis to spare, positional ones first."""

    def is_argument(node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        items = node.op == "call_function" and node.target is operator.getitem
        return items and isinstance(node.args[0], fx.Node) and is_argument(node.args[0])

    return [n for n in captured.graph.nodes if is_argument(n) and is_stream_like(n.meta["val"])]


def outputs_of(captured: CapturedBlock) -> list[tuple[tuple[Any, ...], fx.Node]]:
    return [
        (at, leaf)
        for at, leaf in flatten_with_path(captured.output)
        if isinstance(leaf, fx.Node) and is_stream_like(leaf.meta.get("val"))
    ]


def most_likely_start(starts: list[fx.Node], output: fx.Node) -> fx.Node:
    def rank(start: fx.Node) -> tuple[bool, bool]:
        same_shape = start.meta["val"].shape == output.meta["val"].shape
        return not same_shape, not reaches(start, output)

    return min(starts, key=rank)


def find_stream(
    named: Iterable[tuple[str, Any]], argument: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Any]:
    """Where in (args, kwargs) the stream is, and the stream. `named`: the call's arguments, in order, by name.

    Raises:
        AttributeError, KeyError, IndexError, TypeError, ValueError: the call has no such argument.
    """
    wanted, _, item = argument.partition("[")
    names = [name for name, _ in named]
    at = names.index(wanted if wanted in names else argument)
    place: tuple[Any, ...] = (0, at) if at < len(args) else (1, names[at])
    if item and wanted in names:
        key = item.rstrip("]")
        place += (int(key) if key.lstrip("-").isdigit() else key.strip("'\""),)
    value: Any = (args, kwargs)
    for key in place:
        value = getattr(value, key) if is_dataclass(value) and not isinstance(value, Mapping) else value[key]
    return place, value


def replace_leaf(structure: Any, at: tuple[Any, ...], value: Any) -> Any:
    """`structure` with the leaf at `at` replaced; containers on the way are copied."""
    if not at:
        return value
    key, rest = at[0], at[1:]
    if isinstance(structure, tuple):
        items = [(replace_leaf(item, rest, value) if i == key else item) for i, item in enumerate(structure)]
        return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
    if isinstance(structure, list):
        return [(replace_leaf(item, rest, value) if i == key else item) for i, item in enumerate(structure)]
    if isinstance(structure, dict):
        copied = structure.copy()
        copied[key] = replace_leaf(structure[key], rest, value)
        return copied
    twin = copy.copy(structure)
    object.__setattr__(twin, key, replace_leaf(getattr(structure, key), rest, value))  # it may be frozen
    return twin
