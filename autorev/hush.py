"""Silence what libraries say to the calling thread; what they say to other threads is said."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from autorev.patching import is_here, patched_here, this_thread


@contextmanager
def logs_hushed(name: str, level: int) -> Iterator[None]:
    """Below `level`, this thread logs nothing to the logger called `name` and to those below it."""

    def replace(original: Callable[..., bool]) -> Callable[..., bool]:
        def enabled(logger: logging.Logger, asked: int) -> bool:
            ours = asked < level and f"{logger.name}.".startswith(f"{name}.")
            return not ours and original(logger, asked)

        return enabled

    # Not by the logger's level or a filter: those are everybody's.
    with patched_here(logging.Logger, "isEnabledFor", replace):
        yield


@contextmanager
def warnings_hushed(modules: str) -> Iterator[None]:
    """This thread's warnings from modules whose name begins with the pattern `modules` are ignored.

    `warnings.catch_warnings` exchanges the filters of the whole process, and of two threads one may leave its own.
    Here one filter is added that applies to this thread, and taken away again; the others are left where they are.
    """
    with this_thread() as thread:
        here = _ThisThread(modules, thread)
        ours: Any = ("ignore", None, Warning, here, 0)
        warnings.filters.insert(0, ours)  # type: ignore[attr-defined]  # a sequence, it says; this list is asked
        try:
            yield
        finally:
            here.ended = True  # somebody may have saved the filters, and put ours back
            with suppress(ValueError):
                warnings.filters.remove(ours)  # type: ignore[attr-defined]  # likewise


class _ThisThread:
    """What stands in a filter for the pattern of a module's name: `match` is all that is asked of it."""

    def __init__(self, pattern: str, thread: object) -> None:
        self.pattern, self.thread, self.ended = re.compile(pattern), thread, False

    def match(self, module: str) -> bool:
        return not self.ended and is_here(self.thread) and self.pattern.match(module) is not None
