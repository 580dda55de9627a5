"""The recorded call: run the model once and write down every module call, its arguments and its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autorev.capture.fake import every_layer_kept
from autorev.capture.source import caller_line
from autorev.integrations.transformers import without_caches
from autorev.own_mode import OwnMode
from autorev.patching import patched_here


@dataclass(eq=False)
class ModuleCall:
    """One call of one module, with what it received, returned and did on the side."""

    path: str
    module: nn.Module
    index: int
    """0 for the module's first call in this forward, 1 for its second, ..."""
    parent: ModuleCall | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    children: list[ModuleCall] = field(default_factory=list)
    draws_random: bool = False
    """Did it, or anything below it, draw from torch's generator?"""
    scalar_draws: list[Any] = field(default_factory=list)
    """Random scalars drawn in its own code (layer-drop)."""
    function: str = ""
    """The user's `torch.autograd.Function`, with a backward of its own, in whose forward it runs."""
    buffers_written: tuple[str, ...] = ()
    entered: dict[int, int] = field(default_factory=dict)
    """id of a tensor it received -> how often that had been written to by then."""
    left: dict[int, int] = field(default_factory=dict)
    """The same for what it returned."""

    def inputs(self) -> dict[str, Any]:
        """Arguments by name."""
        return dict(named_arguments(self.module, self.args, self.kwargs))

    def walk(self) -> Iterator[ModuleCall]:
        """This call and all below it, in the order they began."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(eq=False)
class RecordedCall:
    """The whole forward pass."""

    root: ModuleCall
    producers: dict[int, tuple[str, str]]
    """id of a tensor -> (the function that made it outside any leaf, `file.py:line`)."""
    writers: dict[int, tuple[str, str]]
    """id of a tensor -> (the function that last wrote to it in place, `file.py:line`)."""
    readers: dict[int, list[tuple[ModuleCall, str, str]]]
    """id of a tensor -> (the call whose code read it, the function, `file.py:line`)."""
    alive: list[Any]
    """Keeps every tensor alive, so that an id never names two of them."""


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments of a call in order, by the name `forward` gives them; an item of `*args` as `args[i]`."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    for i, value in enumerate(args):
        yield (positional[i].name if i < len(positional) else f"{rest}[{i - len(positional)}]"), value
    yield from kwargs.items()


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedCall:
    """Run `model(*args, **kwargs)` once and write down every module call.

    The caller decides what the tensors are (fake ones, as a rule) and how `model` is set (training or not). `model` is
    a copy that nobody else has: while it runs, its modules carry hooks, and its configs are others.
    """
    counts: dict[int, int] = {}
    stack: list[ModuleCall] = []
    drawn: list[Any] = []
    watcher = _Watch(stack)
    roots: list[ModuleCall] = []
    functions: list[str] = []

    def applying(original: Any) -> Any:
        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # Torch's own (a re-entrant checkpoint) runs what is inside once more, with autograd.
            functions.append("" if cls.__module__.startswith("torch.") else cls.__name__)
            try:
                return original(cls, *args, **kwargs)
            finally:
                functions.pop()

        return apply

    def recorded(original: Any, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        index = counts.get(id(module), 0)
        counts[id(module)] = index + 1
        call = ModuleCall(path, module, index, stack[-1] if stack else None, args, dict(kwargs))
        call.function = functions[-1] if functions else ""
        (stack[-1].children if stack else roots).append(call)
        before, versions = len(drawn), _buffer_versions(module)
        call.entered = _tensor_versions((args, kwargs))
        stack.append(call)
        try:
            result = original(*args, **kwargs)
        finally:
            stack.pop()
        if isinstance(module, torch.jit.ScriptModule):
            call.output = result  # its hooks are compiled into it
        inner = sum(len(child.scalar_draws) for child in call.walk() if child is not call)
        call.scalar_draws = drawn[before : len(drawn) - inner]
        call.buffers_written = _written(module, versions)
        call.draws_random = call.draws_random or any(child.draws_random for child in call.children)
        call.left = _tensor_versions(call.output)
        watcher.alive += [args, kwargs, call.output, result]
        for tensor in tree_leaves(call.output):
            if isinstance(tensor, torch.Tensor):
                watcher.producers.setdefault(id(tensor), (path or type(module).__name__, caller_line()))
        return result

    def recording(path: str, module: nn.Module) -> Any:
        return calls_patched(module, lambda original: partial(recorded, original, path, module))

    with (
        every_layer_kept(drawn),
        without_caches(model),
        patched_here(torch.autograd.Function, "apply", applying),
        _RandomWatch(stack),
        watcher,
        ExitStack() as patches,
        _inside_of_hooks(model, stack),
    ):
        for path, module in model.named_modules():
            patches.enter_context(recording(path, module))
        model(*args, **kwargs)
    return RecordedCall(roots[0], watcher.producers, watcher.writers, watcher.readers, watcher.alive)


def calls_patched(module: nn.Module, replace: Callable[..., Any]) -> AbstractContextManager[None]:
    """This thread's calls of `module`, and of no other module, are calls of `replace(original)`.

    `__call__` itself is looked up in the class, which all modules share; these are what it calls.
    """
    compiled = vars(module).get("_compiled_call_impl") is not None
    return patched_here(module, "_compiled_call_impl" if compiled else "_call_impl", replace)


class _RandomWatch(OwnMode):
    """Marks the module whose operator drew from a random generator: seen, not guessed from `p` or class names."""

    def __init__(self, stack: list[ModuleCall]) -> None:
        super().__init__()
        self.stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack and torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            # Fused attention carries the tag even at dropout 0; with dropout it decomposes and draws visibly.
            self.stack[-1].draws_random = True
        return func(*args, **(kwargs or {}))


@contextmanager
def _inside_of_hooks(model: nn.Module, stack: list[ModuleCall]) -> Iterator[None]:
    """Records what a module's `forward` got and returned: its own hooks may change either, and are no part of it."""

    def given(module: nn.Module, args: Any, kwargs: Any) -> None:
        if stack and stack[-1].module is module:
            stack[-1].args, stack[-1].kwargs = _as_given(args), _as_given(dict(kwargs))

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        if stack and stack[-1].module is module:
            stack[-1].output = output

    # Hooks of the modules, as one for all modules would run in every thread.
    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes none
                hooks.callback(module.register_forward_pre_hook(given, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(returned, prepend=True).remove)
        yield


def _as_given(structure: Any) -> Any:
    """The same with new lists and dicts: the model may add to its own after the call (DenseNet's features)."""
    if type(structure) in (list, tuple):
        return type(structure)(map(_as_given, structure))
    if type(structure) is dict:
        return {key: _as_given(value) for key, value in structure.items()}
    return structure


class _Watch(TorchFunctionMode):
    """Remembers which line of the model's code made each tensor, and which code read it."""

    def __init__(self, stack: list[ModuleCall]) -> None:
        super().__init__()
        self.stack = stack
        self.producers: dict[int, tuple[str, str]] = {}
        self.writers: dict[int, tuple[str, str]] = {}
        self.readers: dict[int, list[tuple[ModuleCall, str, str]]] = {}
        self.alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name == "__setitem__" or (isinstance(result, torch.Tensor) and args and result is args[0]):
            self.writers[id(args[0])] = name, caller_line()
        if not isinstance(result, torch.Tensor):
            return result
        line = caller_line()
        if id(result) not in self.producers:
            self.producers[id(result)] = name, line
            self.alive.append(result)
        if self.stack and not name.startswith(("new_", "__get__")) and not name.endswith("_like"):
            for read in tree_leaves((args, kwargs)):
                if isinstance(read, torch.Tensor) and read is not result:
                    self.readers.setdefault(id(read), []).append((self.stack[-1], name, line))
                    self.alive.append(read)
        return result


def _tensor_versions(structure: Any) -> dict[int, int]:
    return {id(t): t._version for t in tree_leaves(structure) if isinstance(t, torch.Tensor)}


def _buffer_versions(module: nn.Module) -> dict[str, int]:
    return {name: buffer._version for name, buffer in module.named_buffers()}


def _written(module: nn.Module, before: dict[str, int]) -> tuple[str, ...]:
    written = {n for n, buffer in module.named_buffers() if buffer._version != before.get(n, buffer._version)}
    for name, child in module.named_modules():
        # Normalisation kernels update running statistics without telling the version counter.
        if isinstance(child, _NormBase) and child.training and child.track_running_stats:
            prefix = f"{name}." if name else ""
            written |= {prefix + "running_mean", prefix + "running_var"}
    return tuple(sorted(written))
