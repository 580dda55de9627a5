"""Are the stream's elements in the same places behind a block as before it?"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autorev.detect.stream import MOVES, VIEWS, Add, Stream
from autorev.detect.ways import name_of


def keeps_order(stream: Stream, end: fx.Node) -> bool:
    """Are the stream's elements in the same places at `end` as at the start?

    Shapes do not tell: a transpose that is never undone adds the branch to a permuted skip. So the views on the way are
    taken of a tensor that holds each element's number.
    """
    path = stream.path_to(end)
    # Into a concatenated tensor and out of it nothing moves (`_same_layout`).
    way = [
        node
        for before, node in pairwise(path)
        if not isinstance(stream.nodes[node], Add) and before not in stream.cats and node not in stream.cats
    ]
    if not any(name_of(n) in MOVES or (n.target is getattr and n.args[1] in MOVES) for n in way):
        return True
    shape = stream.start.meta["val"].shape
    with unset_fake_temporarily():
        before = torch.arange(shape.numel(), dtype=torch.int32).reshape(shape)
        places = before
        for step in way:
            if name_of(step) in MOVES or step.target is getattr or name_of(step) in VIEWS:
                places = _moved(step, places)
            else:
                places = places.reshape(step.meta["val"].shape)
        return torch.equal(places, before)


def _moved(node: fx.Node, places: torch.Tensor) -> torch.Tensor:
    args = list(node.args[1:])
    if node.target is getattr:
        moved = getattr(places, str(args[0]))
    elif node.op == "call_method":
        moved = getattr(places, str(node.target))(*args, **node.kwargs)
    else:
        moved = node.target(places, *args, **node.kwargs)  # type: ignore[operator]  # a function here
    assert isinstance(moved, torch.Tensor)
    return moved
