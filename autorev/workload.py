"""A workload: how to build a model and an example call of it, at any batch size and sequence length.

It is the one thing the front ends (MODEL on the command line, a model in user code) hand to capture and prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autorev.errors import SettingError
from autorev.given import is_count

if TYPE_CHECKING:
    import torch

    from autorev.models.quantization import Scheme

MOST_TOKENS = 2**31
"""In one step: a thousand times what the largest clusters take, and in reach of 64-bit sizes."""
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
    walks_batch: bool = False
    """Does the model walk through its samples one at a time, in Python, as through their pictures?"""
    notes: tuple[str, ...] = ()
    """What its source leaves open, and was assumed."""
    scheme: Scheme | None = None
    """How its weights are quantised; None: they are not, or the built model has them quantised."""


def check_step(batch: int | None, sequence: int | None) -> None:
    """Raise where a step would be larger than any there is.

    Raises:
        SettingError: it would.
    """
    for what, count in (("samples", batch), ("tokens per sample", sequence)):
        if count is not None and not is_count(count):
            raise SettingError(f"a step has 1 or more {what}, a whole number, not {count!r}")
    if (batch or 1) * (sequence or 1) > MOST_TOKENS:
        tokens = "" if sequence is None else f" of {sequence:,} tokens"
        raise SettingError(
            f"a step of {batch or 1:,} samples{tokens} is larger than any there is; give {MOST_TOKENS:,} in all at most"
        )
