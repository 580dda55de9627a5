"""What stands between a block and reversibility, one function per reason.

Each function looks at one captured block and returns an `Obstacle` when its reason holds. `code` is the stable name of
the reason (docs/obstacles.md has a section for each); `text` is for the user; `source` names the line.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from autorev.capture.tracer import CapturedBlock
from autorev.detect.stream import Add, Stream, add_operands, is_subtraction, reaches, scale_of

_norm_functions = {F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm, F.instance_norm, F.normalize}
_norm_functions |= {torch.layer_norm, torch.rms_norm, torch.batch_norm, torch.group_norm}
_activations = {"relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "leaky_relu", "elu", "mish"}
_activations |= {"hardswish", "softplus", "relu6", "selu", "celu", "prelu", "quick_gelu"}
_scalings = {operator.mul, operator.imul, operator.truediv, operator.neg, operator.itruediv}
_scaling_names = {"mul", "mul_", "multiply", "div", "div_", "divide", "neg", "lerp", "lerp_", "__rmul__"}
_weighted = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Sequential)


@dataclass(frozen=True)
class Obstacle:
    """Why a block is refused, or what to know about it."""

    code: str
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text} ({self.source})"


@dataclass(frozen=True, eq=False)
class Question:
    """What an obstacle function is asked about."""

    block: CapturedBlock
    stream: Stream
    """The stream as far as it goes from the argument that carries it."""
    output: fx.Node
    """The block's first output tensor."""


def obstacles_to_stream(question: Question) -> list[Obstacle]:
    """Why the block's output is not the stream; most telling reason first, never empty."""
    found = [obstacle for check in _checks if (obstacle := check(question)) is not None]
    if found and found[0].code == "post-norm":
        # Inside a post-norm block every later skip starts behind a norm, which is the same fact told twice.
        found = [obstacle for obstacle in found if obstacle.code != "normed-shortcut"]
    return found or [_not_residual(question)]


GENERIC = {"not-residual"}
"""Codes that say little about a residual block: a container of blocks has them too."""


# -- each reason -------------------------------------------------------------------------------------------------------


def post_norm(question: Question) -> Obstacle | None:
    """`norm(h + f(h))`: BERT, the original Transformer, OPT-350m."""
    for node in _tail(question.output):
        if _is_norm(node, question.block) and _adds_below(node, question):
            name = _title(node, question.block)
            return Obstacle(
                "post-norm",
                f"the residual sum passes through {name} before it leaves the block, so the skip is not free",
                node.meta["source"],
            )
    return None


def post_activation(question: Question) -> Obstacle | None:
    """`relu(h + f(h))`: ResNet v1."""
    for node in _tail(question.output):
        if _is_activation(node, question.block) and _adds_below(node, question):
            return Obstacle(
                "post-activation",
                f"the residual sum passes through {_title(node, question.block)} before it leaves the block, "
                "which cannot be undone",
                node.meta["source"],
            )
    return None


def shape_change(question: Question) -> Obstacle | None:
    """The block returns another shape than it received."""
    before, after = question.stream.start.meta["val"], question.output.meta["val"]
    if before.shape == after.shape or not _sums(question):
        return None
    return Obstacle(
        "shape-change",
        f"the block turns {tuple(before.shape)} into {tuple(after.shape)}, so its input is no summand of its output",
        question.output.meta["source"],
    )


def scaled_shortcut(question: Question) -> Obstacle | None:
    """`a * h + f(h)`, `f(h) - h`, `lerp`, a gate on the skip."""
    for node in _sums(question):
        for operand, factor in _operands(node):
            if operand in question.stream and factor != 1:
                return Obstacle(
                    "scaled-shortcut",
                    f"the skip enters its sum with the factor {factor}, not as it is",
                    node.meta["source"],
                )
            scaled = _scaling_of_carrier(operand, question)
            if scaled is not None:
                return Obstacle(
                    "scaled-shortcut",
                    f"the skip is multiplied (`{_title(scaled, question.block)}`) before the branch is added, "
                    "so undoing a layer would divide by that factor",
                    scaled.meta["source"],
                )
    last = _strip(question.output)
    if _is_lerp(last) and any(_carries(n, question) for n in last.all_input_nodes):
        return Obstacle(
            "scaled-shortcut",
            f"`{_title(last, question.block)}` weighs the skip against the branch, so the skip is scaled",
            last.meta["source"],
        )
    if _is_scaling(last) and _adds_below(last, question):
        return Obstacle(
            "scaled-shortcut",
            f"the residual sum itself is multiplied (`{_title(last, question.block)}`) before it leaves the block",
            last.meta["source"],
        )
    return None


