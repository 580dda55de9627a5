"""The conversion as an fx pass, for people who transform graphs themselves.

    ReverseChains(method="momentum", batch=(x,))(gm)

Every residual chain that `AnnotateResiduals` calls eligible is rewritten: the nodes of a step become one `call_module`
of a `ReversibleStep`, which runs them on `gm`'s own live modules and parameters. `gm`'s `state_dict` keys stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from autorev.conversion.probe import choose_grids
from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.choose import coupling_for
from autorev.detect.outline import LiveGraph, subgraph
from autorev.detect.runs import Run, residual_runs
from autorev.engine.chain import ReversibleChain
from autorev.engine.mode import ORIGINAL, mode
from autorev.engine.plain_data import without_history
from autorev.engine.step import Branch, Step
from autorev.errors import ConversionError, SettingError
from autorev.fx.annotate import ResidualPass, graph_chain
from autorev.fx.user_graph import UserGraph, read_user_graph
from autorev.methods import Method
from autorev.rewrite.built import arithmetic_for


class ReversibleStep(nn.Module):
    """One residual step of a rewritten graph; owns no parameter."""

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph, chain: ReversibleChain, number: int) -> None:
        super().__init__()
        self.chain, self.number, self.graph = chain, number, graph
        self.__dict__["gm"] = gm  # past `__setattr__`: it holds this module, and is no part of it

    @property
    def turn(self) -> Any:
        """The step's nodes as a function over `gm`'s live modules."""
        if "made" not in self.__dict__:
            self.__dict__["made"] = LiveGraph(self.__dict__["gm"], {}, self.graph)
        return self.__dict__["made"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "made"}  # a copy makes its own

    def forward(self, stream: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """stream + what the step adds, coupled."""
        turn = self.turn
        if mode() == ORIGINAL:
            result: torch.Tensor = turn(stream, *inputs)
            return result
        path = f"step {self.number} of {self.chain.name}"
        modules = _modules_of(turn, self.__dict__["gm"])
        branch = Branch(modules, path, modules.training, lambda module, name: False, mutates_input=True)
        step = Step(self.chain, (stream,), (self.number,), branch)
        if step.replay is not None:
            kept = tuple(without_history(i) if isinstance(i, torch.Tensor) else i for i in inputs)
            step.replay.add_arguments(kept)
            step.replay.again = lambda x: (None, (turn(x, *kept),))
        with step.running():
            out = turn(*step.given(), *inputs)
        (new,) = step.take((out,))
        return new


class ReverseChains(ResidualPass):
    """Rewrite the residual chains of a graph reversibly, in place.

    `method`, `gamma`, `c`, `arithmetic`, `keep_last` and `fraction_bits` are those of `autorev.convert`, and
    `keep_last` counts steps; `batch` are those of `AnnotateResiduals`, and choose the fixed-point grid.
    """

    def __init__(
        self,
        batch: Sequence[Any] | None = None,
        *,
        method: str = "momentum",
        gamma: float | None = None,
        c: float | None = None,
        arithmetic: str = "exact",
        keep_last: int = 1,
        fraction_bits: int | None = None,
    ) -> None:
        super().__init__(batch)
        self.keep_last = keep_last
        try:
            self.method = Method(
                method,
                gamma=gamma,
                c=c,
                arithmetic=arithmetic,
                granularity="sublayer",
                keep_last=keep_last,
                fraction_bits=fraction_bits,
            )
        except SettingError as error:
            raise ConversionError(str(error)) from None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite; `modified` is False where there is no eligible chain, or the graph was rewritten before.

        Raises:
            CaptureError: the graph cannot be run on fake tensors with these inputs.
            ConversionError: the coupling cannot be had with these numbers.
        """
        if any(isinstance(module, ReversibleStep) for module in graph_module.modules()):
            return PassResult(graph_module, False)
        graph = read_user_graph(graph_module, self.batch)
        chains: list[tuple[ReversibleChain, list[_Unit]]] = []
        for run in residual_runs(graph.block.graph):
            public = graph_chain(graph, run)
            units = [] if public.verdict == "refused" else _units(graph, graph_module, run)
            if len(units) > 1:
                double = run.steps[0].before.meta["val"].dtype is torch.float64
                chains.append((self._chain(public.name, len(chains), len(units), double), units))
        if not chains:
            return PassResult(graph_module, False)
        before = copy.deepcopy(graph_module.graph)
        try:
            for number, (chain, units) in enumerate(chains):
                # The last one first: what it begins with is then still the user's own node.
                for step, unit in reversed(list(enumerate(units))):
                    unit.install(graph_module, chain, f"reversible_{number}_{step}", step)
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
            self._choose_grids(graph_module, [chain for chain, _ in chains])
        except BaseException:
            graph_module.graph = before
            for name, module in list(graph_module.named_children()):
                if isinstance(module, ReversibleStep):
                    graph_module.delete_submodule(name)
            raise
        return PassResult(graph_module, True)

    def _choose_grids(self, graph_module: fx.GraphModule, chains: list[ReversibleChain]) -> None:
        bits = self.method.fraction_bits
        if self.batch is not None:
            choose_grids(graph_module, chains, bits, tuple(self.batch), {})
        elif isinstance(bits, int):
            for chain in chains:
                chain.arithmetic = FixedPoint(bits)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The rewritten graph is well formed."""
        graph_module.graph.lint()

    def _chain(self, name: str, number: int, steps: int, double: bool) -> ReversibleChain:
        full = f"{name} (graph chain {number})"
        gamma, c = self.method.gamma, self.method.c
        assert not isinstance(gamma, Mapping)
        assert not isinstance(c, Mapping)
        couplings = [coupling_for(self.method.preset, full, n, steps, gamma, c) for n in range(steps)]
        stored_from = max(steps - self.keep_last, 0)
        arithmetic = arithmetic_for(self.method, couplings[:stored_from], [full] * steps, full, double)
        paths = [full] * steps
        return ReversibleChain(full, couplings, arithmetic, stored_from, self.method.preset.averages, paths)


@dataclass(eq=False)
class _Unit:
    """The user's nodes of one step; of several, where a leaf module holds them or the stream's form changes between."""

    start: fx.Node
    nodes: list[fx.Node]
    end: fx.Node

    def install(self, gm: fx.GraphModule, chain: ReversibleChain, name: str, number: int) -> None:
        """Put one `ReversibleStep` in the nodes' place."""
        graph, outer = subgraph(self.nodes, self.start, self.end)
        gm.add_submodule(name, ReversibleStep(gm, graph, chain, number))
        with gm.graph.inserting_after(self.end):
            new = gm.graph.call_module(name, (self.start, *outer))
        new.meta = dict(self.end.meta)
        self.end.replace_all_uses_with(new)
        for node in reversed(self.nodes):
            gm.graph.erase_node(node)


