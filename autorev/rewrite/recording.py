"""What the model's own code did between two residual adds, in one call: enough to do it once more on another input.

The code runs by itself, with whatever it decides in this call, and is watched; a second run in backward repeats the
calls it made, not the decisions. Sub-modules are single calls, which their `Replay` runs as they ran. The recording
holds what came from outside of the step, and none of the values that the step computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from autorev.engine.owned import version_of
from autorev.engine.plain_data import without_history
from autorev.engine.replay import Rest
from autorev.errors import ConversionError


@dataclass(frozen=True)
class _Slot:
    """A value computed in the step; number 0 is its input."""

    number: int


@dataclass(frozen=True)
class _Outer:
    """A tensor from outside of the step."""

    number: int


@dataclass(eq=False)
class _Kept:
    """A tensor from outside, without its history."""

    tensor: torch.Tensor
    version: int
    before: torch.Tensor | None = None
    """Its values before the step wrote to it."""


@dataclass(eq=False)
class _Made:
    """One call."""

    function: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    returned: list[tuple[int, str | None, int]]
    """(leaf of what it returns, attribute of that leaf, slot) of each tensor that it returns."""
    grad: bool
    autocast: tuple[bool, torch.dtype]
    device: str
    generators: list[tuple[torch.Generator, torch.Tensor]]
    """Those that it was given, with their states."""


class Recording:
    """The calls of one step."""

    def __init__(self, x: torch.Tensor) -> None:
        """`x`: the input, as the code is given it."""
        self.calls: list[_Made] = []
        self.outer: list[_Kept] = []
        self.slots = 1
        self.device = x.device.type
        self.writes_to_input = False
        self.input = x.untyped_storage()._cdata
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], _Slot | _Outer]] = {}
        self._name(x, _Slot(0))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> Any:
        """Run `function(*args, **kwargs)` and write it down. `in_place`: it writes to its first argument.

        Raises:
            ConversionError: it has written to a tensor from outside of the step in a way that could not be foreseen.
        """
        leaves, spec = tree_flatten((args, kwargs))
        noted = [self._noted(leaf) if isinstance(leaf, torch.Tensor) else without_history(leaf) for leaf in leaves]
        for tensor in _written(function, args, kwargs, in_place):
            self._about_to_write(tensor)
        given = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]
        made = _Made(function, noted, spec, [], torch.is_grad_enabled(), _autocast(self.device), self.device, given)
        result = function(*args, **kwargs)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and isinstance(name := self._noted(leaf), _Outer):
                kept = self.outer[name.number]
                if kept.before is None and version_of(leaf) != kept.version:
                    what = getattr(function, "__name__", type(function).__name__)
                    raise ConversionError(
                        f"`{what}` writes to a tensor (shape {tuple(leaf.shape)}) made outside of the residual step, "
                        "and would do so again in backward; use granularity='block', or exclude the block"
                    )
        found = False
        for number, leaf in enumerate(tree_flatten(result)[0]):
            for attribute, tensor in _tensors_of(leaf):
                found = True
                made.returned.append((number, attribute, self._made(tensor)))
        if found or (result is None and any(isinstance(leaf, torch.Tensor) for leaf in leaves)):
            self.calls.append(made)  # anything else is a question about shape or dtype, and answered
        return result

    def slot_of(self, tensor: torch.Tensor) -> int:
        """The slot of a value that the step computed."""
        known = self._noted(tensor)
        assert isinstance(known, _Slot)
        return known.number

    def arguments(self) -> list[torch.Tensor]:
        """Tensors from outside that have to be the same in a second run."""
        return [kept.tensor for kept in self.outer if kept.before is None]

    def last_call_of(self, module: nn.Module) -> int | None:
        """The number of the latest call, where that is one of `module` that returned one tensor."""
        if not self.calls:
            return None
        latest = self.calls[-1]
        called = getattr(latest.function, "args", ())
        if not called or called[0] is not module or [place[:2] for place in latest.returned] != [(0, None)]:
            return None
        return len(self.calls) - 1

    def finish(self, result: int | None, tiled: int | None = None) -> Repeated:
        """The step as a function of its input; `result`: the slot that it returns (None: it is run for its effects);
        `tiled`: the call that a second run may stop at."""
        self._known.clear()
        last: dict[int, int] = {} if result is None else {result: len(self.calls)}
        for number in range(len(self.calls) - 1, -1, -1):
            for leaf in self.calls[number].leaves:
                if isinstance(leaf, _Slot):
                    last.setdefault(leaf.number, number)
        return Repeated(self.calls, self.outer, last, result, tiled)

    def _name(self, tensor: torch.Tensor, name: _Slot | _Outer) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), name

    def _noted(self, tensor: torch.Tensor) -> _Slot | _Outer:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        # With its history it might close a circle through autograd's graph.
        self.outer.append(_Kept(without_history(tensor), version_of(tensor)))
        name = _Outer(len(self.outer) - 1)
        self._name(tensor, name)
        return name

    def _made(self, tensor: torch.Tensor) -> int:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and isinstance(known[1], _Slot):
            return known[1].number  # returned as it was given
        self.slots += 1
        self._name(tensor, _Slot(self.slots - 1))
        return self.slots - 1

    def _about_to_write(self, tensor: torch.Tensor) -> None:
        """To a tensor, or through a view (`.data` included) of one."""
        storage = tensor.untyped_storage()._cdata
        self._noted(tensor)
        self.writes_to_input |= storage == self.input
        for kept in self.outer:
            if kept.before is None and kept.tensor.untyped_storage()._cdata == storage:
                kept.before = kept.tensor.detach().clone()


@dataclass(eq=False)
class Repeated:
    """The calls once more."""

    calls: list[_Made]
    outer: list[_Kept]
    last: dict[int, int]
    """Slot -> the last call that reads it: behind that it is let go, as the code's own variables were."""
    result: int | None
    tiled: int | None

    def __call__(self, x: torch.Tensor) -> tuple[None, tuple[torch.Tensor]]:
        values = {0: x}
        self._make(range(len(self.calls)), values, self._outer())
        return None, (x if self.result is None else values[self.result],)

    def but_for_tiles(self, x: torch.Tensor) -> Rest:
        """The calls up to the tiled one; what is left is a function of what that returns."""
        assert self.tiled is not None
        assert self.result is not None
        result, tiled = self.result, self.tiled
        values, outer = {0: x}, self._outer()
        self._make(range(tiled + 1), values, outer)
        values = {slot: value.detach() for slot, value in values.items()}
        ((_, _, slot),) = self.calls[tiled].returned

        def rest(returned: Callable[[], torch.Tensor]) -> torch.Tensor:
            values[slot] = returned()
            if (total := self._added_in_place(values, outer)) is not None:
                return total
            self._make(range(tiled + 1, len(self.calls)), values, outer)
            return values.pop(result)

        return rest

    def _added_in_place(self, values: dict[int, torch.Tensor], outer: list[torch.Tensor]) -> torch.Tensor | None:
        """What the tiled call returned, with the rest done to it; None where that is more than one add."""
        assert self.tiled is not None
        last = self.calls[self.tiled + 1 :]
        if len(last) != 1 or last[0].function not in (torch.add, torch.sub):
            return None
        args, kwargs = tree_unflatten([self._value(leaf, values, outer) for leaf in last[0].leaves], last[0].spec)
        ((_, _, slot),) = self.calls[self.tiled].returned
        total = values[slot]
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(tensor.dtype != total.dtype or tensor.shape != total.shape for tensor in tensors):
            return None
        return last[0].function(*args, **kwargs, out=total)

    def _outer(self) -> list[torch.Tensor]:
        return [kept.tensor if kept.before is None else kept.before.clone() for kept in self.outer]

    def _make(self, numbers: range, values: dict[int, torch.Tensor], outer: list[torch.Tensor]) -> None:
        """These calls; what they read is in `values`, and so is what later ones will."""
        for number in numbers:
            made = self.calls[number]
            leaves = [self._value(leaf, values, outer) for leaf in made.leaves]
            args, kwargs = tree_unflatten(leaves, made.spec)
            del leaves
            with _as_it_was(made):
                returned = tree_flatten(made.function(*args, **kwargs))[0]
            del args, kwargs
            for leaf, attribute, slot in made.returned:
                value = returned[leaf] if attribute is None else getattr(returned[leaf], attribute)
                if slot in self.last:
                    values[slot] = value
            del returned
            for slot in [slot for slot in values if self.last.get(slot, -1) <= number]:
                del values[slot]

    def _value(self, leaf: Any, values: dict[int, torch.Tensor], outer: list[torch.Tensor]) -> Any:
        if isinstance(leaf, _Slot):
            return values[leaf.number]
        return outer[leaf.number] if isinstance(leaf, _Outer) else leaf


