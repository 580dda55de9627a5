"""Looking around in a captured block's graph: what a node is, and how it stands to the residual sums."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from autorev.capture.tracer import CapturedBlock
from autorev.detect.stream import Stream
from autorev.detect.sums import add_operands, is_subtraction, scale_of
from autorev.detect.ways import reaches

_norm_functions = {F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm, F.instance_norm, F.normalize}
_norm_functions |= {torch.layer_norm, torch.rms_norm, torch.batch_norm, torch.group_norm}
NORM_NAMES = {function.__name__ for function in _norm_functions}
_activations = {"relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "leaky_relu", "elu", "mish"}
_activations |= {"hardswish", "softplus", "relu6", "selu", "celu", "prelu", "quick_gelu", "hardtanh", "hardtanh_"}
# Not called activations, but as little to be undone.
_activations |= {"clamp", "clamp_", "clip", "clip_", "nan_to_num", "nan_to_num_", "where", "masked_fill"}
_activations |= {"masked_fill_"}
_scalings = {operator.mul, operator.imul, operator.truediv, operator.neg, operator.itruediv}
_scaling_names = {"mul", "mul_", "multiply", "div", "div_", "divide", "neg", "lerp", "lerp_", "__rmul__"}
_projections = ("conv", "linear", "matmul", "pool", "interpolate", "pad", "bmm", "einsum", "tensordot")
_weighted = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Sequential)


@dataclass(frozen=True, eq=False)
class BlockView:
    """What an obstacle function is asked about."""

    block: CapturedBlock
    stream: Stream
    """The stream as far as it goes from the argument that carries it."""
    output: fx.Node
    """The block's first output tensor."""


def strip(node: fx.Node) -> fx.Node:
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


_reshapes: set[Any] = {
    "__getitem__",
    "view",
    "reshape",
    "permute",
    "transpose",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
}
_reshapes |= {"contiguous", "to", "float", "half", "bfloat16", "type_as", "clone", "movedim", "swapaxes"}
_reshapes |= {"view_as", "reshape_as", "t", torch.permute, torch.transpose, torch.flatten, torch.clone}


def tail(output: fx.Node) -> list[fx.Node]:
    """The nodes after the last add: the output and what it is computed from, one operand deep."""
    nodes: list[fx.Node] = []
    node = strip(output)
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
        node = strip(max(inputs, key=size))
    return nodes


def size(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, torch.Tensor) else 0


def sums(view: BlockView) -> list[fx.Node]:
    """The last additions before the output, nearest first: the output's own, and those it adds up."""
    behind = tail(view.output)
    pending, found = [view.output, *reversed(behind)], []
    seen: set[fx.Node] = set()
    if behind:
        pending += [strip(n) for n in behind[-1].all_input_nodes]
    while pending:
        node = strip(pending.pop(0))
        if node in seen:
            continue
        seen.add(node)
        parts = add_operands(node)
        if parts is not None:
            found.append(node)
            pending += [operand for operand in (parts[0], *parts[1]) if isinstance(operand, fx.Node)]
    # A module that merely adds two of its arguments holds no branch, and is no block.
    return [n for n in found if adds_two_of_the_stream(n, view)]


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a sum, scalars left out."""
    tensors = [o for o, _ in operands(node) if isinstance(o.meta.get("val"), torch.Tensor)]
    return [o for o in tensors if o.meta["val"].dim() > 0]


def operands(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """(operand, factor) of a sum, for its tensor operands."""
    parts = add_operands(node)
    if parts is None:
        return []
    factor = -1 if is_subtraction(node) else scale_of(node)
    pairs = [(parts[0], 1), *((item, factor) for item in parts[1])]
    return [(operand, scale) for operand, scale in pairs if isinstance(operand, fx.Node)]


def adds_below(node: fx.Node, view: BlockView) -> bool:
    """Is there a residual sum right below `node`? One operand must carry the input without having been a branch."""
    for operand in node.all_input_nodes:
        candidates = [strip(operand), *(strip(n) for t in tail(operand) for n in t.all_input_nodes)]
        if any(adds_two_of_the_stream(candidate, view) for candidate in candidates):
            return True
    return False


def adds_two_of_the_stream(node: fx.Node, view: BlockView) -> bool:
    """Is it a sum of two that depend on the stream, where one is the stream, or has weights that the other has not?

    `u + 0.04 u^3`, of a `u` that a layer made of the stream, is part of an activation.
    """
    found = [o for o in tensor_operands(node) if reaches(view.stream.start, o)]
    if len(found) < 2:
        return False
    if len(found) > 2 or any(operand in view.stream for operand in found):
        return True
    return _weights_behind(found[0], view) != _weights_behind(found[1], view)


def _weights_behind(operand: fx.Node, view: BlockView) -> set[fx.Node]:
    """The nodes with or of parameters that it is computed by, from the stream on."""
    found, seen, pending = set(), {view.stream.start}, [operand]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        called = node.op == "call_module" and view.block.module.get_submodule(str(node.target))
        if node.op == "get_attr" or (isinstance(called, nn.Module) and any(True for _ in called.parameters())):
            found.add(node)
        pending += node.all_input_nodes
    return found


def carries(node: fx.Node, view: BlockView) -> bool:
    """Is `node` the stream, or a residual sum that is not one only because its own skip was spoilt?"""
    inner = strip(node)
    if node in view.stream or inner in view.stream:
        return True
    return adds_two_of_the_stream(inner, view)


def scaling_of_carrier(operand: fx.Node, view: BlockView) -> fx.Node | None:
    node = strip(operand)
    if not is_scaling(node):
        return None
    first = node.args[0] if node.args else None
    carriers = [n for n in node.all_input_nodes if carries(n, view)]
    return node if carriers and (first in carriers or node.target not in (operator.truediv, "div")) else None


def is_lerp(node: fx.Node) -> bool:
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in ("lerp", "lerp_")


def is_scaling(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    return node.target in _scalings or (node.op != "call_module" and name in _scaling_names)


def shortcut(node: fx.Node, view: BlockView) -> list[fx.Node]:
    """What stands between the sum `node` and the stream on the skip's way: of two ways, the shorter one is the skip."""
    ways = [way for o in tensor_operands(node) if (way := _path_to_stream(o, view)) is not None]
    shortest = min(map(len, ways), default=0)
    return [through for way in ways if len(way) == shortest for through in way]


