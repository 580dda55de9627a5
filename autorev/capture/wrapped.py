"""A model whose `forward` another library has wrapped: its copy has to run itself, and not the model.

`copy.deepcopy` rebinds a bound method to the copy, but not one that a closure holds (trl's fused head, accelerate's
mixed precision, patches by hand): the copy's forward would be the model's own, on the model's own weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` has its class's forward where its instance's is a wrapper around that."""
    wrapper = model.__dict__.get("forward")
    if wrapper is None or not _encloses(wrapper, model):
        yield
        return
    del model.__dict__["forward"]
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapper


def _encloses(wrapper: Any, model: nn.Module) -> bool:
    """Does it lead to the class's forward of `model`, through however many wrappers?"""
    if hasattr(wrapper, "__wrapped__") and inspect.unwrap(wrapper) is inspect.unwrap(type(model).forward):
        return True
    function = getattr(wrapper, "__func__", wrapper)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if getattr(held, "__self__", None) is model and getattr(held, "__func__", None) is type(model).forward:
            return True
        if callable(held) and held is not wrapper and getattr(held, "__closure__", None) and _encloses(held, model):
            return True
    return False
