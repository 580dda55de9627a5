"""A mask that attention is given: is it causal, and what of it does a tile look at?

Its two last axes are positions, those that look (queries) and those that are looked at (keys). Of a tile, it has the
queries' rows, and the columns up to the tile's last position, as the past has the keys.

Whether a mask is causal is in its values. They are looked at once, and not in each block: a GPU is waited for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from autorev.engine.digest import digest, waited_for
from autorev.engine.owned import is_fake, memory_of

QUERIES, KEYS = -2, -1
AT_ONCE = 64
"""Queries whose rows are looked at together, so that a mask is not held a second time."""


def own_part(mask: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """What a call on a tile's positions alone would be given."""
    return mask.narrow(QUERIES, start, length).narrow(KEYS, start, length)


def rows(mask: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """What a tile's queries see of the keys up to its end."""
    return mask.narrow(QUERIES, start, length).narrow(KEYS, 0, start + length)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By a mask's storage, as blocks run again on other tensors of it: what it is known by, and the answer."""


def is_causal(mask: torch.Tensor) -> bool:
    """Is no position shown a later one? True of one without values."""
    if is_fake(mask):
        return True
    storage = mask.untyped_storage()
    # Whoever writes through `.data` or NumPy is not counted.
    known_by = memory_of(mask), digest(mask, exact=True) if waited_for(mask.device) else None
    before: tuple[Any, bool] | None = _known.get(storage)
    if before is not None and before[0] == known_by and not mask.is_inference():  # these count no writes at all
        return before[1]
    with torch.no_grad():
        answer = bool(_shows_nothing_later(mask))
    _known[storage] = known_by, answer
    return answer


def _shows_nothing_later(mask: torch.Tensor) -> torch.Tensor:
    answer = torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, mask.shape[QUERIES], AT_ONCE):
        few = mask.narrow(QUERIES, start, min(AT_ONCE, mask.shape[QUERIES] - start))
        later = torch.ones(few.shape[QUERIES:], dtype=torch.bool, device=mask.device).triu(start + 1)
        answer &= (_hidden(few, later) if mask.is_floating_point() else ~(few & later)).all()
    return answer


def _hidden(few: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """Of numbers that are added to scores: -inf hides a key, and so does the dtype's lowest number, if the query is
    shown another. Where it is shown none, all of its keys count alike, the later ones, too."""
    lowest = torch.finfo(few.dtype).min
    shown = ((few > lowest / 4) & ~later).any(KEYS, keepdim=True)
    return ~later | (few == float("-inf")) | (few <= lowest / 2) & shown
