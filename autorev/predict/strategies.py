"""The ways to train that are compared, and those of them that are PyTorch's own: what each keeps between forward and
backward, and what it computes twice.

Reversible ones are run by the engine itself (`simulate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autorev.couplings.choose import coupling_for
from autorev.rewrite.request import Request, check_request, in_pieces

Run = Callable[[torch.Tensor], Any]
"""Runs one block: stream in, whatever the block returns out."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the comparison."""

    name: str
    kind: str
    """plain, checkpoint, sac, offload or reversible."""
    request: Request | None = None
    """What `convert` would be asked for, of a reversible one."""
    preserves_function: bool = True
    note: str = ""
    keep_last: int | tuple[int, ...] = 0
    """Blocks at the end of a reversible chain that are stored instead of recomputed: of all alike, or one by one."""

    @property
    def in_pieces(self) -> bool:
        """Is a step less than a block?"""
        return self.request is not None and in_pieces(self.request, check_request(self.request))

    def side_bits(self, number: int, blocks: int) -> int:
        """What block `number` of a chain of `blocks` keeps of an element, where a block is one step."""
        if self.request is None or self.in_pieces or isinstance(self.request.gamma, Mapping):
            return 0
        preset = check_request(self.request)
        return coupling_for(preset, "", number, blocks, self.request.gamma, None).side_bits

    def stored_of(self, chain: int) -> int:
        """Blocks at the end of the chain of that number that are stored."""
        return self.keep_last if isinstance(self.keep_last, int) else self.keep_last[chain]


def reversible(name: str, note: str, preserves_function: bool = False) -> Method:
    """The coupling of that name as `convert` has it by default."""
    return Method(name, "reversible", Request(name), preserves_function, note)


METHODS: tuple[Method, ...] = (
    Method("plain", "plain", note="torch autograd keeps every activation"),
    Method("checkpoint", "checkpoint", note="torch.utils.checkpoint around every block"),
    Method("offload", "offload", note="checkpoint, with the blocks' inputs kept in host memory"),
    reversible("momentum", "gamma = 1/8, c = 15/16, exact", preserves_function=True),
    reversible("bdia", "gamma = +-1/2, exact"),
    reversible("leapfrog", "gamma = 1, c = 1"),
    reversible("midpoint", "gamma = -1, c = 2"),
    reversible("midpoint_a", "gamma = -a, a = n/8 per layer"),
    reversible("hamiltonian", "two streams (q, p)"),
    reversible("revnet", "two streams (x1, x2)"),
)


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
