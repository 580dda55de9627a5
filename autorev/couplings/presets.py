"""The couplings by name: what `convert(coupling=...)` takes, and the numbers behind it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from autorev.couplings.additive import Additive
from autorev.couplings.arithmetic import MOST_SIDE_BITS, side_bits_of
from autorev.couplings.coupling import Coupling
from autorev.couplings.velocity import Bdia, Velocity
from autorev.errors import ConversionError

PRESERVING_GAMMA = Fraction(1, 8)
"""Up to this gamma a pretrained LLM's loss stays within 0.02 nats under momentum (benchmarks/zero_shot_*.md)."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named coupling."""

    name: str
    gamma: Fraction | None
    """None: given by `draw`, or without meaning."""
    c: Callable[[Fraction], float]
    source: str
    c_at_ends: float | None = None
    """c of a chain's first and last step, where it is another."""
    gamma_is_free: bool = False
    two_streams: bool = False
    averages: bool = False
    """Is the read-out the mean of both streams?"""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "momentum",
            Fraction(1, 8),
            # A branch adds c f at once and c f / (1 - gamma) over the layers that follow. With c = 1 - gamma that is f
            # in the end, with c = 1 it is f for the next block; a pretrained model is closest to itself in the middle
            # (benchmarks/zero_shot_*.md).
            lambda gamma: 1 - float(gamma) / 2,
            "Momentum Residual Networks, Sander et al. 2021, arXiv 2102.07870",
            # The first step is exact as in the source (v_1 = f(h_0)); after the last no layers follow.
            c_at_ends=1.0,
            gamma_is_free=True,
        ),
        Preset("leapfrog", Fraction(1), lambda gamma: 1.0, "arXiv 2512.02056, eq. 2.6"),
        Preset("midpoint", Fraction(-1), lambda gamma: 2.0, "arXiv 2512.02056, eq. 2.4"),
        Preset("midpoint_a", None, lambda gamma: 1.0, "arXiv 2512.02056, eq. 3.6"),
        Preset("bdia", Fraction(1, 2), lambda gamma: 1 + float(gamma), "BDIA, Zhang et al. 2024, arXiv 2407.09093"),
        Preset("hamiltonian", None, lambda gamma: 1.0, "arXiv 2512.02056, eq. 2.8-2.9", two_streams=True),
        Preset(
            "revnet",
            None,
            lambda gamma: 1.0,
            "RevNet, Gomez et al. 2017, arXiv 1707.04585; Reformer, arXiv 2001.04451",
            two_streams=True,
            averages=True,
        ),
    )
}


def preset_named(name: str) -> Preset:
    """The preset.

    Raises:
        ConversionError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConversionError(f"there is no coupling {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def coupling_for(preset: Preset, path: str, number: int, steps: int, gamma: float | None, c: float | None) -> Coupling:
    """The coupling of step `number` of a chain of `steps`, in the block `path`.

    Raises:
        ConversionError: the preset leaves no choice of gamma or c, or they make no step.
    """
    if preset.two_streams:
        if gamma is not None or c is not None:
            raise ConversionError(f"{preset.name} has neither gamma nor c; leave them out")
        return Additive()
    if gamma is None:
        chosen = _drawn_gamma(number) if preset.gamma is None else preset.gamma
    elif preset.gamma_is_free:
        chosen = Fraction(gamma)
    else:
        raise ConversionError(f"{preset.name} has its own gamma; coupling='momentum' takes gamma={gamma:g}")
    if c is not None and not abs(c) > 0:
        raise ConversionError(f"c = {c} for {path}: the branches would be switched off; give a number other than 0")
    usual = preset.c(chosen)
    if preset.c_at_ends is not None and number in (0, steps - 1):
        usual = preset.c_at_ends
    factor = usual if c is None else float(c)
    return Bdia(chosen, factor) if preset.name == "bdia" else Velocity(chosen, factor)


def check_dyadic(gamma: Fraction, path: str) -> None:
    """Exact arithmetic needs gamma = n / 2^k with a small k.

    Raises:
        ConversionError: it is another number; the nearest that would do are named.
    """
    denominator = gamma.denominator
    power_of_two = denominator & (denominator - 1) == 0
    if power_of_two and side_bits_of(gamma) <= MOST_SIDE_BITS and abs(gamma) < 2:
        return
    nearest = ", ".join(dict.fromkeys(str(Fraction(round(gamma * 2**k), 2**k)) for k in (3, 5, 7)))
    raise ConversionError(
        f"gamma = {float(gamma):g} for {path} is not n / 2^k with k <= {MOST_SIDE_BITS} and |gamma| < 2, which exact "
        f"arithmetic needs; near it are {nearest}"
    )


def _drawn_gamma(number: int) -> Fraction:
    """-a with a = +-1 + U(-1/2, 1/2), to the nearest eighth; the same for the same step of every chain."""
    draw = random.Random(number)
    return -Fraction(round(8 * (draw.choice((-1, 1)) + draw.uniform(-0.5, 0.5))), 8)
