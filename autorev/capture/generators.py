"""Random generators that the code of modules draws from, and that none of them holds: a class's, or a global one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import unwrap
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

Place = tuple[Mapping[str, Any], str]
"""The names of a class, of a module or of a closure, and one of them."""

_places: WeakKeyDictionary[type, tuple[Place, ...]] = WeakKeyDictionary()
"""By class: where its code was found to draw from when it was first looked at."""


def shared_generators(cls: type) -> list[Any]:
    """The generators that the code of a class names, and that are no attribute of its instances."""
    if cls not in _places:
        _places[cls] = tuple(_named_by(cls))
    found = {id(value): value for names, name in _places[cls] if isinstance(value := names.get(name), KINDS)}
    return [*found.values()]


@contextmanager
def shared_generators_left(model: nn.Module) -> Iterator[None]:
    """What is run inside draws from them, and nobody notices afterwards."""
    found = {id(g): g for cls in {type(module) for module in model.modules()} for g in shared_generators(cls)}
    states = [(generator, generator_state(generator)) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            set_generator(generator, state)


def generator_state(generator: Any) -> Any:
    """Of torch's, Python's or numpy's kind."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state()


def set_generator(generator: Any, state: Any) -> None:
    """Put `generator` where it was."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _named_by(cls: type) -> Iterator[Place]:
    seen: set[int] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, value in vars(base).items():
                if isinstance(value, KINDS):
                    yield vars(base), name
                function = getattr(value, "__func__", getattr(value, "fget", value))  # of a static method, a property
                if isinstance(function, FunctionType):
                    yield from _named_in(function, base.__module__.partition(".")[0], seen)


def _named_in(function: FunctionType, package: str, seen: set[int]) -> Iterator[Place]:
    """In a function of `package`, and in those that it calls by name."""
    function = unwrap(function)
    if not isinstance(function, FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    closure = {name: cell.cell_contents for name, cell in _filled(function)}
    names = _names(function.__code__)
    for space in (closure, function.__globals__):
        for name in names & space.keys():
            value = space[name]
            if isinstance(value, KINDS):
                yield space, name
            elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] == package:
                yield from _named_in(value, package, seen)
            elif isinstance(value, ModuleType) and value.__name__.partition(".")[0] == package:
                yield from ((vars(value), n) for n in names & vars(value).keys() if isinstance(vars(value)[n], KINDS))


def _filled(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            _ = cell.cell_contents
        except ValueError:  # of a name that is not bound yet
            continue
        yield name, cell


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *code.co_freevars}.union(*map(_names, inner))
