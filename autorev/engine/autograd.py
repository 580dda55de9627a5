"""The coupling as a node of autograd's graph: it computes values with the chain's arithmetic and saves none of them.

        x ----------+------------------------> couple --> x'     the stream, in the model's dtype
                    +--> branch --> out ---/          \
        p -------------------------------/             -> p'     the partner

The partner's values are on the tape; in the graph it is a tensor of the right shape and no memory (one zero, expanded),
which exists for its gradient. That is float32 at least: it is summed over the depth of the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autorev.couplings.arithmetic import Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State


def couple(
    coupling: Coupling,
    new: torch.Tensor,
    stream: torch.Tensor,
    partner: torch.Tensor | None,
    out: torch.Tensor,
    factor: float = 1.0,
    check: Callable[[], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x', p') with the gradients of `Coupling.vjp`, of a step from (factor x, factor p); `new` is x' without them,
    `check()` is asked before backward."""
    coupled: tuple[torch.Tensor, torch.Tensor] = apply(_Couple, coupling, [new], stream, partner, out, factor, check)
    return coupled


def apply(function: Any, *args: Any) -> Any:
    """`function.apply(*args)` of an `autograd.Function`, which torch leaves untyped."""
    return function.apply(*args)


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coupling: Coupling,
        made: list[torch.Tensor],
        stream: torch.Tensor,
        partner: torch.Tensor | None,
        out: torch.Tensor,
        factor: float,
        check: Callable[[], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.coupling, ctx.factor, ctx.check = coupling, factor, check
        ctx.set_materialize_grads(False)
        (new,) = made  # in a list it is no input of the node
        return new, _valueless(new)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.check is not None:
            ctx.check()
        grad_stream, grad_partner = grads
        grad_in, grad_carried, grad_out = ctx.coupling.vjp(grad_stream, grad_partner)
        if not ctx.needs_input_grad[3]:
            grad_carried = None
        if ctx.factor != 1:
            grad_in, grad_carried = (None if g is None else g * ctx.factor for g in (grad_in, grad_carried))
        return None, None, grad_in, grad_carried, grad_out, None, None


def _valueless(like: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=like.device).expand(like.shape)


def enter(arithmetic: Arithmetic, state: State, stream: torch.Tensor) -> torch.Tensor:
    """The chain's input as its first branch reads it; the gradient goes straight through the rounding to the grid."""
    if not isinstance(arithmetic, FixedPoint):
        return stream
    entered: torch.Tensor = apply(_Enter, stream, arithmetic, state)
    return entered


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, arithmetic: Arithmetic, state: State) -> torch.Tensor:
        return arithmetic.decode(state.stream, stream.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def read_out(arithmetic: Arithmetic, state: State, stream: torch.Tensor, partner: torch.Tensor | None) -> torch.Tensor:
    """(q + p) / 2 of a chain's last state, in the stream's dtype."""
    mean: torch.Tensor = apply(_ReadOut, stream, partner, arithmetic, state)
    return mean


class _ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: torch.Tensor, partner: torch.Tensor | None, arithmetic: Arithmetic, state: State
    ) -> torch.Tensor:
        wide = torch.float64 if stream.dtype is torch.float64 else torch.float32
        other = arithmetic.decode(state.partner, wide)
        return arithmetic.decode(state.stream, wide).add(other).div_(2).to(stream.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        half = grads[0] / 2
        return half, half if ctx.needs_input_grad[1] else None, None, None


def joined(stream: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`stream`, in its own memory, as the sum of `parts`: its gradient goes to each, and to what was done to each."""
    total: torch.Tensor = apply(_Joined, stream.detach(), *parts)
    return total


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        ctx.dtypes = [part.dtype for part in parts]
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(grads[0].to(dtype) for dtype in ctx.dtypes)


def straight_through(value: torch.Tensor, formula: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient of `formula`."""
    return value.detach() + (formula - formula.detach())
