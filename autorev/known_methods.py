"""What is said of each method, and how it is drawn; the couplings' words are those of `couplings/presets.py`."""

from __future__ import annotations

from dataclasses import dataclass

from autorev.couplings.presets import PRESETS


@dataclass(frozen=True, slots=True)
class Known:
    """What is said of a method of some name, and how it is drawn."""

    title: str
    meaning: str
    """One sentence."""
    source: str
    """What it does in PyTorch's terms, or the paper."""
    light: str
    """Its colour on light paper."""
    dark: str
    """Its colour on dark paper."""
    symbol: str
    """Of its points, by plotly's name."""
    dash: str
    """Of its lines, likewise."""


def _coupling(name: str, *look: str) -> Known:
    return Known(name, PRESETS[name].meaning, PRESETS[name].source, *look)


METHODS: dict[str, Known] = {
    "plain": Known(
        "plain autograd",
        "PyTorch as it is: every block keeps what its backward pass needs.",
        "torch autograd keeps every activation",
        *("#16181d", "#f0f1f4", "circle", "solid"),
    ),
    "checkpoint": Known(
        "activation checkpointing",
        "Every block keeps only its input, and runs once more in the backward pass.",
        "torch.utils.checkpoint around every block",
        *("#0b5cc4", "#3a8df0", "square", "solid"),
    ),
    "sac": Known(
        "selective activation checkpointing",
        "Checkpointing that also keeps what attention and every other matrix product computed.",
        "checkpoint that keeps attention outputs and every other matrix product (torch's selective checkpointing)",
        *("#7724f3", "#7555f6", "hexagon", "dash"),
    ),
    "compile": Known(
        "torch.compile's memory budget",
        "Every block compiled by torch.compile, which decides within a memory budget what to keep.",
        "torch.compile of every block with an activation memory budget",
        *("#194c38", "#aed279", "hourglass", "dot"),
    ),
    "offload": Known(
        "offloaded checkpointing",
        "Checkpointing, with the kept inputs in host memory.",
        "checkpoint, with the blocks' inputs moved to the host",
        *("#4fbcf5", "#a4dafc", "square-open", "dash"),
    ),
    "momentum": _coupling("momentum", "#d55e00", "#f07a30", "diamond", "solid"),
    "leapfrog": _coupling("leapfrog", "#189c5b", "#22c084", "triangle-up", "solid"),
    "midpoint": _coupling("midpoint", "#f5b000", "#f9d648", "triangle-down", "dash"),
    "midpoint_a": _coupling("midpoint_a", "#7a3e11", "#a8683f", "triangle-down-open", "dot"),
    "bdia": _coupling("bdia", "#c06bb4", "#ee86c0", "cross", "dashdot"),
    "hamiltonian": _coupling("hamiltonian", "#561a7d", "#9c66ba", "star", "solid"),
    "revnet": _coupling("revnet", "#85807f", "#767b83", "star-open", "dash"),
}
"""Colours stay apart as those of `report/palette.py` do."""
BASELINES = tuple(name for name in METHODS if name not in PRESETS)
"""What PyTorch can do without a reversible coupling."""
