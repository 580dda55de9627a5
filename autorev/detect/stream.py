"""Follow the residual stream through a block's graph and find its steps.

`s0` is the input that carries the stream. A node *is the stream* when it is s0, a reshape, cast or alias of the stream,
or the sum of the stream and something of the same shape that is not the stream. Where the block's output is the stream,
walking back from it along the skips meets the adds; those that every path from s0 to the output runs through are the
*cuts*. What is added between two cuts is one residual step (attention and MLP in parallel are one step of two terms).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autorev.detect.sums import MATRIX_PRODUCTS, ONTO_FIRST, add_operands, is_subtraction, is_times_one, scale_of

_copies: set[Any] = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "reshape"}
_copies |= {torch.clone, torch.reshape, torch.flatten, "flatten"}
_cats = {"cat", "concat", "concatenate"}
_cuts_gradient = {"detach", "detach_", torch.detach, "data"}


@dataclass(eq=False)
class Add:
    """One add of the stream: `node = skip + branch` (or `skip - branch`)."""

    node: fx.Node
    skip: fx.Node
    branch: tuple[Any, ...]
    """Further operands; nodes or numbers."""


@dataclass(eq=False)
class ResidualStep:
    """The adds between two cuts; the last one is the cut."""

    adds: tuple[Add, ...]
    before: fx.Node
    """The stream node at which the step begins."""

    @property
    def after(self) -> fx.Node:
        """The cut: the stream node at which the step ends."""
        return self.adds[-1].node

    @property
    def source(self) -> str:
        """`file.py:line` of the add that ends the step."""
        return str(self.after.meta["source"])

    def reads_stream(self) -> bool:
        """Does the branch depend on the stream? A module that adds two of its arguments has no branch of its own."""
        return self.reads(self.before)

    def reads(self, node: fx.Node) -> bool:
        """Does the branch depend on `node`?"""
        return any(_depends(item, node) for add in self.adds for item in add.branch)

    def branch_nodes(self) -> list[fx.Node]:
        """Nodes that the branch is computed by, in graph order."""
        wanted: set[fx.Node] = set()
        pending = [item for add in self.adds for item in add.branch if isinstance(item, fx.Node)]
        skips = {add.skip for add in self.adds} | {add.node for add in self.adds}
        while pending:
            node = pending.pop()
            if node in wanted or node in skips or node is self.before:
                continue
            wanted.add(node)
            pending += read_by(node)
        return [node for node in self.before.graph.nodes if node in wanted]


@dataclass(frozen=True)
class Part:
    """Where a stream is in a tensor that it was concatenated into."""

    axis: int
    offset: int


@dataclass(eq=False)
class Stream:
    """Everything the graph says about the stream that starts at `start`."""

    start: fx.Node
    nodes: dict[fx.Node, Add | fx.Node]
    """Stream node -> the add that made it, or the stream node it is an alias of; `start` maps to itself."""
    cats: dict[fx.Node, Part] = field(default_factory=dict)
    """Stream nodes of which the stream is only a part, as it was concatenated with something else."""

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    def within(self, node: fx.Node) -> bool:
        """Is the stream only a part of the stream node `node`?"""
        return node in self.cats

    def path_to(self, end: fx.Node) -> list[fx.Node]:
        """The stream's nodes from `start` to the stream node `end`, along the skips."""
        path = [end]
        while path[-1] is not self.start:
            made = self.nodes[path[-1]]
            path.append(made.skip if isinstance(made, Add) else made)
        return path[::-1]

    def steps_to(self, end: fx.Node) -> list[ResidualStep]:
        """The residual steps between `start` and the stream node `end`, first one first."""
        adds = [made for node in self.path_to(end) if isinstance(made := self.nodes[node], Add)]
        steps: list[ResidualStep] = []
        pending: list[Add] = []
        before = self.start
        for add in adds:
            pending.append(add)
            # A term that does not read the stream (a position, a bias) belongs to the step behind it.
            if self.reads(*pending) and not reaches(self.start, end, without=add.node):
                steps.append(ResidualStep(tuple(pending), before))
                pending, before = [], add.node
        if pending and steps:
            steps[-1] = ResidualStep((*steps[-1].adds, *pending), steps[-1].before)
        elif pending:
            steps.append(ResidualStep(tuple(pending), before))
        return steps

    def reads(self, *adds: Add) -> bool:
        """Does anything of what they add depend on the stream?"""
        return any(_depends(item, self.start) for add in adds for item in add.branch)


