"""What stands between a block and reversibility, one function per reason.

Each function looks at one captured block and returns an `Obstacle` when its reason holds. `code` is the stable name of
the reason (docs/obstacles.md has a section for each); `text` is for the user; `source` names the line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from autorev.capture.tracer import CapturedBlock
from autorev.detect.graph_queries import (
    BlockView,
    adds_below,
    carries,
    is_activation,
    is_dropout,
    is_lerp,
    is_norm,
    is_projection,
    is_scaling,
    is_written_out_norm,
    mixed_streams,
    operands,
    scaling_of_carrier,
    shortcut,
    strip,
    sums,
    tail,
    title,
)
from autorev.detect.sums import add_operands


@dataclass(frozen=True)
class Obstacle:
    """Why a block is refused, or what to know about it."""

    code: str
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text} ({self.source})"


def obstacles_to_stream(view: BlockView) -> list[Obstacle]:
    """Why the block's output is not the stream; most telling reason first, never empty."""
    found = [obstacle for check in _checks if (obstacle := check(view)) is not None]
    if found and found[0].code == "post-norm":
        # The norm itself scales the sum, and every later skip starts behind one: the same fact told again.
        told = {"normed-shortcut", "scaled-shortcut", "broadcast"}
        found = [obstacle for obstacle in found if obstacle.code not in told]
    return found or [_not_residual(view)]


GENERIC = {"not-residual"}
"""Codes that say little about a residual block: a container of blocks has them too."""


# -- each reason


def post_norm(view: BlockView) -> Obstacle | None:
    """`norm(h + f(h))`: BERT, the original Transformer, OPT-350m."""
    for node in tail(view.output):
        written_out = is_written_out_norm(node)
        if (written_out or is_norm(node, view.block)) and adds_below(node, view):
            name = "a norm written out" if written_out and not node.meta["inside"] else title(node, view.block)
            return Obstacle(
                "post-norm",
                f"the residual sum passes through {name} before it leaves the block, so the skip is not free",
                node.meta["source"],
            )
    return None


def post_activation(view: BlockView) -> Obstacle | None:
    """`relu(h + f(h))`: ResNet v1."""
    for node in tail(view.output):
        if is_activation(node, view.block) and adds_below(node, view):
            return Obstacle(
                "post-activation",
                f"the residual sum passes through {title(node, view.block)} before it leaves the block, "
                "which cannot be undone",
                node.meta["source"],
            )
    return None


def shape_change(view: BlockView) -> Obstacle | None:
    """The block returns another shape than it received."""
    before, after = view.stream.start.meta["val"], view.output.meta["val"]
    if before.shape == after.shape or not sums(view):
        return None
    return Obstacle(
        "shape-change",
        f"the block turns {tuple(before.shape)} into {tuple(after.shape)}, so its input is no summand of its output",
        view.output.meta["source"],
    )


def scaled_shortcut(view: BlockView) -> Obstacle | None:
    """A gate on the skip, a learned factor, `lerp` with a tensor of weights."""
    for node in sums(view):
        for operand, _ in operands(node):
            scaled = scaling_of_carrier(operand, view)
            if scaled is not None:
                return Obstacle(
                    "scaled-shortcut",
                    f"the skip is multiplied (`{title(scaled, view.block)}`) {_by_what(scaled)} before the branch is "
                    "added, so undoing a layer would divide by that",
                    scaled.meta["source"],
                )
    last = strip(view.output)
    if is_lerp(last) and any(carries(n, view) for n in last.all_input_nodes):
        return Obstacle(
            "scaled-shortcut",
            f"`{title(last, view.block)}` weighs the skip against the branch by a tensor, so the skip is scaled",
            last.meta["source"],
        )
    if is_scaling(last) and adds_below(last, view):
        return Obstacle(
            "scaled-shortcut",
            f"the residual sum itself is multiplied (`{title(last, view.block)}`) {_by_what(last)} before it leaves "
            "the block",
            last.meta["source"],
        )
    return None


def _by_what(product: fx.Node) -> str:
    """Constants are no obstacle (`scaling`)."""
    origins = map(_origin, product.all_input_nodes)
    learned = [n for n in origins if n.op == "get_attr" and n.meta["val"].requires_grad]
    if not learned:
        return "by a tensor, not by a constant,"
    single = learned[0].meta["val"].numel() == 1 and learned[0] in product.all_input_nodes
    return f"by {learned[0].target}, which is learned{' (frozen, it would be a constant)' if single else ''},"


def _origin(node: fx.Node) -> fx.Node:
    """What `node` is computed from, if it is one thing (`self.factors[3]`, `self.factor.exp()`)."""
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node


def doubled_stream(view: BlockView) -> Obstacle | None:
    """`h + h + f(h)`."""
    for node in sums(view):
        added = [operand for operand, _ in operands(node)]
        if len(added) == 2 and all(operand in view.stream for operand in added):
            return Obstacle(
                "scaled-shortcut",
                "the stream is added to itself, which doubles the skip",
                node.meta["source"],
            )
    return None


