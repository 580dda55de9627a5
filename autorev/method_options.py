"""The options of each method: which it takes, and how the text of one is read and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autorev.couplings.presets import PRESETS
from autorev.errors import SettingError


def options_of(name: str) -> tuple[str, ...]:
    """The options that a method of that name takes."""
    if name in PRESETS:
        numbers = () if PRESETS[name].two_streams else ("gamma", "c") if name == "momentum" else ("c",)
        shared = ("arithmetic", "granularity", "keep_last", "fraction_bits", "tile", "keep", "host", "compile")
        return ("loss", *numbers, *shared)
    others = {"compile": ("loss", "budget"), "plain": ("loss", "tile"), "sac": ("loss", "keep_last", "tile")}
    return others.get(name, ("loss", "keep_last", "tile", "keep", "host"))


def moved_of(name: str) -> tuple[str, ...]:
    """What such a method has that the host could hold."""
    own = ("side_bits",) if name in PRESETS else ("inputs",) if name == "offload" else ()
    return (*own, "attention")


CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ("full", "chunked"),
    "arithmetic": ("exact", "float"),
    "granularity": ("block", "sublayer"),
    "compile": ("blocks", "graph"),
}


def _power(text: str) -> float:
    if not 1 <= (k := int(text)) <= 7:
        raise SettingError(f"k of the method momentum is 1 to 7, not {k}")
    return float(2.0**-k)


def _count(text: str) -> int | str:
    return text if text == "auto" else int(text)


def readers_of(name: str) -> dict[str, Callable[[str], Any]]:
    """How the text of each option is read that a method of that name takes; a reader raises ValueError."""
    taken = options_of(name)
    return {o: read for o, read in _READ.items() if o in taken} | ({"k": _power} if name == "momentum" else {})


_READ: dict[str, Callable[[str], Any]] = {
    "loss": str,
    "gamma": float,
    "c": float,
    "arithmetic": str,
    "granularity": str,
    "keep_last": _count,
    "fraction_bits": int,
    "budget": float,
    "tile": _count,
    "keep": str,
    "host": str,
    "compile": str,
}


def shortest(value: Any) -> str:
    """The shortest text that is read as the same value."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)
