"""Models in which another library has wrapped a `forward`: a copy has to run itself, and not the original.

`copy.deepcopy` rebinds a bound method to the copy, but not one that a closure holds (trl's fused head, accelerate's
mixed precision, patches by hand): the copy's forward would be the original's own, on the original's own weights, and
nothing of what it calls would be seen in the copy.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """While it lasts, copies of `model` run their own modules.

    The model itself has its class's forward where its instance's is a wrapper around that: what is around the whole
    model is no part of its blocks. Wrappers of the modules inside are part of the copy.
    """
    wrappers = {module: module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__}
    wrappers = {module: wrapper for module, wrapper in wrappers.items() if _encloses(wrapper, module)}
    for module, wrapper in wrappers.items():
        if module is model:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = _Copied(wrapper)
    try:
        yield
    finally:
        for module, wrapper in wrappers.items():
            module.__dict__["forward"] = wrapper


@dataclass(eq=False)
class _Copied:
    """Stands for a wrapper while its module is copied."""

    wrapper: Callable[..., Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _rebound(self.wrapper, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapper."""
        return self.wrapper(*args, **kwargs)


def _rebound(held: Any, memo: dict[int, Any]) -> Any:
    """`held`, with the copy's modules wherever a closure leads to those of the original."""
    if isinstance(held, type) or not callable(held):
        return held  # data that a closure has beside the modules is shared
    if isinstance(held, MethodType):
        return MethodType(_rebound(held.__func__, memo), _rebound(held.__self__, memo))
    if not isinstance(held, FunctionType) or held.__closure__ is None:
        return copy.deepcopy(held, memo)
    if id(held) not in memo:
        cells = tuple(CellType() for _ in held.__closure__)
        function = FunctionType(held.__code__, held.__globals__, held.__name__, held.__defaults__, cells)
        function.__kwdefaults__ = held.__kwdefaults__
        function.__dict__.update(held.__dict__)
        memo[id(held)] = function  # it may hold itself
        for cell, original in zip(cells, held.__closure__, strict=True):
            if not _is_empty(original):
                cell.cell_contents = _rebound(original.cell_contents, memo)
    return memo[id(held)]


def _encloses(wrapper: Any, module: nn.Module) -> bool:
    """Does it lead to the class's forward of `module`, through however many wrappers?"""
    own = inspect.getattr_static(type(module), "forward")  # a scripted module's class has none to ask for
    if hasattr(wrapper, "__wrapped__") and inspect.unwrap(wrapper) is inspect.unwrap(own):
        return True
    function = getattr(wrapper, "__func__", wrapper)
    for cell in getattr(function, "__closure__", None) or ():
        if _is_empty(cell):
            continue
        held = cell.cell_contents
        if getattr(held, "__self__", None) is module and getattr(held, "__func__", None) is own:
            return True
        if callable(held) and held is not wrapper and getattr(held, "__closure__", None) and _encloses(held, module):
            return True
    return False


def _is_empty(cell: CellType) -> bool:
    """Is it a variable that was not set yet?"""
    try:
        cell.cell_contents  # noqa: B018  # reading it is the question
    except ValueError:
        return True
    return False