Further = Callable[[fx.Node, Stream], Add | fx.Node | None]


def follow(start: fx.Node, through_cat: bool = False, further: Further | None = None) -> Stream:
    """Find every node that is the stream beginning at `start`; with `through_cat`, also what it is only a part of until
    that part is taken out again; `further` is asked about nodes that are not the stream otherwise."""
    stream = Stream(start, {start: start})
    begun = False
    for node in start.graph.nodes:
        if node is start:
            begun = True
        elif begun:
            made = alias_of(node, stream) or residual_add(node, stream) or (further and further(node, stream))
            if made is not None:
                source = made.skip if isinstance(made, Add) else made
                part = stream.cats.get(source)
                if part is not None and not isinstance(made, Add) and not _same_layout(node, source):
                    continue  # where the stream is in a reshaped tensor is not known
            elif through_cat and (joined := _concatenated(node, stream)) is not None:
                made, part = joined
            elif through_cat:
                made, part = _taken_out(node, stream), None
            if made is not None:
                stream.nodes[node] = made
                if part is not None:
                    stream.cats[node] = part
    return stream


def _same_layout(node: fx.Node, source: fx.Node) -> bool:
    moved = _name(node) in _moves or (node.target is getattr and node.args[1] in _moves)
    return not moved and node.meta["val"].shape == source.meta["val"].shape


def _concatenated(node: fx.Node, stream: Stream) -> tuple[fx.Node, Part] | None:
    """The stream node that `node` concatenates with other tensors, and where it is."""
    if _name(node) not in _cats or not node.args or not isinstance(node.args[0], list | tuple):
        return None
    items = [item for item in node.args[0] if isinstance(item, fx.Node)]
    places = [number for number, item in enumerate(items) if item in stream and item not in stream.cats]
    value, axis = node.meta.get("val"), node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if len(places) != 1 or not isinstance(value, torch.Tensor) or not isinstance(axis, int):
        return None
    axis %= value.dim()
    if any(item.meta["val"].dim() != value.dim() for item in items):
        return None
    return items[places[0]], Part(axis, sum(item.meta["val"].shape[axis] for item in items[: places[0]]))


