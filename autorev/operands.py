"""What an operator is given and returns, looked through.

Its schema nests tensors and numbers in lists alone: torch's pytrees, which know every kind of container, are slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def leaves_of(values: Iterable[Any]) -> Iterator[Any]:
    """All that is no list or tuple, in order."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves_of(value)
        else:
            yield value


def tensors_of(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
    """The tensors among an operator's arguments, or its results."""
    given = [*leaves_of(args), *leaves_of(kwargs.values())] if kwargs else leaves_of(args)
    return [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
