"""The residual runs of a graph: at least two steps `h <- h + f(h)` along one stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from autorev.detect.scaling import factor_in_graph
from autorev.detect.stream import Add, ResidualStep, Stream, follow, is_stream_like
from autorev.detect.sums import add_operands
from autorev.detect.ways import depends


@dataclass(eq=False)
class Run:
    """Steps that follow one another along a stream, from its start."""

    stream: Stream
    steps: list[ResidualStep]

    @cached_property
    def path(self) -> list[fx.Node]:
        """The stream's nodes from the first step's beginning to the last one's cut."""
        return self.stream.path_to(self.steps[-1].after)

    @cached_property
    def branches(self) -> list[list[fx.Node]]:
        """What computes each step's branch from the stream."""
        return [step.own_nodes() for step in self.steps]

    def nodes(self) -> set[fx.Node]:
        """Path and branches."""
        return {*self.path, *(n for branch in self.branches for n in branch)}


def residual_runs(graph: fx.Graph) -> list[Run]:
    """The longest runs that do not overlap, in graph order; one inside another's branch is left out."""
    candidates: list[Run] = []
    covered: set[fx.Node] = set()
    for total in stream_like_sums(graph):
        for start in (node for summand in summands(total) for node in before_products(summand)):
            if start in covered or not is_stream_like(start.meta.get("val")):
                continue
            run = _longest(follow(start))
            if run is not None:
                candidates.append(run)
                covered |= set(run.stream.nodes)
    taken: set[fx.Node] = set()
    chosen = []
    for run in sorted(candidates, key=lambda run: -len(run.steps)):
        if taken.isdisjoint(run.path[1:]):
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
        most = sum(isinstance(stream.nodes[node], Add) for node in stream.path_to(add.node))
        # Of ends that as many steps lead to, one is best that turns of a loop end with.
        wanted = 2 if best is None else len(best.steps) + _ends_a_turn(best.steps)
        if most < wanted or not (stream.reads(add) or _recurs(add, stream)):
            continue
        steps = stream.steps_to(add.node, in_loop=True)
        if len(steps) < wanted or not _ends_with_it(steps[-1]):
            continue
        if best is None or len(steps) > len(best.steps) or _ends_a_turn(steps):
            best = Run(stream, steps)
    first = best.steps[0].adds[0] if best is not None else None
    if first is not None and not (stream.reads(first) or _recurs(first, stream)):
        return _longest(follow(first.node))  # token + position embedding: a sum, but no step
    return best


def _ends_a_turn(steps: list[ResidualStep]) -> bool:
    """Does an earlier step end by the same code as the last one?"""
    return any(step.after.meta["place"] == steps[-1].after.meta["place"] for step in steps[:-1])


def _ends_with_it(step: ResidualStep) -> bool:
    """Or does the step's last sum add what is none of its branch (the stream before the loop, behind it)?"""
    last = [add for add in step.adds if add.branch][-1]
    return any(depends(item, step.before) for item in last.branch)


def _recurs(add: Add, stream: Stream) -> bool:
    """Is it a product that other turns of the loop have, too? One before the loop, or behind it, is no part of it."""
    made = stream.nodes.values()
    alike = [a for a in made if isinstance(a, Add) and a.node.meta["place"] == add.node.meta["place"]]
    return not add.branch and len(alike) > 1


def before_products(node: fx.Node) -> list[fx.Node]:
    """What `node` is a multiple of by constants, first one first, and itself."""
    found = factor_in_graph(node, lambda source: is_stream_like(source.meta.get("val")))
    return [node] if found is None else [*before_products(found[0]), node]


def summands(node: fx.Node) -> list[fx.Node]:
    """The nodes that the sum `node` adds up."""
    first, others = add_operands(node) or (None, ())
    return [operand for operand in (first, *others) if isinstance(operand, fx.Node)]


def stream_like_sums(graph: fx.Graph) -> list[fx.Node]:
    """Every sum that could be a stream, in graph order."""
    return [n for n in graph.nodes if add_operands(n) is not None and is_stream_like(n.meta.get("val"))]
