"""The colours, symbols and dashes of a report, for light and for dark paper.

Categories and methods each stay apart by at least 15 in CIELAB, on both papers, for normal, deuteranopic,
protanopic and tritanopic sight. Figures are drawn in light colours, and `DARK_FOR_LIGHT` says what each
becomes on dark paper; so a light colour is never used for two things that differ in the dark.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from autorev.analysis import Category
from autorev.known_methods import METHODS

THEME = {
    "paper": ("#ffffff", "#15171c"),
    "panel": ("#f6f7f8", "#1d2027"),
    "ink": ("#16181d", "#f0f1f4"),
    "muted": ("#5a616d", "#a3a9b5"),
    "line": ("#e1e4e8", "#343943"),
    "accent": ("#0b5c66", "#6cc7d1"),
    "good": ("#0f6b4a", "#67cfa4"),
    "warn": ("#8a5a00", "#e8b85c"),
    "bad": ("#b3261e", "#f2877f"),
}
"""Role to (light, dark)."""

CATEGORY_COLORS = {
    Category.PARAMETERS: ("#16324f", "#3a5fcf"),
    Category.GRADIENTS: ("#6c7bd6", "#93a5f8"),
    Category.OPTIMIZER_STATE: ("#bccdf5", "#dfe9fb"),
    Category.STORED_ACTIVATIONS: ("#cf4f0a", "#e8692a"),
    Category.WORKING_SET: ("#ffc24a", "#fbd062"),
    Category.STREAMS: ("#008a63", "#0a9468"),
    Category.SIDE_BITS: ("#74dcbc", "#86efb8"),
    Category.LOGITS_AND_LOSS: ("#8a3a94", "#a452ac"),
    Category.OTHER: ("#a08fa6", "#9d93a6"),
}
"""Blue for what the weights cost, orange for activations, green for a reversible chain's own state."""

PHASE_LOOKS = {
    "forward": (THEME["accent"][0], "triangle-right"),
    "backward": (CATEGORY_COLORS[Category.STORED_ACTIVATIONS][0], "diamond"),
    "optimizer": (THEME["muted"][0], "square"),
}

OVERHEAD_COLORS = {
    "recomputation": CATEGORY_COLORS[Category.STORED_ACTIVATIONS][0],
    "coupling": CATEGORY_COLORS[Category.STREAMS][0],
    "packing": CATEGORY_COLORS[Category.SIDE_BITS][0],
}
"""Seconds in the colour of the bytes they save or handle."""

DARK_FOR_LIGHT = dict(
    [*THEME.values(), *CATEGORY_COLORS.values(), *((known.light, known.dark) for known in METHODS.values())]
)


@dataclass(frozen=True, slots=True)
class Look:
    """How one method or run is drawn in every figure of a page."""

    color: str
    symbol: str
    dash: str


def look_of(method: str, again: int = 0) -> Look:
    """The method's look on light paper; the second, third, ... of its kind differ in symbol and dash."""
    known = METHODS.get(method)
    light, symbol, dash = (known.light, known.symbol, known.dash) if known else (THEME["muted"][0], "circle", "solid")
    if again:
        shape = symbol.removesuffix("-open")
        fills = [symbol, *(f"{shape}{fill}" for fill in ("-open", "-dot", "-open-dot") if f"{shape}{fill}" != symbol)]
        dashes = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
        symbol, dash = fills[again % len(fills)], dashes[again % len(dashes)]
    return Look(light, symbol, dash)


class Looks:
    """Hands out looks: what is new of a method gets the next of its looks, what was seen gets its own."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[Hashable, int]] = {}

    def of(self, method: str, what: Hashable) -> Look:
        """The look of `what`, which is trained by `method`."""
        seen = self._seen.setdefault(method, {})
        return look_of(method, seen.setdefault(what, len(seen)))