def _units(graph: UserGraph, gm: fx.GraphModule, run: Run) -> list[_Unit]:
    """The run in the user's own nodes, step by step; empty where a value inside a step is read from outside."""
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    path = run.path
    units: list[_Unit] = []
    pending: set[fx.Node] = set()
    start = graph.origin[run.steps[0].before]
    shape = run.steps[0].before.meta["val"].shape
    for step, branch in zip(run.steps, run.branches, strict=True):
        between = path[path.index(step.before) + 1 : path.index(step.after) + 1]
        pending |= {graph.origin[node] for node in (*branch, *between)}
        end = graph.origin[step.after]
        if step.after.meta["val"].shape != shape:
            continue  # flattened for this add: the step ends where its form is restored
        if units and units[-1].end is end:  # a leaf module that holds several steps
            units[-1].nodes = sorted({*units[-1].nodes, *pending}, key=order.__getitem__)
        else:
            units.append(_Unit(start, sorted(pending - {start}, key=order.__getitem__), end))
        start, pending = end, set()
    for unit in units:
        inside = set(unit.nodes)
        if any(user not in inside for node in unit.nodes if node is not unit.end for user in node.users):
            return []
        if unit.end not in inside or unit.start in inside:
            return []
    return units


def _modules_of(turn: Any, gm: fx.GraphModule) -> nn.Module:
    """The sub-modules whose parameters a step uses, as one module."""
    paths: dict[str, None] = {}
    for node in turn.graph.nodes:
        if node.op in ("call_module", "get_attr") and str(node.target).startswith("block."):
            path = str(node.target).removeprefix("block.")
            paths[path if node.op == "call_module" else path.rpartition(".")[0]] = None
    group = nn.ModuleList(gm.get_submodule(path) for path in paths)
    group.training = gm.training
    return group
