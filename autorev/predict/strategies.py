"""The ways to run a block that are compared: what each keeps between forward and backward, and what it computes twice.

A strategy is a function `run(block) -> block`: it takes the callable that runs a block on its stream and returns one
that does the same under the strategy. The reversible ones here have the memory behaviour of the engine (the tape keeps
the chain's last state and the side bits; backward rebuilds the input, evaluates the branch once, undoes the step)
without its numbers: they are run on fake tensors, to be counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autorev.analysis import Category
from autorev.predict.tracker import MemoryTracker

Run = Callable[[torch.Tensor], Any]
"""Runs one block: stream in, whatever the block returns out."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One row of the comparison."""

    name: str
    kind: str
    """plain, checkpoint, sac, offload or reversible."""
    side_bits: int = 0
    """k of gamma = n / 2^k; 0 where nothing need be stored."""
    preserves_function: bool = True
    note: str = ""
    keep_last: int | tuple[int, ...] = 0
    """Blocks at the end of a reversible chain that are stored instead of recomputed: of all alike, or one by one."""
    like: str = ""
    """Another strategy with the same memory and work: predicted once."""

    def stored_of(self, chain: int) -> int:
        """Blocks at the end of the chain of that number that are stored."""
        return self.keep_last if isinstance(self.keep_last, int) else self.keep_last[chain]


STRATEGIES: tuple[Strategy, ...] = (
    Strategy("plain", "plain", note="torch autograd keeps every activation"),
    Strategy("checkpoint", "checkpoint", note="torch.utils.checkpoint around every block"),
    Strategy("offload", "offload", note="checkpoint, with the blocks' inputs kept in host memory"),
    Strategy("momentum", "reversible", 3, note="gamma = 1/8, c = 15/16, exact"),
    Strategy("bdia", "reversible", 1, False, "gamma = +-1/2, exact"),
    Strategy("leapfrog", "reversible", 0, False, "gamma = 1, c = 1"),
    Strategy("midpoint", "reversible", 0, False, "gamma = -1, c = 2", like="leapfrog"),
    Strategy("midpoint_a", "reversible", 3, False, "gamma = -a, a = n/8 per layer", like="momentum"),
    Strategy("hamiltonian", "reversible", 0, False, "two streams (q, p)", like="leapfrog"),
    Strategy("revnet", "reversible", 0, False, "two streams (x1, x2)", like="leapfrog"),
)


@dataclass
class ChainState:
    """What a reversible chain's tape holds while it is simulated."""

    streams: list[torch.Tensor] = field(default_factory=list)
    """The last state: two int32 tensors."""
    bits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Block number -> packed side bits."""
    velocity_gradient: torch.Tensor | None = None
    """The gradient of v, the second stream of the backward pass."""


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
    return checkpoint(_Forgetful(run, stream), use_reentrant=False)


def run_reversible(
    run: Run,
    stream: torch.Tensor,
    place: Callable[[Any, torch.Tensor], Any],
    take: Callable[[Any], torch.Tensor],
    state: ChainState,
    number: int,
    side_bits: int,
    recompute: bool,
    tracker: MemoryTracker,
) -> Any:
    """One block of a reversible chain.

    `take` picks the stream out of what the block returns and `place` puts another in its stead. `recompute=False` is
    `keep_last`: the block's activations are stored, as its backward comes next anyway.
    """
    if not state.streams:
        with tracker.labelled(Category.STREAMS):
            state.streams = [torch.zeros_like(stream, dtype=torch.int32) for _ in range(2)]
    if recompute:
        returned = checkpoint(
            _Forgetful(run, stream, lambda: _undo(state, number, side_bits)),
            use_reentrant=False,
            early_stop=False,
        )
    else:
        returned = run(stream)
    delta = take(returned)
    with torch.no_grad():
        if side_bits and recompute:
            with tracker.labelled(Category.SIDE_BITS):
                packed = (stream.numel() * side_bits + 7) // 8
                state.bits[number] = torch.empty(packed, dtype=torch.uint8)
                tracker.relabel(state.bits[number], Category.SIDE_BITS)
        rounded = torch.empty_like(delta, dtype=torch.int32)  # round(c f(h) 2^s), then V', then H'
        state.streams[1].add_(rounded)
        state.streams[0].add_(state.streams[1])
        del rounded
    with tracker.labelled(Category.STREAMS):
        after = _Couple.apply(stream, delta, state)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return place(returned, after)


class _Forgetful:
    """Runs the block on its input once and forgets it; run again, it asks for a fresh one."""

    def __init__(self, run: Run, stream: torch.Tensor, rebuilt: Callable[[], None] | None = None) -> None:
        self.run, self.stream, self.rebuilt = run, [stream], rebuilt
        self.like = torch.empty(0, dtype=stream.dtype), stream.shape, stream.requires_grad

    def __call__(self) -> Any:
        if self.stream:
            return self.run(self.stream.pop())
        sample, shape, requires_grad = self.like
        if self.rebuilt is not None:
            self.rebuilt()
        with torch.no_grad():
            stream = sample.new_empty(shape)
        return self.run(stream.requires_grad_(requires_grad))


def _undo(state: ChainState, number: int, side_bits: int) -> None:
    """H = H' - V', V = (V' - round(...)) * 2^k + r: in place but for one temporary; the side bits are spent."""
    with torch.no_grad():
        state.streams[0].sub_(state.streams[1])
        state.streams[1].sub_(torch.empty_like(state.streams[1]))
    if side_bits:
        del state.bits[number]


class _Couple(torch.autograd.Function):
    """The coupling as autograd sees it: h' from h and c f; saves nothing."""

    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, delta: torch.Tensor, state: ChainState) -> torch.Tensor:
        ctx.state = state
        return torch.empty_like(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        ctx.state.velocity_gradient = torch.empty_like(grad)  # gamma * grad_v + grad_h
        return grad, torch.empty_like(grad), None
