"""What modules hold besides the code of their classes: written down before a branch runs, in place when it runs again.

Attributes, hooks, flags, parameters and buffers of a module are entries of its `__dict__`, or of dicts in there. So
one mechanism puts all of them back: what was there before the first run is there again in a later one (a counter, an
adapter that was active, a hook that has been removed since), and afterwards everything is as it was found: a later
run leaves no trace. What cannot be put back (the values of a parameter) is compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autorev.capture.generators import generator_state, set_generator, shared_generators
from autorev.engine.digest import WHOLE
from autorev.engine.owned import PARTITIONED, Owned, is_zero
from autorev.engine.plain_data import (
    copied,
    inside,
    is_container,
    is_generator,
    is_record,
    says_more,
    without_history,
)

_ABSENT = object()
TORCH_DICTS = frozenset(key for key, value in nn.Module().__dict__.items() if isinstance(value, dict))
"""Parameters, buffers, sub-modules and hooks: their entries are compared, and they are rarely another than before."""
_SIMPLE = frozenset({int, float, bool, str, type(None)})
_DICTS = frozenset({dict, OrderedDict})
_MOST = 1000
"""Modules and objects of one branch; more are those of a program that is reached from a module (its trainer's)."""
SHARDED = "_is_fsdp_managed_module"
_COURSE_OF_ZERO = ("ds_", "applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn")
"""How its attributes begin in which ZeRO-3 counts what is still to be gathered: a later run counts on."""


@dataclass(eq=False)
class _Held:
    """The attributes of one module, or of an object that one refers to (a config), before the first run."""

    home: dict[str, Any]
    attributes: dict[str, Any]
    """Torch's own dicts as copies; other containers as copies down to their leaves."""
    containers: set[str]


class ModuleStates:
    """The modules that a branch runs, as they were before it ran."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.held: list[_Held] = []
        self.owned: list[Owned] = []
        self.updated: list[tuple[Callable[[], dict[str, Any]], str, torch.Tensor]] = []
        """Tensors that the branch writes to, with their values before: (where a module has them, name, values)."""
        self.compared: set[int] = set()
        """Storages whose values are looked after here: among what the branch saves, they are not compared again."""
        self.hides = False
        """Is a parameter zero (a fresh LoRA, ReZero, adaLN-zero), or a trained argument? Then the output does not tell
        what the branch computes before it, and what it saves is looked at wholly."""
        self.small: list[tuple[Callable[[], dict[str, Any]], str, Owned, torch.Tensor]] = []
        """Small tensors with their values, until it is known whether the branch writes to them."""
        self.generators: list[tuple[Any, Any]] = []
        """Random generators that they hold, with their states."""
        self._copies: dict[int, tuple[Any, Any]] = {}
        """id of a container -> (itself, its copy): what two modules share stays shared."""

    def add(self, module: nn.Module, path: str, writes: Callable[[nn.Module, str], bool]) -> None:
        """Write down `module` and all below it. `writes(child, name)`: is that buffer updated by the branch?"""
        for name, child in module.named_modules():
            if id(child) in self.seen:
                continue
            prefix = ".".join(filter(None, (path, name)))
            if type(child).__name__ == "FullyShardedDataParallel":
                self.seen.add(id(child))  # its attributes are the course of its own work, in backward as in forward
            else:
                self.hold(child, prefix)
            counts = isinstance(child, _NormBase) and child.training and child.track_running_stats
            for key, parameter in child._parameters.items():
                if parameter is not None:
                    self.owned.append(Owned.found(f"{prefix}.{key}", parameter))
                    self.hides = self.hides or (key != "bias" and is_zero(parameter))
                    if self.owned[-1].values is not None:
                        self.compared.add(parameter.untyped_storage()._cdata)
            for key, buffer in child._buffers.items():
                if buffer is None:
                    continue
                where = partial(child.__dict__.__getitem__, "_buffers")
                if counts or writes(child, key):
                    self.compared.add(buffer.untyped_storage()._cdata)
                    self.updated.append((where, key, buffer.clone()))
                else:
                    self._own(f"{prefix}.{key}", buffer, where, key)

    def _own(self, path: str, tensor: torch.Tensor, where: Callable[[], dict[str, Any]], key: str) -> None:
        owned = Owned.found(path, tensor)
        if tensor.is_leaf and tensor.numel() <= WHOLE:
            self.small.append((where, key, owned, tensor.detach().clone()))
        else:
            self.owned.append(owned)

    def ran(self) -> None:
        """Called after the first run: tensors that it wrote to are no constants."""
        for where, key, owned, value in self.small:
            if owned.change() is None:
                self.owned.append(owned)
            else:
                self.updated.append((where, key, value))
        self.small.clear()

    def hold(self, thing: Any, path: str) -> None:
        """Write down the attributes of one module, or of an object that one refers to."""
        self.seen.add(id(thing))
        home = thing.__dict__
        held = _Held(home, {}, set())
        for key, value in home.items():
            if counted_by_zero(home, key):
                continue
            kind = type(value)
            if kind in _SIMPLE:
                held.attributes[key] = value
            elif key in TORCH_DICTS and kind in _DICTS:
                held.containers.add(key)
                held.attributes[key] = value.copy()
            elif is_container(value):
                held.containers.add(key)
                held.attributes[key] = copied(value, self._copies)
                for leaf in inside(value):
                    self.hold_object(leaf, path, key)
            elif isinstance(value, torch.Tensor):
                # With its history, what an earlier pass left here would hold on to all that came before it.
                held.attributes[key] = value if value.is_leaf else without_history(value)
                self._own(f"{path}.{key}", value, partial(_itself, home), key)
            else:
                held.attributes[key] = value
                self.hold_object(value, path, key)
        for generator in shared_generators(type(thing)) if isinstance(thing, nn.Module) else ():
            self.hold_object(generator, path)  # as it was before the first module of its class ran
        self.held.append(held)
        for key, parameter in thing._parameters.items() if isinstance(thing, nn.Module) else ():
            if says_more(parameter) and id(parameter) not in self.seen:
                self.hold(parameter, f"{path}.{key}")

    def hold_object(self, value: Any, path: str, key: str = "") -> None:
        """Write down what is none of torch's, where that is plain data or a random generator."""
        if type(value) in _SIMPLE or id(value) in self.seen or len(self.held) > _MOST:
            return
        if is_generator(value):
            self.seen.add(id(value))
            self.generators.append((value, generator_state(value)))
        elif is_record(value):
            self.hold(value, f"{path}.{key}")

    def change(self) -> str | None:
        """The first parameter, buffer or tensor attribute that is not what it was, in words."""
        for owned in self.owned:
            what = owned.change()
            if what is not None:
                return f"{owned.path} {what}"
        return None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As before the first run; afterwards as they are now."""
        fresh: dict[int, tuple[Any, Any]] = {}
        with ExitStack() as stack:
            for held in self.held:
                stack.callback(put_back, held.home, dict(held.home))
                _restore(held, fresh)
            for generator, state in self.generators:
                stack.callback(set_generator, generator, generator_state(generator))
                set_generator(generator, state)
            for where, name, value in self.updated:
                home = where()  # the dict that is in place now: `_restore` may have put a copy there
                stack.callback(home.__setitem__, name, home[name])
                home[name] = value.clone()
            for owned in self.owned:
                if owned.tensor.is_leaf and owned.tensor.requires_grad != owned.requires_grad:
                    stack.callback(owned.tensor.requires_grad_, owned.tensor.requires_grad)
                    owned.tensor.requires_grad_(owned.requires_grad)
            yield


def _itself(home: dict[str, Any]) -> dict[str, Any]:
    return home


def _restore(held: _Held, fresh: dict[int, tuple[Any, Any]]) -> None:
    home = held.home
    for key, value in held.attributes.items():
        if key in TORCH_DICTS:
            # Which parameters of a sharded module are in place, whole ones or parts, goes by its own hooks.
            if not ((key == "_parameters" and SHARDED in home) or same_entries(home.get(key), value)):
                home[key] = value.copy()
        elif key in held.containers:
            home[key] = copied(value, fresh)  # a list that the branch appends to is not appended to once more
        elif home.get(key, _ABSENT) is not value:
            home[key] = value
    for key in home.keys() - held.attributes.keys():
        if not counted_by_zero(home, key):
            del home[key]


def put_back(home: dict[str, Any], before: dict[str, Any]) -> None:
    """Make the entries of `home` those of `before`."""
    for key, value in before.items():
        if home.get(key, _ABSENT) is not value and not counted_by_zero(home, key):
            home[key] = value
    for key in home.keys() - before.keys():
        if not counted_by_zero(home, key):
            del home[key]


def counted_by_zero(home: dict[str, Any], key: str) -> bool:
    """Is that attribute of a module the course of ZeRO-3's own work?"""
    return PARTITIONED in home and key.startswith(_COURSE_OF_ZERO)


def same_entries(a: Any, b: Any) -> bool:
    """Have two dicts the same keys, with the same objects behind them?"""
    return a is not None and len(a) == len(b) and all(a.get(key, _ABSENT) is value for key, value in b.items())
