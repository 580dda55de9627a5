"""What a block keeps for backward beyond what its method always does, and what of that waits on the host.

A method says it of every block or, with a number, of so many in each chain: `attention`, `side_bits+attention:8`.
"""

from __future__ import annotations

from dataclasses import dataclass

from autorev.given import is_count

KEPT = ("attention",)
"""What `keep=` takes: of the last blocks that are run twice, as these let go of it first."""
MOVED = ("side_bits", "inputs", "attention")
"""What `host=` takes: of the first blocks that have it, where it waits longest."""

Amounts = dict[str, int | None]
"""What, of how many blocks of each chain; None: of all."""


@dataclass(frozen=True, slots=True)
class Keeps:
    """What one block keeps."""

    attention: bool = False
    """What its attention returned, so that its second run need not compute it."""
    on_host: frozenset[str] = frozenset()
    """Of `MOVED`."""


NOTHING = Keeps()


def amounts_of(text: str | None, known: tuple[str, ...]) -> Amounts:
    """What `text` says.

    Raises:
        ValueError: it says something else than `known`, twice the same, or a number below 1.
    """
    found: Amounts = {}
    for part in text.split("+") if text else ():
        what, colon, number = part.strip().partition(":")
        count = int(number) if colon else None
        if what not in known or what in found or not (count is None or is_count(count, 1)):
            raise ValueError(part)
        found[what] = count
    return found


def text_of(amounts: Amounts) -> str | None:
    """The one spelling: in the order of `MOVED`."""
    parts = (what if amounts[what] is None else f"{what}:{amounts[what]}" for what in sorted(amounts, key=MOVED.index))
    return "+".join(parts) or None


def keeps_at(position: int, recomputed: int, kept: Amounts, moved: Amounts) -> Keeps:
    """Of the block at `position` of a chain, the first `recomputed` of whose blocks are run twice."""
    if position >= recomputed:
        return NOTHING

    def among(amounts: Amounts, what: str, place: int) -> bool:
        number = amounts.get(what, 0)
        return number is None or place < number

    attention = among(kept, "attention", recomputed - 1 - position)
    number = kept.get("attention")
    first = 0 if number is None else max(recomputed - number, 0)
    places = {"side_bits": position, "inputs": position, **({"attention": position - first} if attention else {})}
    return Keeps(attention, frozenset(what for what, place in places.items() if among(moved, what, place)))
