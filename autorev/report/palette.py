"""The colours of a report, for light and for dark paper.

Categories and methods each stay apart by at least 15 in CIELAB, on both papers, for normal, deuteranopic,
protanopic and tritanopic sight. Figures are drawn in light colours, and `DARK_FOR_LIGHT` says what each
becomes on dark paper; so a light colour is never used for two things that differ in the dark.
"""

from __future__ import annotations

from autorev.analysis import Category

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

PHASE_COLORS = {
    "forward": THEME["accent"],
    "backward": CATEGORY_COLORS[Category.STORED_ACTIVATIONS],
    "optimizer": THEME["muted"],
}

OVERHEAD_COLORS = {
    "recomputation": CATEGORY_COLORS[Category.STORED_ACTIVATIONS],
    "coupling": CATEGORY_COLORS[Category.STREAMS],
    "packing": CATEGORY_COLORS[Category.SIDE_BITS],
}
"""Seconds in the colour of the bytes they save or handle."""

_method_colors = {
    "plain": THEME["ink"],
    "checkpoint": ("#0b5cc4", "#3a8df0"),
    "offload": ("#4fbcf5", "#a4dafc"),
    "sac": ("#7724f3", "#7555f6"),
    "compile": ("#194c38", "#aed279"),
    "momentum": ("#d55e00", "#f07a30"),
    "leapfrog": ("#189c5b", "#22c084"),
    "midpoint": ("#f5b000", "#f9d648"),
    "midpoint_a": ("#7a3e11", "#a8683f"),
    "bdia": ("#c06bb4", "#ee86c0"),
    "hamiltonian": ("#561a7d", "#9c66ba"),
    "revnet": ("#85807f", "#767b83"),
}

DARK_FOR_LIGHT = dict([*THEME.values(), *CATEGORY_COLORS.values(), *_method_colors.values()])


def method_color(method: str) -> str:
    """The method's colour on light paper."""
    return _method_colors.get(method, THEME["muted"])[0]
