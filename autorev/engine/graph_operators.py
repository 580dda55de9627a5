"""Operators of autorev's own in a compiled graph (NOTE [ Whole graph ] in `traced`): what is looked at when it runs.

Importing this defines them, as `torch.ops.autorev`.
"""

import torch

from autorev.couplings.arithmetic import LIMIT, FixedPoint
from autorev.engine.chain import chain_called
from autorev.engine.grid import check_largest, grid_at_start
from autorev.errors import FixedPointRangeError, ReconstructionError


@torch.library.custom_op("autorev::grid_of", mutates_args=())
def _grid_of(stream: torch.Tensor, key: str) -> torch.Tensor:
    """2^s of the grid that this pass begins with."""
    arithmetic = grid_at_start(chain_called(key), stream)
    assert isinstance(arithmetic, FixedPoint)
    return torch.full((), 2.0**arithmetic.fraction_bits, dtype=torch.float64, device=stream.device)


@torch.library.custom_op("autorev::held", mutates_args=())
def _held(largest: torch.Tensor, grid: torch.Tensor, key: str) -> torch.Tensor:
    """0, once it is known that the grid has held the stream."""
    if int(largest) >= LIMIT:
        chain, arithmetic = chain_called(key), FixedPoint(round(float(grid.log2())))
        try:
            check_largest(arithmetic, largest, chain.name)
        except FixedPointRangeError:
            chain.begin_coarser(arithmetic)
            raise
    return torch.zeros((), dtype=torch.int32, device=largest.device)


@torch.library.custom_op("autorev::after", mutates_args=())
def _after(gradient: torch.Tensor) -> torch.Tensor:
    """0, behind the gradient."""
    return torch.zeros((), dtype=torch.int32, device=gradient.device)


@torch.library.custom_op("autorev::as_it_is", mutates_args=())
def _as_it_is(value: torch.Tensor) -> torch.Tensor:
    """The same, from memory."""
    return value.clone()


@torch.library.custom_op("autorev::rebuilt", mutates_args=())
def _rebuilt(left: torch.Tensor, grid: torch.Tensor, key: str, path: str) -> torch.Tensor:
    """0, once it is known that the state at the start is what it was."""
    chain, rest = chain_called(key), int(left)
    chain.drifts[chain.name] = rest / float(grid)
    if rest:
        raise ReconstructionError(
            f"the compiled backward pass of {chain.name} did not come back to the state it began with at {path} "
            f"({rest} grid steps off): its branches were compiled to round otherwise than forward, or weights were "
            "changed in between. No gradient of this step may be used; convert with compile='blocks'"
        )
    return torch.zeros((), dtype=grid.dtype, device=left.device)


@_grid_of.register_fake
def _(stream: torch.Tensor, key: str) -> torch.Tensor:
    return stream.new_empty((), dtype=torch.float64)


@_held.register_fake
def _(largest: torch.Tensor, grid: torch.Tensor, key: str) -> torch.Tensor:
    return largest.new_empty((), dtype=torch.int32)


@_after.register_fake
def _(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty((), dtype=torch.int32)


@_as_it_is.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


@_rebuilt.register_fake
def _(left: torch.Tensor, grid: torch.Tensor, key: str, path: str) -> torch.Tensor:
    return grid.new_empty(())
