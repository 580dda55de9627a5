"""A user's own `fx.GraphModule` in the form that the detection reads; nothing of the user's is written to.

The detection wants a `CapturedBlock`: each node with its value in one call, the line it came from and what it
changed in place, and PyTorch's operators under the names they have in Python. Here the graph is copied node
by node; the copy runs once on fake tensors (no weight is computed with), which also tells which results share
memory; then aten operators are renamed (`aten.add.Tensor` becomes `add`), and a leaf module that is a
residual block is opened in place.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from autorev.capture.fake import DATA_DEPENDENT, fake_copy, new_fake_mode
from autorev.capture.record import ModuleCall, named_arguments
from autorev.capture.source import is_model_code, short_path
from autorev.capture.tracer import CapturedBlock
from autorev.detect.chains import TORCH_BLOCKS
from autorev.detect.finding import Finding
from autorev.detect.judge import judge
from autorev.detect.obstacles import Obstacle
from autorev.errors import CaptureError, first_line

REMEDY = "pass example inputs, batch=(...), or run torch.fx.passes.shape_prop.ShapeProp on the graph first"


@dataclass(eq=False)
class UserGraph:
    """The copy, and the way back from it."""

    block: CapturedBlock
    origin: dict[fx.Node, fx.Node]
    """Node of the copy -> the user's node it stands for; all nodes of an opened leaf stand for that leaf."""
    refused_leaves: dict[fx.Node, Obstacle]
    """The user's `call_module` nodes that hold a residual block which cannot be reversed."""


def read_user_graph(gm: fx.GraphModule, batch: Sequence[Any] | None = None) -> UserGraph:
    """Copy `gm`'s graph, give every node a value, and put it into the detection's words.

    Raises:
        CaptureError: an input has no value, or the graph cannot be run on fake tensors.
    """
    mode = new_fake_mode()
    root = fake_copy(_shell(gm), mode)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    copies[next(iter(reversed(gm.graph.nodes)))] = graph.output(result)
    origin = {copy: node for node, copy in copies.items()}
    leaf_classes = _leaf_classes(graph)
    for node in graph.nodes:
        source = _source(node)
        node.meta = {
            "source": source,
            "place": (source, 0),
            "inside": () if node.op == "call_module" else leaf_classes.get(_module_path(node), ()),
            "mutates": (),
            "module": _module_path(node),
        }
    run = _ValueRun(root, graph, origin)
    inputs = fake_copy(_inputs(gm, batch), mode)
    with mode, torch.enable_grad():
        run.run(*inputs, enable_io_processing=False)
    placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    for node, finding in run.opened.items():
        _splice(node, finding, origin)
    for node in graph.nodes:
        _rename_operator(node)
    refused = {origin[node]: obstacle for node, obstacle in run.refused.items()}
    block = CapturedBlock(
        path="",
        module=root,
        graph=graph,
        placeholders=placeholders,
        constants={},
        decided=(),
        lost=(),
        opened=frozenset(),
    )
    return UserGraph(block, origin, refused)


def missing_values(gm: fx.GraphModule) -> list[str]:
    """Inputs that the graph reads and that carry neither a value nor a shape."""
    return [
        str(node.target)
        for node in gm.graph.nodes
        if node.op == "placeholder"
        and node.users
        and not node.args
        and "val" not in node.meta
        and "tensor_meta" not in node.meta
    ]


def _shell(gm: fx.GraphModule) -> nn.Module:
    """`gm`'s parameters and sub-modules without its graph, whose own copy would compile code for nothing."""
    shell = nn.Module()
    for name in ("training", "_parameters", "_buffers", "_modules"):
        shell.__dict__[name] = gm.__dict__[name]
    for node in gm.graph.nodes:
        first = str(node.target).partition(".")[0]
        if node.op == "get_attr" and first in gm.__dict__:
            shell.__dict__[first] = gm.__dict__[first]
    return shell


# -- inputs


