"""PyTorch's own ways to keep less of a block between forward and backward, as predictions run them.

Reversible ones are run by the engine itself (`chains`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Run = Callable[[torch.Tensor], Any]
"""Runs one block: stream in, whatever the block returns out."""


def run_checkpointed(run: Run, stream: torch.Tensor) -> Any:
    """PyTorch's own non-reentrant checkpoint: keeps the block's input."""
    return checkpoint(run, stream, use_reentrant=False)


def run_selective(run: Run, stream: torch.Tensor) -> Any:
    """PyTorch's selective checkpoint: keeps the block's input and what `selective_policy` says."""
    contexts = partial(create_selective_checkpoint_contexts, selective_policy())
    return checkpoint(run, stream, use_reentrant=False, context_fn=contexts)


def selective_policy() -> Callable[..., CheckpointPolicy]:
    """A policy as large training runs use it: attention's output is kept, and every second matrix product."""
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default}
    counts = {False: 0, True: 0}  # in the first run and in the second

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in attention:
            return CheckpointPolicy.MUST_SAVE
        if op in products:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


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
