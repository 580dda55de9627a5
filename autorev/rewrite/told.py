"""What a converted chain tells the user while it runs: each thing once."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from autorev.engine.chain import ReversibleChain

_told: WeakKeyDictionary[ReversibleChain, set[str]] = WeakKeyDictionary()


def say(chain: ReversibleChain, what: str) -> None:
    """Log that the blocks of `chain` are reversible and `what`, unless it was said."""
    told = _told.setdefault(chain, set())
    if what not in told:
        told.add(what)
        logging.getLogger("autorev").warning("the blocks of %s are reversible and %s", chain.name, what)
