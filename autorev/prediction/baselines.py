"""PyTorch's own ways to keep less of a block between forward and backward, as predictions run them.

Reversible ones are run by the engine itself (`chains`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autorev.methods import Method
from autorev.rewrite.checkpointed_forward import checkpoint_of

Run = Callable[[torch.Tensor], Any]
"""Runs one block: stream in, whatever the block returns out."""


def run_checkpointed(method: Method, run: Run, stream: torch.Tensor) -> Any:
    """PyTorch's own non-reentrant checkpoint: keeps the block's input, and what `method` says."""
    return checkpoint_of(method)(run, stream, use_reentrant=False)


def run_offloaded(method: Method, run: Run, stream: torch.Tensor) -> Any:
    """A checkpoint whose input is kept on the host: forgotten here, allocated again when it is needed."""
    return checkpoint_of(method)(_WithoutInput(run, stream), use_reentrant=False)


class _WithoutInput:
    """Runs the block on its input once and lets go of it; run again, it makes a fresh one."""

    def __init__(self, run: Run, stream: torch.Tensor) -> None:
        self.run, self.stream = run, [stream]
        self.like = torch.empty(0, dtype=stream.dtype), stream.shape, stream.requires_grad

    def __call__(self) -> Any:
        if self.stream:
            return self.run(self.stream.pop())
        sample, shape, requires_grad = self.like
        with torch.no_grad():
            stream = sample.new_empty(shape)
        return self.run(stream.requires_grad_(requires_grad))