def doubled_stream(question: Question) -> Obstacle | None:
    """`h + h + f(h)`."""
    for node in _sums(question):
        operands = [operand for operand, _ in _operands(node)]
        if len(operands) == 2 and all(operand in question.stream for operand in operands):
            return Obstacle(
                "scaled-shortcut",
                "the stream is added to itself, which doubles the skip",
                node.meta["source"],
            )
    return None


def projected_shortcut(question: Question) -> Obstacle | None:
    """`W h + f(h)`: a convolution, linear map or pooling on the skip."""
    for node in _sums(question):
        ways = [way for o in _tensor_operands(node) if (way := _path_to_stream(o, question)) is not None]
        shortcut = min(ways, key=len, default=[])  # of two ways from the input, the shorter one is the skip
        for through in shortcut:
            if _is_projection(through, question.block):
                return Obstacle(
                    "projected-shortcut",
                    f"the skip runs through {_title(through, question.block)} before the branch is added",
                    through.meta["source"],
                )
    return None


def normed_shortcut(question: Question) -> Obstacle | None:
    """`norm(h) + f(norm(h))`: the skip starts behind the norm (BLOOM's post-layernorm residual)."""
    for node in _sums(question):
        for operand, _ in _operands(node):
            inner = _strip(operand)
            if _is_norm(inner, question.block) and any(_carries(n, question) for n in inner.all_input_nodes):
                return Obstacle(
                    "normed-shortcut",
                    f"the skip is taken behind {_title(inner, question.block)}, not from the stream itself",
                    node.meta["source"],
                )
    return None


def broadcast(question: Question) -> Obstacle | None:
    """The branch and the stream have different shapes and one is broadcast onto the other."""
    for node in _sums(question):
        parts = add_operands(node)
        operands = [parts[0], *parts[1]] if parts else []
        for skip in operands:
            for other in operands:
                if skip is other or skip not in question.stream or not isinstance(other, fx.Node):
                    continue
                mine, theirs = skip.meta["val"].shape, other.meta["val"].shape
                if mine != theirs:
                    return Obstacle(
                        "broadcast",
                        f"a branch of shape {tuple(theirs)} is broadcast against a stream of shape {tuple(mine)}",
                        node.meta["source"],
                    )
    return None


def stream_dropout(question: Question) -> Obstacle | None:
    """`dropout(h + f(h))`: what is dropped from the stream cannot be reconstructed."""
    for node in [*_tail(question.output), *(_strip(o) for s in _sums(question) for o, _ in _operands(s))]:
        if _is_dropout(node, question.block) and any(_carries(n, question) for n in node.all_input_nodes):
            return Obstacle(
                "stream-dropout",
                "dropout acts on the residual stream itself, and what it drops cannot be reconstructed; "
                "set its rate to 0 or move it into the branch",
                node.meta["source"],
            )
    return None


def detached(question: Question) -> Obstacle | None:
    """The skip is cut off from autograd."""
    for node in _sums(question):
        for operand, _ in _operands(node):
            if operand.target in ("detach", torch.detach) or (
                operand.target is getattr and operand.args[1] == "data"
            ):
                return Obstacle(
                    "detached",
                    "the skip is detached, so no gradient flows through the stream",
                    operand.meta["source"],
                )
    return None


_checks: tuple[Callable[[Question], Obstacle | None], ...] = (
    post_norm,
    post_activation,
    normed_shortcut,
    projected_shortcut,
    detached,
    stream_dropout,
    scaled_shortcut,
    doubled_stream,
    broadcast,
    shape_change,
)


def _not_residual(question: Question) -> Obstacle:
    last = _strip(question.output)
    return Obstacle(
        "not-residual",
        f"the output comes from {_title(last, question.block)} and does not contain the input as a summand",
        last.meta["source"],
    )


def between_sums(question: Question, total: fx.Node) -> Obstacle | None:
    """What a hand-written loop does to the residual sum `total` before it adds again; None when nothing."""
    for user in total.users:
        if _is_norm(user, question.block) and len(total.users) == 1:
            code, what = "post-norm", "passes through"
        elif _is_activation(user, question.block) and len(total.users) == 1:
            code, what = "post-activation", "passes through"
        elif _is_scaling(user) and len(total.users) == 1:
            code, what = "scaled-shortcut", "is scaled by"
        else:
            continue
        return Obstacle(
            code,
            f"the residual sum {what} {_title(user, question.block)} before the next one",
            user.meta["source"],
        )
    return None