def _path_to_stream(operand: fx.Node, view: BlockView) -> list[fx.Node] | None:
    """The nodes between `operand` and the stream when the way is short and unbranched, as a shortcut's is."""
    path: list[fx.Node] = []
    node = strip(operand)
    while not carries(node, view):
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if is_projection(node, view.block):
            # `A @ h`, with a matrix that may be computed from h too (hyper-connections)
            inputs = [n for n in inputs if carries(n, view)][:1] or inputs
        if len(path) == 4 or len(inputs) != 1:
            return None
        path.append(node)
        node = strip(inputs[0])
    return path


def is_projection(node: fx.Node, block: CapturedBlock) -> bool:
    if node.op == "call_module":
        module = block.module.get_submodule(str(node.target))
        if isinstance(module, nn.Sequential):
            return all(isinstance(m, (*_weighted, nn.Identity)) or "pool" in _class(m) for m in module)
        name = _class(module)
        words = ("shortcut", "downsample", "project", "pool", "patchmerging")
        return isinstance(module, _weighted) or any(word in name for word in words)
    name = getattr(node.target, "__name__", str(node.target))
    return any(word in name for word in _projections)


def mixed_streams(node: fx.Node, view: BlockView) -> int:
    """How many parts of the stream a product mixes by learned weights, all features of each alike; 0 for any other."""
    features = view.stream.start.meta["val"].shape[-1]
    for matrix in node.all_input_nodes if node.op != "call_module" else ():
        value = matrix.meta.get("val")
        shape: tuple[int, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        if carries(matrix, view) or len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == features:
            continue
        made_by = [n for n in node.graph.nodes if n.op == "get_attr" and n.meta["val"].requires_grad]
        if any(n is matrix or reaches(n, matrix) for n in made_by):
            return shape[-1]
    return 0


def is_norm(node: fx.Node, block: CapturedBlock) -> bool:
    if any(_norm_name.search(name.lower()) for name in node.meta.get("inside", ())):
        return True
    if node.op == "call_module":
        return is_norm_module(block.module.get_submodule(str(node.target)))
    return node.target in _norm_functions


def is_written_out_norm(node: fx.Node) -> bool:
    """`x * rsqrt(mean(x ** 2) + eps)` and the like: scaled by a statistic that is smaller than what it scales."""
    if not is_scaling(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    statistics = [n for n in node.all_input_nodes if n.op != "get_attr" and 0 < size(n) < size(node)]
    for _ in range(6):
        names = {str(getattr(n.target, "__name__", n.target)) for n in statistics}
        if names & {"rsqrt", "sqrt", "std", "var", "norm", "vector_norm"}:
            return True
        statistics = [i for n in statistics for i in n.all_input_nodes if 0 < size(i) < size(node)]
    return False


def is_norm_module(module: nn.Module) -> bool:
    """Is it a norm by name, and not something larger that has "norm" in its name (`RobertaPreLayerNormAttention`)?"""
    name = _class(module)
    larger = any(isinstance(m, nn.Linear | nn.modules.conv._ConvNd) for m in module.modules())
    return ("norm" in name and not larger) or bool(_gated_norm.search(name)) or name == "affine"


# A norm that computes a gate, but no `PreNorm(attention)`.
_gated_norm = re.compile(r"(?<!pre)(?<!post)norm(\dd)?$")
# Class names of opened modules: a norm, not a wrapper or a model named after one.
_norm_name = re.compile(r"(?<!pre)norm(?!.*(attention|output|layer|block|residual|intermediate|coder))")


def is_activation(node: fx.Node, block: CapturedBlock) -> bool:
    if node.op == "call_module":
        module = block.module.get_submodule(str(node.target))
        return type(module).__module__ == "torch.nn.modules.activation" or "activation" in _class(module)
    return getattr(node.target, "__name__", node.target) in _activations


def is_dropout(node: fx.Node, block: CapturedBlock) -> bool:
    if node.op == "call_module":
        name = _class(block.module.get_submodule(str(node.target)))
        return any(word in name for word in ("dropout", "droppath", "stochasticdepth"))
    return "dropout" in getattr(node.target, "__name__", str(node.target))


def _class(module: nn.Module) -> str:
    return type(module).__name__.lower()


def title(node: fx.Node, block: CapturedBlock) -> str:
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
        node = strip(pending.pop())
        found.append(node)
        parts = add_operands(node)
        if parts is not None and len(found) < 20:
            pending += [o for o in (parts[0], *parts[1]) if isinstance(o, fx.Node)]
    return found


def is_single_input_layer(node: fx.Node, module: nn.Module) -> bool:
    """A custom norm, dropout or activation that takes one tensor: it cannot hold a residual add of two."""
    name = _class(module)
    words = ("dropout", "droppath", "stochasticdepth", "activation")
    plain = is_norm_module(module) or any(word in name for word in words)
    return len(node.all_input_nodes) == 1 and plain
