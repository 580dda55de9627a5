"""A user's own `torch.autograd.Function` as the target of a graph's node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch


@dataclass(frozen=True)
class Applied:
    """`function.apply`, by its class.

    The bound method itself says that it comes from `torch.autograd.function`, where fx's generated code would then look
    for it.
    """

    function: type[torch.autograd.Function]
    apply: Callable[..., Any] = field(repr=False)
    """Of `torch.autograd.Function`, as it was before the capture took its place."""

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return MethodType(self.apply, self.function)(*args, **kwargs)
