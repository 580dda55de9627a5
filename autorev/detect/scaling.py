"""Constants that a stream is multiplied by: a chain takes their product along as the unit of its state.

A number of the code is one, and so is a tensor of one element that the module holds and that needs no gradient (a
buffer, Gemma 4's `layer_scalar`). What is learned, or computed from data, is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from autorev.capture.fake import number_in
from autorev.errors import ConversionError

MULTIPLICATIONS = {"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__", "imul"}
DIVISIONS = {"div", "div_", "divide", "divide_", "true_divide", "true_divide_", "truediv", "itruediv"}
DIVISIONS |= {"__truediv__", "__itruediv__"}
NEGATIONS = {"neg", "neg_", "negative", "negative_", "__neg__"}
PRODUCTS = MULTIPLICATIONS | DIVISIONS | NEGATIONS
"""Names of functions that multiply or divide."""
LEAST, MOST = 2.0**-20, 2.0**10
"""Of one step's factor: below, too many bits fall away at once, above, too few are left of what came in."""
LEAST_IN_ALL, MOST_IN_ALL = 2.0**-64, 2.0**20
"""The same of the product over a chain."""


@dataclass(frozen=True)
class Constant:
    """A tensor of one element that a module holds."""

    path: str
    """Below the module whose code reads it."""
    divides: bool
    known: float | None
    """Its value at the analysis, where it had one."""


@dataclass(frozen=True)
class Factor:
    """A product of constants."""

    number: float = 1.0
    tensors: tuple[Constant, ...] = ()

    def __mul__(self, other: Factor) -> Factor:
        return Factor(self.number * other.number, (*self.tensors, *other.tensors))

    @property
    def known(self) -> float | None:
        """Its value at the analysis; None where a model without weights was analysed."""
        values = [_power(c.known, c.divides) for c in self.tensors if c.known is not None]
        return math.prod(values, start=self.number) if len(values) == len(self.tensors) else None

    def value(self, module: nn.Module) -> float:
        """Its value for the next call of `module`, whose code it stands in; 1 for what has none.

        Raises:
            ConversionError: one of the tensors is trained now.
        """
        return math.prod((_power(_read(module, c.path), c.divides) for c in self.tensors), start=self.number)


def products(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Any, Any, bool]]:
    """(what is multiplied, by what, or is it divided by that?) of a call; both ways round for a product."""
    name = getattr(function, "__name__", function)
    if name in NEGATIONS and len(args) == 1:
        return [(args[0], -1, False)]
    if kwargs or len(args) != 2 or name not in PRODUCTS:
        return []
    first, second = args
    return [(first, second, True)] if name in DIVISIONS else [(first, second, False), (second, first, False)]


def factor_in_graph(node: fx.Node, is_stream: Callable[[fx.Node], bool]) -> tuple[fx.Node, Factor] | None:
    """The stream that `node` multiplies by a constant, and that; None for any other node."""
    if node.op not in ("call_function", "call_method") or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    for source, other, divides in products(node.target, node.args, node.kwargs):
        if not isinstance(source, fx.Node) or not is_stream(source):
            continue
        if node.meta["val"].shape == source.meta["val"].shape and (factor := _constant(other, divides)) is not None:
            return source, factor
    return None


def _constant(operand: Any, divides: bool) -> Factor | None:
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return Factor(_power(operand, divides)) if operand or not divides else None
    if not isinstance(operand, fx.Node) or operand.op != "get_attr" or "." not in f".{operand.target}":
        return None
    value = operand.meta["val"]
    written = any(operand in user.meta["mutates"] for user in operand.users)
    if not is_constant(value) or written or str(operand.target).startswith("_captured_constant"):
        return None
    return Factor(1.0, (Constant(str(operand.target), divides, number_in(value)),))


def factor_in_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], stream: Any) -> float | None:
    """By which constant a call that is being made multiplies `stream`; None where it does something else."""
    for source, other, divides in products(function, args, kwargs):
        if source is stream and (is_constant(other) or (isinstance(other, int | float) and (other or not divides))):
            return _power(number_of(other) if isinstance(other, torch.Tensor) else other, divides)
    return None


def is_constant(value: Any) -> bool:
    """Is it a tensor of one number, which needs no gradient?"""
    one = isinstance(value, torch.Tensor) and value.numel() == 1 and value.is_floating_point()
    return one and not value.requires_grad


def is_held(factor: float) -> bool:
    """Can a chain take a step with it?"""
    return LEAST <= abs(factor) <= MOST


def number_of(tensor: torch.Tensor) -> float:
    """The number in a tensor, which a GPU is asked for once; 1 where it has no value."""
    version = 0 if tensor.is_inference() else tensor._version
    found: tuple[int, float] | None = _numbers.get(tensor)
    if found is None or found[0] != version:
        number = number_in(tensor)
        found = _numbers[tensor] = version, 1.0 if number is None else number
    return found[1]


_numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read(module: nn.Module, path: str) -> float:
    holder, _, name = path.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(holder), name)
    if tensor.requires_grad:
        raise ConversionError(
            f"{path} of {type(module).__name__} multiplies a reversible stream, and was a constant when the model was "
            "converted: it needs a gradient now. Freeze it, or revert the model"
        )
    return number_of(tensor)


def _power(number: float, divides: bool) -> float:
    if not divides:
        return float(number)
    return 1 / number if number else math.inf
