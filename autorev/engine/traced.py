"""Steps of a chain inside of one compiled graph, forward and backward.

NOTE [ Whole graph ]

Dynamo traces the model's own loop, with a block's branch as a graph of its own (`rewrite.traced_block`). AOTAutograd
then runs what is here, on fake tensors, and what it sees is the compiled program.

    forward     out = x + f(x);  (H, V), out -> (H', V'), by `couplings.integers`
    backward    H = H' - V';  x = decode(H);  out once more, with its gradients;  V of V', out

A tape would hold the state beside autograd. Here it goes back the way that gradients do: each step also returns a
tensor without values for H' and one for V', whose "gradients", from the step behind, are the bits of H' and V' as
floats. Nothing adds to them: one step alone is given them. The last step has no one behind it and saves H' and V'; any
step does, and the compiler drops what backward does not read. So two streams are kept, and the side bits.

Rule 1. A step is undone when its gradient is there, not sooner: what backward computes of saved tensors alone, the
        partitioner may move to the forward pass, and would keep every activation. `after` ties V' to the gradient.
Rule 2. Both runs of a branch must round alike, and a compiler keeps fused values wider than their dtype says. Where a
        value of 16 bits leaves a branch or enters one, `settled` rounds it.
Rule 3. What remains (pytorch#192845) is checked: `rebuilt` looks at the state that backward comes back to. It is an
        operator of the compiled program, and raises an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import autorev.engine.graph_operators  # noqa: F401  # defines them
from autorev.couplings.integers import Advanced, advanced, decoded
from autorev.couplings.velocity import Velocity


@dataclass(frozen=True, eq=False)
class TracedState:
    """What travels beside the stream in a compiled pass."""

    stream: torch.Tensor
    """H."""
    velocity: torch.Tensor
    """V."""
    largest: torch.Tensor
    """The largest |H| so far, int64."""
    grid: torch.Tensor
    """2^s, float32 or float64."""
    back: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Without values: their gradients are the bits of H, those of V, and the gradient of the velocity."""

    @property
    def leading(self) -> tuple[torch.Tensor, ...]:
        """In order."""
        return (self.stream, self.velocity, self.largest, self.grid, *self.back)


@dataclass(eq=False)
class TracedPass:
    """One pass through a chain, while it is traced."""

    given: tuple[tuple[Any, ...], dict[str, Any]]
    """The arguments of the module that holds the loop."""
    latest: TracedState | None = None
    """What the last step left; None before the first step and behind the last."""
    handed: torch.Tensor | None = None
    """The stream that it returned."""
    number: int = -1
    """That step's."""


HELD = 7
"""How many tensors `leading` are: a branch's graph takes them first."""
RETURNED = 6
"""How many it returns behind `out`: all but the grid, which stays."""


def begun(stream: torch.Tensor, key: str) -> tuple[TracedState, torch.Tensor]:
    """The first state of a pass, and the stream as the first branch reads it. Traced by Dynamo."""
    kind = torch.float64 if stream.dtype is torch.float64 else torch.float32
    given = stream.detach()
    grid = torch.ops.autorev.grid_of(given, key).to(kind)
    first = (given.to(kind) * grid).round().to(torch.int32)
    size = torch.zeros((), dtype=torch.int64, device=stream.device)
    entered = _Enter.apply(stream, first, grid)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return TracedState(first, torch.zeros_like(first), size, grid, valueless(given)), entered


class _Enter(torch.autograd.Function):
    """The gradient goes straight through the rounding to the grid."""

    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, first: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return settled(decoded(first, 1 / grid, stream.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def settled(value: torch.Tensor) -> torch.Tensor:
    """The same, rounded to its dtype whatever a compiler fuses it with (Rule 2).

    Half to even, by the bits of a float32: a cast there and back is nothing to a compiler that computes in float32.
    """
    if value.dtype is torch.bfloat16:
        wide = value.float()
        bits = wide.view(torch.int32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
        return torch.where(wide.isfinite(), rounded, wide).to(value.dtype)
    if value.dtype is torch.float16:
        settled: torch.Tensor = torch.ops.autorev.as_it_is(value)
        return settled
    return value


def without_gradient(
    state: TracedState, out: torch.Tensor, x: torch.Tensor, coupling: Any, key: str | None
) -> tuple[TracedState, torch.Tensor]:
    """A step in a pass without gradients; `key`: of its chain, if this is the last one. Traced by Dynamo."""
    step = advance(coupling, state.stream, state.velocity, state.grid, settled(out), x)
    largest = torch.maximum(state.largest, step.largest)
    stream = step.stream if key is None else step.stream + torch.ops.autorev.held(largest, state.grid, key)
    new = settled(decoded(stream, 1 / state.grid, out.dtype))
    return TracedState(step.stream, step.velocity, largest, state.grid, state.back), new


def advance(
    coupling: Velocity, stream: torch.Tensor, velocity: torch.Tensor, grid: torch.Tensor, out: torch.Tensor, x: Any
) -> Advanced:
    gamma = coupling.gamma
    if not gamma:
        velocity = torch.zeros_like(velocity)
    return advanced(stream, velocity, out, x, gamma.numerator or 1, grid * coupling.c, coupling.side_bits)


def valueless(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three tensors of one zero, for their gradients: the bits of H and V, and the velocity's gradient."""
    kind = torch.float64 if like.dtype is torch.float64 else torch.float32
    kinds = (torch.float32, torch.float32, kind)
    first, second, third = (torch.zeros((), dtype=each, device=like.device).expand(like.shape) for each in kinds)
    return first, second, third
