"""The grid of a fixed-point stream: chosen for each forward pass, and coarsened within one that outgrows it.

A grid must be coarse enough for the largest activation and fine enough for the input of the chain. Where one step
leaves it, that step alone is taken back and taken again on a coarser one; the bits that fall away are kept beside the
step, as side bits are, so that backward comes by the same values. So no forward pass fails for its grid, and nothing
is rounded that does not have to be.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from autorev.couplings.arithmetic import LIMIT, Arithmetic, FixedPoint, grid_for
from autorev.couplings.coupling import Coupling, State
from autorev.couplings.side_bits import pack, unpack
from autorev.engine.digest import looked_at
from autorev.errors import FixedPointRangeError

if TYPE_CHECKING:
    from autorev.engine.chain import ReversibleChain

USUAL_FRACTION_BITS = 16
"""Of a grid that nothing is known for."""
HEAD_ROOM = 4.0
"""After a step that left the grid, activations may become so many times larger before the next one does."""
COARSEST_FOR_INPUT = 2.0**-7
"""Steps of the grid, in terms of the input's root mean square, beyond which a finer one is begun on: bfloat16's own
resolution."""
COARSEST_FOR_ROW = 2.0**-4
"""The same in terms of its smallest row (a token, a sample), which may be far below the others: branches normalise."""
SMALLEST_ROW = 2.0**-23
"""In terms of the largest value; no grid has steps for a smaller one."""
NOTHING = 1e-12
"""A row that small is what a model has in the place of zero (the embedding of a token that was never trained)."""
FINE_FOR_INPUT = 2.0**-14
MOST_DROPPED = 28
"""Bits by which one step may coarsen the grid; beyond, the stream has become another thing altogether."""


@dataclass(eq=False)
class Dropped:
    """What coarsening took away from a state, for `refine` to put back."""

    bits: int
    stream: torch.Tensor
    partner: torch.Tensor

    @classmethod
    def from_state(cls, state: State, bits: int) -> Dropped:
        """Coarsen `state` by `bits`, in place."""
        # As in a product with gamma: the low bits are kept, packed, and the shift rounds down.
        dropped = cls(bits, pack(state.stream, bits), pack(state.partner, bits))
        state.stream.bitwise_right_shift_(bits)
        state.partner.bitwise_right_shift_(bits)
        return dropped

    def refine_stream(self, state: State) -> None:
        """Make `state.stream` what it was before."""
        state.stream = _refined(state.stream, self.stream, self.bits)

    def coarsen_stream(self, state: State) -> None:
        """Undo `refine_stream`."""
        state.stream.bitwise_right_shift_(self.bits)

    def refine_partner(self, state: State) -> None:
        """Make `state.partner` what it was before."""
        state.partner = _refined(state.partner, self.partner, self.bits)


def _refined(coarse: torch.Tensor, low: torch.Tensor, bits: int) -> torch.Tensor:
    return unpack(low, bits, coarse.bitwise_left_shift_(bits))


@dataclass(frozen=True, eq=False)
class Taken:
    """How a step was taken."""

    arithmetic: Arithmetic
    side: torch.Tensor | None
    """Its side bits."""
    new: torch.Tensor | None = None
    """The new stream as the model reads it, where it is made already."""
    dropped: Dropped | None = None
    """What the state lost just before the step."""
    largest: torch.Tensor | None = None
    """The largest |H|, not looked at yet."""
    outgrown: bool = False
    """Was its grid too fine for the step?"""


def grid_at_start(chain: ReversibleChain, stream: torch.Tensor) -> Arithmetic:
    """The arithmetic to begin a forward pass with: the usual one, or another grid for an input that is too small
    or too large for it, or of which a part is.

    Raises:
        FixedPointRangeError: the input holds something that is not a number.
    """
    usual = chain.arithmetic
    if not isinstance(usual, FixedPoint) or not stream.numel() or stream.is_meta or not looked_at():
        return usual
    wide = stream.detach().float() if stream.dtype is not torch.float64 else stream.detach()
    rows, top = _sizes_of_rows(wide), wide.abs().amax()
    held = rows > SMALLEST_ROW * top
    row_held, row_lost = rows.where(held, torch.inf).amin(), rows.where(~held & (rows > NOTHING), 0).amax()
    sizes = torch.stack([rows.square().mean().sqrt(), top, row_held, row_lost])
    size, largest, row, lost = (float(number) for number in sizes)
    if not math.isfinite(largest):
        raise FixedPointRangeError(f"the input of {chain.name} holds values that are not numbers (inf or NaN)")
    if largest == 0:
        return usual
    if lost:
        chain.warn_once(
            f"were given a row of size {lost:.3g} beside values of {largest:.3g}: no fixed-point grid holds both, and "
            "the small one is rounded away; scale it, or convert with arithmetic='float'"
        )
    size = max(size, largest * 2.0**-20)  # squares of the smallest floats are zero
    if largest * 2.0**usual.fraction_bits >= LIMIT:
        return FixedPoint(grid_for(largest, HEAD_ROOM))
    if 2.0**-usual.fraction_bits <= min(COARSEST_FOR_INPUT * size, COARSEST_FOR_ROW * row):
        return usual
    step = min(FINE_FOR_INPUT * size, COARSEST_FOR_ROW * row)
    return FixedPoint(min(math.ceil(-math.log2(step)), grid_for(largest, HEAD_ROOM), chain.finest))


def _sizes_of_rows(stream: torch.Tensor) -> torch.Tensor:
    """Root mean squares of its tokens or, of images and the like, of its samples."""
    rows = stream.flatten(1) if stream.dim() > 3 else stream
    return rows.square().mean(-1).sqrt()


def step_on_grid(
    coupling: Coupling,
    state: State,
    out: torch.Tensor,
    value: torch.Tensor,
    arithmetic: Arithmetic,
    path: str,
    at_once: bool,
    finest: int = 2**30,
) -> Taken:
    """`coupling.step`, coarsening the grid where the step needs it.

    `at_once`: look at the new stream now. On a GPU that waits for the device, so there it is done once a pass.
    `finest`: fraction bits beyond which the grid is coarsened in any case. A stream that is multiplied by a small
    number would else leave its grid, on which it becomes no smaller.

    Raises:
        FixedPointRangeError: the branch returned something that is not a number.
    """
    if not isinstance(arithmetic, FixedPoint):
        return Taken(arithmetic, coupling.step(state, out, value, arithmetic))
    spare = max(arithmetic.fraction_bits - finest, 0)
    dropped = Dropped.from_state(state, spare) if spare else None
    fine, arithmetic = arithmetic, arithmetic.coarsened(spare)
    fused = coupling.fused_step(state, out, value, arithmetic)
    side, largest, new = (
        (*_step_by_operators(coupling, state, out, value, arithmetic), None)
        if fused is None
        else (fused.side, fused.largest, fused.new)
    )
    if largest is None or not at_once or int(largest) < LIMIT:
        return Taken(arithmetic, side, new, dropped, None if at_once else largest)
    coupling.recover_input(state, arithmetic)  # exact even where a number wrapped round: so does its way back
    coupling.recover_partner(state, out, value, side, arithmetic)
    if dropped is not None:
        dropped.refine_stream(state)
        dropped.refine_partner(state)
    return _coarsened(coupling, state, out, value, fine, path, spare + 1)


def _step_by_operators(
    coupling: Coupling, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: FixedPoint
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(side bits, the largest |H|: `LIMIT` at least where V n left int32)."""
    # |V| < 2^30 is known from the streams before, so n = +-1 needs no look at V.
    partner = largest_of(state.partner) if abs(coupling.multiplier) > 1 else None
    side = coupling.step(state, out, value, arithmetic)
    largest = largest_of(state.stream)
    if partner is not None and largest is not None:
        fits = partner * abs(coupling.multiplier) < 2**31
        largest = torch.where(fits, largest, largest.clamp(min=LIMIT))
    return side, largest