# -- looking around in the graph -----------------------------------------------------------------------------------------


def _strip(node: fx.Node) -> fx.Node:
    """Walk back over reshapes, casts and `getitem` to the node that computed the value."""
    while True:
        value, inputs = node.meta.get("val"), node.all_input_nodes
        same = (
            node.op in ("call_method", "call_function")
            and len(inputs) >= 1
            and isinstance(value, torch.Tensor)
            and isinstance(first := inputs[0].meta.get("val"), torch.Tensor)
            and first.numel() == value.numel()
            and (node.target in _reshapes or value is first)
            and not node.meta["mutates"]
        )
        if not (same or node.target is operator.getitem):
            return node
        node = inputs[0]


_reshapes = {"view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze"}
_reshapes |= {"contiguous", "to", "float", "half", "bfloat16", "type_as", "clone", "movedim", "swapaxes"}
_reshapes |= {"view_as", "reshape_as", "t", torch.permute, torch.transpose, torch.flatten, torch.clone}


def _tail(output: fx.Node) -> list[fx.Node]:
    """The nodes after the last add: the output and what it is computed from, one operand deep."""
    nodes: list[fx.Node] = []
    node = _strip(output)
    while add_operands(node) is None and len(nodes) < 12:
        nodes.append(node)
        inputs = [
            n
            for n in node.all_input_nodes
            if n.op != "get_attr" and isinstance(n.meta.get("val"), torch.Tensor | tuple)
        ]
        if not inputs:
            break
        # A hand-written norm multiplies its input by a statistic of it: follow the operand with the most elements.
        node = _strip(max(inputs, key=_size))
    return nodes


