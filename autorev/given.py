"""What a caller gave: Python takes anything, so what has to be a number is looked at before it is computed with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any


def is_count(value: Any, least: int = 1) -> bool:
    """A whole number, `least` or more? `True` is none: who writes it means something else."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """A number that a float can hold, neither nan nor infinite?"""
    is_real = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    return is_real and bool(abs(value) <= sys.float_info.max)


def wrong_number(given: Any) -> str:
    """What in a number for all blocks, or a dict from block patterns to numbers, is neither; empty where nothing is."""
    if not isinstance(given, Mapping):
        right = given is None or is_number(given)
        return "" if right else f"a finite number, or a dict from block patterns to numbers, not {given!r}"
    for pattern, number in given.items():
        if not isinstance(pattern, str):
            return f"a dict from block patterns, which are text, not {pattern!r}, to numbers"
        if not is_number(number):
            return f"a finite number for {pattern!r}, not {number!r}"
    return ""


def no_function(**given: Any) -> str:
    """Which of these, by the names of their parameters, cannot be called; empty where all can."""
    return next((f"{name} is a function, not {value!r}" for name, value in given.items() if not callable(value)), "")
