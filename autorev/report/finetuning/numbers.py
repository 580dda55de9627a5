"""Losses, side bits and coupling numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import groupby
from math import isfinite

from autorev.format import NOTHING, format_rate

_MOST_RUNS = 6
"""Stretches of equal numbers along a chain that are still read at a glance."""


def loss_text(loss: float | None) -> str:
    """`3.221`, or the sign for nothing."""
    return NOTHING if loss is None else f"{loss:.3f}"


def change_text(change: float | None) -> str:
    """`+0.011`, or the sign for nothing; no change has no sign of its own."""
    if change is None:
        return NOTHING
    text = f"{change:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def perplexity_text(perplexity: float | None) -> str:
    """`25.1`, `1,234`, `1.5e+07`."""
    if perplexity is None:
        return NOTHING
    return format_rate(perplexity) if perplexity < 1e6 else f"{perplexity:.1e}" if isfinite(perplexity) else "infinite"


def share_text(share: float | None) -> str:
    """`88.5 %`, or the sign for nothing."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def divergence_text(divergence: float | None) -> str:
    """`0.042`; in powers of ten where three decimals would show nothing."""
    if divergence is None:
        return NOTHING
    return f"{divergence:.3f}" if abs(divergence) >= 5e-4 or not divergence else f"{divergence:.1e}"


def bits_text(bits: float | None) -> str:
    """`3`, `2.4`, or the sign for nothing."""
    if bits is None:
        return NOTHING
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def gamma_text(gamma: float) -> str:
    """`1/8`, `-5/4`, `1`: what it is in exact arithmetic; as a decimal where that is no short fraction."""
    if not isfinite(gamma):
        return str(gamma)
    exact = Fraction(gamma)
    return str(exact) if exact.denominator <= 64 else f"{gamma:.4g}"


def along_chain(values: Sequence[float], text_of: Callable[[float], str]) -> str:
    """`1, 15/16 x 28, 1`; the smallest and the largest where neighbours differ too often."""
    stretches = [(text, len(list(same))) for text, same in groupby(map(text_of, values))]
    if not stretches:
        return NOTHING
    if len(stretches) > _MOST_RUNS:
        return f"{text_of(min(values))} to {text_of(max(values))}"
    return ", ".join(text if count == 1 else f"{text} x {count}" for text, count in stretches)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with its neighbours, of whom there are fewer at both ends."""
    half = window // 2
    stretches = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(stretch) / len(stretch) for stretch in stretches]
