"""How a chain's two streams are held and computed with: `FixedPoint`, which is exact, or `Floating`, which drifts.

Both offer the same operations to the couplings, and work in place: a state's tensors are never handed to anybody, what
the model is given is decoded from them.

Upper-case letters are int32 grid points, lower-case ones are values: h = H 2^-s, with s = `fraction_bits`. Streams have
the shape of the model's own, (batch, time, width) as a rule; H_BTD below stands for any.

Where blocks multiply their stream by a constant, it is the unit that is multiplied, and no grid point is touched: the
state holds z = h / factor, which such a block only adds to. So nothing is rounded, and nothing has to be divided.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from autorev.alike import typical
from autorev.couplings.side_bits import pack, unpack

LIMIT = 2**29
"""|H| of a fixed-point stream stays below this.

Then no overflow can hide. Let |H| < 2^29 before a step, hence |V| < 2^30. The step adds q, |q| < 2^30 (V n fits into an
int32, and is divided by 2 at least unless n is 1 or -1), and an increment that int32 can hold (a float that it cannot
hold becomes -2^31 or 2^31 - 1). The true |H'| is below 2^29 + 2^30 + 2^31, so if it is not a number that passes the
check, neither is what it wraps round to.
"""
MOST_SIDE_BITS = 8
MOST_FRACTION_BITS = 96
"""For streams around 1e-20; a factor of 2^96 is still a float32."""


@dataclass(frozen=True)
class FixedPoint:
    """Streams as int32 multiples of 2^-fraction_bits: sums are exact, and so is a product with n / 2^k if k bits stay.

    Source: the integer representation of Maclaurin et al., arXiv 1502.03492, and Momentum ResNets, arXiv 2102.07870.
    """

    fraction_bits: int
    factor: float = 1.0
    """The rest of the factor that the stream was multiplied with, 1/2 < |factor| <= 1: h = H 2^-s factor."""

    @property
    def unit(self) -> float:
        """The value of a grid point 1."""
        return 2.0**-self.fraction_bits * self.factor

    @property
    def largest(self) -> float:
        """The largest activation that the grid can hold."""
        return LIMIT * abs(self.unit)

    def multiplied(self, factor: float) -> FixedPoint:
        """The grid on which the same integers are a stream that was multiplied by `factor`."""
        if factor == 1:
            return self
        scale, exponent = math.frexp(self.factor * factor)  # 1/2 <= |scale| < 1
        if abs(scale) == 0.5:
            scale, exponent = 2 * scale, exponent - 1  # powers of two change the exponent alone
        return FixedPoint(self.fraction_bits - exponent, scale)

    def coarsened(self, bits: int) -> FixedPoint:
        """With so many fraction bits less."""
        return replace(self, fraction_bits=self.fraction_bits - bits) if bits else self

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """A floating tensor, rounded to the grid: int32, in the tensor's memory format."""
        scaled = wide(value).mul(1 / self.unit)  # h_BTD float; a power of two changes the exponent alone
        return to_integers(scaled.round_())  # H_BTD int32; from here on, sums are exact

    def decode(self, stream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An int32 stream as a new floating tensor of `dtype`."""
        floating = torch.float64 if dtype is torch.float64 else torch.float32
        value = torch.empty_like(stream, dtype=dtype)
        for ints, floats in _slices(stream, value):
            # |H| < 2^29 has more bits than a float32 holds: the branch reads a rounded h, the same one in both runs.
            floats.copy_(ints.to(floating).mul_(self.unit))  # H_BTD int32 -> h_BTD dtype
        return value

    def add_branch(self, a: torch.Tensor, out: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
        """a + F in a's memory: F = round(c * (out - h) * 2^s) is what a branch `out = h + f(h)` adds."""
        for total, o, h in _slices(a, out, value):
            total.add_(self._increment(o, h, factor))
        return a

    def subtract_branch(self, a: torch.Tensor, out: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
        """a - F in a's memory."""
        for total, o, h in _slices(a, out, value):
            total.sub_(self._increment(o, h, factor))
        return a

    def _increment(self, out: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
        # Both are what the branch read and returned, in the model's dtype, so that both runs find the same integers.
        change = wide(out) - value  # f_BTD float32
        return to_integers(change.mul_(factor / self.unit).round_())

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a + b, in a's memory."""
        return a.add_(b)

    def subtract(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a - b, in a's memory."""
        return a.sub_(b)

    def scale(self, velocity: torch.Tensor, gamma: Fraction) -> tuple[torch.Tensor, torch.Tensor | None]:
        """V n = q 2^k + r: q in V's memory, and r packed to k bits an element (None for k = 0)."""
        bits = side_bits_of(gamma)
        if gamma.numerator == -1:
            velocity.neg_()
        elif gamma.numerator != 1:
            velocity.mul_(gamma.numerator)  # V n, int32
        if not bits:
            return velocity, None
        # In two's complement the low k bits are r = V n mod 2^k with 0 <= r < 2^k, of negative numbers, too, and the
        # arithmetic shift rounds down: -5 = -2 * 4 + 3. So q and r hold V n to the last bit.
        side = pack(velocity, bits)
        return velocity.bitwise_right_shift_(bits), side

    def unscale(self, velocity: torch.Tensor, gamma: Fraction, side: torch.Tensor | None) -> torch.Tensor:
        """The V that `scale` was given, from what it returned, in q's memory."""
        bits = side_bits_of(gamma)
        if side is not None:
            unpack(side, bits, velocity.bitwise_left_shift_(bits))  # q 2^k, whose low k bits are zero, + r
        if gamma.numerator == -1:
            return velocity.neg_()
        return velocity if gamma.numerator == 1 else velocity.mul_(inverse_of(gamma.numerator))


@dataclass(frozen=True)
class Floating:
    """Streams in float32 (float64 for float64 models): reconstruction is right up to rounding, which it amplifies."""

    factor: float = 1.0
    """The factor that the stream was multiplied with: h = z factor."""

    def multiplied(self, factor: float) -> Floating:
        """The arithmetic in which the same floats are a stream that was multiplied by `factor`."""
        return self if factor == 1 else Floating(self.factor * factor)

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """A floating tensor as a stream of its own."""
        stream = value.to(torch.float64 if value.dtype is torch.float64 else torch.float32, copy=True)
        return stream if self.factor == 1 else stream.div_(self.factor)

    def decode(self, stream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A stream as a new tensor of `dtype`."""
        return stream.to(dtype, copy=True) if self.factor == 1 else stream.mul(self.factor).to(dtype)

    def add_branch(self, a: torch.Tensor, out: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
        """a + c * (out - h), in a's memory."""
        for total, o, h in _slices(a, out, value):
            total.add_((wide(o) - h).mul_(factor / self.factor))
        return a

    def subtract_branch(self, a: torch.Tensor, out: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
        """a - c * (out - h), in a's memory."""
        for total, o, h in _slices(a, out, value):
            total.sub_((wide(o) - h).mul_(factor / self.factor))
        return a

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a + b, in a's memory."""
        return a.add_(b)

    def subtract(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a - b, in a's memory."""
        return a.sub_(b)

    def scale(self, velocity: torch.Tensor, gamma: Fraction) -> tuple[torch.Tensor, None]:
        """gamma v, in v's memory."""
        return (velocity if gamma == 1 else velocity.mul_(float(gamma))), None

    def unscale(self, velocity: torch.Tensor, gamma: Fraction, side: torch.Tensor | None) -> torch.Tensor:
        """v / gamma, in v's memory; there are no side bits."""
        return velocity if gamma == 1 else velocity.div_(float(gamma))


Arithmetic = FixedPoint | Floating


def side_bits_of(gamma: Fraction) -> int:
    """k of gamma = n / 2^k."""
    return gamma.denominator.bit_length() - 1  # 8 is 0b1000: four bits, k = 3


def inverse_of(numerator: int) -> int:
    """What V n has to be multiplied with, as int32 that wrap round, to be V again: an odd number, as n is, has one."""
    inverse = pow(numerator, -1, 2**32)
    return inverse - 2**32 if inverse >= 2**31 else inverse


def grid_for(largest: float, head_room: float) -> int:
    """The most fraction bits with which activations `head_room` times as large as `largest` do not overflow."""
    needed = max(largest * head_room, 2.0**-MOST_FRACTION_BITS)
    return min(MOST_FRACTION_BITS, math.ceil(math.log2(LIMIT / needed)) - 1)  # |H| stays *below* the limit


SLICE = 2**16
"""Elements that are computed with at a time, so that temporaries are small, and are still in the cache when they are
read."""
MOST_SLICES = 64


def _slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape, a piece of all at a time."""
    shape, count = tensors[0].shape, min(MOST_SLICES, tensors[0].numel() // SLICE)
    if count <= 1:
        yield tensors
        return
    axis = max(range(len(shape)), key=shape.__getitem__)
    length = -(-shape[axis] // count)
    starts = range(0, shape[axis], length)
    for start in map(starts.__getitem__, typical(len(starts))):
        yield tuple(tensor.narrow(axis, start, min(length, shape[axis] - start)) for tensor in tensors)


_NAN_IS_LEAST = platform.machine() in ("x86_64", "AMD64")
"""Does this CPU turn NaN into -2^31, as it does with what is too large? Others, and GPUs, turn it into 0."""


def to_integers(values: torch.Tensor) -> torch.Tensor:
    """Rounded floats as int32; what is no number becomes one that `LIMIT` catches."""
    if values.device.type != "cpu" or not _NAN_IS_LEAST:
        values = values.nan_to_num_(nan=-(2.0**31))
    return values.to(torch.int32)


def wide(value: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
