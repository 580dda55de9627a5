"""The coupling of one step, from a preset and the numbers that the user gave."""

from __future__ import annotations

import random
from fractions import Fraction

from autorev.couplings.additive import Additive
from autorev.couplings.arithmetic import MOST_SIDE_BITS, side_bits_of
from autorev.couplings.coupling import Coupling
from autorev.couplings.presets import Preset
from autorev.couplings.velocity import Bdia, Velocity
from autorev.errors import ConversionError


def coupling_for(preset: Preset, path: str, number: int, steps: int, gamma: float | None, c: float | None) -> Coupling:
    """The coupling of step `number` of a chain of `steps`, in the block `path`.

    Raises:
        ConversionError: c makes no step.
    """
    own = _drawn_gamma(number) if preset.gamma is None else preset.gamma
    chosen = own if gamma is None else Fraction(gamma)
    if c is not None and not abs(c) > 0:
        raise ConversionError(f"c = {c} for {path}: the branches would be switched off; give a number other than 0")
    usual = preset.c(chosen)
    if preset.c_at_ends is not None and number in (0, steps - 1):
        usual = preset.c_at_ends
    factor = usual if c is None else float(c)
    if preset.two_streams:
        return Additive()
    return Bdia(chosen, factor) if preset.family == "bdia" else Velocity(chosen, factor)


def check_dyadic(gamma: Fraction, path: str) -> None:
    """Exact arithmetic needs gamma = n / 2^k with a small k.

    Raises:
        ConversionError: it is another number; the nearest that would do are named.
    """
    denominator = gamma.denominator
    power_of_two = denominator & (denominator - 1) == 0
    if power_of_two and side_bits_of(gamma) <= MOST_SIDE_BITS and abs(gamma) < 2:
        return
    nearest = ", ".join(dict.fromkeys(str(_near(gamma, 2**k)) for k in (3, 5, 7)))
    shown = repr(float(gamma)).removesuffix(".0")  # every digit: 0.125000001 is not 0.125
    raise ConversionError(
        f"gamma = {shown} for {path} is not n / 2^k with k <= {MOST_SIDE_BITS} and |gamma| < 2, which exact "
        f"arithmetic needs; near it are {nearest}"
    )


def _near(gamma: Fraction, denominator: int) -> Fraction:
    """The multiple of 1 / denominator that is nearest to gamma, of those within the range and off zero."""
    multiple = min(max(round(abs(gamma) * denominator), 1), 2 * denominator - 1)
    return Fraction(multiple if gamma > 0 else -multiple, denominator)


def _drawn_gamma(number: int) -> Fraction:
    """-a with a = +-1 + U(-1/2, 1/2), to the nearest eighth; the same for the same step of every chain."""
    draw = random.Random(number)
    return -Fraction(round(8 * (draw.choice((-1, 1)) + draw.uniform(-0.5, 0.5))), 8)
