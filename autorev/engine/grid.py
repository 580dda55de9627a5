"""Has a fixed-point stream left its grid? Seen at once; on a GPU, for steps on a tape, once per backward pass."""

from __future__ import annotations

import torch

from autorev.couplings.arithmetic import LIMIT, Arithmetic, FixedPoint
from autorev.couplings.coupling import Coupling, State
from autorev.errors import FixedPointRangeError


def advance(
    coupling: Coupling, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: Arithmetic, path: str
) -> torch.Tensor | None:
    """`coupling.advance`, with the block's path in what it raises.

    Raises:
        FixedPointRangeError: a product left the grid.
    """
    try:
        return coupling.advance(state, out, value, arithmetic)
    except FixedPointRangeError as error:
        raise FixedPointRangeError(f"{path}: {error}; convert again with fewer fraction_bits") from None


def check_range(
    arithmetic: FixedPoint, stream: torch.Tensor, path: str, peak: torch.Tensor | None, at_once: bool
) -> torch.Tensor | None:
    """Raise if |H| reaches `LIMIT`; with `at_once` off, a device tensor of the largest |H| so far instead of waiting.

    Raises:
        FixedPointRangeError: an activation is too large for the grid, or not a number.
    """
    if (
        not stream.numel()
        or stream.device.type == "meta"
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    ):
        return None
    low, high = torch.aminmax(stream)
    if stream.device.type == "cpu" or at_once:
        largest = max(-int(low), int(high))
        if largest >= LIMIT:
            raise FixedPointRangeError(
                f"{path}: an activation left the fixed-point grid, which holds values below {arithmetic.largest:g}, or "
                "is not a number; if the loss is finite without autorev, convert again with fewer fraction_bits "
                f"(now {arithmetic.fraction_bits})"
            )
        return None
    largest_now = torch.maximum(high, -(low + 1))  # -(-2^31) would be itself
    return largest_now if peak is None else torch.maximum(peak, largest_now)
