"""Which blocks a simulated step runs: every one of the model in calling order, and which of them stand for others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from autorev.couplings.choose import coupling_for
from autorev.detect.ends import argument_of, flatten_with_path
from autorev.detect.finding import Finding
from autorev.detect.outline import Outlined, outline
from autorev.keeps import NOTHING, Keeps
from autorev.methods import Method
from autorev.rewrite.in_steps import by_steps


@dataclass(frozen=True, eq=False)
class Site:
    """Where one block is called, and how its stream is found in the call."""

    number: int
    module: nn.Module
    call: int
    """Number of this call among the module's calls."""
    lanes: tuple[tuple[str, tuple[Any, ...]], ...]
    """(argument name, `hidden_states` or `states[0]`; place in what is returned) of each stream that it carries."""
    chain: int | None
    """Number of its chain; None for a refused block."""
    from_end: int
    """0 for the last block of its chain, 1 for the one before, ..."""
    kind: Any
    """Blocks of one kind (class, shapes, graph) behave alike."""
    turn: int | None = None
    """For an inline block: which turn of `module`'s loop it is."""
    stored: bool = False
    """Is it left as it is?"""
    keeps: Keeps = NOTHING
    overwritten: tuple[str, ...] = ()
    """The arguments that it adds to in place."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Every block of the model, in calling order."""

    sites: tuple[Site, ...]
    outlined: dict[nn.Module, Outlined]
    """Modules that hold inline blocks, with these taken out of their forward."""
    chains: tuple[list[Finding], ...]
    refused: list[Finding]
    twin: nn.Module
    stored: tuple[int, ...] = ()
    """Of each chain, how many blocks at its end a reversible method stores instead of recomputing."""

    @property
    def findings(self) -> list[Finding]:
        """Of all blocks."""
        return [*(finding for chain in self.chains for finding in chain), *self.refused]

    @cached_property
    def groups(self) -> dict[Any, list[int]]:
        """Block numbers by chain and kind."""
        groups: dict[Any, list[int]] = {}
        for site in self.sites:
            groups.setdefault((site.chain, site.kind), []).append(site.number)
        return groups

    @cached_property
    def active(self) -> frozenset[int]:
        """The blocks that have to be run: the first, the second and the last of each kind and chain."""
        return frozenset(n for group in self.groups.values() for n in {*group[:2], group[-1]})

    @property
    def run_findings(self) -> list[Finding]:
        """Those of the modules that are run."""
        modules = {self.sites[number].module for number in self.active}
        return [finding for finding in self.findings if finding.call.module in modules]

    def stand_in(self, number: int) -> int:
        """The active block whose segments are this one's: itself, or the second of its kind, which is typical."""
        site = self.sites[number]
        return number if number in self.active else self.groups[site.chain, site.kind][1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Blocks of each chain, by its number."""
        counts = Counter(site.chain for site in self.sites if site.chain is not None)
        return tuple(counts[number] for number in range(len(counts)))

    @cached_property
    def in_steps(self) -> Layout:
        """The layout in which every residual step of an inline block is a block."""
        if not any(chain[0].inline for chain in self.chains):
            return self
        return layout_of([by_steps(c) if c[0].inline else c for c in self.chains], self.refused, self.twin)

    def under(self, method: Method) -> Layout:
        """The layout of what `method` runs. Blocks of a chain that are stored instead of recomputed are a kind of
        their own, and so are those that keep other side bits."""
        layout = self.in_steps if method.in_pieces else self
        stored = tuple(
            sum(len(f.steps) if f.inline and method.in_pieces else 1 for f in chain[len(chain) - kept :])
            for chain, kept in ((c, min(method.stored_of(n), len(c))) for n, c in enumerate(self.chains))
        )
        sites = []
        for site in layout.sites:
            if site.chain is not None:
                length = len(layout.chains[site.chain])
                last = site.from_end < stored[site.chain]
                position = length - 1 - site.from_end
                bits, keeps = _side_bits(method, position, length), method.keeps(position, length - stored[site.chain])
                # The last block of a kind is run in any case: where it alone is stored, it is of the kind that it
                # would be of otherwise, so that steps with and without it run the same blocks.
                several = stored[site.chain] > 1
                alike = method.keeps(position, length) if last and not several else keeps
                kind = site.kind, last and several, bits, alike
                site = replace(site, kind=kind, stored=last, keeps=keeps)
            else:
                site = replace(site, keeps=method.keeps(0, 1))
            sites.append(site)
        return replace(layout, sites=tuple(sites), stored=stored)


def _side_bits(method: Method, number: int, blocks: int) -> int:
    """What block `number` of a chain of `blocks` keeps of an element, where a block is one step."""
    if not method.reversible or method.in_pieces or isinstance(method.gamma, Mapping):
        return 0
    return coupling_for(method.preset, "", number, blocks, method.gamma, None).side_bits


def layout_of(chains: list[list[Finding]], refused: list[Finding], twin: nn.Module) -> Layout:
    """The blocks that methods can be put around: every chain's, and refused ones that keep their shape."""
    found: list[tuple[Finding, int | None, int]] = []
    for number, chain in enumerate(chains):
        found += [(f, number, len(chain) - 1 - at) for at, f in enumerate(chain)]
    for finding in refused:
        into, out = finding.stream_in, finding.stream_out
        if not finding.inline and into is not None and out is not None and into.shape == out.shape:
            found.append((finding, None, 0))
    inline: dict[Any, list[Finding]] = {}
    for finding, _, _ in found:
        if finding.inline:
            inline.setdefault(finding.captured, []).append(finding)
    outlined = [outline(captured, findings) for captured, findings in inline.items()]
    turns = {id(f): n for holder in outlined for n, f in enumerate(holder.blocks)}
    found = [item for item in found if not item[0].inline or id(item[0]) in turns]
    order = {id(call): n for n, call in enumerate(_root(found).walk())} if found else {}
    found.sort(key=lambda item: order.get(id(item[0].call), 0))  # stable: turns of one loop keep their order
    sites = tuple(
        Site(
            number=n,
            module=twin.get_submodule(f.call.path),
            call=f.call.index,
            lanes=tuple((argument_of(g.start) if g.start and not g.inline else "", g.output_at) for g in f.lanes),
            chain=chain,
            from_end=from_end,
            kind=_kind(f),
            turn=turns.get(id(f)),
            overwritten=() if f.inline else f.overwritten,
        )
        for n, (f, chain, from_end) in enumerate(found)
    )
    outlines = {twin.get_submodule(holder.captured.path): holder for holder in outlined}
    return Layout(sites, outlines, tuple(chains), refused, twin)


def _root(found: list[tuple[Finding, int | None, int]]) -> Any:
    call = found[0][0].call
    while call.parent is not None:
        call = call.parent
    return call


def _kind(finding: Finding) -> Any:
    module = finding.call.module
    if finding.inline:
        nodes = [n for step in finding.steps for n in step.branch_nodes()]
        called = [module.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
        return type(module), _shapes(called), tuple(str(n.target) for n in nodes if n.op == "call_function")
    inputs = tuple(
        (name, tuple(leaf.shape))
        for name, value in finding.call.inputs().items()
        for _, leaf in flatten_with_path(value)
        if isinstance(leaf, torch.Tensor)
    )
    graph = tuple(str(n.target) for n in finding.captured.graph.nodes) if finding.captured else ()
    return type(module), _shapes([module]), inputs, graph


def _shapes(modules: list[nn.Module]) -> Any:
    return tuple((type(m), tuple(p.shape), p.dtype) for m in modules for p in m.parameters())
