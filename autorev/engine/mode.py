"""How converted models run in this thread: reversibly, as the oracle, or as they were before the conversion."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

REVERSIBLE, ORACLE, ORIGINAL = "reversible", "oracle", "original"

_mode: ContextVar[str] = ContextVar("autorev mode", default=REVERSIBLE)
_lock = threading.Lock()
otherwise = 0
"""How many threads run converted models otherwise than reversibly: compiled code is guarded by it, as no compiler can
read a context variable."""


@contextmanager
def running(how: str) -> Iterator[None]:
    """While it lasts, and in this thread alone, converted models run reversibly, as the ORACLE (the original code under
    the same coupling, every activation stored by ordinary autograd), or as the ORIGINAL blocks.

    A second run in backward is reversible whatever thread it is in: that is how the first one was.
    """
    token = _mode.set(how)
    _count_otherwise(int(how != REVERSIBLE))
    try:
        yield
    finally:
        _count_otherwise(-int(how != REVERSIBLE))
        _mode.reset(token)


def _count_otherwise(more: int) -> None:
    global otherwise
    with _lock:
        otherwise += more


def mode() -> str:
    """How converted models run at the moment, in this thread."""
    return _mode.get()


def is_traced() -> bool:
    """Is this code a part of what Dynamo compiles, to be run reversibly? It is asked by that code, and guards it."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not otherwise


def is_written_down() -> bool:
    """Are the operators that run now written down, to be run elsewhere (torch.export, torch.jit.trace)?"""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()