@contextmanager
def _as_it_was(made: _Made) -> Iterator[None]:
    """Grad mode and autocast, where the code had switched them between two calls, and generators that it hands over."""
    with ExitStack() as stack:
        if torch.is_grad_enabled() != made.grad:
            stack.enter_context(torch.set_grad_enabled(made.grad))
        if _autocast(made.device) != made.autocast:
            enabled, dtype = made.autocast
            stack.enter_context(torch.autocast(made.device, enabled=enabled, dtype=dtype))
        for generator, state in made.generators:
            stack.callback(generator.set_state, generator.get_state())
            generator.set_state(state)
        yield


def _written(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool
) -> Iterator[torch.Tensor]:
    """The tensors that a call is going to write to."""
    name = getattr(function, "__name__", "")
    targets: list[Any] = [args[0]] if in_place and args else []
    if name.startswith("_foreach_") and name.endswith("_"):
        targets += list(args[0])
    if name in ("batch_norm", "instance_norm"):  # running statistics, of which no version counter tells
        targets += [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    out = kwargs.get("out")
    targets += list(out) if isinstance(out, tuple | list) else [out]
    return (target for target in targets if isinstance(target, torch.Tensor))


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    if not torch.amp.is_autocast_available(device):
        return False, torch.float32
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _tensors_of(leaf: Any) -> list[tuple[str | None, torch.Tensor]]:
    if isinstance(leaf, torch.Tensor):
        return [(None, leaf)]
    if is_dataclass(leaf) and not isinstance(leaf, type):
        named = ((f.name, getattr(leaf, f.name)) for f in fields(leaf))
        return [(name, value) for name, value in named if isinstance(value, torch.Tensor)]
    return []
