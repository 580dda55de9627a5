"""A value-carrying `torch.fx.Tracer`: one block's own forward as a small graph, its sub-modules as leaves.

An ordinary fx trace replaces tensors by proxies, and a model's Python code (`if x is None`, `isinstance`, `**kwargs`,
`len`, dataclasses) soon trips over them. Here the forward runs on the *values* of one recorded call, fake tensors as
a rule, while a `TorchFunctionMode` writes each torch function into an `fx.Graph` and keeps the book of which tensor
came from which node. Ordinary Python just works; what it decided on the way is part of the capture:

- `None`, numbers and strings stay the constants they were in the recorded call;
- every tensor argument is a placeholder (items of tuples and dicts are taken out of it by `getitem`);
- parameters and buffers are `get_attr` nodes; sub-modules are `call_module` nodes, unless named in `opened`;
- a tensor that the code reached in any other way (a closure, a global) is kept beside the graph as a constant;
- whatever depended on a tensor's *data* (`if x.sum() > 0`) is written down in `decided`, except where it was drawn.

Nothing is written to the module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autorev.capture.custom_function import Applied
from autorev.capture.fake import every_layer_kept
from autorev.capture.record import calls_patched, named_arguments
from autorev.capture.scripted import scripted_as_written
from autorev.capture.source import caller_line, caller_place
from autorev.own_mode import OwnMode
from autorev.patching import patched_here

_reads_data = {"__bool__", "item", "tolist", "__int__", "__float__", "__index__", "__contains__", "numpy"}
_reads_data |= {"is_nonzero", "equal", "allclose", "nonzero", "unique"}


@dataclass(eq=False)
class CapturedBlock:
    """One block's forward as a graph.

    Each node's `meta` has `val` (its value in the recorded call), `source` (`file.py:line`), `place` (the same with
    the instruction), `inside` (classes of the opened sub-modules it stands in) and `mutates` (nodes whose value it
    changed in place).
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    placeholders: dict[str, fx.Node]
    """Argument name -> its node, for every argument that holds a tensor or an object."""
    constants: dict[str, torch.Tensor]
    """Tensors the code reached by closure, by the attribute name the graph uses for them."""
    decided: tuple[str, ...]
    """`what (file.py:line)` for each decision that hung on a tensor's data."""
    lost: tuple[str, ...]
    """`file.py:line` where a tensor appeared that no recorded function had made."""
    opened: frozenset[str]

    @property
    def output(self) -> Any:
        """The structure that the block returns, with nodes for tensors."""
        return next(iter(reversed(self.graph.nodes))).args[0]

    def graph_module(self) -> fx.GraphModule:
        """The capture as a runnable module over the *live* sub-modules."""
        root = _Root(self.module, self.constants)
        return fx.GraphModule(root, self.graph)


