"""The couplings by name, and the numbers behind each. Nothing here needs torch: reports read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

PRESERVING_GAMMA = Fraction(1, 8)
"""Up to this gamma a pretrained LLM's loss stays within 0.02 nats under momentum (benchmarks/zero_shot_*.md)."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named coupling."""

    name: str
    gamma: Fraction | None
    """None: given by `draw`, or without meaning."""
    c: Callable[[Fraction], float]
    family: Literal["velocity", "bdia", "additive"]
    """The arithmetic of its step: `Velocity`, `Bdia` or `Additive`."""
    numbers: str
    """gamma and c, in words."""
    meaning: str
    """One sentence."""
    source: str
    c_at_ends: float | None = None
    """c of a chain's first and last step, where it is another."""
    averages: bool = False
    """Is the read-out the mean of both streams?"""

    @property
    def two_streams(self) -> bool:
        """Is a step of attention followed by one of the MLP, each on its own stream?"""
        return self.family == "additive"

    @property
    def keeps_side_bits(self) -> bool:
        """Does exact arithmetic keep bits of each step, unless gamma is given as a whole number?"""
        return not self.two_streams and (self.gamma is None or self.gamma.denominator > 1)


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
            "velocity",
            "gamma = 1/8, c = 15/16, exact",
            "v = \u03b3v + c f(h), then h = h + v, with a small \u03b3. The bits that \u03b3 rounds off are kept.",
            "Momentum Residual Networks, Sander et al. 2021, arXiv 2102.07870",
            # The first step is exact as in the source (v_1 = f(h_0)); after the last no layers follow.
            c_at_ends=1.0,
        ),
        Preset(
            "leapfrog",
            Fraction(1),
            lambda gamma: 1.0,
            "velocity",
            "gamma = 1, c = 1",
            "The same with \u03b3 = 1: nothing is rounded off.",
            "arXiv 2512.02056, eq. 2.6",
        ),
        Preset(
            "midpoint",
            Fraction(-1),
            lambda gamma: 2.0,
            "velocity",
            "gamma = -1, c = 2",
            "The same with \u03b3 = \u22121.",
            "arXiv 2512.02056, eq. 2.4",
        ),
        Preset(
            "midpoint_a",
            None,
            lambda gamma: 1.0,
            "velocity",
            "gamma = -a, a = n/8 per layer",
            "The same with \u03b3 = \u2212a, a random and fixed for each layer.",
            "arXiv 2512.02056, eq. 3.6",
        ),
        Preset(
            "bdia",
            Fraction(1, 2),
            lambda gamma: 1 + float(gamma),
            "bdia",
            "gamma = +-1/2, exact",
            "The same with \u03b3 = \u2212g and c = 1 + g.",
            "BDIA, Zhang et al. 2024, arXiv 2407.09093",
        ),
        Preset(
            "hamiltonian",
            None,
            lambda gamma: 1.0,
            "additive",
            "two streams (q, p)",
            "Two streams: q = q + Attention(p), then p = p + MLP(q).",
            "arXiv 2512.02056, eq. 2.8-2.9",
        ),
        Preset(
            "revnet",
            None,
            lambda gamma: 1.0,
            "additive",
            "two streams (x1, x2)",
            "Two streams, each updated from the other, as in RevNet and Reformer.",
            "RevNet, Gomez et al. 2017, arXiv 1707.04585; Reformer, arXiv 2001.04451",
            averages=True,
        ),
    )
}
