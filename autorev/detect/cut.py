"""Cut a block's graph at its residual adds: prologue, one branch per step, epilogue.

    stream, shared = prologue(arguments)
    for branch in branches:
        stream = stream + branch(stream, shared)
    output = epilogue(stream, shared)

Each piece is a `torch.fx.GraphModule` that runs on the *live* sub-modules of the block: it owns none of them and looks them
up by path at every call, so an adapter injected later is seen. The stream keeps one layout from start to end, the one in
which it enters; where the block adds in another (OPT flattens tokens around its MLP), the branch goes there and back.
What the block adds in place is added out of place here: the caller's tensors are never written to.

`reproduces` compares the fold with the block's own forward bit for bit. A cut is made for one recorded call: shapes, and the
training mode as far as the block's own code reads it, are those of that call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from autorev.capture.record import named_arguments
from autorev.capture.tracer import CapturedBlock
from autorev.detect.judge import Finding, leaves, path_nodes
from autorev.detect.stream import Add, ResidualStep, Stream, follow, is_subtraction, scale_of

_permutations = {"permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_reshapes = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}


class CutError(Exception):
    """The block cannot be cut, or is called in another way than it was cut for."""


@dataclass(frozen=True)
class Piece:
    """A part of the block: the values it `reads` -> those it `returns`, by their names in the block's graph."""

    graph: fx.GraphModule
    reads: tuple[str, ...]
    returns: tuple[str, ...]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What it returns, by name."""
        return dict(zip(self.returns, self.graph(*(values[name] for name in self.reads)), strict=True))


@dataclass(frozen=True)
class Join:
    """How one add of the block joins its operands to the stream."""

    function: Callable[..., torch.Tensor]
    """torch.add, torch.sub, torch.addcmul or torch.addcdiv."""
    operands: tuple[Any, ...]
    """Names of values, or numbers."""
    options: dict[str, Any]
    """`alpha` or `value`."""

    def __call__(self, stream: torch.Tensor, values: Mapping[str, Any]) -> torch.Tensor:
        operands = [values[o] if isinstance(o, str) else o for o in self.operands]
        return self.function(stream, *operands, **self.options)


@dataclass(frozen=True)
class Branch:
    """One residual step; its piece reads the stream first and returns the operands of `joins`, then side values."""

    piece: Piece
    joins: tuple[Join, ...]

    def delta(self, values: Mapping[str, Any], like: torch.Tensor) -> torch.Tensor:
        """What the step adds to a stream shaped `like`, as one tensor: equal to the joins up to rounding."""
        total = torch.zeros_like(like)
        for join in self.joins:
            total = join(total, values)
        return total


@dataclass(frozen=True)
class CutBlock:
    """A block (or a chain of inline blocks) as prologue, residual branches and epilogue."""

    prologue: Piece
    """Arguments -> the stream's first value and what several pieces share."""
    branches: tuple[Branch, ...]
    epilogue: Piece
    """The stream's last value -> the block's whole output."""
    stream: str
    """The name that the stream has among the values."""
    arguments: tuple[str, ...]
    """The arguments that hold tensors or objects; the others are constants of the cut."""
    block: nn.Module
    rebuild: Callable[[Any], Any]
    """Makes the type that the block returns of the epilogue's plain dicts."""

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's tensors and objects by argument name.

        Raises:
            CutError: the call has other tensors than the recorded one.
        """
        named = dict(named_arguments(self.block, args, kwargs))
        given = {k: v for k, v in named.items() if not is_constant(v)}
        if set(given) != set(self.arguments):
            raise CutError(
                f"the block was cut for a call with the tensors {sorted(self.arguments)}, and is called with "
                f"{sorted(given)}"
            )
        return {f"argument:{name}": value for name, value in given.items()}

    def fold(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, computed piece by piece."""
        values = self.inputs(args, kwargs)
        values |= self.prologue.run(values)
        for branch in self.branches:
            values |= branch.piece.run(values)
            for join in branch.joins:
                values[self.stream] = join(values[self.stream], values)
        return self.rebuild(self.epilogue.run(values)["output"])


def is_constant(value: Any) -> bool:
    """Does the capture bake this argument in?"""
    return value is None or isinstance(value, bool | int | float | str)


def cut(findings: Finding | Sequence[Finding], block: nn.Module | None = None) -> CutBlock:
    """Cut the block of a reversible finding; of inline findings, all of one chain at once.

    `block` is the module to run on, of the same structure as the analysed one, which it is by default.

    Raises:
        CutError: the block has a shape that no cut can be given, with the reason.
    """
    chain = [findings] if isinstance(findings, Finding) else list(findings)
    captured, start, end = chain[0].captured, chain[0].start, chain[-1].end
    if captured is None or start is None or end is None or not all(f.reversible for f in chain):
        raise CutError(f"{chain[0].path} is not a reversible block")
    if len(chain) > 1 and any(f.captured is not captured for f in chain):
        raise CutError("only inline blocks of one loop are cut together")
    steps = [step for finding in chain for step in finding.steps]
    return _Cutter(captured, start, end, steps, block or captured.module).cut(chain[0].call.output)