class _Root(nn.Module):
    """What `fx.GraphModule` copies attributes from: the block's own, and the constants beside the graph."""

    def __init__(self, module: nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.__dict__["_module"] = module
        for name, value in constants.items():
            self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def capture(
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opened: frozenset[str] = frozenset(),
) -> CapturedBlock:
    """Trace `module.forward(*args, **kwargs)` on those very values.

    `opened` names sub-modules (by path below `module`) whose forward is traced through instead of being a leaf.

    Raises:
        whatever the forward raises; under fake tensors, `capture.fake.DATA_DEPENDENT` where it asks for data.
    """
    return ValueTracer(module, opened).run(path, args, kwargs)


class ValueTracer(fx.Tracer):
    """See the module's docstring."""

    def __init__(self, root: nn.Module, opened: frozenset[str]) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.opened = opened
        self.owned: dict[int, str] = {}
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            self.owned.setdefault(id(tensor), name)
        self.node_of: dict[int, fx.Node] = {}
        self.alive: list[Any] = []
        self.original: dict[int, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.decided: list[str] = []
        self.lost: list[str] = []
        self.inside: list[str] = []
        self.paused = 0
        self.made = _MadeHere()

    def run(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedBlock:
        """Trace once; a tracer is not used twice."""
        args, kwargs = self._told_apart(args, kwargs)
        placeholders = self._placeholders(args, kwargs)

        def applying(original: Any) -> Any:
            def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
                applied = Applied(cls, original)
                return self._leaf(lambda: applied(*args, **kwargs), "call_function", applied, args, kwargs)

            return apply

        with (
            every_layer_kept(),
            self.made,
            ExitStack() as patches,
            patched_here(torch.autograd.Function, "apply", applying),
            scripted_as_written(),
            _Recorder(self),
        ):
            for name, module in self.root.named_modules():
                if name:  # the root's own forward is what is traced
                    patches.enter_context(calls_patched(module, partial(self._calling, name, module)))
            output = self.root.forward(*args, **kwargs)
            with self._pause():
                self.graph.output(self.create_arg(output))
        return CapturedBlock(
            path=path,
            module=self.root,
            graph=self.graph,
            placeholders=placeholders,
            constants=self.constants,
            decided=tuple(dict.fromkeys(self.decided)),
            lost=tuple(dict.fromkeys(self.lost)),
            opened=self.opened,
        )

    # -- arguments -------------------------------------------------------------------------------------------------

    def _told_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One tensor given for two arguments (a stream that is its own memory) becomes a tensor and a view of it."""
        seen: set[int] = set()

        def apart(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or id(value) not in seen:
                seen.add(id(value))
                return value
            view = value.view_as(value)
            self.original[id(view)] = value
            return view

        return tuple(map(apart, args)), {name: apart(value) for name, value in kwargs.items()}

    def _placeholders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, fx.Node]:
        named = dict(named_arguments(self.root, args, kwargs))
        nodes: dict[str, fx.Node] = {}
        for name, value in named.items():
            if value is None or isinstance(value, bool | int | float | str):
                continue
            node = self.graph.placeholder(name.replace("[", "_").replace("]", "").replace(".", "_"))
            nodes[name] = self._book(node, value, source="argument")
            node.meta["val"] = self.original.get(id(value), value)
            node.meta["argument"] = name
        for name, node in nodes.items():
            self._take_apart(node, named[name])
        return nodes

    def _take_apart(self, node: fx.Node, value: Any) -> None:
        """Book the tensors inside a tuple, list, dict or dataclass as items of `node`."""
        items: list[tuple[Any, Any]] = []
        if isinstance(value, list | tuple):
            items = list(enumerate(value))
        elif isinstance(value, Mapping):
            items = list(value.items())
        elif _is_record(value):
            items = [(f.name, getattr(value, f.name, None)) for f in fields(value)]
        for key, item in items:
            if isinstance(item, torch.Tensor):
                if id(item) not in self.node_of:
                    self._book(self.graph.call_function(operator.getitem, (node, key)), item, node.meta["source"])
            elif (isinstance(item, list | tuple | Mapping) and tree_leaves(item)) or _is_record(item):
                self._take_apart(
                    self._book(self.graph.call_function(operator.getitem, (node, key)), item, node.meta["source"]),
                    item,
                )

    def create_arg(self, a: Any) -> Any:
        """fx's structure walk, with this capture's nodes for tensors."""
        if isinstance(a, torch.Tensor):
            return self._node_for(a)
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return type(a)(*(self.create_arg(item) for item in a))
        if isinstance(a, list | tuple):
            # torch.Size too: fx prints and pickles plain tuples.
            return (list if isinstance(a, list) else tuple)(self.create_arg(item) for item in a)
        if isinstance(a, slice):
            return slice(self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step))
        if isinstance(a, Mapping):
            return {key: self.create_arg(item) for key, item in a.items()}
        if _is_record(a):
            return {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a)}
        if isinstance(a, fx.node.base_types) or a is None or a is ...:
            return a
        node = self.node_of.get(id(a))
        return node if node is not None else _Opaque(type(a).__name__)

    def _node_for(self, tensor: torch.Tensor) -> fx.Node:
        node = self.node_of.get(id(tensor))
        if node is not None:
            return node
        with self._pause():
            if id(tensor) in self.owned:
                return self._book(self.graph.get_attr(self.owned[id(tensor)]), tensor)
            if self.made.contains(tensor):
                self.lost.append(caller_line())
            name = f"_captured_constant_{len(self.constants)}"
            self.constants[name] = tensor
            node = self.graph.create_node("get_attr", name, (), {})
            return self._book(node, tensor)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _book(self, node: fx.Node, value: Any, source: str | None = None) -> fx.Node:
        node.meta["val"] = value
        place = caller_place()
        node.meta["source"] = source or place[0]
        node.meta["place"] = place
        node.meta["inside"] = tuple(self.inside)
        node.meta.setdefault("mutates", ())
        self.node_of[id(value)] = node
        self.alive.append(value)
        return node

    def _leaf(self, function: Callable[[], Any], kind: str, target: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run `function` unrecorded, and write it down as one node."""
        if self.paused:
            return function()
        node_args, node_kwargs = self.create_arg(args), self.create_arg(dict(kwargs))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        read = {id(t): self.node_of[id(t)] for t in tensors}
        versions = {id(t): t._version for t in tensors}
        with self._pause():
            result = function()
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            name = getattr(target, "__name__", str(target))
            if name in _reads_data and tensors and not all(_is_drawn(read[id(t)]) for t in tensors):
                self.decided.append(f"{name} ({caller_line()})")
            elif kind != "call_module" and not any(t._version != versions[id(t)] for t in tensors):
                return result  # a question about shape, dtype or device
        mutated = tuple(read[id(t)] for t in tensors if t._version != versions[id(t)])
        node = self.graph.create_node(kind, target, node_args, node_kwargs)
        node.meta["mutates"] = mutated
        self._book(node, result)
        if not isinstance(result, torch.Tensor):
            self._take_apart(node, result)
        return result

    def _calling(self, path: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """What a call of the sub-module `module` does instead of `original`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return original(*args, **kwargs)
            if path in self.opened:
                self.inside.append(type(module).__name__)
                try:
                    return original(*args, **kwargs)
                finally:
                    self.inside.pop()
            return self._leaf(lambda: original(*args, **kwargs), "call_module", path, args, kwargs)

        return call

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


def _is_drawn(node: fx.Node) -> bool:
    """Does its value hang on random numbers and constants of the code alone? These are the same in a second run."""
    return node.op in ("call_function", "call_method") and all(map(_is_drawn, node.all_input_nodes))


class _Opaque(str):
    """Stands in the graph for an object that fx has no notation for."""

    __slots__ = ()


class _Recorder(TorchFunctionMode):
    """Hands every torch function that the model's own code calls to the tracer."""

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of a tensor: x.shape, x.T, x.data
            descriptor = getattr(func.__self__, "__name__", None) or func.__self__.fget.__name__
            return self.tracer._leaf(lambda: func(*args, **kwargs), "call_function", getattr, (args[0], descriptor), {})
        kind, target = ("call_method", name) if _is_tensor_method(func) else ("call_function", func)
        return self.tracer._leaf(lambda: func(*args, **kwargs), kind, target, args, kwargs)


def _is_record(value: Any) -> bool:
    """Is it an object of a dataclass?"""
    return is_dataclass(value) and not isinstance(value, type)


def _is_tensor_method(func: Any) -> bool:
    return getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase."))


class _MadeHere(OwnMode):
    """Knows which storages came into being during the trace: a tensor with one of them that no node made was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self.alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.storages.add(tensor.untyped_storage()._cdata)
                self.alive.append(tensor)
        return result

    def contains(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages
