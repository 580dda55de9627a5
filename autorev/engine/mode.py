"""How converted models run in this thread: reversibly, as the oracle, or as they were before the conversion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REVERSIBLE, ORACLE, ORIGINAL = "reversible", "oracle", "original"

_mode: ContextVar[str] = ContextVar("autorev mode", default=REVERSIBLE)


@contextmanager
def running(how: str) -> Iterator[None]:
    """While it lasts, and in this thread alone, converted models run reversibly, as the ORACLE (the original code under
    the same coupling, every activation stored by ordinary autograd), or as the ORIGINAL blocks.

    A second run in backward is reversible whatever thread it is in: that is how the first one was.
    """
    token = _mode.set(how)
    try:
        yield
    finally:
        _mode.reset(token)


def mode() -> str:
    """How converted models run at the moment, in this thread."""
    return _mode.get()
