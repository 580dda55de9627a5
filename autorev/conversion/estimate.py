"""What a training step of the example call holds, simulated on fake tensors before anything is converted.

It decides how many blocks are stored where nobody said so, by the rule that `analyze` predicts with, and it is what
the summary compares with plain training and with checkpointing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from autorev.conversion.summary import Held, Memory
from autorev.detect.finding import Finding
from autorev.errors import ConversionError
from autorev.methods import Method
from autorev.prediction.example_step import example_step, why_unknown
from autorev.prediction.layout import Layout
from autorev.prediction.simulate import StepTrace
from autorev.prediction.stored import blocks_to_store, grown_kept, grown_peak
from autorev.workload import Call

PLAIN, CHECKPOINT = Method("plain"), Method("checkpoint")


@dataclass(frozen=True)
class Stored:
    """For each chain, how many blocks at its end are stored, and why."""

    blocks: tuple[int, ...]
    why: tuple[str, ...]


@dataclass(eq=False)
class Estimate:
    """Steps of a fake twin, simulated when they are asked for."""

    twin: nn.Module
    call: Call
    chains: Sequence[list[Finding]]
    """To be converted."""
    others: Sequence[Finding]
    """Blocks that stay as they are."""
    steps: dict[tuple[Any, ...], tuple[Layout, StepTrace]] = field(default_factory=dict)
    """By what of the method matters."""
    unknown: str = ""
    """Why nothing could be simulated, if that is so."""

    def stored(self, method: Method) -> Stored:
        """How many blocks are stored."""
        if isinstance(method.keep_last, tuple):
            if len(method.keep_last) != len(self.chains):
                raise ConversionError(
                    f"keep_last has {len(method.keep_last)} numbers, and there are {len(self.chains)} chains to "
                    "convert; give one for each, or one for all"
                )
            alike = zip(method.keep_last, self.chains, strict=True)
            return self._alike([min(number, len(chain)) for number, chain in alike], "as asked for")
        if isinstance(method.keep_last, int):
            return self._alike([min(method.keep_last, len(chain)) for chain in self.chains], "as asked for")
        none = [0] * len(self.chains)
        if method.in_pieces:
            return self._alike(none, "a step is less than a block, whose activations would raise the peak")
        nothing, last = (self._step(replace(method.of_all_blocks, keep_last=n)) for n in (0, 1))
        if nothing is None or last is None:
            return self._alike(none, "what storing one would cost is not known")
        blocks = blocks_to_store(nothing[1], last[1], nothing[0])
        lie_beside = "its activations would lie beside the peak of what comes behind the chain"
        return Stored(blocks, tuple("it is needed first, and raises no peak" if n else lie_beside for n in blocks))

    def memory(self, method: Method, keep_last: tuple[int, ...]) -> Memory | str:
        """The step under plain autograd, under checkpointing, and as converted; or why that is not known."""
        found = []
        own = _storing(method, keep_last) if method.reversible else method
        for compared in (PLAIN, CHECKPOINT, own):
            step = self._step(compared)
            if step is None:
                return self.unknown
            layout, trace = step
            found.append(Held(grown_kept(trace, layout), grown_peak(trace, layout)))
        return Memory(*found)

    def _alike(self, blocks: list[int], why: str) -> Stored:
        return Stored(tuple(blocks), (why,) * len(blocks))

    def _step(self, method: Method) -> tuple[Layout, StepTrace] | None:
        key = method.name, method.keep_last, method.tile, method.keep, method.host
        if key not in self.steps and not self.unknown:
            try:
                self.steps[key] = example_step(self.twin, self.call, self.chains, self.others, method)
            except Exception as error:  # whatever is wrong with a backward without data: it may train all the same
                self.unknown = why_unknown(error)
        return self.steps.get(key)


def _storing(method: Method, keep_last: int | tuple[int, ...]) -> Method:
    if isinstance(keep_last, tuple) and len(set(keep_last)) == 1:
        keep_last = keep_last[0]
    return replace(method, keep_last=keep_last)
