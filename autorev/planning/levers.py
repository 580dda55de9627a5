"""The levers of a plan: what a method does for so many blocks of each chain, and the same method with other numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from autorev.keeps import KEPT, MOVED, amounts_of, text_of
from autorev.methods import Method

Lever = tuple[str, str]
"""The option, and what of it."""
Cost = Callable[[Method], tuple[float, ...] | None]
"""Of a method; None: it does not fit."""
STORED: Lever = ("keep_last", "")
ATTENTION: Lever = ("keep", "attention")


def levers_of(method: Method, long: bool) -> list[Lever]:
    """Those that `method` has; `long`: is what attention returned worth keeping?"""
    moved = amounts_of(method.host, MOVED)
    if method.name == "offload":
        moved.setdefault("inputs", None)
    return [STORED, *([ATTENTION] if long else []), *(("host", what) for what in moved)]


def with_number(method: Method, lever: Lever, number: int | None) -> Method:
    """`method`, which does that for so many blocks; None: for all."""
    option, what = lever
    if lever == STORED:
        return replace(method, keep_last=number or 0)
    amounts = {**amounts_of(getattr(method, option), KEPT if lever == ATTENTION else MOVED), what: number}
    return replace(method, keep=text_of(amounts)) if option == "keep" else replace(method, host=text_of(amounts))


def best_number(method: Method, lever: Lever, blocks: int, cost: Cost) -> Method:
    """`method`, or the same with the number of `lever` at the edge of what fits, where that costs less."""
    wants_memory = lever in (STORED, ATTENTION)
    good, bad = (0, blocks) if wants_memory else (blocks, 0)
    tried = {method: cost(method)}

    def fits(number: int) -> bool:
        other = with_number(method, lever, None if number == blocks and lever != STORED else number)
        tried[other] = cost(other)
        return tried[other] is not None

    if lever == ATTENTION and fits(blocks):
        good = bad
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return min(tried, key=lambda each: tried[each] or (math.inf,))
