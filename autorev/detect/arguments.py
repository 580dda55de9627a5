"""What the arguments of a call hold: a block that changes that when it runs cannot be run a second time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autorev.capture.record import ModuleCall
from autorev.capture.source import definition_line
from autorev.detect.obstacles import Obstacle


def contents(call: ModuleCall) -> dict[str, list[int]]:
    """The tensors that each object among the arguments holds: a cache, a list that results are appended to."""
    return {name: list(_held(value)) for name, value in call.inputs().items()}


def _held(value: Any, depth: int = 10) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield id(value)
    elif depth and isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _held(item, depth - 1)
    elif depth and not isinstance(value, nn.Module | type):
        yield from _held(_attributes(value), depth - 1)


def _attributes(value: Any) -> dict[str, Any]:
    slots = (name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()))
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}


def changed_argument(call: ModuleCall, before: dict[str, list[int]]) -> Obstacle | None:
    """Do its arguments hold something else than `before`, after its code ran once more?"""
    after = contents(call)
    name = next((name for name in after if after[name] != before[name]), None)
    if name is None:
        return None
    kind = type(call.inputs()[name]).__name__
    remedy = "; train without a cache (use_cache=False)" if "cache" in f"{name} {kind}".lower() else ""
    text = f"it changes its argument {name} (a {kind}) while it runs; run again in backward, it would do so once more"
    return Obstacle("argument-write", text + remedy, definition_line(call.module))
