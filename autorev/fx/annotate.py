"""The detection as an fx pass, for people who transform graphs themselves.

    AnnotateResiduals(batch=(x,))(gm)

`gm` may come from `torch.fx.symbolic_trace`, from `torch.export.export(...).module()` or from a tracer of
your own. Its code and its weights stay as they are; afterwards

- `gm.meta["autorev"]` is the list of its residual chains;
- `node.meta["autorev"]` says which part a node plays in one, and why a residual sum is in none.

A chain is a run of at least two steps `h <- h + f(h)` in which nothing but reshapes and casts touches `h` in
between. A single such sum is not reported: the `u + 0.0447 u^3` inside a hand-written GELU looks the same.

Lines of source are known where the tracer kept them: torch.export does, `torch.fx.Tracer` when its
`record_stack_traces` is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from autorev.analysis import Verdict
from autorev.detect.graph_queries import BlockView, size
from autorev.detect.inline import common_start
from autorev.detect.obstacles import GENERIC, Obstacle, obstacles_to_stream
from autorev.detect.on_stream import caveats_on_stream, obstacles_on_stream
from autorev.detect.runs import Run, residual_runs, stream_like_sums
from autorev.detect.stream import follow, is_stream_like
from autorev.detect.ways import reaches
from autorev.errors import CaptureError
from autorev.fx.user_graph import REMEDY, UserGraph, missing_values, read_user_graph

KEY = "autorev"
"""Where the findings are in `gm.meta` and `node.meta`."""

WALK = 12
"""How many nodes may lie between two sums that belong together: a norm written out has eight."""


class Role(StrEnum):
    """What a node does for a residual chain."""

    STREAM = "stream"
    """It is the stream: where the chain starts, and reshapes, casts and inner sums on its way."""
    CUT = "cut"
    """The sum that ends a step."""
    BRANCH = "branch"
    """It computes what a step adds."""
    REFUSED = "refused"
    """A residual sum outside any chain; `reason` says what stands in the way."""


@dataclass(frozen=True, slots=True)
class NodeRole:
    """`node.meta["autorev"]`."""

    role: Role
    chain: int | None
    """Index in `gm.meta["autorev"]`; None for a refused sum."""
    step: int | None
    """0 for the chain's first step; for a leaf module that holds several, the last of them."""
    source: str
    """`file.py:line`, or the module it was traced in."""
    reason: str = ""
    """`code: sentence (file.py:line)` for a refused sum; docs/obstacles.md explains the codes."""


@dataclass(frozen=True, slots=True)
class GraphChain:
    """One item of `gm.meta["autorev"]`."""

    name: str
    """The module path that all its nodes share: `model.layers`."""
    steps: int
    verdict: Verdict
    reasons: tuple[str, ...]
    sources: tuple[str, ...]
    """Where each step's sum is written."""


class ResidualPass(PassBase):
    """A pass that reads a graph's residual chains.

    `batch` are needed where the graph's inputs carry no shapes.
    """

    def __init__(self, batch: Sequence[Any] | None = None) -> None:
        self.batch = batch

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every input that is read has a value or a shape.

        Raises:
            CaptureError: one has not, and there are no example inputs.
        """
        missing = missing_values(graph_module)
        if missing and self.batch is None:
            raise CaptureError(f"the shape of input {', '.join(missing)} is not known; {REMEDY}")


class AnnotateResiduals(ResidualPass):
    """Write into a graph which of its nodes form residual chains; of `batch` only shapes and dtypes count."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Annotate; `modified` is False where the same annotations were there already.

        Raises:
            CaptureError: the graph cannot be run on fake tensors with these inputs.
        """
        graph = read_user_graph(graph_module, self.batch)
        runs = residual_runs(graph.block.graph)
        roles = _roles(graph, runs)
        chains = [graph_chain(graph, run) for run in runs]
        modified = graph_module.meta.get(KEY) != chains
        graph_module.meta[KEY] = chains
        for node in graph_module.graph.nodes:
            role = roles.get(node)
            if node.meta.get(KEY) != role:
                modified = True
                node.meta[KEY] = role
            if role is None:
                node.meta.pop(KEY, None)
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Each chain's cuts stand in the order of its steps, and the last one ends it."""
        last = dict.fromkeys(range(len(graph_module.meta[KEY])), -1)
        for node in graph_module.graph.nodes:
            role = node.meta.get(KEY)
            if role is not None and role.role is Role.CUT:
                assert role.step > last[role.chain], f"{node.name} ends step {role.step} once more"
                last[role.chain] = role.step
        for i, chain in enumerate(graph_module.meta[KEY]):
            assert last[i] == chain.steps - 1, f"{chain.name}: {chain.steps} steps, the last cut is {last[i]}"


# -- the verdict on a chain


def graph_chain(graph: UserGraph, run: Run) -> GraphChain:
    """The run in public words."""
    obstacles = obstacles_on_stream(graph.block, run.stream, run.path)
    reasons = obstacles or _caveats(graph, run)
    verdict = Verdict.REFUSED if obstacles else Verdict.CAVEAT if reasons else Verdict.ELIGIBLE
    return GraphChain(
        name=_name(run),
        steps=len(run.steps),
        verdict=verdict,
        reasons=tuple(dict.fromkeys(map(str, reasons))),
        sources=tuple(step.source for step in run.steps),
    )


def _name(run: Run) -> str:
    """The path that the modules of all branches share, as a chain of blocks is named."""
    paths = [n.meta["module"].split(".") for branch in run.branches for n in branch if n.meta["module"]]
    return ".".join(common_start(paths)) or "(the model itself)"


