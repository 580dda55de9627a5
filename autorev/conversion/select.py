"""Which blocks are converted: what analysis found, less what the user left out; every block not taken has a reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from autorev.detect.finding import Finding
from autorev.detection import detect_in
from autorev.errors import ConversionError


@dataclass(eq=False)
class Chosen:
    """Chains of findings to convert, and (path, reason) of the blocks that are not."""

    chains: list[list[Finding]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    others: list[Finding] = field(default_factory=list)
    """Those blocks that were judged."""
    twin: nn.Module = field(default_factory=nn.Module)
    """The fake copy that the findings speak of."""
    nearest: str = ""
    """What came nearest to a residual block, where there is none."""
    idle: list[str] = field(default_factory=list)
    """Of each tower that the call does not run, a sentence."""

    def leave_out(self, unfit: Mapping[int, str]) -> None:
        """Chains, by their number, that turned out not to run reversibly, and why."""
        for number, why in unfit.items():
            self.left_out += [(finding.path, f"cannot-run: {why}") for finding in self.chains[number]]
            self.others += self.chains[number]
        self.chains = [chain for number, chain in enumerate(self.chains) if number not in unfit]


def choose(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> Chosen:
    """Analyse `model` on a fake copy and select.

    Raises:
        ConversionError: a pattern matches no block.
        CaptureError: the call fails.
    """

    detection, twin = detect_in(model, args, kwargs)
    wanted, unwanted = patterns(blocks), patterns(exclude)
    chosen = Chosen(twin=twin, nearest=detection.nearest, idle=detection.idle)
    refused = detection.public()[1]
    paths = [f.path for chain in detection.chains for f in chain] + [block.path for block in refused]
    for pattern in (*(wanted or ()), *(unwanted or ())):
        if not any(fnmatchcase(path, pattern) for path in paths):
            some = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
            raise ConversionError(f"the pattern {pattern!r} matches no residual block; they are {some or 'none'}")
    taken: set[str] = set()
    for chain in detection.chains:
        # Modules that are called once more on another stream are converted already.
        modules = {f.call.path for f in chain}
        if modules & taken:
            again = {f.path for f in chain} - {f.path for c in chosen.chains for f in c}
            text = "second-chain: its module holds, or is part of, another chain that is converted"
            chosen.left_out += [(path, text) for path in sorted(again)]
            continue
        taken |= modules
        for run in _runs(chain, wanted, unwanted, chosen.left_out):
            if len(run) > 1 or wanted is not None:
                chosen.chains.append(run)
            else:
                reason = "single-block: a chain of one block saves no more than checkpointing it; name it in blocks="
                chosen.left_out.append((run[0].path, reason))
    for block in refused:
        chosen.left_out.append((block.path, "; ".join(block.reasons)))
        if wanted is not None and any(fnmatchcase(block.path, p) for p in wanted):
            raise ConversionError(f"{block.path} cannot be converted: {'; '.join(block.reasons)}")
    taken_over = {id(finding) for chain in chosen.chains for finding in chain}
    judged = (*(finding for chain in detection.chains for finding in chain), *detection.refused)
    chosen.others = [finding for finding in judged if id(finding) not in taken_over]
    return chosen


def patterns(given: str | Iterable[str] | None) -> list[str] | None:
    """One pattern or several as a list."""
    if given is None:
        return None
    if isinstance(given, str):
        return [given]
    found = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(pattern, str) for pattern in found):
        raise ConversionError(f"patterns of blocks are text, or a list of it, not {given!r}")
    return found


def _runs(
    chain: list[Finding], wanted: list[str] | None, unwanted: list[str] | None, left_out: list[tuple[str, str]]
) -> list[list[Finding]]:
    """The stretches of a chain that are wanted."""
    runs: list[list[Finding]] = [[]]
    for finding in chain:
        if wanted is not None and not any(fnmatchcase(finding.path, p) for p in wanted):
            left_out.append((finding.path, "not-asked-for: no pattern of blocks= matches it"))
        elif unwanted is not None and any(fnmatchcase(finding.path, p) for p in unwanted):
            left_out.append((finding.path, "excluded: a pattern of exclude= matches it"))
        else:
            runs[-1].append(finding)
            continue
        runs.append([])
    return [run for run in runs if run]
