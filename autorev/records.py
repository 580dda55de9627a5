"""Records as files: frozen data to JSON with a digest of its content, and back, with a clear word about what is wrong.

Numbers in a record are measurements. One that was cut short, changed by hand or written by another version is refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from autorev.analysis import converter
from autorev.errors import RecordError, UnreadableError
from autorev.files import parse_json, read_bytes, shortened

LONGEST_NAME = 150
"""Letters: a file system takes 255 bytes."""
Record = TypeVar("Record")
_NUMBERS = re.compile(r"\[\s+(?:[-+.\deE]+,\s+)*[-+.\deE]+\s+\]")
"""A list of numbers: a time line has hundreds, and each would have a line of its own."""


def to_json(record: Any) -> str:
    """One JSON object, with a digest of its content at its end."""
    data = converter().unstructure(record)
    text = json.dumps({**data, "digest": _digest(data)}, indent=1)
    return _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)


def from_json(text: str, cls: type[Record], version: int, what: str, name: str) -> Record:
    """Read back what `to_json` wrote of a `cls`; `what` a record is of (`a profile`), and `name` what errors call it.

    Raises:
        RecordError: it is truncated, of another schema version, or was changed by hand.
    """
    try:
        data = parse_json(text)
    except UnreadableError as error:
        raise RecordError(
            f"{name} {error}: it is truncated, or was edited; measure again, or take it from version control"
        ) from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != version or "digest" not in data:
        why = f"has schema version {found}" if found is not None else f"is no record of {what}"
        raise RecordError(f"{name} {why}, and this autorev reads {version}; measure again")
    digest = data.pop("digest")
    from cattrs.errors import BaseValidationError
    from cattrs.v import transform_error

    try:
        record: Record = converter().structure(data, cls)
    except BaseValidationError as error:
        problems = "; ".join(transform_error(error)[:3])
        raise RecordError(f"{name} does not follow its schema: {problems}") from None
    if digest != _digest(data):
        raise RecordError(
            f"{name} was changed after it was written (its digest does not match), so its figures are no "
            "measurement; measure again, or take it from version control"
        )
    return record


def check_name(name: str, where: str) -> None:
    """Raise unless a record that is written to a file of its own name may be called `name`.

    Raises:
        RecordError: it may not.
    """
    if not name.isprintable() or set(name) & set("/\\") or name in ("", ".", "..") or len(name) > LONGEST_NAME:
        raise RecordError(
            f"{where} has the name {shortened(name)!r}, which a record cannot have: it is 1 to {LONGEST_NAME} letters, "
            "without slashes and control characters"
        )


def read_text(path: str | Path) -> str:
    """The text of a record's file.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        return read_bytes(Path(path)).decode()
    except UnreadableError as error:
        raise RecordError(f"{path} {error}") from None
    except UnicodeDecodeError:
        raise RecordError(f"{path} cannot be read: it is not text") from None


def write_whole(path: Path, text: str) -> Path:
    """Write `text`; whoever reads the file meanwhile, or after a crash, sees the old text or the new one, whole.

    Raises:
        RecordError: the file cannot be written.
    """
    try:
        replace_whole(path, text)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}; name another folder") from None
    return path


def replace_whole(path: Path, text: str) -> None:
    """As `write_whole`, with the system's error."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or a device, which nothing can take the place of
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # of two processes that write at once, each has its own
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def drop_parts(path: Path) -> None:
    """Remove what processes that were killed had not finished writing to `path`; for whoever alone writes there."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _digest(data: Any) -> str:
    """Of the content, whatever the order of keys or the white space."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
