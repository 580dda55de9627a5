"""How many blocks at the end of each chain are stored instead of recomputed: the rule behind `keep_last="auto"`.

The last block's activations are needed first in backward. Storing them costs nothing where the highest point of the
step is the backward of some block that is made again anyway; it costs a block's activations where the step is highest
in what comes behind the chain (the logits and the loss, another chain): they lie beside it. So the last block of a
chain is stored unless that raises the peak. A second one would lie beside the backward of the last, and never is.

Only what grows with the batch is counted: parameters, their gradients and the optimiser's state are not, so that the
choice does not depend on the size of the example. Gradients pile up on the way back and are never more at an earlier
point of it, so what raises no peak without them raises none with them.
"""

from __future__ import annotations

from collections.abc import Iterator

from autorev.analysis import Category
from autorev.prediction.compose import expand
from autorev.prediction.layout import Layout
from autorev.prediction.simulate import StepTrace
from autorev.prediction.tracker import Segment

_OF_WEIGHTS = (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)


def blocks_to_store(nothing: StepTrace, last: StepTrace, layout: Layout) -> tuple[int, ...]:
    """0 or 1 for each chain of `layout`, from a step with `keep_last=0` and one with `keep_last=1`."""
    lowest = grown_peak(nothing, layout)
    stored: set[int] = set()
    for chain in reversed(range(len(layout.lengths))):  # the later a chain, the less lies behind it
        if layout.lengths[chain] > 1:
            tried = stored | {chain}
            if grown_peak(_storing(nothing, last, layout, tried), layout) <= lowest:
                stored = tried
    return tuple(int(chain in stored) for chain in range(len(layout.lengths)))


def grown_peak(trace: StepTrace, layout: Layout) -> int:
    """The highest number of live bytes of all that grows with the batch."""
    alive = most = sum(size for category, size in trace.start.items() if category not in _OF_WEIGHTS)
    for segment in expand(trace.segments, layout):
        most = max(most, alive + segment.grown_top)
        alive += segment.grown
    return most


def grown_kept(trace: StepTrace, layout: Layout) -> int:
    """What of that the forward pass leaves behind from the first block to the last."""
    forward = [segment for segment in expand(trace.segments, layout) if segment.phase == "forward"]
    inside = [number for number, segment in enumerate(forward) if segment.block is not None]
    return sum(segment.grown for segment in forward[inside[0] : inside[-1] + 1]) if inside else 0


def _storing(nothing: StepTrace, last: StepTrace, layout: Layout, chains: set[int]) -> StepTrace:
    """The step in which only the last blocks of `chains` are stored: those of the one, and the others of the other."""
    return StepTrace(nothing.start, list(_mixed(nothing, last, layout, chains)), nothing.stream_bytes)


def _mixed(nothing: StepTrace, last: StepTrace, layout: Layout, chains: set[int]) -> Iterator[Segment]:
    of_chain = False
    for without, with_last in zip(nothing.segments, last.segments, strict=True):
        if without.block is not None:
            of_chain = layout.sites[without.block].chain in chains
        elif without.phase != "forward":  # in forward, what the loop lets go of behind a block belongs to it
            of_chain = False
        yield with_last if of_chain else without
