"""The couplings by name: what `convert(coupling=...)` takes, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

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
    if not isinstance(name, str) or name not in PRESETS:
        raise ConversionError(f"there is no coupling {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
