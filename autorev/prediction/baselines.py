"""PyTorch's own ways to keep less of a block between forward and backward, as predictions run them.

Reversible ones are run by the engine itself (`chains`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from autorev.rewrite.checkpointed_forward import selecting

Run = Callable[[torch.Tensor], Any]
"""Runs one block: stream in, whatever the block returns out."""


def run_checkpointed(run: Run, stream: torch.Tensor) -> Any:
    """PyTorch's own non-reentrant checkpoint: keeps the block's input."""
    return checkpoint(run, stream, use_reentrant=False)


def run_selective(run: Run, stream: torch.Tensor) -> Any:
    """PyTorch's selective checkpoint: keeps the block's input and what `selective_policy` says."""
    return checkpoint(run, stream, use_reentrant=False, context_fn=selecting)


def run_offloaded(run: Run, stream: torch.Tensor) -> Any:
    """A checkpoint whose input is kept on the host: forgotten here, allocated again when it is needed."""
    return checkpoint(_WithoutInput(run, stream), use_reentrant=False)


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
