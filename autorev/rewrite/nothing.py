"""Zeros that may only be added: what a deferred block is given for the part that its stream holds already.

At conversion the part reached the sum as it was, perhaps through a dropout of 0 or a factor of 1. Set to something else
later, these would change the sum, and of zeros nobody would see it. So whatever is computed of them is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_any

from autorev.detect.sums import is_times_one
from autorev.errors import ConversionError

_ADDED = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_LOOKED_AT = {"__get__", "detach", "requires_grad_", "expand", "expand_as", "__getitem__"}
_LAID_OUT = {"view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"}
_CAST = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}


class Nothing(torch.Tensor):
    """Zeros of any shape and dtype."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`.

        Raises:
            ConversionError: it computes something else of zeros than a sum.
        """
        kwargs = kwargs or {}
        name = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not tree_any(lambda leaf: isinstance(leaf, torch.Tensor), result) or name in _ADDED:
            return result  # a question about it; or the sum
        keeps = (
            name in _LOOKED_AT | _LAID_OUT | _CAST
            or _drops_nothing(func, args, kwargs)
            or is_times_one(name, args, kwargs)
        )
        if not keeps:
            raise ConversionError(
                f"{name} changes what a block of deferred residuals adds to its stream, which nothing did when the "
                "model was converted (a dropout of 0, a factor of 1?); set it back, or revert and convert anew"
            )
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


def _drops_nothing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func not in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout):
        return False
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    training = given.get("training", given.get("train", True))
    return not training or given.get("p", 0.5) == 0
