"""Write the pieces of a cut block: which node of the block's graph goes into which, and what they hand on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from autorev.capture.tracer import CapturedBlock
from autorev.detect.judge import leaves, path_nodes
from autorev.detect.pieces import Branch, CutBlock, CutError, Join, LiveGraph, Piece, like
from autorev.detect.stream import Add, ResidualStep, Stream, follow, is_subtraction, scale_of

_permutations = {"permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_reshapes = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}


class Cutter:
    """Sorts the nodes into stages: 0 is the prologue, j the branch of step j, the last one the epilogue.

    `keep_order`: what only a side output needs is computed where the block computes it, for the sake of the random
    numbers drawn on the way; otherwise as soon as it can be.
    """

    def __init__(
        self,
        captured: CapturedBlock,
        start: fx.Node,
        end: fx.Node,
        steps: list[ResidualStep],
        block: nn.Module,
        keep_order: bool = True,
    ) -> None:
        self.keep_order = keep_order
        self.captured, self.start, self.steps, self.block = captured, start, steps, block
        self.stream: Stream = follow(start)
        self.last = len(steps) + 1
        self.opens = [start, *(step.after for step in steps)]
        """`opens[j - 1]` is the stream node that stage j begins with."""
        on_path = path_nodes(self.stream, end)
        self.level: dict[fx.Node, int] = {}
        """Path node -> the first stage that may read it."""
        level = 1
        for node in captured.graph.nodes:
            if node in on_path:
                level += node in self.opens[1:]
                self.level[node] = level
        self.operand_in: dict[fx.Node, set[int]] = {}
        for number, step in enumerate(steps, 1):
            for item in (item for add in step.adds for item in add.branch if isinstance(item, fx.Node)):
                self.operand_in.setdefault(item, set()).add(number)
        self.stage = self._stages()

    def cut(self, recorded_output: Any) -> CutBlock:
        """All pieces."""
        crossing = self._crossing()
        pieces = []
        for stage in range(self.last + 1):
            writer = PieceWriter(self, stage)
            for node, of in self.stage.items():
                if of == stage:
                    writer.get(node)
            adds = self.steps[stage - 1].adds if 0 < stage < self.last else ()
            if stage == self.last:
                pieces.append(writer.finish({"output": self.captured.output}))
            else:
                operands = {operand_name(a, i): (a, i) for a in adds for i in a.branch if isinstance(i, fx.Node)}
                laid_out = {name: writer.in_stream_layout(*pair) for name, pair in operands.items()}
                pieces.append(writer.finish(laid_out | {self.name(n): n for n in crossing[stage]}))
        return CutBlock(
            prologue=pieces[0],
            branches=tuple(
                Branch(piece, tuple(join_of(add) for add in step.adds), self._rounds_to(step))
                for piece, step in zip(pieces[1:-1], self.steps, strict=True)
            ),
            epilogue=pieces[-1],
            stream=self.name(self.start),
            arguments=tuple(self.captured.placeholders),
            block=self.block,
            rebuild=lambda structure: like(recorded_output, structure),
        )

    def name(self, node: fx.Node) -> str:
        """The name of a node's value among the values of a fold."""
        return f"argument:{node.meta['argument']}" if node.op == "placeholder" else node.name

    def _rounds_to(self, step: ResidualStep) -> torch.dtype | None:
        """The narrowest dtype in which the stream is passed on between this step's add and the next one."""
        behind = [node for node in self.level if self.level[node] == self.level[step.after] and not self._adds(node)]
        dtypes = [node.meta["val"].dtype for node in (step.after, *behind)]
        narrowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        return None if narrowest == step.after.meta["val"].dtype else narrowest

    def layout(self, node: fx.Node) -> list[fx.Node]:
        """The nodes between start and the stream node `node` that change the stream's form, in order."""
        found: list[fx.Node] = []
        while node is not self.start:
            made = self.stream.nodes[node]
            if isinstance(made, Add):
                node = made.skip
            else:
                if node.meta["val"] is not made.meta["val"]:
                    found.append(node)
                node = made
        return found[::-1]

    def readers(self, node: fx.Node, apart_from: Sequence[fx.Node] = ()) -> set[int | None]:
        """The stages that read `node`; None stands for one that cannot be told."""
        users = [user for user in node.users if not self._adds(user) and user not in apart_from]
        stages = {0 if user is self.start else self.stage.get(user) for user in users}
        return stages | self.operand_in.get(node, set())

    def _adds(self, node: fx.Node) -> bool:
        return node in self.level and node is not self.start and isinstance(self.stream.nodes[node], Add)

    def _stages(self) -> dict[fx.Node, int]:
        self.stage = {}
        nodes = [n for n in self.captured.graph.nodes if n.op not in _on_demand and n not in self.level]
        passed = 1
        for node in self.captured.graph.nodes:
            passed += node in self.opens[1:]
            if node not in self.level and node.op not in _on_demand:
                read = [self.level.get(n, self.stage.get(n, 0)) for n in node.all_input_nodes]
                earliest = max(read, default=0)
                self.stage[node] = passed if earliest and self.keep_order else earliest
        output = next(iter(reversed(self.captured.graph.nodes)))
        self.stage[output] = self.last
        together = _written_together(nodes)
        moved = True
        while moved:  # what one piece alone needs is computed there
            moved = False
            for node in reversed(nodes):
                group = together.get(node, [node])
                if node is group[0] and not any(self.stage[n] for n in group):
                    readers = {r for n in group for r in self.readers(n, apart_from=group)}
                    if len(readers) == 1 and (only := readers.pop()):
                        self.stage.update((n, only) for n in group)
                        moved = True
        del self.stage[output]
        return self.stage

    def _crossing(self) -> list[list[fx.Node]]:
        """By stage, the nodes that a later stage reads."""
        found: list[list[fx.Node]] = [[] for _ in range(self.last + 1)]
        returned = {leaf for _, leaf in leaves(self.captured.output) if isinstance(leaf, fx.Node)}
        for node, stage in self.stage.items():
            late = node in returned and stage < self.last
            if late or any(reader is not None and reader > stage for reader in self.readers(node)):
                found[stage].append(node)
        if self.start.op != "placeholder":
            found[0].append(self.start)
        return found


