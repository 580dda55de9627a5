"""Are the files of a model what was written? A mark beside them holds the size and a digest of each."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from autorev.errors import DamagedError, RecordError
from autorev.records import Record

FILE = "autorev.json"
"""The mark in its folder, written last."""
_RECORD = "run.json"
"""Of a run, whose figures are those of the files that are marked."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as it was written."""

    name: str
    """With the folders that lead to it, divided by slashes."""
    size: int
    """Bytes."""
    digest: str


@dataclass(frozen=True, slots=True)
class Mark(Record):
    """What a folder of weights holds, and whose they are."""

    run: str
    """The run that wrote them, by its own random name."""
    step: int
    """They are those after so many optimiser steps."""
    files: tuple[Stored, ...]
    coupling: str = ""
    """The method's spec."""
    grids: dict[str, int] = field(default_factory=dict)
    """Fraction bits by chain."""
    kind: str = "mark"
    schema_version: int = 2


def stored(folder: Path) -> tuple[Stored, ...]:
    """Every file in a folder but the mark, once it is on the disk for good."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    return tuple(_settled(path, path.relative_to(folder).as_posix()) for path in files)


def read_mark(folder: Path) -> Mark | None:
    """The mark of a folder; None where there is none.

    Raises:
        DamagedError: it is not what was written.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Mark.read(path)
    except RecordError:
        raise DamagedError(f"{path} is not what was written; {_remedy(folder)}") from None


def damage(folder: Path) -> str:
    """What differs from the mark: a file, and how; empty where nothing does, or where there is no mark."""
    try:
        mark = read_mark(folder)
    except DamagedError:
        return f"{folder / FILE} is not what was written"
    return next(filter(None, (_difference(folder / file.name, file) for file in mark.files)), "") if mark else ""


def check_intact(folder: Path) -> None:
    """Raise where the files of a folder are not those of its mark; without a mark, nothing is known of them.

    Raises:
        DamagedError: one is missing or was changed, which the message names.
    """
    if why := damage(folder):
        raise DamagedError(f"{why}: it was damaged or replaced, and would be used in good faith; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    marks = FILE if not (folder / _RECORD).is_file() else f"{FILE} and {_RECORD}"
    return f"copy the folder once more, or, if you changed it on purpose, remove {marks} there"


def _difference(path: Path, expected: Stored) -> str:
    try:
        found = path.stat()
        if found.st_size != expected.size:
            return f"{path} has {found.st_size:,} bytes instead of {expected.size:,}"
        same = _digest(path, found.st_size, found.st_mtime_ns) == expected.digest
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return "" if same else f"{path} is not what was written (its digest differs)"


def _settled(path: Path, name: str) -> Stored:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is marked as written survives a crash of the machine
    found = path.stat()
    return Stored(name, found.st_size, _digest(path, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=256)  # a folder is looked at by whoever loads a part of it
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