def projected_shortcut(view: BlockView) -> Obstacle | None:
    """`W h + f(h)`: a convolution, linear map or pooling on the skip."""
    for node in sums(view):
        for through in shortcut(node, view):
            if is_projection(through, view.block):
                text = f"the skip runs through {title(through, view.block)} before the branch is added"
                if streams := mixed_streams(through, view):
                    text = (
                        f"learned weights mix {streams} parts of the stream (`{title(through, view.block)}`) before "
                        "the branch is added, as hyper-connections do with their streams: undoing a layer would invert "
                        "that matrix, which may have no inverse; checkpoint the blocks"
                    )
                return Obstacle("projected-shortcut", text, through.meta["source"])
    return None


def normed_shortcut(view: BlockView) -> Obstacle | None:
    """`norm(h) + f(norm(h))`: the skip starts behind the norm (BLOOM's post-layernorm residual)."""
    for node in sums(view):
        way = shortcut(node, view)
        for through in way if not any(is_projection(n, view.block) for n in way) else ():
            if is_norm(through, view.block):
                return Obstacle(
                    "normed-shortcut",
                    f"the skip is taken behind {title(through, view.block)}, not from the stream itself",
                    node.meta["source"],
                )
    return None


def broadcast(view: BlockView) -> Obstacle | None:
    """The branch and the stream have different shapes and one is broadcast onto the other."""
    for node in sums(view):
        parts = add_operands(node)
        added = [parts[0], *parts[1]] if parts else []
        for skip in added:
            for other in added:
                if skip is other or skip not in view.stream or not isinstance(other, fx.Node):
                    continue
                mine, theirs = skip.meta["val"].shape, other.meta["val"].shape
                if mine != theirs:
                    return Obstacle(
                        "broadcast",
                        f"a branch of shape {tuple(theirs)} is broadcast against a stream of shape {tuple(mine)}",
                        node.meta["source"],
                    )
    return None


def stream_dropout(view: BlockView) -> Obstacle | None:
    """`dropout(h + f(h))`: what is dropped from the stream cannot be reconstructed."""
    added = sums(view)
    for node in [*(tail(view.output) if added else ()), *(strip(o) for s in added for o, _ in operands(s))]:
        if is_dropout(node, view.block) and any(carries(n, view) for n in node.all_input_nodes):
            return Obstacle(
                "stream-dropout",
                "dropout acts on the residual stream itself, and what it drops cannot be reconstructed; "
                "set its rate to 0 or move it into the branch",
                node.meta["source"],
            )
    return None


def overwritten(view: BlockView) -> Obstacle | None:
    """`h.relu_()` before `h + f(h)`: what is added is no longer what came in."""
    for node in sums(view):
        for operand, _ in operands(node):
            inner = strip(operand)
            if add_operands(inner) is None and any(n in view.stream for n in inner.meta["mutates"]):
                return in_place(inner, view.block)
    return None


def in_place(node: fx.Node, block: CapturedBlock) -> Obstacle:
    text = f"`{title(node, block)}` overwrites the residual stream in place"
    return Obstacle("in-place", text, node.meta["source"])


def detached(view: BlockView) -> Obstacle | None:
    """The skip is cut off from autograd."""
    for node in sums(view):
        for operand, _ in operands(node):
            if operand.target in ("detach", torch.detach) or (operand.target is getattr and operand.args[1] == "data"):
                return Obstacle(
                    "detached",
                    "the skip is detached, so no gradient flows through the stream",
                    operand.meta["source"],
                )
    return None


_checks: tuple[Callable[[BlockView], Obstacle | None], ...] = (
    post_norm,
    post_activation,
    normed_shortcut,
    overwritten,
    projected_shortcut,
    detached,
    stream_dropout,
    scaled_shortcut,
    doubled_stream,
    broadcast,
    shape_change,
)


def _not_residual(view: BlockView) -> Obstacle:
    last = strip(view.output)
    return Obstacle(
        "not-residual",
        f"the output comes from {title(last, view.block)} and does not contain the input as a summand",
        last.meta["source"],
    )


def between_sums(view: BlockView, total: fx.Node) -> Obstacle | None:
    """What a hand-written loop does to the residual sum `total` before it adds again; None when nothing."""
    for user in total.users:
        if is_norm(user, view.block) and len(total.users) == 1:
            code, what = "post-norm", "passes through"
        elif is_activation(user, view.block) and len(total.users) == 1:
            code, what = "post-activation", "passes through"
        elif is_scaling(user) and len(total.users) == 1:
            code, what = "scaled-shortcut", "is scaled by"
        else:
            continue
        return Obstacle(
            code,
            f"the residual sum {what} {title(user, view.block)} before the next one",
            user.meta["source"],
        )
    return None
