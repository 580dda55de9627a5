"""What a command prints and writes: text without control codes, on any terminal, pipe or full disk."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autorev.files import why_not_written
from autorev.format import visible
from autorev.records import replace_whole

if TYPE_CHECKING:
    from rich.console import Console

REPORTS = Path("reports")
"""Where pages go that nobody gave a place."""
_LONGEST_NAME = 100
"""Letters; a file system takes 255 bytes."""


def say(text: str, err: bool = False) -> None:
    """Print a line, or several; on stderr, if there is one that takes it."""
    if err:
        with suppress(OSError):
            click.echo(visible(text), err=True)
        return
    with printing():
        click.echo(visible(text))


@contextmanager
def printing() -> Iterator[None]:
    """What is printed inside and cannot be is an error of the command's own: there is no result then."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # the reader of a pipe went away, which click ends quietly
        _drop_output()
        raise click.ClickException(f"the output could not be written: {error.strerror}") from None


def console() -> Console:
    """rich's, for tables."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Screen()


def check_place(path: Path) -> None:
    """Raise where a report could not be written to `path`: better said before the work than after it."""
    if why := why_not_written(path):
        raise _unwritten(path, why)


def write(path: Path, text: str) -> None:
    """Write a report, whole or not at all."""
    try:
        replace_whole(path, text)
    except OSError as error:
        raise _unwritten(path, error.strerror) from None


def _unwritten(path: Path, why: str | None) -> click.ClickException:
    return click.FileError(str(path), f"{why}; name another file")


def file_name(model: str) -> str:
    """A model's name without what a file system, or a shell, reads as something else."""
    return re.sub(r"[^\w.-]+", "-", model)[:_LONGEST_NAME].strip("-.") or "model"


def show_what_cannot_be_written() -> None:
    """A terminal of few letters (`LC_ALL=C`) gets the others as escapes, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Python writes what is left in its buffer once more at its end, and would complain of it then."""
    with suppress(OSError, ValueError):  # a test's stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
