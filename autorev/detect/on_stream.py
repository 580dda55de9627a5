"""A block whose output is the stream: what forbids reversing it all the same, and what to know before.

As in `obstacles`, each reason is one `Obstacle`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from autorev.capture.tracer import CapturedBlock
from autorev.detect.graph_queries import title
from autorev.detect.obstacles import Obstacle, in_place
from autorev.detect.scaling import LEAST, MOST, is_held
from autorev.detect.stream import Add, Stream, storage_of


def obstacles_on_stream(
    block: CapturedBlock, stream: Stream, path: list[fx.Node], paths: Sequence[list[fx.Node]] = ()
) -> list[Obstacle]:
    """What forbids reversing a block although its output is the stream; empty when nothing does.

    `path` holds the stream nodes between start and output, `paths` those of every stream that the block carries.
    """
    return [
        *_decisions(block),
        *unseen_code(block),
        *_overwritten_values(block, stream, path, paths),
        *_unheld_factors(block, stream, path),
    ]


def _decisions(block: CapturedBlock) -> Iterator[Obstacle]:
    for decision in block.decided:
        what, _, source = decision.rpartition(" (")
        text = f"its course depends on the values of its tensors (`{what}`); run again, it could take another path"
        yield Obstacle("data-dependent", text, source.rstrip(")"))


def unseen_code(block: CapturedBlock) -> list[Obstacle]:
    """A tensor came from somewhere that the capture cannot see, so its branch cannot be cut out."""
    text = "a tensor appeared that no torch function of the block made (compiled or foreign code)"
    return [Obstacle("unseen-code", text, source) for source in block.lost]


def _overwritten_values(
    block: CapturedBlock, stream: Stream, path: list[fx.Node], paths: Sequence[list[fx.Node]]
) -> Iterator[Obstacle]:
    own = {storage_of(n.meta.get("val")) for n in stream.nodes}
    given = {
        storage_of(n.meta.get("val")): n for n in block.graph.nodes if "argument" in n.meta and n is not stream.start
    }
    for node in block.graph.nodes:
        changed = {storage_of(target.meta.get("val")) for target in node.meta.get("mutates", ())} - {None}
        if changed & own and not (node in path and isinstance(stream.nodes[node], Add)):
            yield in_place(node, block)
        if any(node in other for other in paths):
            continue  # an add to a stream beside this one, which is given as a copy too
        for argument in (given[storage] for storage in changed - own if storage in given):
            name = argument.meta["argument"]
            text = f"`{title(node, block)}` overwrites its argument {name}, and would do so once more in backward"
            yield Obstacle("argument-write", text, node.meta["source"])


def _unheld_factors(block: CapturedBlock, stream: Stream, path: list[fx.Node]) -> Iterator[Obstacle]:
    """`0 * h + f(h)`, and numbers that are next to that, or the other way round."""
    for add in stream.adds_to(path[-1]):
        known = add.factor.known
        if add.node in path and known is not None and not is_held(known):
            text = (
                f"the stream is multiplied by {known:g} (`{title(add.node, block)}`): a step may make it smaller by "
                f"2^{-math.log2(LEAST):g} or larger by 2^{math.log2(MOST):g}, for more an integer has too few bits"
            )
            yield Obstacle("scaled-shortcut", text, add.node.meta["source"])


# -- what to know of a stream that can be reversed


def caveats_on_stream(path: list[fx.Node]) -> Iterator[Obstacle]:
    """Casts, roundings and writes to the caller's tensor, of the stream nodes from the first to the last."""
    start, end = path[0], path[-1]
    entering, leaving = (n.meta["val"].dtype for n in (start, end))
    narrow = [n for n in path if n.meta["val"].dtype.itemsize < entering.itemsize]
    if entering != leaving:
        text = f"it turns a {_short(entering)} stream into a {_short(leaving)} one"
        yield Obstacle("stream-cast", text, end.meta["source"])
    elif narrow:
        text = f"it rounds its {_short(entering)} stream to {_short(narrow[0].meta['val'].dtype)} on the way"
        yield Obstacle("stream-cast", text, narrow[0].meta["source"])
    for node in path[1:]:
        if any(storage_of(n.meta.get("val")) == storage_of(start.meta["val"]) for n in node.meta["mutates"]):
            text = "it writes to its input in place; a converted block returns a new tensor instead"
            yield Obstacle("in-place-add", text, node.meta["source"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
