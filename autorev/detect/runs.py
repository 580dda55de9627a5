"""The residual chains of a user's own graph: runs of steps along one stream, and what is said of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from autorev.analysis import Verdict
from autorev.detect.obstacles import Obstacle, obstacles_on_stream
from autorev.detect.stream import Add, ResidualStep, Stream, add_operands, follow, reaches
from autorev.detect.user_graph import UserGraph


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


@dataclass(eq=False)
class Run:
    """A chain in the copied graph of a `UserGraph`."""

    stream: Stream
    steps: list[ResidualStep]

    def path(self) -> list[fx.Node]:
        """The stream's nodes from the first step's beginning to the last one's cut."""
        nodes = [self.steps[-1].after]
        while nodes[-1] is not self.steps[0].before:
            made = self.stream.nodes[nodes[-1]]
            nodes.append(made.skip if isinstance(made, Add) else made)
        return nodes[::-1]

    @cached_property
    def branches(self) -> list[list[fx.Node]]:
        """What computes each step's branch from the stream; masks and encoder states are inputs of it."""
        return [[n for n in step.branch_nodes() if reaches(step.before, n)] for step in self.steps]

    def nodes(self) -> set[fx.Node]:
        """Path and branches."""
        return {*self.path(), *(n for branch in self.branches for n in branch)}


def longest_runs(graph: fx.Graph) -> list[Run]:
    """The longest chains that do not overlap, in graph order; one inside another's branch is not reported."""
    candidates: list[Run] = []
    covered: set[fx.Node] = set()
    for total in sums_of(graph):
        for start in total.all_input_nodes:
            if start in covered or not is_wide(start):
                continue
            run = _longest(follow(start))
            if run is not None:
                candidates.append(run)
                covered |= set(run.stream.nodes)
    taken: set[fx.Node] = set()
    chosen = []
    for run in sorted(candidates, key=lambda run: -len(run.steps)):
        if taken.isdisjoint(run.path()[1:]):
            chosen.append(run)
            taken |= run.nodes()
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(chosen, key=lambda run: order[run.steps[0].before])


def _longest(stream: Stream) -> Run | None:
    """The most steps that lead to one end of the stream; it may fork."""
    adds = [made for made in stream.nodes.values() if isinstance(made, Add)]
    best: Run | None = None
    for add in reversed(adds):
        # The number of sums on the way bounds the number of steps, and is cheap to count.
        if _depth(stream, add.node) < max(2, len(best.steps) + 1 if best else 0):
            continue
        steps = stream.steps_to(add.node)
        while steps and not steps[0].reads_stream():  # token + position embedding: a sum, but no step
            steps = steps[1:]
        if len(steps) >= 2 and (best is None or len(steps) > len(best.steps)):
            best = Run(stream, steps)
    return best


def _depth(stream: Stream, node: fx.Node) -> int:
    depth = 0
    while node is not stream.start:
        made = stream.nodes[node]
        depth += isinstance(made, Add)
        node = made.skip if isinstance(made, Add) else made
    return depth


def sums_of(graph: fx.Graph) -> list[fx.Node]:
    """Every sum of two wide tensors, in graph order."""
    return [n for n in graph.nodes if add_operands(n) is not None and is_wide(n)]


def is_wide(node: fx.Node) -> bool:
    """Could its value be a stream?"""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2


def graph_chain(graph: UserGraph, run: Run) -> GraphChain:
    """The run in public words."""
    obstacles = obstacles_on_stream(graph.block, run.stream, set(run.path()))
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
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared) or "(the model itself)"


def _caveats(graph: UserGraph, run: Run) -> list[Obstacle]:
    found = []
    for branch in run.branches:
        for node in branch:
            if _writes_buffers(graph, node):
                text = "it updates buffers while it runs; a second run in backward must not update them again"
                found.append(Obstacle("buffer-write", text, node.meta["source"]))
    first, last = run.steps[0].before.meta["val"], run.steps[-1].after.meta["val"]
    if first.dtype != last.dtype:
        before, after = (str(value.dtype).removeprefix("torch.") for value in (first, last))
        text = f"it turns a {before} stream into a {after} one"
        found.append(Obstacle("stream-cast", text, run.steps[-1].source))
    for node in run.path()[1:]:
        if node.meta["mutates"]:
            text = "it adds to its input in place; a converted block returns a new tensor instead"
            found.append(Obstacle("in-place-add", text, node.meta["source"]))
    return found


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
