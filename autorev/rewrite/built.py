"""One chain of findings as a reversible chain, with the forwards that run it; installed, or only looked at."""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from autorev.couplings.arithmetic import Arithmetic, FixedPoint, Floating
from autorev.couplings.choose import check_dyadic, coupling_for
from autorev.couplings.coupling import Coupling
from autorev.couplings.velocity import Velocity
from autorev.detect.chains import chain_name
from autorev.detect.ends import argument_of
from autorev.detect.finding import Finding
from autorev.detect.tokenwise import TokenWise
from autorev.engine.chain import ReversibleChain
from autorev.engine.grid import USUAL_FRACTION_BITS
from autorev.engine.host_store import HostStore
from autorev.engine.tape import TOLERANCE
from autorev.errors import ConversionError
from autorev.methods import Method
from autorev.rewrite.adds import KnownAdds
from autorev.rewrite.block_forward import ReversibleForward, WholeBlock
from autorev.rewrite.deferred import DeferredBlock
from autorev.rewrite.in_steps import StepsOfBlock, StepsOfLoop, by_steps
from autorev.rewrite.traced_block import TracedBlock


class BuiltChain:
    """A chain ready to be installed."""

    def __init__(
        self,
        model: nn.Module,
        findings: list[Finding],
        kept: int,
        method: Method,
        taken: set[str],
        host: HostStore,
        run: Container[nn.Module] | None = None,
    ) -> None:
        """`kept`: so many blocks are stored; `host`: the model's; `run`: the blocks that will be, None for all."""
        pieces = method.in_pieces
        inline = findings[0].inline
        if pieces and findings[0].deferred:
            raise ConversionError(
                f"{findings[0].path} leaves the last of its residual adds to the next block, so it is no step by step; "
                "use granularity='block', and a coupling of one stream"
            )
        beside = next((lane for f in findings for lane in f.beside if lane.adds_in_place), None) if pieces else None
        if beside is not None and beside.start is not None:
            raise ConversionError(
                f"{beside.path} adds in place to {argument_of(beside.start)}, its second stream, and step by step only "
                "one is reversed; use granularity='block', and a coupling of one stream"
            )
        self.kept = kept
        if pieces and inline:
            kept = sum(len(finding.steps) for finding in findings[len(findings) - kept :])
            findings = by_steps(findings)
        self.findings, self.preset = findings, method.preset
        self.first: list[int] = []
        """Number of each block's first step."""
        paths: list[str] = []
        for finding in findings:
            self.first.append(len(paths))
            apart = pieces and not inline and not finding.in_slices
            paths += [finding.path] * (len(finding.steps) if apart else 1)
        couplings = couplings_of(method, paths)
        stored_from = self.first[len(findings) - kept] if kept else len(couplings)
        stream = findings[0].stream_in
        double = stream is not None and stream.dtype is torch.float64
        arithmetic = arithmetic_for(method, couplings[:stored_from], paths, chain_name(findings), double)
        name = plain_name = chain_name(findings)
        while name in taken:
            name = f"{plain_name} ({1 + sum(other.startswith(plain_name) for other in taken)})"
        keeps = [
            method.keeps(position, len(findings) - kept)
            for position, (begin, end) in enumerate(pairwise([*self.first, len(paths)]))
            for _ in range(begin, end)
        ]
        averages = method.preset.averages
        self.chain = ReversibleChain(name, couplings, arithmetic, stored_from, averages, paths, keeps=keeps, host=host)
        self.traced = method.compile == "graph"
        self.lanes = 1 if pieces or findings[0].deferred else len(findings[0].lanes)
        self.forwards = self._forwards(model, pieces, method, run)

    def _forwards(
        self, model: nn.Module, pieces: bool, method: Method, run: Container[nn.Module] | None
    ) -> list[ReversibleForward]:
        if self.findings[0].inline:
            holder = model.get_submodule(self.findings[0].call.path)
            return [StepsOfLoop.of(holder, self.findings, self.chain, in_steps=pieces)]
        by_module: dict[str, list[int]] = {}
        for position, finding in enumerate(self.findings):
            by_module.setdefault(finding.call.path, []).append(position)
        made: list[ReversibleForward] = []
        for path, positions in by_module.items():
            finding = self.findings[positions[0]]
            block = model.get_submodule(path)
            if run is not None and block not in run:
                continue
            assert finding.start is not None
            known: dict[str, Any] = {
                "block": block,
                "path": path,
                "chain": self.chain,
                "numbers": tuple(self.first[p] for p in positions),
                "argument": argument_of(finding.start),
                "output_at": finding.output_at,
                "written": finding.call.buffers_written,
                "mutates_input": any(lane.adds_in_place for lane in finding.lanes),
            }
            beside = tuple(("" if f.start is None else argument_of(f.start), f.output_at) for f in finding.beside)
            factors = tuple(lane.factor for lane in finding.lanes) if finding.multiplies else ()
            if pieces and not finding.in_slices:
                made.append(StepsOfBlock(**known, adds=KnownAdds.of_block(finding), steps=len(finding.steps)))
            elif self.is_tiled_whole(positions, method):
                made.append(WholeBlock(**known, factors=factors))
            elif method.tile is not None and not finding.beside and (adds := _last_add_of(finding)) is not None:
                made.append(StepsOfBlock(**known, adds=adds, steps=1, whole=True))
            else:
                whole = TracedBlock if self.traced else WholeBlock
                made.append(
                    DeferredBlock(**known, added=beside[0])
                    if finding.deferred
                    else whole(**known, beside=beside, factors=factors)
                )
        return made

    def is_tiled_whole(self, positions: list[int], method: Method) -> bool:
        """Are the calls of one block, at these places of the chain, run a tile at a time, attention and all?"""
        recomputed = max(positions) < len(self.findings) - self.kept
        return method.tiles_attention and recomputed and isinstance(self.findings[positions[0]].causal, TokenWise)

    def install(self) -> None:
        """Put the new forwards in place."""
        for forward in self.forwards:
            forward.install()

    @property
    def side_bits(self) -> int:
        """The most that a block which is recomputed keeps of an element."""
        chain = self.chain
        if not isinstance(chain.arithmetic, FixedPoint):
            return 0
        per_block = max(len(chain.couplings) // max(len(set(chain.paths)), 1), 1)
        return per_block * max((c.side_bits for c in chain.couplings[: chain.stored_from]), default=0)


def _last_add_of(finding: Finding) -> KnownAdds | None:
    """Of a block that can be taken as one step by the add at its end, so that its second run may leave out what is
    tiled before that; None for any other."""
    if finding.captured is None or not finding.steps or finding.in_slices:
        return None
    if any(part.path in finding.opened for part in finding.parts if isinstance(part, TokenWise)):
        return None  # the add may stand in what is tiled (BLOOM's MLP adds its residual)
    try:
        return KnownAdds.of_block(finding, whole=True)
    except ConversionError:  # it goes by one line of code for that add and for another
        return None


def couplings_of(method: Method, paths: list[str]) -> list[Coupling]:
    """One for each step, of which `paths` are the blocks."""
    return [
        coupling_for(method.preset, path, n, len(paths), method.gamma_of(path), method.c_of(path))
        for n, path in enumerate(paths)
    ]


def arithmetic_for(method: Method, recomputed: list[Coupling], paths: list[str], name: str, double: bool) -> Arithmetic:
    """The arithmetic of the chain `name`, of which the steps `recomputed` (in the blocks `paths`) are undone.

    Raises:
        ConversionError: a gamma is no n / 2^k, or float streams would drift too far.
    """
    if method.arithmetic == "exact":
        for coupling, path in zip(recomputed, paths, strict=False):
            if isinstance(coupling, Velocity):
                check_dyadic(coupling.gamma, path)
        return FixedPoint(USUAL_FRACTION_BITS)
    worst, product = 1.0, 1.0
    for coupling in recomputed:
        product *= coupling.growth if coupling.invertible else 1.0
        worst = max(worst, product)
    error = worst * (2.0**-53 if double else 2.0**-24)
    if error > TOLERANCE:
        raise ConversionError(
            f"in float arithmetic, rounding errors of {name} would grow to {error:.1g} of the stream "
            f"over its {len(recomputed)} steps (each divides by gamma); use arithmetic='exact', which has none, or "
            "|gamma| = 1"
        )
    return Floating()
