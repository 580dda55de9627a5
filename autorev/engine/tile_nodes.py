"""The nodes of autograd's graph between the tiles of a call: they cut its inputs, and put together what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autorev.alike import stand_for, standing_for
from autorev.engine.autograd import apply
from autorev.engine.mask import own_part


def cut(x: torch.Tensor, axis: int, start: int, length: int, is_mask: bool = False) -> torch.Tensor:
    """A tile, in memory of its own layout in every run: kernels sum in another order where it is another."""
    return own_part(x, start, length) if is_mask else x.narrow(axis, start, length).contiguous()


def read(
    inputs: Sequence[torch.Tensor], axis: int, start: int, length: int, mask: int | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs, and a tile of each; `mask`: which of them is one."""
    whole, tiles = [], []
    for number, x in enumerate(inputs):
        known = x.requires_grad
        passed, tile = (
            apply(Read, x, axis, start, length) if known else (x, cut(x, axis, start, length, number == mask))
        )
        whole.append(passed)
        tiles.append(tile)
    return whole, tiles


class Read(torch.autograd.Function):
    """x -> x, its tile. In backward, tiles put their gradients into one tensor, the last tile first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: int, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.place, ctx.shape = (axis, start, length), x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), cut(x, axis, start, length)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, grad_tile = grads
        if grad_tile is not None:
            # Only tiles behind this one have written to it: nobody else has seen it.
            grad = grad_tile.new_zeros(ctx.shape) if grad is None else grad
            grad.narrow(*ctx.place).copy_(grad_tile)
        return grad, None, None, None


class Write(torch.autograd.Function):
    """Puts a tile into its place in `out`."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, tile: torch.Tensor, axis: int, start: int) -> torch.Tensor:
        ctx.place, ctx.stands_for = (axis, start, tile.shape[axis]), standing_for()
        ctx.mark_dirty(out)
        out.narrow(*ctx.place).copy_(tile)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        stand_for(ctx.stands_for)  # until the tile before it: autograd finishes one first
        return grads[0], grads[0].narrow(*ctx.place), None, None


class Values(torch.autograd.Function):
    """Values that require a gradient and may be written to, unlike a leaf; nobody asks for the gradient."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, made: Callable[[], torch.Tensor]) -> torch.Tensor:
        return made()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("the first run's graph has the gradients of a tiled call")


class Keep(torch.autograd.Function):
    """Saves tensors, for whoever asks its node for them."""

    @staticmethod
    def forward(ctx: Any, dummy: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return dummy.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("nothing is computed from what this returned")