def _taken_out(node: fx.Node, stream: Stream) -> fx.Node | None:
    """The stream node of which `node` is the very part that is the stream: a slice, or an item of a split."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if not isinstance(source.meta.get("val"), torch.Tensor) and source.args and isinstance(source.args[0], fx.Node):
        source = source.args[0]  # the tuple that a split returns
    part = stream.cats.get(source)
    if part is None or value.shape != stream.start.meta["val"].shape:
        return None
    whole: torch.Tensor = source.meta["val"]
    offset = value.storage_offset() - whole.storage_offset()
    if storage_of(value) != storage_of(whole) or value.stride() != whole.stride():
        return None
    return source if offset == part.offset * whole.stride(part.axis) else None


def keeps_order(stream: Stream, end: fx.Node) -> bool:
    """Are the stream's elements in the same places at `end` as at the start?

    Shapes do not tell: a transpose that is never undone adds the branch to a permuted skip. So the views on the way are
    taken of a tensor that holds each element's number.
    """
    path = stream.path_to(end)
    # Into a concatenated tensor and out of it nothing moves (`_same_layout`).
    way = [
        node
        for before, node in pairwise(path)
        if not isinstance(stream.nodes[node], Add) and before not in stream.cats and node not in stream.cats
    ]
    if not any(_name(n) in _moves or (n.target is getattr and n.args[1] in _moves) for n in way):
        return True
    shape = stream.start.meta["val"].shape
    with unset_fake_temporarily():
        before = torch.arange(shape.numel(), dtype=torch.int32).reshape(shape)
        places = before
        for step in way:
            if _name(step) in _moves or step.target is getattr or _name(step) in _views:
                places = _moved(step, places)
            else:
                places = places.reshape(step.meta["val"].shape)
        return torch.equal(places, before)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _moved(node: fx.Node, places: torch.Tensor) -> torch.Tensor:
    args = list(node.args[1:])
    if node.target is getattr:
        moved = getattr(places, str(args[0]))
    elif node.op == "call_method":
        moved = getattr(places, str(node.target))(*args, **node.kwargs)
    else:
        moved = node.target(places, *args, **node.kwargs)  # type: ignore[operator]  # a function here
    assert isinstance(moved, torch.Tensor)
    return moved


_moves = {"permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_views = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}


def alias_of(node: fx.Node, stream: Stream) -> fx.Node | None:
    """The stream node that `node` merely reshapes, casts or returns; None where it is not one."""
    value = node.meta.get("val")
    source = next((n for n in node.all_input_nodes if n in stream), None)
    if source is None or not isinstance(value, torch.Tensor) or source in node.meta["mutates"]:
        return None
    name = node.args[1] if node.target is getattr else node.target
    if name in _cuts_gradient or node.op == "output" or not node.args or node.args[0] is not source:
        # A module that returns its argument (dropout at 0, nn.Identity) may take it by keyword.
        return source if value is source.meta["val"] and name not in _cuts_gradient else None
    origin: torch.Tensor = source.meta["val"]
    if value.numel() != origin.numel() or not value.is_floating_point():
        return None
    if value is origin or storage_of(value) == storage_of(origin) or (node.op != "call_module" and name in _copies):
        return source
    same = name is F.dropout and value is origin
    return source if same or _is_guard(node) or is_times_one(name, node.args, node.kwargs) else None


def merely_laid_out(node: fx.Node) -> bool:
    """Is it a cast or a reshape by name, whatever is set in the model?"""
    name = node.args[1] if node.target is getattr else node.target
    return node.op != "call_module" and (name in _copies or _name(node) in _moves | _views)


def _is_guard(node: fx.Node) -> bool:
    """Is it a clamp to the largest numbers that the dtype has, as models that train in half precision have it (T5)?"""
    if node.target not in (torch.clamp, "clamp"):
        return False
    largest = torch.finfo(node.meta["val"].dtype).max
    return all(_is_as_large(bound, 0.9 * largest) for bound in (*node.args[1:], *node.kwargs.values()))


def _is_as_large(bound: Any, limit: float) -> bool:
    if not isinstance(bound, fx.Node):
        return bound is None or abs(bound) >= limit
    # `where(isinf(h).any(), max - 1000, max)`, and the negative of it
    numbers = [item for item in bound.args if not isinstance(item, fx.Node)]
    below = bound.args if bound.target in ("neg", operator.neg, torch.neg, "__neg__") else numbers
    return bool(below) and bound.target is not torch.clamp and all(_is_as_large(item, limit) for item in below)


def residual_add(node: fx.Node, stream: Stream) -> Add | None:
    """`node` as stream + something that is not the stream, unscaled and of the stream's shape; None otherwise."""
    parts = add_operands(node)
    if parts is None:
        return None
    skip, branch = parts
    if not isinstance(skip, fx.Node) or skip not in stream:
        if is_subtraction(node) or node.target in ONTO_FIRST or scale_of(node) != 1:
            return None
        summands = (skip, *branch)
        skip = next((item for item in branch if isinstance(item, fx.Node) and item in stream), None)
        branch = tuple(item for item in summands if item is not skip)
    if skip is None or (node.target in MATRIX_PRODUCTS and node.kwargs.get("beta", 1) != 1):
        return None
    if any(item in stream for item in branch):
        return None
    shape = skip.meta["val"].shape
    if node.meta["val"].shape != shape:
        return None
    return Add(node, skip, branch)


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
    name = _name(node)
    if name in _takes_after and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return [n for n in node.all_input_nodes if n is not node.args[1]]
    if node.op != "call_module" and (name.endswith("_like") or name.startswith("new_")):
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return node.all_input_nodes


_takes_after = {"type_as", "view_as", "reshape_as", "expand_as", "to"}


def _depends(item: Any, start: fx.Node) -> bool:
    return isinstance(item, fx.Node) and reaches(start, item)


def storage_of(value: Any) -> int | None:
    """What two tensors that share memory have in common; None for anything else."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def is_stream_like(value: Any) -> bool:
    """Could it be a stream: a floating-point tensor with an axis?"""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
