"""Which operators of a graph add something to a tensor, and what."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

_adds = {operator.add, operator.iadd, torch.add, "add", "add_", "__radd__"}
_subtracts = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"}
_scaled_products = {torch.addcmul, torch.addcdiv, "addcmul", "addcmul_", "addcdiv", "addcdiv_"}
MATRIX_PRODUCTS: set[Any] = {torch.addmm, torch.addbmm, torch.baddbmm, torch.addmv, torch.addr}
MATRIX_PRODUCTS |= {"addmm", "addmm_", "addbmm", "addbmm_", "baddbmm", "baddbmm_", "addmv", "addmv_", "addr", "addr_"}
_averages: set[Any] = {torch.lerp, "lerp", "lerp_"}
_scatters: set[Any] = {torch.index_add, torch.scatter_add, "index_add", "index_add_", "scatter_add", "scatter_add_"}
ONTO_FIRST = _scaled_products | MATRIX_PRODUCTS | _scatters
"""They add to their first operand, whatever the shapes of the others."""
FURTHER_OPERANDS = ("other", "tensor1", "tensor2", "mat1", "mat2", "batch1", "batch2", "dim", "index", "source", "src")
"""What the operands of sums behind the first one are called, where they are given by name."""
_multiplies: set[Any] = {operator.mul, operator.truediv, torch.mul, torch.div, torch.true_divide}
_multiplies |= {"mul", "div", "true_divide", "__mul__", "__rmul__", "__truediv__"}


def add_operands(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """(first operand, the others) of an addition or subtraction of tensors; None for any other node."""
    if node.op not in ("call_function", "call_method") or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    operands = [*node.args, *(node.kwargs[k] for k in FURTHER_OPERANDS if k in node.kwargs)]
    if node.target in _adds | _subtracts and len(operands) >= 2:
        return operands[0], (operands[1],)
    if node.target in _scaled_products | MATRIX_PRODUCTS and len(operands) >= 3:
        return operands[0], tuple(operands[1:3])
    if node.target in _scatters and len(operands) >= 4:
        return operands[0], tuple(operands[2:4])
    if node.target in _averages and _weight(node.args, node.kwargs) is not None:
        return node.args[0], (node.args[1] if len(node.args) > 1 else node.kwargs["end"],)
    return _stacked(node)


def _stacked(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The same of `torch.stack([a, b, ...]).sum(0)`."""
    stack = node.args[0] if node.args else None
    if node.target not in (torch.sum, "sum") or not isinstance(stack, fx.Node) or stack.target is not torch.stack:
        return None
    dims = [n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", usual) for n, usual in ((stack, 0), (node, None))]
    tensors, kept = stack.args[0], node.meta["val"].dim() == stack.meta["val"].dim()
    if dims[0] != dims[1] or kept or not isinstance(tensors, list | tuple):
        return None
    return tensors[0], tuple(tensors[1:])


def scale_of(node: fx.Node) -> Any:
    """The factor that `torch.add(a, b, alpha=...)` puts on its second operand."""
    return node.kwargs.get("alpha", 1)


def is_subtraction(node: fx.Node) -> bool:
    """Is it `a - b`?"""
    return node.target in _subtracts


def factor_of_operand(node: fx.Node, number: int) -> float | None:
    """What a sum multiplies its operand `number` by, before it adds the others to that; None where nothing is added to
    that one, or where it is no number."""
    return factor_of(node.target, node.args, node.kwargs, number)


def factor_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], number: int) -> float | None:
    """The same of a function's call."""
    factor: Any = 1
    if function in _averages and (weight := _weight(args, kwargs)) is not None:
        factor = weight if number else 1 - weight
    elif number and function in ONTO_FIRST:
        return None
    elif number:
        factor = (-1 if function in _subtracts else 1) * kwargs.get("alpha", 1)
    elif function in MATRIX_PRODUCTS:
        factor = kwargs.get("beta", 1)
    return factor if isinstance(factor, int | float) and factor else None


def _weight(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """That of `lerp(a, b, weight)`, where it is a number."""
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    return weight if isinstance(weight, int | float) else None


def is_times_one(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Is it `x * 1.0` or `x / 1.0`, as where a model has a factor that was never set?"""
    known = function in _multiplies and len(args) == 2 and not kwargs
    return known and isinstance(args[1], int | float) and args[1] == 1