def _written_together(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> itself and all that write to it or that it writes to, in graph order; left out: nodes on their own."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        touched = [n for n in node.meta["mutates"] if n in nodes]
        if touched:
            merged = {n for t in (node, *touched) for n in groups.get(t, [t])}
            group = [n for n in nodes if n in merged]
            for member in group:
                groups[member] = group
    return groups


_on_demand = ("placeholder", "get_attr", "output")


def join_of(add: Add) -> Join:
    """The add, out of place."""
    operands = tuple(operand_name(add, item) if isinstance(item, fx.Node) else item for item in add.branch)
    function, options = _function_of(add)
    return Join(function, operands, options)


def operand_name(add: Add, item: fx.Node) -> str:
    """What a branch returns the operand `item` of `add` as."""
    return f"{item.name} of {add.node.name}"


def _function_of(add: Add) -> tuple[Callable[..., torch.Tensor], dict[str, Any]]:
    if len(add.branch) == 2:
        target = str(getattr(add.node.target, "__name__", add.node.target))
        value = add.node.kwargs.get("value", 1)
        return (torch.addcmul if "addcmul" in target else torch.addcdiv), {"value": value}
    scale = scale_of(add.node)
    return (torch.sub if is_subtraction(add.node) else torch.add), {} if scale == 1 else {"alpha": scale}


class PieceWriter:
    """Writes the graph of one stage."""

    def __init__(self, cutter: Cutter, stage: int) -> None:
        self.cutter, self.stage = cutter, stage
        self.graph = fx.Graph()
        self.reads: list[str] = []
        self.copy: dict[fx.Node, fx.Node] = {}
        """Node of the block's graph -> its copy here."""
        self.stream: fx.Node | None = None
        """The stream as this stage receives it."""
        if stage:
            self.stream = self._argument(cutter.start)

    def finish(self, returned: dict[str, Any]) -> Piece:
        """The piece that returns these nodes of the block's graph, or of this one, by name."""
        mine = set(self.graph.nodes)
        values = {k: fx.map_arg(v, lambda n: n if n in mine else self.get(n)) for k, v in returned.items()}
        self.graph.output(tuple(values.values()))
        live = LiveGraph(self.cutter.block, self.cutter.captured.constants, self.graph)
        return Piece(live, tuple(self.reads), tuple(values))

    def get(self, node: fx.Node) -> fx.Node:
        """The copy of `node` here: computed, read from another piece, or the stream in one of its forms."""
        if node not in self.copy:
            self.copy[node] = self._made(node)
        return self.copy[node]

    def _made(self, node: fx.Node) -> fx.Node:
        cutter = self.cutter
        if node.op == "get_attr":
            prefix = "constants" if node.target in cutter.captured.constants else "block"
            return self.graph.create_node("get_attr", f"{prefix}.{node.target}", (), {})
        if node in cutter.level and self.stage:
            return self._stream_node(node)
        if cutter.stage.get(node) != self.stage and (node is not cutter.start or node.op == "placeholder"):
            return self._argument(node)
        if any(type(leaf).__name__ == "_Opaque" for _, leaf in leaves((node.args, node.kwargs))):
            raise CutError(f"{node.name} is given an object that was made inside the block")
        copied = self.graph.node_copy(node, self.get)
        if copied.op == "call_module":
            copied.target = f"block.{node.target}"
        return copied

    def _argument(self, node: fx.Node) -> fx.Node:
        """A value that another piece, or the caller, provides."""
        self.reads.append(self.cutter.name(node))
        computed = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if computed is None:
            return self.graph.placeholder(node.name)
        with self.graph.inserting_before(computed):
            return self.graph.placeholder(node.name)

    def _stream_node(self, node: fx.Node) -> fx.Node:
        """A stream node of this stage, made from the stream that the stage receives."""
        cutter = self.cutter
        assert self.stream is not None
        if cutter.level[node] != self.stage:
            raise CutError(f"{node.name}, the stream before a step, is read after that step")
        if node is cutter.opens[self.stage - 1]:
            formed = self.stream
            for alias in cutter.layout(node):
                formed = self._reformed(alias, formed)
            return formed
        made = cutter.stream.nodes[node]
        if isinstance(made, Add):  # an add within the step, whose sum another branch of it reads
            function, options = _function_of(made)
            operands = (self.get(i) if isinstance(i, fx.Node) else i for i in made.branch)
            return self.graph.call_function(function, (self.get(made.skip), *operands), options)
        source = self.get(made)
        return source if node.meta["val"] is made.meta["val"] else self._reformed(node, source)

    def _reformed(self, alias: fx.Node, source: fx.Node) -> fx.Node:
        before = self.cutter.stream.nodes[alias]
        return self.graph.node_copy(alias, lambda n: source if n is before else self.get(n))

    def in_stream_layout(self, add: Add, item: fx.Node) -> fx.Node:
        """The operand `item` of `add`, laid out as the stream is when it enters the block."""
        copied, shape = self.get(item), tuple(add.node.meta["val"].shape)
        aliases = [alias for alias in self.cutter.layout(add.skip) if _order(alias) != "same"]
        if aliases and tuple(item.meta["val"].shape) not in (shape, ()):
            copied = self.graph.call_method("expand", (copied, shape))
        for alias in reversed(aliases):
            order = _order(alias)
            if order == "reshaped":
                before = self.cutter.stream.nodes[alias]
                assert isinstance(before, fx.Node)
                copied = self.graph.call_method("reshape", (copied, tuple(before.meta["val"].shape)))
            else:
                inverse = tuple(order.index(axis) for axis in range(len(order)))
                copied = self.graph.call_method("permute", (copied, inverse))
        entering, leaving = self.cutter.start.meta["val"].dtype, add.node.meta["val"].dtype
        if entering != leaving and item.meta["val"].dtype == entering:  # the block widened the skip (Mamba)
            copied = self.graph.call_method("to", (copied, leaving))
        return copied


def _order(alias: fx.Node) -> Any:
    """What an alias of the stream does to its axes: the permutation, "reshaped" or "same"."""
    name = str(alias.args[1] if alias.target is getattr else getattr(alias.target, "__name__", alias.target))
    before, after = alias.args[0].meta["val"], alias.meta["val"]  # type: ignore[union-attr]  # an alias reads a node
    if name in _permutations:
        probe = torch.empty(tuple(range(2, 2 + before.dim())), device="meta")
        moved = getattr(probe, name)
        return tuple(size - 2 for size in (moved(*alias.args[1:], **alias.kwargs) if callable(moved) else moved).shape)
    if before.shape == after.shape:
        return "same"
    if name in _reshapes:
        return "reshaped"
    raise CutError(f"`{name}` rearranges the stream in a way that cannot be undone")