def _inputs(gm: fx.GraphModule, batch: Sequence[Any] | None) -> list[Any]:
    """One value for each placeholder, in order."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if batch is None:
        return [_described_value(node) for node in placeholders]
    given = list(gm.graph.process_inputs(*batch))
    optional = [node.args[0] for node in placeholders[len(given) :] if node.args]
    if len(given) + len(optional) != len(placeholders):
        names = ", ".join(str(n.target) for n in placeholders)
        raise CaptureError(
            f"the graph takes {len(placeholders)} inputs ({names}), and AnnotateResiduals was given "
            f"{len(given)}: pass one for each, in this order"
        )
    return given + optional


def _described_value(node: fx.Node) -> Any:
    """A tensor of the shape in `node.meta`; sizes left open by export are those it traced with."""
    value: Any = node.meta.get("val", node.meta.get("tensor_meta"))
    if value is None and node.args:
        return node.args[0]
    try:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            stride = value.stride() if callable(value.stride) else value.stride
            shape = [_hint(size) for size in value.shape]
            # On the meta device it costs no memory; the fake copy makes a CPU tensor of it.
            return torch.empty_strided(shape, [_hint(s) for s in stride], dtype=value.dtype, device="meta")
        return _hint(value)
    except ValueError:
        raise CaptureError(f"the size of input {node.target} is not known; {REMEDY}") from None


def _hint(size: Any) -> Any:
    symbolic = getattr(size, "node", None)
    if symbolic is None:
        return size
    if not symbolic.has_hint():
        raise ValueError("unbacked")
    return symbolic.hint


# -- values


class _ValueRun(fx.Interpreter):
    """Runs the copy on fake tensors and notes each node's value, and what it changed in place."""

    def __init__(self, root: nn.Module, graph: fx.Graph, origin: dict[fx.Node, fx.Node]) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self.origin = origin
        self.opened: dict[fx.Node, Finding] = {}
        self.refused: dict[fx.Node, Obstacle] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Run one node; an error names it."""
        versions = {n: _version(n.meta["val"]) for n in node.all_input_nodes}
        self.current = node
        try:
            value = super().run_node(node)
        except DATA_DEPENDENT:
            raise CaptureError(
                f"{_title(node)} looks at the values of its tensors, and fake tensors have none; annotate "
                "the part of the graph that does not"
            ) from None
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{_title(node)} failed on fake tensors with {first_line(error)}; "
                "check that the example inputs are those the graph takes"
            ) from error
        node.meta["val"] = value
        node.meta["mutates"] = tuple(n for n, before in versions.items() if _version(n.meta["val"]) != before)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a leaf module; one of the user's own classes may be a whole block, and is judged as such."""
        module = self.fetch_attr(target)
        own = not type(module).__module__.startswith("torch.") or isinstance(module, TORCH_BLOCKS)
        if own and not isinstance(module, fx.GraphModule):
            finding = judge(ModuleCall(str(target), module, 0, None, args, dict(kwargs)))
            if finding.residual and finding.obstacles:
                self.refused[self.current] = finding.obstacles[0]
            elif finding.steps and _can_be_spliced(self.current, finding):
                assert finding.captured is not None
                self.opened[self.current] = finding
                return fx.node.map_arg(finding.captured.output, lambda n: n.meta["val"])
        return super().call_module(target, args, kwargs)


def _title(node: fx.Node) -> str:
    source = node.meta["source"]
    return source if source.startswith(("node ", "input ")) else f"node {node.name} ({source})"


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


# -- leaves that hold a block


def _outer_arguments(node: fx.Node, finding: Finding) -> dict[str, Any]:
    return dict(named_arguments(finding.call.module, node.args, dict(node.kwargs)))


def _can_be_spliced(node: fx.Node, finding: Finding) -> bool:
    """Are all tensors handed over bare, and is the result a tensor or a tuple that is taken apart at once?"""
    captured = finding.captured
    assert captured is not None
    outer = _outer_arguments(node, finding)
    if not all(isinstance(outer.get(name), fx.Node) for name in captured.placeholders):
        return False
    if isinstance(captured.output, fx.Node):
        return True
    taken_apart = all(user.target is operator.getitem for user in node.users)
    flat = isinstance(captured.output, tuple | list) and all(
        item is None or isinstance(item, fx.Node) for item in captured.output
    )
    return flat and taken_apart


