"""Search the recorded call for residual blocks, and join those that hand one tensor from each to the next."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from autorev.analysis import Block, Chain, Verdict
from autorev.capture.record import ModuleCall, RecordedCall
from autorev.capture.source import definition_line
from autorev.detect.finding import Finding
from autorev.detect.idle import idle_towers
from autorev.detect.inline import common_start, inline_blocks, recur, refused_loops
from autorev.detect.judge import judge, judge_first
from autorev.detect.links import State, enters, entry_of, exit_of, leaves, link
from autorev.detect.nearest import nearest
from autorev.detect.obstacles import Obstacle
from autorev.detect.scaling import LEAST_IN_ALL, MOST_IN_ALL

MOST_STEPS = 4
"""A module with more residual steps than this, found inside its own sub-modules, is a container of blocks."""

TORCH_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Detection:
    """Chains of findings, and the findings that were refused, in the order of the recorded call."""

    chains: list[list[Finding]] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)
    never_called: list[Block] = field(default_factory=list)
    nearest: str = ""
    """Where there is neither: what came nearest to a residual block; empty where nothing did."""
    idle: list[str] = field(default_factory=list)
    """Of each tower that did not run, a sentence."""

    def public(self) -> tuple[tuple[Chain, ...], tuple[Block, ...]]:
        """As frozen data."""
        chains = tuple(Chain(chain_name(chain), tuple(f.block() for f in chain)) for chain in self.chains)
        return chains, (*(f.block() for f in self.refused), *self.never_called)


def detect(recorded: RecordedCall) -> Detection:
    """Find every residual block of the recorded call, judge it, and build the chains."""
    findings = list(_search(recorded.root))
    if not findings:
        findings = refused_loops(recorded.root)
    _keep_what_is_handed_on(findings)
    _put_in_one_order(findings)
    link(findings, recorded)
    for chain in _chains(findings):
        _refuse_product(chain)
    detection = Detection(_chains(findings), [finding for finding in findings if not finding.reversible])
    for chain in detection.chains:
        if len(chain) == 1:
            text = "it stands alone: a chain of one block saves no more than checkpointing that block would"
            chain[0].caveats.append(Obstacle("single-block", text, definition_line(chain[0].call.module)))
    detection.never_called = list(_never_called(recorded.root, findings))
    detection.idle = idle_towers(recorded)
    if not findings:
        repeated = (c for call in recorded.root.walk() for c in call.children if _is_candidate(c, call))
        detection.nearest = nearest(recorded.root, repeated)
    return detection


def _run_alike(before: Finding, after: Finding) -> bool:
    """Blocks are run by their modules, and the turns of a loop by the module whose code holds them."""
    return not (before.inline or after.inline) or (before.inline and after.inline and before.call is after.call)


def chain_name(chain: list[Finding]) -> str:
    """The path that all blocks share: `model.layers`."""
    parts = [finding.path.split(".") for finding in chain]
    if len({tuple(p) for p in parts}) == 1:  # one module called again and again
        return chain[0].path
    return ".".join(common_start(parts)) or "(the model itself)"


# -- search


def _search(call: ModuleCall, inline: bool = True) -> list[Finding]:
    """Blocks below `call`, outermost first; a container of blocks gives way to what it contains.

    `inline=False`: `call`'s own code was judged already, and of it only a loop is taken.
    """
    judged = {id(child): judge(child) for child in call.children if _is_candidate(child, call)}
    deferring = {type(finding.call.module): finding.captured for finding in judged.values() if finding.deferred}
    for key, ordinary in judged.items():
        if not ordinary.deferred and (like := deferring.get(type(ordinary.call.module))) is not None:
            judged[key] = judge_first(ordinary.call, like.opened) or ordinary
    found: list[Finding] = []
    for child in call.children:
        finding = judged.get(id(child))
        if finding is not None and finding.steps and not _is_container(finding, judged):
            inner = [finding]
        else:
            refused = finding is not None and finding.residual and not finding.steps
            inner = _search(child, inline=not refused)
            if not inner and finding is not None and finding.residual:
                inner = [finding]
        found += inner
    found = list(_opened_up(found))
    return found if type(call.module).__module__.startswith("torch.nn") else _around(call, found, inline)


def _opened_up(found: list[Finding]) -> Iterator[Finding]:
    """`found`, but where a block is part of no chain (SDXL's transformers between convolutions), the chain inside."""
    lone = {id(chain[0]) for chain in _chains(found, wholly=False) if len(chain) == 1 and not chain[0].inline}
    for finding in found:
        inside = _search(finding.call) if id(finding) in lone else []
        yield from inside if _chained(inside) else [finding]


def _around(call: ModuleCall, found: list[Finding], inline: bool) -> list[Finding]:
    """What is found below `call`, or else the loop in `call`'s own code, if more steps follow one another in that.

    Blocks between which a loop adds something, or lays the stream out anew, are part of its own code.
    """
    chained = _chained(found)
    if chained and not _interrupted(found):
        return found
    blocks = [finding for finding in found if finding.reversible and not finding.inline]
    opened = {path for block in blocks for path in (block.call.path, *block.opened)}
    loop = inline_blocks(call, frozenset(path.removeprefix(f"{call.path}.") for path in opened))
    if not (loop if inline and not found else _chained(loop) > chained):
        return found
    run = {f"{call.path}.{path}".lstrip(".") for finding in loop for path in finding.modules}
    return loop + [f for f in found if not any(f"{f.path}.".startswith(f"{path}.") for path in opened | run)]


def _chained(findings: list[Finding]) -> int:
    """How many steps follow one another in chains of several blocks, each module being part of one chain.

    Adds in a module's own code that do not recur are no loop.
    """
    steps, taken = 0, set[str]()
    for chain in _chains(findings, wholly=False):
        modules = {finding.call.path for finding in chain}
        ends = [finding.end for finding in chain if finding.end is not None]
        if len(chain) > 1 and taken.isdisjoint(modules) and (not chain[0].inline or recur(ends)):
            taken |= modules
            steps += sum(len(finding.steps) for finding in chain)
    return steps


def _interrupted(found: list[Finding]) -> bool:
    """Does a block receive another tensor than the one before it returned, but one that could be made of that?"""
    taken = {state for f in found if f.reversible for state in entry_of(f)}
    given = {state for f in found if f.reversible for state in exit_of(f)}
    return any(
        taken.isdisjoint(exit_of(before))
        and given.isdisjoint(entry_of(after))
        and before.stream_out is not None
        and after.stream_in is not None
        and before.stream_out.numel() == after.stream_in.numel()
        for before, after in pairwise([f for f in found if f.reversible and not f.inline])
    )


def _is_candidate(child: ModuleCall, parent: ModuleCall) -> bool:
    """Repeated modules: items of a container, a class that occurs again among its siblings, one module called twice."""
    module = child.module
    if isinstance(module, TORCH_BLOCKS):
        return True
    if type(module).__module__.startswith("torch.nn"):
        return False
    siblings = [other for other in parent.children if type(other.module) is type(module)]
    return len(siblings) > 1 or child.path.rpartition(".")[2].isdigit() or _in_container(child, parent)


def _in_container(child: ModuleCall, parent: ModuleCall) -> bool:
    inside = child.path.removeprefix(parent.path).lstrip(".").rpartition(".")[0]
    try:
        return bool(inside) and isinstance(parent.module.get_submodule(inside), _containers)
    except AttributeError:
        return False


def _is_container(finding: Finding, judged: dict[int, Finding]) -> bool:
    """A stage whose steps all stem from a series of equal sub-modules, or from a loop, holds blocks and is none itself.

    A block may well be made of two equal residual wrappers; then its siblings are blocks like it.
    """
    assert finding.captured is not None
    module = finding.call.module
    opened = Counter(type(module.get_submodule(path)) for path in finding.captured.opened)
    own = [step for step in finding.steps if step.reads_stream() and not step.after.meta["inside"]]
    series = max(opened.values(), default=0) > 1 and not own
    if not series and not recur([step.after for step in finding.steps]):
        return False
    if len(finding.steps) > MOST_STEPS:
        return True
    siblings = [f for f in judged.values() if type(f.call.module) is type(module)]
    return len(siblings) < 2 or not all(f.reversible for f in siblings)


# -- links between blocks


def _chains(findings: list[Finding], wholly: bool = True) -> list[list[Finding]]:
    """The reversible ones, in one list those that hand on their streams from each to the next: all of them, or, not
    `wholly`, one at least."""
    chains: list[list[Finding]] = []
    tail: dict[Any, list[Finding]] = {}
    for finding in findings:
        if finding.reversible:
            entry, exit = ((state,) if wholly else state for state in (entry_of(finding), exit_of(finding)))
            state = next((state for state in entry if state in tail and _run_alike(tail[state][-1], finding)), None)
            chain = [] if state is None else tail.pop(state)
            if state is None:
                chains.append(chain)
            chain.append(finding)
            tail |= dict.fromkeys(exit, chain)
    return chains


def _refuse_product(chain: list[Finding]) -> None:
    """The factors of its streams may be held one by one, and not all together."""
    for lanes in zip(*(finding.lanes for finding in chain), strict=False):
        factors = [lane.factor_known for lane in lanes]
        for product in accumulate(factors, operator.mul):
            if not LEAST_IN_ALL <= abs(product) <= MOST_IN_ALL:
                text = f"over the {len(chain)} blocks its stream is multiplied by {product:.3g}, which no grid can hold"
                for finding in chain:
                    finding.obstacles.append(Obstacle("scaled-shortcut", text, finding.steps[-1].source))
                return


def _keep_what_is_handed_on(findings: list[Finding]) -> None:
    """A further stream is one only where a block receives from another what that one returned, and a deferred residual
    only where another block adds it up."""
    given = {state for finding in findings if finding.reversible for state in exit_of(finding)}
    taken = {state for finding in findings if finding.reversible for state in entry_of(finding)}
    sums = {entry_of(finding) for finding in findings} & {exit_of(finding) for finding in findings}
    for number, finding in enumerate(findings):
        if not finding.deferred:
            every, finding.beside = finding.beside, []
            for lane in every:
                if enters(lane) in given or leaves(lane) in taken:
                    finding.beside.append(lane)
                else:
                    finding.leave_out(lane)
        elif sums.isdisjoint((entry_of(finding), exit_of(finding))):
            other = judge(finding.call, deferred=False)
            findings[number] = other if other.residual else finding


def _put_in_one_order(findings: list[Finding]) -> None:
    """A block may take its streams in another order than the one before it returns them."""
    order: dict[frozenset[State], tuple[State, ...]] = {}
    for number, finding in enumerate(findings):
        wanted = order.get(frozenset(entry_of(finding)), ())
        if len(wanted) == len(finding.lanes) and not finding.deferred:
            lanes = {enters(lane): lane for lane in finding.lanes}
            finding.beside = []
            first, *beside = (lanes[state] for state in wanted)
            finding = findings[number] = first
            finding.beside = beside
        if len(set(exit_of(finding))) == len(finding.lanes):
            order[frozenset(exit_of(finding))] = exit_of(finding)


def _never_called(root: ModuleCall, findings: list[Finding]) -> Iterator[Block]:
    """Siblings of found blocks that the recorded call did not visit."""
    called = {id(call.module) for call in root.walk()}
    containers: dict[str, Finding] = {}
    for finding in findings:
        container, _, name = finding.call.path.rpartition(".")
        if name.isdigit():
            containers.setdefault(container, finding)
    for container, finding in containers.items():
        for name, module in root.module.get_submodule(container).named_children():
            if type(module) is type(finding.call.module) and id(module) not in called:
                text = "the recorded call never reached it (early exit, or a layer that this input skips)"
                where = definition_line(module)
                yield Block(
                    path=f"{container}.{name}",
                    class_name=type(module).__name__,
                    verdict=Verdict.REFUSED,
                    reasons=(f"not-called: {text} ({where})",),
                    steps=(),
                    stream="",
                    shape=(),
                    dtype="",
                    extra_inputs=(),
                    buffers_written=(),
                    draws_random=False,
                    parameters=sum(p.numel() for p in module.parameters()),
                    source=where,
                )