class _Cutter:
    """Sorts the nodes into stages: 0 is the prologue, j the branch of step j, the last one the epilogue."""

    def __init__(
        self,
        captured: CapturedBlock,
        start: fx.Node,
        end: fx.Node,
        steps: list[ResidualStep],
        block: nn.Module,
    ) -> None:
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
            writer = _PieceWriter(self, stage)
            for node, of in self.stage.items():
                if of == stage:
                    writer.get(node)
            adds = self.steps[stage - 1].adds if 0 < stage < self.last else ()
            if stage == self.last:
                pieces.append(writer.finish({"output": self.captured.output}))
            else:
                operands = {
                    operand_name(a, i): (a, i) for a in adds for i in a.branch if isinstance(i, fx.Node)
                }
                laid_out = {name: writer.in_stream_layout(*pair) for name, pair in operands.items()}
                pieces.append(writer.finish(laid_out | {self.name(n): n for n in crossing[stage]}))
        return CutBlock(
            prologue=pieces[0],
            branches=tuple(
                Branch(piece, tuple(join_of(add) for add in step.adds))
                for piece, step in zip(pieces[1:-1], self.steps, strict=True)
            ),
            epilogue=pieces[-1],
            stream=self.name(self.start),
            arguments=tuple(self.captured.placeholders),
            block=self.block,
            rebuild=lambda structure: _like(recorded_output, structure),
        )

    def name(self, node: fx.Node) -> str:
        """The name of a node's value among the values of a fold."""
        return f"argument:{node.meta['argument']}" if node.op == "placeholder" else node.name

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
        for node in nodes:
            read = (self.level.get(n, self.stage.get(n, 0)) for n in node.all_input_nodes)
            self.stage[node] = max(read, default=0)
        output = next(iter(reversed(self.captured.graph.nodes)))
        self.stage[output] = self.last
        together = _written_together(nodes)
        for node in reversed(nodes):
            group = together.get(node, [node])
            if node is group[0] and not any(self.stage[n] for n in group):
                readers = {r for n in group for r in self.readers(n, apart_from=group)}
                if len(readers) == 1:  # what one piece alone needs is computed there
                    self.stage |= dict.fromkeys(group, readers.pop() or 0)
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
            groups |= dict.fromkeys(merged, [n for n in nodes if n in merged])
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


class _PieceWriter:
    """Writes the graph of one stage."""

    def __init__(self, cutter: _Cutter, stage: int) -> None:
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
        live = _LiveGraph(self.cutter.block, self.cutter.captured.constants, self.graph)
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
    before, after = alias.args[0].meta["val"], alias.meta["val"]  # type: ignore[union-attr]
    if name in _permutations:
        probe = torch.empty(tuple(range(2, 2 + before.dim())), device="meta")
        moved = getattr(probe, name)
        return tuple(
            size - 2 for size in (moved(*alias.args[1:], **alias.kwargs) if callable(moved) else moved).shape
        )
    if before.shape == after.shape:
        return "same"
    if name in _reshapes:
        return "reshaped"
    raise CutError(f"`{name}` rearranges the stream in a way that cannot be undone")


class _LiveGraph(fx.GraphModule):
    """A graph that finds the block's sub-modules at call time, and registers none of them as its own."""

    def __init__(self, block: nn.Module, constants: Mapping[str, torch.Tensor], graph: fx.Graph) -> None:
        # Attributes that `fx.GraphModule` finds in place already are not copied.
        self.__dict__["block"] = block
        self.__dict__["constants"] = SimpleNamespace(**constants)
        holder = nn.Module()
        holder.__dict__.update(block=block, constants=self.__dict__["constants"])
        super().__init__(holder, graph)


def _like(template: Any, structure: Any) -> Any:
    """`structure` with dicts turned into the dataclasses that stand in the same places of `template`."""
    if is_dataclass(template) and not isinstance(template, type) and isinstance(structure, Mapping):
        return type(template)(**{k: _like(getattr(template, k), v) for k, v in structure.items()})
    if isinstance(template, list | tuple) and not hasattr(template, "_fields"):
        return type(template)(_like(t, s) for t, s in zip(template, structure, strict=True))
    return structure


# -- check


def reproduces(cut_block: CutBlock, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does the fold return what `block.forward(*args, **kwargs)` returns, bit for bit?

    Both run from one state of the random streams and buffers, which is put back, and on copies of the arguments.
    """
    results = []
    for forward in (block.forward, cut_block.fold):
        with _state_kept(block):
            own_args, own_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            results.append(forward(*own_args, **own_kwargs))
    first, second = (dict(leaves(result)) for result in results)
    return first.keys() == second.keys() and all(_identical(v, second[at]) for at, v in first.items())


def _identical(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a is b or a == b)
    if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


@contextmanager
def _state_kept(block: nn.Module) -> Iterator[None]:
    devices = sorted({t.device.index for t in block.parameters() if t.is_cuda and t.device.index is not None})
    saved = [(buffer, buffer.clone()) for buffer in block.buffers()]
    python_state = random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)