def _coarsened(
    coupling: Coupling,
    state: State,
    out: torch.Tensor,
    value: torch.Tensor,
    arithmetic: FixedPoint,
    path: str,
    least: int,
) -> Taken:
    """The step on a grid that is coarser by `least` bits: as coarse as its largest value needs, then by two bits more
    at each try."""
    largest = max(float(out.abs().amax()), float(value.abs().amax()))
    if not math.isfinite(largest):
        raise FixedPointRangeError(
            f"{path} returned values that are not numbers (inf or NaN) for finite ones: the training diverged, or the "
            "weights are broken; autorev keeps such a stream no better than autograd does"
        )
    # The branch may be far smaller than the velocity: both have to fit.
    largest = max(largest, float(state.partner.abs().amax()) * abs(arithmetic.unit))
    bits = max(least, arithmetic.fraction_bits - grid_for(largest, HEAD_ROOM))
    while bits <= MOST_DROPPED:
        coarse = arithmetic.coarsened(bits)
        before = state.clone()
        dropped = Dropped.from_state(state, bits)
        side, size = _step_by_operators(coupling, state, out, value, coarse)
        if size is None or int(size) < LIMIT:
            return Taken(coarse, side, dropped=dropped, outgrown=True)
        state.stream, state.partner = before.stream, before.partner
        bits += 2
    raise FixedPointRangeError(
        f"{path}: the stream grew to {largest:.3g} in one step, from a grid of 2^{-arithmetic.fraction_bits} for far "
        "smaller ones; lower the learning rate, or convert again with arithmetic='float'"
    )


def say_coarsened(name: str, path: str, before: FixedPoint, after: FixedPoint) -> None:
    """Tell the user."""
    logging.getLogger("autorev").warning(
        "%s: an activation of %s outgrew the fixed-point grid of 2^%d (values below %g): the grid is 2^%d from here "
        "on. The step was taken again, and nothing is lost",
        name,
        path,
        -before.fraction_bits,
        before.largest,
        -after.fraction_bits,
    )


def largest_of(stream: torch.Tensor) -> torch.Tensor | None:
    """The largest |H|, int64, on the stream's device: nothing waits for it."""
    if not stream.numel() or stream.device.type == "meta" or not looked_at():
        return None
    low, high = torch.aminmax(stream)  # `abs` would make a copy, and keep -2^31 as it is
    return torch.maximum(high.long(), -low.long())


def check_largest(arithmetic: FixedPoint, peak: torch.Tensor, name: str) -> None:
    """Has a stream left its grid?

    Raises:
        FixedPointRangeError: it has.
    """
    if int(peak) >= LIMIT:
        raise FixedPointRangeError(
            f"{name}: an activation left the fixed-point grid, which holds values below {arithmetic.largest:g}, or is "
            "not a number; this step is void. The grid is coarser from now on: run the step again"
        )
