"""Attention in which each position looks at itself and at those before it, and at no others, as it is called.

A call of `scaled_dot_product_attention` says what it does (`is_causal`), where operators that are written out or
another library's kernel do not. Of one that is given a mask, the mask's values say it: here it only has to be the one
that the module is called with (`masks`). Modules in which positions meet in one such call, and nowhere else, can be run
a tile of positions at a time, in order.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from autorev.capture.source import caller_line
from autorev.detect.masks import OperatorsAndMask
from autorev.detect.positions import MixesError, Positions


def attention_as_written(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The arguments of `scaled_dot_product_attention`, which has no signature of its own."""


ATTENTION = "attention"
"""What a call is noted as, among operators."""
ARGUMENTS = inspect.signature(attention_as_written)


class CausalAttention(TorchFunctionMode):
    """Tells `watch` where the positions are in what attention returns, and refuses any that cannot be causal."""

    def __init__(self, watch: OperatorsAndMask) -> None:
        super().__init__()
        self.watch, self.calls = watch, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        watch, where = self.watch, caller_line()
        self.calls += 1
        given = ARGUMENTS.bind(*args, **kwargs)
        given.apply_defaults()
        named = given.arguments
        query, key, value = named["query"], named["key"], named["value"]
        at = Positions(query.dim() - 2)
        if self.calls > 1:
            self._refuse(f"it attends more than once, again at {where}")
        elif named["attn_mask"] is not None and not watch.is_mask(named["attn_mask"]):
            self._refuse(f"attention at {where} is given a mask that the module is not called with")
        elif named["dropout_p"]:
            self._refuse(f"attention at {where} drops out")
        elif watch.length > 1 and not named["is_causal"] and named["attn_mask"] is None:
            self._refuse(f"attention at {where} looks at later positions, too")
        elif watch.length > 1 and any(watch.positions(tensor) != at for tensor in (query, key, value)):
            self._refuse(f"attention at {where} is not over the positions of the input")
        watch.computed.append((ATTENTION, f"{named['scale']}, {named['enable_gqa']}, {named['attn_mask'] is None}"))
        watch.aside = True
        try:
            result: torch.Tensor = func(*args, **kwargs)
        finally:
            watch.aside = False
        watch.note(result, at if watch.length > 1 else Positions(0))
        return result

    def _refuse(self, why: str) -> None:
        self.watch.refuse(MixesError(why))