def _caveats(graph: UserGraph, run: Run) -> list[Obstacle]:
    text = "it updates buffers while it runs; a second run in backward must not update them again"
    writers = [node for branch in run.branches for node in branch if _writes_buffers(graph, node)]
    writes = [Obstacle("buffer-write", text, node.meta["source"]) for node in writers]
    return [*writes, *caveats_on_stream(run.path)]


def _writes_buffers(graph: UserGraph, node: fx.Node) -> bool:
    if any(target.op == "get_attr" for target in node.meta["mutates"]):
        return True
    if node.op == "call_module":
        modules = graph.block.module.get_submodule(str(node.target)).modules()
        norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        return any(norm.training and norm.track_running_stats for norm in norms)
    # batch_norm(x, weight, bias, mean, var, training, ...) updates statistics without a word in its schema.
    name = getattr(node.target, "__name__", node.target)
    return name == "batch_norm" and node.kwargs.get("training", *node.args[5:6]) is True


# -- residual sums outside any chain


@dataclass(eq=False)
class _Sum:
    """`total = skip + branch`, where skip and branch part at `start`."""

    total: fx.Node
    start: fx.Node


def _refused(graph: UserGraph, taken: set[fx.Node]) -> dict[fx.Node, Obstacle]:
    """Residual sums that follow one another and still form no chain, and why.

    A lone sum is no sign of a residual network: nothing is said about it.
    """
    candidates = [_as_sum(total) for total in stream_like_sums(graph.block.graph) if total not in taken]
    sums = {one.total: one for one in candidates if one is not None}
    found: dict[fx.Node, Obstacle] = {}
    last: list[_Sum] = []
    for one in sums.values():
        before = _sum_before(graph, one, sums)
        obstacle = None if before is None else _obstacle(graph, before, [one.start])
        if before is not None and obstacle is not None:
            found.setdefault(before.total, obstacle)
            last.append(one)
    order = list(graph.block.graph.nodes)
    for one in last:
        begin = order.index(one.total) + 1
        after = [n for n in order[begin : begin + WALK] if _is_wide(n) and one.total in _walk(n)]
        obstacle = _obstacle(graph, one, after)
        if one.total not in found and obstacle is not None:
            found[one.total] = obstacle
    return found


def _as_sum(total: fx.Node) -> _Sum | None:
    """`total` as a residual sum: a short way leads from one operand to what the other is computed from."""
    operands = [n for n in total.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    ways = [list(_walk(operand))[:5] for operand in operands]
    for distance in range(5):
        for operand, way in zip(operands, ways, strict=True):
            others = [n for n in operands if n is not operand]
            node = way[distance] if distance < len(way) else None
            if node is not None and others and _is_wide(node) and all(reaches(node, n) for n in others):
                return _Sum(total, node)
    return None


def _walk(node: fx.Node | None) -> Iterator[fx.Node]:
    """`node`, the largest tensor it is computed from, and so on: through norms, gates and projections.

    Of equally large ones the oldest: a gate is computed from the stream, and so comes after it.
    """
    for _ in range(WALK):
        if node is None:
            return
        yield node
        computed = [n for n in node.all_input_nodes if n.op != "get_attr"]
        tensors = [n for n in computed if isinstance(n.meta.get("val"), torch.Tensor | tuple)]
        node = max(sorted(tensors), key=size, default=None)


def _is_wide(node: fx.Node) -> bool:
    return is_stream_like(node.meta.get("val"))


def _sum_before(graph: UserGraph, one: _Sum, sums: dict[fx.Node, _Sum]) -> _Sum | None:
    """The residual sum that this one's skip comes from, with nothing that has a weight matrix in between."""
    for node in _walk(one.start):
        if node in sums:
            return sums[node]
        weights = [n.meta["val"] for n in node.all_input_nodes if n.op == "get_attr"]
        if node.op == "call_module":
            weights += graph.block.module.get_submodule(str(node.target)).parameters()
        if any(isinstance(w, torch.Tensor) and w.dim() > 1 for w in weights):
            return None
    return None


def _obstacle(graph: UserGraph, one: _Sum, ends: list[fx.Node]) -> Obstacle | None:
    """What spoils the sum's skip; where nothing does, what happens to the sum on the way to one of `ends`."""
    stream = follow(one.start)
    for end in ends if one.total in stream else [one.total]:
        obstacle = obstacles_to_stream(BlockView(graph.block, stream, end))[0]
        if obstacle.code not in GENERIC:
            return obstacle
    return None


# -- roles

_telling = (Role.CUT, Role.REFUSED, Role.STREAM, Role.BRANCH)
"""Which role a leaf module takes that holds nodes of several."""


def _roles(graph: UserGraph, runs: list[Run]) -> dict[fx.Node, NodeRole]:
    """The user's nodes and their roles."""
    found: dict[fx.Node, list[NodeRole]] = {}

    def write(node: fx.Node, role: Role, chain: int | None, step: int | None, reason: str = "") -> None:
        written = NodeRole(role, chain, step, node.meta["source"], reason)
        found.setdefault(graph.origin[node], []).append(written)

    taken: set[fx.Node] = set()
    for i, run in enumerate(runs):
        taken |= run.nodes()
        cuts = {step.after: k for k, step in enumerate(run.steps)}
        k = 0
        for node in run.path:
            write(node, Role.CUT if node in cuts else Role.STREAM, i, k)
            k += node in cuts
        for k, branch in enumerate(run.branches):
            for node in branch:
                write(node, Role.BRANCH, i, k)
    for node, obstacle in _refused(graph, taken).items():
        write(node, Role.REFUSED, None, None, str(obstacle))
    for leaf, obstacle in graph.refused_leaves.items():
        found[leaf] = [NodeRole(Role.REFUSED, None, None, obstacle.source, str(obstacle))]
    return {node: min(reversed(roles), key=lambda r: _telling.index(r.role)) for node, roles in found.items()}