def _splice(node: fx.Node, finding: Finding, origin: dict[fx.Node, fx.Node]) -> None:
    """Put the block's own graph before the leaf's node, and make that node an alias of the result."""
    captured = finding.captured
    assert captured is not None
    outer = _outer_arguments(node, finding)
    inner: dict[fx.Node, fx.Node] = {p: outer[name] for name, p in captured.placeholders.items()}
    with node.graph.inserting_before(node):
        for old in captured.graph.nodes:
            if old in inner or old.op == "output":
                continue
            new = node.graph.node_copy(old, lambda n: inner[n])
            if old.op in ("call_module", "get_attr"):
                new.target = f"{finding.call.path}.{old.target}"
            new.meta["mutates"] = tuple(inner[n] for n in old.meta["mutates"])
            new.meta["module"] = finding.call.path
            inner[old], origin[new] = new, origin[node]
    if isinstance(captured.output, fx.Node):
        _make_alias(node, inner[captured.output])
        return
    for user in list(node.users):
        item = captured.output[user.args[1]]
        if isinstance(item, fx.Node):
            _make_alias(user, inner[item])


def _make_alias(node: fx.Node, of: fx.Node) -> None:
    node.op, node.target, node.args, node.kwargs = "call_method", "contiguous", (of,), {}
    node.meta["mutates"] = ()


# -- words

# aten names that neither `torch.Tensor` nor `torch.nn.functional` has, and the function that means the same.
_meaning: dict[str, Any] = {
    "_to_copy": "to",
    "_unsafe_view": "view",
    "_fused_rms_norm": F.rms_norm,
    "rms_norm": F.rms_norm,
    "layer_norm": F.layer_norm,
    "native_layer_norm": F.layer_norm,
    "group_norm": F.group_norm,
    "native_group_norm": F.group_norm,
    "batch_norm": F.batch_norm,
    "_native_batch_norm_legit": F.batch_norm,
    "_native_batch_norm_legit_functional": F.batch_norm,
    "_native_batch_norm_legit_no_training": F.batch_norm,
    "_batch_norm_with_update": F.batch_norm,
    "native_batch_norm": F.batch_norm,
    "cudnn_batch_norm": F.batch_norm,
    "instance_norm": F.instance_norm,
}


def _rename_operator(node: fx.Node) -> None:
    """`aten.add.Tensor(a, b)` becomes `a.add(b)`, `aten.gelu.default(a)` becomes `F.gelu(a)`."""
    if not isinstance(node.target, OpOverload | OpOverloadPacket):
        return
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    name = packet.__name__
    target = _meaning.get(name) or (name if hasattr(torch.Tensor, name) else getattr(F, name, None))
    if target is not None and node.args:
        node.op, node.target = ("call_method" if isinstance(target, str) else "call_function"), target


_frame = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in ', re.MULTILINE)


def _source(node: fx.Node) -> str:
    """`file.py:line` of the newest frame of the user's code; where the tracer kept none, the module."""
    for match in reversed(list(_frame.finditer(node.meta.get("stack_trace") or ""))):
        file = match["file"]
        if is_model_code(file):
            return f"{short_path(file)}:{match['line']}"
    path, name = _innermost(node)
    return f"{path} ({name})" if path else f"{'input' if node.op == 'placeholder' else 'node'} {node.name}"


def _innermost(node: fx.Node) -> tuple[str, str]:
    """(path, class name) of the module in whose code the node was traced."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    path, kind = stack[-1]
    # torch.export marks the second call of one module as `path@1`, and writes classes as text.
    name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
    return path.partition("@")[0], name


def _module_path(node: fx.Node) -> str:
    return str(node.meta["module"]) if "module" in node.meta else _innermost(node)[0]


def _leaf_classes(graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """Path -> class of the innermost modules: a norm's arithmetic is a norm, a `PreNormLayer`'s is none."""
    classes = dict(_innermost(n) for n in graph.nodes)
    return {
        path: (name,)
        for path, name in classes.items()
        if path and not any(other.startswith(f"{path}.") for other in classes)
    }
