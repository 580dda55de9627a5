"""A workload: how to build a model and an example call of it, at any batch size and sequence length.

It is the one thing the front ends (MODEL on the command line, a model in user code) hand to capture and prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward call."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model that can be built and called without its weights.

    `build(dtype)` and `example(batch, sequence)` are called with fake tensors switched on, so nothing they
    make is allocated. `build` returns the model with floating parameters of `dtype`; `example` returns arguments that
    make the model return a `.loss` where it can (labels included), and plain outputs where it cannot.
    """

    name: str
    source: str
    """Where the model came from, in words: `profile llama-3.1-8b`, a path, `package.module:factory`."""
    build: Callable[[torch.dtype], torch.nn.Module]
    example: Callable[[int, int | None], Call]
    default_batch: int
    default_sequence: int | None
    """None: the model has no sequence axis that may be changed."""
    longest_sequence: int | None
    """The model's own limit (position embeddings); None where it has none or none is known."""
    resizable: bool = True
    """May `batch` be varied? Not where the user's example inputs share no first axis."""
