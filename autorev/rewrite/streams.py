"""Which of the tensors that running code has are its stream, in which form, and what is added to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autorev.detect.scaling import DIVISIONS, MULTIPLICATIONS, NEGATIONS, factor_in_call
from autorev.detect.sums import FURTHER_OPERANDS, ONTO_FIRST, factor_of
from autorev.rewrite.layout import Form, Multiplied, Reshaped, factor_in, layout_of

SUMS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__", "iadd"), torch.add),
    **dict.fromkeys(("sub", "__sub__", "sub_", "__isub__", "isub", "subtract", "subtract_"), torch.sub),
    **dict.fromkeys(("addcmul", "addcmul_"), torch.addcmul),
    **dict.fromkeys(("addcdiv", "addcdiv_"), torch.addcdiv),
    **dict.fromkeys(("addmm", "addmm_"), torch.addmm),
    **dict.fromkeys(("baddbmm", "baddbmm_"), torch.baddbmm),
    **dict.fromkeys(("addbmm", "addbmm_"), torch.addbmm),
    **dict.fromkeys(("addmv", "addmv_"), torch.addmv),
    **dict.fromkeys(("addr", "addr_"), torch.addr),
    **dict.fromkeys(("index_add", "index_add_"), torch.index_add),
    **dict.fromkeys(("scatter_add", "scatter_add_"), torch.scatter_add),
    **dict.fromkeys(("lerp", "lerp_"), torch.lerp),
    "sum": torch.sum,
}
FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    **SUMS,
    **dict.fromkeys(MULTIPLICATIONS, torch.mul),
    **dict.fromkeys(DIVISIONS, torch.div),
    **dict.fromkeys(NEGATIONS, torch.neg),
}
"""By the names that code calls them by, in place or not: what ends a step is computed anew."""


@dataclass(frozen=True, eq=False)
class Skip:
    """The operand of a sum, or of a product with a constant, that is the stream."""

    form: Form
    factor: float
    """What the stream was multiplied by when that is done."""


class Streams:
    """Of one step."""

    def __init__(self) -> None:
        self.forms: dict[int, tuple[weakref.ref[torch.Tensor], Form]] = {}
        self.stacked: dict[int, list[torch.Tensor]] = {}
        """What the latest stack holds: `torch.stack([x, f(x)]).sum(0)` is a sum, too."""

    def mark(self, tensor: Any, form: Form) -> None:
        """It is the stream."""
        if isinstance(tensor, torch.Tensor):
            self.forms[id(tensor)] = weakref.ref(tensor), form

    def form(self, tensor: Any) -> Form | None:
        """The form of a tensor that is the stream; None for any other."""
        found = self.forms.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def skip(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Skip | None:
        """What a call by this name adds something to that is not the stream, or multiplies by a constant."""
        function = FUNCTIONS[name]
        operands = [*args, *(kwargs[key] for key in FURTHER_OPERANDS if key in kwargs)]
        if name == "sum":
            operands = self.stacked.pop(id(args[0]), [])
        forms = {number: form for number, item in enumerate(operands) if (form := self.form(item)) is not None}
        fewest = min((_products(form) for form in forms.values()), default=0)
        found = [number for number, form in forms.items() if _products(form) == fewest]
        if len(found) != 1:
            return None
        (number,) = found
        stream: torch.Tensor = operands[number]
        if name not in SUMS:
            factor = factor_in_call(function, args, kwargs, stream)
        else:
            factor = factor_of(function, args, kwargs, number) if self._is_kept(function, stream, operands) else None
        return None if factor is None else Skip(forms[number], factor * factor_in(forms[number]))

    def _is_kept(self, function: Any, stream: torch.Tensor, operands: list[Any]) -> bool:
        """Has the sum the stream's shape?"""
        if function in ONTO_FIRST:
            return stream is operands[0]
        others = (o for o in operands if isinstance(o, torch.Tensor) and o is not stream)
        return bool(torch.broadcast_shapes(stream.shape, *(o.shape for o in others)) == stream.shape)

    def mark_alias(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """A function that is no sum has returned it, perhaps of the stream."""
        form = self.form(args[0]) if args else None
        if form is None or not isinstance(result, torch.Tensor) or result is args[0]:
            return
        more = layout_of(func, name, args, kwargs, result)
        if more is None:
            self.mark_view((args[0],), result)
        else:
            self.mark(result, (*form, *more))

    def mark_view(self, args: tuple[Any, ...], result: Any) -> None:
        """Whatever returned it: all of the stream's memory, in the same order, is the stream."""
        results = result if isinstance(result, tuple) else (result,)
        for source in args:
            form = self.form(source)
            if form is None or not source.is_contiguous():
                continue
            for one in results:
                if (
                    isinstance(one, torch.Tensor)
                    and self.form(one) is None
                    and one.numel() == source.numel()
                    and one.is_contiguous()
                    and one.untyped_storage()._cdata == source.untyped_storage()._cdata
                ):
                    self.mark(one, (*form, Reshaped(source.shape, one.shape)))


def _products(form: Form) -> int:
    return sum(isinstance(part, Multiplied) for part in form)
