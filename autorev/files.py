"""Paths and JSON as users and strangers write them: read with a clear word about what is wrong, and within bounds.

Everything that comes from a file passes here first, so that what follows may rely on it: JSON is nested no deeper than
a program can walk, and its whole numbers are sizes that a computer can have.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from autorev.errors import UnreadableError

DEEPEST = 50
"""Levels of lists and objects within each other; a config has five."""
LARGEST = 2**63
"""No size, count or number of a token reaches it, and PyTorch counts no further."""
MOST_BYTES = 2**29
"""Of a file that is read whole: a large record has one thousandth of it."""
_SHOWN = 60


def path_of(given: str | Path) -> Path:
    """The path, `~` being the home folder where there is one.

    Raises:
        UnreadableError: it is no path, or the system cannot look there (a name that is too long, a folder that may not
            be read).
    """
    try:
        path = Path(given)
    except TypeError:
        raise UnreadableError(f"a path is text, not {given!r}") from None
    with suppress(RuntimeError):  # `~name` of nobody: a file may be called so
        path = path.expanduser()
    try:
        path.exists()
    except OSError as error:
        raise UnreadableError(f"{shortened(str(given))} cannot be looked up: {error.strerror}") from None
    return path


def why_not_written(path: Path) -> str:
    """Why nothing could be written to a file, or a folder, of that name, as the system says it; empty where it could.

    It is tried where its folder is, or the first one above it that is there: what may be written is not all there is to
    it (read-only and virtual file systems), and nothing is left behind.
    """
    try:
        path = path.resolve()
        if path.exists() and not path.is_dir() and not path.is_file():  # a pipe or a device
            return "" if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
        inside = path if path.is_dir() else path.parent
        while not inside.exists():
            inside = inside.parent
        with tempfile.TemporaryFile(dir=inside):
            return ""
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError:  # links that lead to each other
        return os.strerror(errno.ELOOP)


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` makes of it.

    Raises:
        UnreadableError: it is no JSON, or out of bounds; the text reads on from the file's name (`is not valid ...`).
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise UnreadableError(f"is nested deeper than {DEEPEST} levels") from None
    except UnicodeDecodeError:
        raise UnreadableError("is not valid JSON: it is not UTF-8 text") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise UnreadableError("is not valid JSON: it holds a number of thousands of digits") from None
    _check_bounds(data)
    return data


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UnreadableError: see `parse_json`, and that the file cannot be read; the file is not named.
    """
    return parse_json(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        UnreadableError: it cannot be read, or has no end; the file is not named.
    """
    try:
        if path.is_char_device() or path.is_block_device():
            raise UnreadableError("cannot be read: it is a device")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise UnreadableError(f"cannot be read: it is larger than {MOST_BYTES >> 20} MiB")
    return content


def shortened(text: str) -> str:
    """`text`, cut where it would fill a screen."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} letters)"


def _check_bounds(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, int) and not -LARGEST < value < LARGEST:
                raise UnreadableError(f"holds the number {shortened(str(value))}, which is larger than any size")
        if not inner:
            return
        level = inner
    raise UnreadableError(f"is nested deeper than {DEEPEST} levels")
