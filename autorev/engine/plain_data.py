"""Plain data that code reads numbers from, and copies of it: containers, arrays, objects, random generators"""

from __future__ import annotations

import copy
import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from autorev.capture.generators import KINDS

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, set, deque})
_MACHINERY = frozenset({"torch", "accelerate", "deepspeed", "logging", "threading", "autorev"})
"""Packages whose objects are no data that a forward reads its numbers from."""
_CODE = (nn.Module, FunctionType, ModuleType, functools.partial, type)
"""What is called and holds no numbers, or whose numbers are looked after elsewhere."""
_LARGE = 10_000
"""Items beyond which a list is taken for data, and left alone."""


def is_container(value: Any) -> bool:
    """Does code write to it in place, a list or an array?"""
    return type(value) in _CONTAINERS or type(value) is np.ndarray


def is_generator(value: Any) -> bool:
    """Of random numbers: torch's, Python's or numpy's kind?"""
    return isinstance(value, KINDS)


def is_record(value: Any) -> bool:
    """An object of plain data: a config, a namespace, a dataclass, a schedule that is called for its next number."""
    if isinstance(value, _CODE) or is_generator(value) or not says_more(value):
        return False
    if callable(value) and not isinstance(type(value).__call__, FunctionType):
        return False  # written in C
    return type(getattr(value, "__dict__", None)) is dict


def says_more(value: Any) -> bool:
    """Is it of a class that is not PyTorch's or another library's machinery? Of a parameter: a quantised weight."""
    return value is not None and type(value).__module__.partition(".")[0] not in _MACHINERY


def inside(container: Any) -> Iterator[Any]:
    """The leaves of a container, and of those in it."""
    if (type(container) in _CONTAINERS or type(container) is tuple) and len(container) <= _LARGE:
        for item in container.values() if isinstance(container, dict) else container:
            yield from inside(item)
    else:
        yield container


def copied(value: Any, copies: dict[int, tuple[Any, Any]]) -> Any:
    """A container, and those inside it, as new ones with the same leaves; one that occurs twice is copied once."""
    kind = type(value)
    if kind is tuple:
        items = [copied(item, copies) for item in value]
        return tuple(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if isinstance(value, torch.Tensor):
        return value if value.is_leaf else without_history(value)
    if kind is np.ndarray:
        return value.copy() if value.size <= _LARGE else value
    if kind not in _CONTAINERS or len(value) > _LARGE:
        return value
    if id(value) in copies:
        return copies[id(value)][1]
    twin = value.copy()
    copies[id(value)] = value, twin
    if isinstance(twin, dict):
        for key, item in value.items():
            twin[key] = copied(item, copies)
    elif not isinstance(twin, set):
        for number, item in enumerate(value):
            twin[number] = copied(item, copies)
    return twin


def without_history(value: Any) -> Any:
    """A tensor of the same values, cut off from autograd's graph; whether a gradient goes there stays. Of an object of
    plain data (a context that blocks hand on and write to), a copy that holds such tensors, and containers of its own.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if not is_record(value):
        return value
    try:
        twin = copy.copy(value)
    except Exception:  # made of something that cannot be copied, and so no plain data
        return value
    copies: dict[int, tuple[Any, Any]] = {}
    twin.__dict__.update({name: copied(held, copies) for name, held in vars(value).items()})
    return twin