def _size(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _sums(question: Question) -> list[fx.Node]:
    """The last additions before the output, nearest first: the output's own, and those it adds up."""
    pending, found = [question.output, *reversed(_tail(question.output))], []
    seen: set[fx.Node] = set()
    tail = _tail(question.output)
    if tail:
        pending += [_strip(n) for n in tail[-1].all_input_nodes]
    while pending:
        node = _strip(pending.pop(0))
        if node in seen:
            continue
        seen.add(node)
        parts = add_operands(node)
        if parts is not None:
            found.append(node)
            pending += [operand for operand in (parts[0], *parts[1]) if isinstance(operand, fx.Node)]
    start = question.stream.start
    # A module that merely adds two of its arguments holds no branch, and is no block.
    return [n for n in found if sum(reaches(start, o) for o in _tensor_operands(n)) >= 2]


def _tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a sum, scalars left out."""
    tensors = [o for o, _ in _operands(node) if isinstance(o.meta.get("val"), torch.Tensor)]
    return [o for o in tensors if o.meta["val"].dim() > 0]


def _operands(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """(operand, factor) of a sum, for its tensor operands."""
    parts = add_operands(node)
    if parts is None:
        return []
    factor = -1 if is_subtraction(node) else scale_of(node)
    pairs = [(parts[0], 1), *((item, factor) for item in parts[1])]
    return [(operand, scale) for operand, scale in pairs if isinstance(operand, fx.Node)]


def _adds_below(node: fx.Node, question: Question) -> bool:
    """Is there a residual sum right below `node`? One operand must carry the input without having been a branch."""
    for operand in node.all_input_nodes:
        tail = _tail(operand)
        candidates = [_strip(operand), *(_strip(n) for t in tail for n in t.all_input_nodes)]
        for candidate in candidates:
            if add_operands(candidate) is not None and reaches(question.stream.start, candidate):
                if sum(reaches(question.stream.start, o) for o in _tensor_operands(candidate)) >= 2:
                    return True
    return False


def _carries(node: fx.Node, question: Question) -> bool:
    """Is `node` the stream, or a residual sum that is not one only because its own skip was spoilt?"""
    inner = _strip(node)
    if node in question.stream or inner in question.stream:
        return True
    return sum(reaches(question.stream.start, o) for o in _tensor_operands(inner)) >= 2


def _scaling_of_carrier(operand: fx.Node, question: Question) -> fx.Node | None:
    node = _strip(operand)
    if not _is_scaling(node):
        return None
    first = node.args[0] if node.args else None
    carriers = [n for n in node.all_input_nodes if _carries(n, question)]
    return node if carriers and (first in carriers or node.target not in (operator.truediv, "div")) else None


def _is_lerp(node: fx.Node) -> bool:
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in ("lerp", "lerp_")


def _is_scaling(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    return node.target in _scalings or (node.op != "call_module" and name in _scaling_names)


def _path_to_stream(operand: fx.Node, question: Question) -> list[fx.Node] | None:
    """The nodes between `operand` and the stream when the way is short and unbranched, as a shortcut's is."""
    path: list[fx.Node] = []
    node = _strip(operand)
    while not _carries(node, question):
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(path) == 4 or len(inputs) != 1:
            return None
        path.append(node)
        node = _strip(inputs[0])
    return path


def _is_projection(node: fx.Node, block: CapturedBlock) -> bool:
    if node.op == "call_module":
        module = block.module.get_submodule(str(node.target))
        if isinstance(module, nn.Sequential):
            return all(isinstance(m, (*_weighted, nn.Identity)) or "pool" in _class(m) for m in module)
        name = _class(module)
        words = ("shortcut", "downsample", "project", "pool", "patchmerging")
        return isinstance(module, _weighted) or any(word in name for word in words)
    name = getattr(node.target, "__name__", str(node.target))
    return any(word in name for word in ("conv", "linear", "matmul", "pool", "interpolate", "pad", "bmm"))


def _is_norm(node: fx.Node, block: CapturedBlock) -> bool:
    if any("norm" in name.lower() for name in node.meta.get("inside", ())):
        return True
    if node.op == "call_module":
        name = _class(block.module.get_submodule(str(node.target)))
        return "norm" in name or name in ("affine", "scalenorm")
    return node.target in _norm_functions


def _is_activation(node: fx.Node, block: CapturedBlock) -> bool:
    if node.op == "call_module":
        module = block.module.get_submodule(str(node.target))
        return type(module).__module__ == "torch.nn.modules.activation" or "activation" in _class(module)
    return getattr(node.target, "__name__", node.target) in _activations


def _is_dropout(node: fx.Node, block: CapturedBlock) -> bool:
    if node.op == "call_module":
        name = _class(block.module.get_submodule(str(node.target)))
        return any(word in name for word in ("dropout", "droppath", "stochasticdepth"))
    return "dropout" in getattr(node.target, "__name__", str(node.target))


def _class(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _title(node: fx.Node, block: CapturedBlock) -> str:
    """A node in the user's words: the sub-module's path and class, or the function's name."""
    if node.op == "call_module":
        return f"{node.target} ({type(block.module.get_submodule(str(node.target))).__name__})"
    if node.meta.get("inside"):
        return str(node.meta["inside"][-1])
    return str(getattr(node.target, "__name__", node.target))


def sum_operands_before(output: fx.Node) -> list[fx.Node]:
    """The node that computes the output and, while these are sums, the nodes they add up."""
    pending, found = [output], []
    while pending:
        node = _strip(pending.pop())
        found.append(node)
        parts = add_operands(node)
        if parts is not None and len(found) < 20:
            pending += [o for o in (parts[0], *parts[1]) if isinstance(o, fx.Node)]
    return found


def is_single_input_layer(node: fx.Node, module: nn.Module) -> bool:
    """A custom norm, dropout or activation that takes one tensor: it cannot hold a residual add of two."""
    name = _class(module)
    words = ("norm", "dropout", "droppath", "stochasticdepth", "activation")
    return len(node.all_input_nodes) == 1 and any(word in name for word in words)


# -- obstacles of a block whose output is the stream -------------------------------------------------------------------


def obstacles_on_stream(block: CapturedBlock, stream: Stream, path: set[fx.Node]) -> list[Obstacle]:
    """What forbids reversing a block although its output is the stream; empty when nothing does.

    `path` holds the stream nodes between start and output.
    """
    found = []
    for decision in block.decided:
        what, _, source = decision.rpartition(" (")
        found.append(
            Obstacle(
                "data-dependent",
                f"the block's course depends on the values of its tensors (`{what}`), so running it again could "
                "take another path",
                source.rstrip(")"),
            )
        )
    found += [
        Obstacle(
            "unseen-code",
            "a tensor appeared that no torch function of the block made (compiled or foreign code)",
            s,
        )
        for s in block.lost
    ]
    storages = {n.meta["val"].untyped_storage()._cdata for n in stream.nodes}
    for node in block.graph.nodes:
        for target in node.meta.get("mutates", ()):
            value = target.meta.get("val")
            if (
                isinstance(value, torch.Tensor)
                and value.untyped_storage()._cdata in storages
                and not (node in path and isinstance(stream.nodes[node], Add))
            ):
                found.append(
                    Obstacle(
                        "in-place",
                        f"`{_title(node, block)}` overwrites the residual stream in place",
                        node.meta["source"],
                    )
                )
    return found
