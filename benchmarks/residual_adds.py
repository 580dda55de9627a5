"""The residual adds of a model, from the autograd graph of its own forward: what a sweep compares autorev with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

Edge = tuple[Any, int]
"""A node of the autograd graph and which of its forward's results is meant."""

VIEWED = "View UnsafeView ReshapeAlias Permute Transpose T Alias Clone ToCopy Squeeze Unsqueeze"
ONTO_THE_FIRST = {f"{name}Backward0" for name in ("Sub", "Addcmul", "Addmm", "Baddbmm", "IndexAdd", "ScatterAdd")}
VIEWS = {f"{name}Backward{version}" for name in VIEWED.split() for version in "012"}


def residual_chains(outputs: Iterable[torch.Tensor]) -> list[int]:
    """How many adds x + f(x) follow each other on every stream of two or more, longest first.

    An add is one where a tensor x of the sum's shape is added to what was computed from x. It follows another where its
    x is, up to views, the other's sum. Further terms (x + f(x) + g(x)) belong to the same add.
    """
    order = list(_inputs_first([tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]))
    bits: dict[Edge, int] = {}
    for node in order:
        for skip, _ in _sums(node):
            bits.setdefault(skip, 1 << len(bits))
    reach: dict[Any, int] = {}  # of each node, the possible streams that it was computed from
    for node in order:
        reach[node] = 0
        for edge in _edges(node):
            reach[node] |= reach[edge[0]] | bits.get(edge, 0)

    added_to: dict[Any, Edge] = {}
    depth: dict[Any, int] = {}
    first: dict[Any, Any] = {}
    for node in order:
        for skip, branches in _sums(node):
            before = skip[0]
            seen = 0
            for branch in branches:
                seen |= reach[branch[0]] | bits.get(branch, 0)
            if seen & bits[skip]:
                added_to[node], depth[node] = skip, depth.get(before, 0) + 1
            elif before in added_to and seen & bits[added_to[before]]:
                added_to[node], depth[node] = added_to[before], depth[before]
            else:
                continue
            first[node] = first.get(before, node)
            break
    longest: Counter[Any] = Counter()
    for node, length in depth.items():
        longest[first[node]] = max(longest[first[node]], length)
    return sorted((length for length in longest.values() if length > 1), reverse=True)


def _edges(node: Any) -> list[Edge]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _inputs_first(roots: list[Any]) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in _edges(node) if before not in seen]


def _sums(node: Any) -> Iterator[tuple[Edge, list[Edge]]]:
    """(what may be the stream, the other terms) of a node that adds."""
    operands = node.next_functions
    if node.name() == "AddBackward0":
        choices = (0, 1) if node._saved_alpha == 1 else (0,)
    elif node.name() in ONTO_THE_FIRST:
        choices = (0,)
    else:
        return
    for choice in choices:
        others = [edge for place, edge in enumerate(operands) if place != choice and edge[0] is not None]
        skip = operands[choice]
        if skip[0] is not None and others and _kind(skip) == _kind((node, 0)) and _kind(skip)[0]:
            yield _before_views(skip), others


def _kind(edge: Edge) -> tuple[tuple[int, ...], Any]:
    meta = edge[0]._input_metadata[edge[1]]
    return tuple(meta.shape), meta.dtype


def _before_views(edge: Edge) -> Edge:
    while True:
        node = edge[0]
        one = node.name() in ("MulBackward0", "DivBackward0") and node.next_functions[1][0] is None
        times_one = one and node._saved_other is not None and node._saved_other.numel() == 1 and node._saved_other == 1
        if not (node.name() in VIEWS or times_one) or node.next_functions[0][0] is None:
            return edge
        edge = node.next_functions[0]
