"""A step of the velocity family and its inverse as functions without side effects, for a compiler: the integers of
`arithmetic` and `side_bits`, to the last bit.

    V' = (V n >> k) + F,  H' = H + V'              V = ((V' - F) << k, + side bits) / n

H, V int32 in the stream's shape; F = round(c 2^s (out - h)) in it, too, of floats out and h in the model's dtype. Where
side bits are packed, tensors are taken as eight rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autorev.couplings.arithmetic import LIMIT, to_integers, wide
from autorev.couplings.side_bits import ROWS, WORD

Number = int | torch.Tensor
"""A constant, or int32 without axes, so that nothing is compiled anew for another one."""


@dataclass(frozen=True, eq=False)
class Advanced:
    """What a step gives."""

    stream: torch.Tensor
    """H'."""
    velocity: torch.Tensor
    """V'."""
    product: torch.Tensor
    """V n, whose low k bits are the side bits."""
    largest: torch.Tensor
    """The largest |H'|, int64; `LIMIT` at least where V n left int32."""


def advanced(
    stream: torch.Tensor,
    velocity: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    numerator: Number,
    scale: torch.Tensor,
    bits: int,
) -> Advanced:
    """The step of which the branch returned `out` for `value`; `scale`: c 2^s."""
    product = velocity * numerator
    after = (product >> bits) + increment(out, value, scale)
    total = stream + after
    size = torch.maximum(total.amax().long(), -total.amin().long())
    factor = abs(numerator) if isinstance(numerator, int) else numerator.abs()
    most = torch.maximum(velocity.amax().long(), -velocity.amin().long()) * factor
    largest = torch.where(most < 2**31, size, torch.clamp(size, min=LIMIT))
    return Advanced(total, after, product, largest)


def velocity_before(
    after: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    inverse: Number,
    scale: torch.Tensor,
    bits: int,
    low: torch.Tensor | None,
) -> torch.Tensor:
    """V of V'; `inverse`: what undoes the product with n; `low`: the side bits, unpacked."""
    product = (after - increment(out, value, scale)) << bits
    return (product if low is None else product + low) * inverse


def increment(out: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """F."""
    return to_integers(((wide(out) - value) * scale).round())


def decoded(stream: torch.Tensor, unit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The stream as the model reads it; `unit`: 2^-s, in the dtype that is computed in."""
    return (stream.to(unit.dtype) * unit).to(dtype)


def packed(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The low bits of rows (8, n) int32 -> (n, bits) uint8."""
    parts = []
    for low in range(0, bits, WORD):
        width = min(WORD, bits - low)
        places = torch.arange(ROWS, device=rows.device, dtype=torch.int32)[:, None] * width
        word = (((rows >> low) & ((1 << width) - 1)) << places).sum(0, dtype=torch.int32)  # (n,), of `width` bytes
        parts += [((word >> 8 * byte) & 255).to(torch.uint8) for byte in range(width)]
    return torch.stack(parts, 1)


def unpacked(side: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, bits) uint8 -> rows (8, n) int32 of `bits` bits."""
    found = torch.zeros((), device=side.device, dtype=torch.int32)
    for low in range(0, bits, WORD):
        width = min(WORD, bits - low)
        word = torch.zeros((), device=side.device, dtype=torch.int32)
        for byte in range(width):
            word = word | (side[:, low + byte].to(torch.int32) << 8 * byte)
        places = torch.arange(ROWS, device=side.device, dtype=torch.int32)[:, None] * width
        found = found | (((word >> places) & ((1 << width) - 1)) << low)
    return found
