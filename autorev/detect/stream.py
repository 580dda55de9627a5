"""Follow the residual stream through a block's graph and find its steps.

`s0` is the input that carries the stream. A node *is the stream* when it is s0, a reshape, cast or alias of the stream,
a multiple of it by a constant, or the sum of the stream and something of the same shape. Where the block's output is
the stream, walking back from it along the skips meets the adds; those that every path from s0 to the output runs
through are the *cuts*. What is added between two cuts is one residual step (attention and MLP in parallel are one step
of two terms).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from autorev.detect.scaling import Factor, factor_in_graph
from autorev.detect.sums import add_operands, factor_of_operand, is_times_one
from autorev.detect.ways import depends, downstream, name_of, reaches, read_by

_copies: set[Any] = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "reshape"}
_copies |= {torch.clone, torch.reshape, torch.flatten, "flatten"}
_cats = {"cat", "concat", "concatenate"}
_cuts_gradient = {"detach", "detach_", torch.detach, "data"}


@dataclass(eq=False)
class Add:
    """One add of the stream: `node = skip + branch` (or `skip - branch`), or a product with a constant."""

    node: fx.Node
    skip: fx.Node
    branch: tuple[Any, ...]
    """Further operands; nodes or numbers. Of a product, none."""
    factor: Factor = field(default_factory=Factor)
    """What `skip` is multiplied by."""


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
        return any(depends(item, node) for add in self.adds for item in add.branch)

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

    def own_nodes(self) -> list[fx.Node]:
        """Those of them that come of the stream: not masks, encoder states and older streams, which are its inputs."""
        own = downstream(self.before)
        return [node for node in self.branch_nodes() if node in own]


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

    def adds_to(self, end: fx.Node) -> list[Add]:
        """The sums and products on the path to `end`."""
        return [made for node in self.path_to(end) if isinstance(made := self.nodes[node], Add)]

    def factor_to(self, end: fx.Node) -> Factor:
        """What the stream is multiplied by, all in all, on its path to `end`."""
        return reduce(operator.mul, (add.factor for add in self.adds_to(end)), Factor())

    def steps_to(self, end: fx.Node, in_loop: bool = False) -> list[ResidualStep]:
        """The residual steps between `start` and the stream node `end`, first one first.

        A product belongs to the step before it. Where a loop begins with one, it belongs to the step behind.
        `in_loop`: later steps may read what earlier ones began with: the loop's first stream, or a long skip's.
        """
        adds = self.adds_to(end)
        leading = {add.node.meta["place"] for add in takewhile(lambda add: not add.branch, adds)}
        steps: list[ResidualStep] = []
        pending: list[Add] = []
        before = self.start
        for number, add in enumerate(adds):
            if in_loop:
                cut = self._ends_here(add, before, adds[number + 1 :], end)
            else:
                cut = not reaches(self.start, end, without=add.node)
            behind = steps and not (pending or add.branch or add.node.meta["place"] in leading)
            if behind and cut:
                steps[-1], before = ResidualStep((*steps[-1].adds, add), steps[-1].before), add.node
                continue
            pending.append(add)
            # A term that does not read the stream (a position, a bias, a skip) belongs to the step behind it.
            origin = before if in_loop else self.start
            if cut and any(depends(item, origin) for one in pending for item in one.branch):
                steps.append(ResidualStep(tuple(pending), before))
                pending, before = [], add.node
        if pending and steps:
            steps[-1] = ResidualStep((*steps[-1].adds, *pending), steps[-1].before)
        elif pending:
            steps.append(ResidualStep(tuple(pending), before))
        return steps

    def _ends_here(self, add: Add, before: fx.Node, later: list[Add], end: fx.Node) -> bool:
        """May a step that began at `before` end with `add`, although later ones read what is older?

        Not between two terms of one step: of those, the second one reads `before`, and none reads the sum.
        """
        if not reaches(self.start, end, without=add.node):
            return True
        if later and not any(depends(item, before) for item in later[0].branch):
            return True
        path = self.path_to(end)
        behind = path[path.index(add.node) + 1 :]
        here = [add.node, *takewhile(lambda node: not isinstance(self.nodes[node], Add), behind)]
        return any(user not in path and reaches(user, end) for node in here for user in node.users)

    def reads(self, add: Add) -> bool:
        """Does anything of what it adds depend on the stream?"""
        return any(depends(item, self.start) for item in add.branch)


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
            made = alias_of(node, stream) or residual_add(node, stream) or constant_multiple(node, stream)
            made = made or (further and further(node, stream))
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
    moved = name_of(node) in MOVES or (node.target is getattr and node.args[1] in MOVES)
    return not moved and node.meta["val"].shape == source.meta["val"].shape


def _concatenated(node: fx.Node, stream: Stream) -> tuple[fx.Node, Part] | None:
    """The stream node that `node` concatenates with other tensors, and where it is."""
    if name_of(node) not in _cats or not node.args or not isinstance(node.args[0], list | tuple):
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


MOVES = {"permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}


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
    return node.op != "call_module" and (name in _copies or name_of(node) in MOVES | VIEWS)


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
    """`node` as stream + something else, of the stream's shape; None otherwise."""
    parts = add_operands(node)
    if parts is None:
        return None
    summands = (parts[0], *parts[1])
    number = _latest(summands, stream)
    if number is None or (factor := factor_of_operand(node, number)) is None:
        return None
    skip = summands[number]
    if node.meta["val"].shape != skip.meta["val"].shape:
        return None
    return Add(node, skip, summands[:number] + summands[number + 1 :], Factor(factor))


def _latest(summands: tuple[Any, ...], stream: Stream) -> int | None:
    """Which of the summands the sum goes on with: the stream, rather than what it was before, or a multiple of it."""
    found = [number for number, item in enumerate(summands) if isinstance(item, fx.Node) and item in stream]
    if len(found) < 2:
        return found[0] if found else None
    order = {}
    for number in found:
        adds = stream.adds_to(summands[number])
        products = sum(not add.branch for add in adds)
        order[number] = len(adds) - products, -products
    last = [number for number in found if order[number] == max(order.values())]
    return last[0] if len(last) == 1 else None


def constant_multiple(node: fx.Node, stream: Stream) -> Add | None:
    """`node` as a constant times the stream; None otherwise."""
    found = factor_in_graph(node, stream.__contains__)
    return None if found is None else Add(node, found[0], (), found[1])


def storage_of(value: Any) -> int | None:
    """What two tensors that share memory have in common; None for anything else."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def is_stream_like(value: Any) -> bool:
    """Could it be a stream: a floating-point tensor with an axis?"""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
