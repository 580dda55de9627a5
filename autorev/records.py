"""Records as files: frozen data to JSON with a digest of its content, and back, with a clear word about what is wrong.

Numbers in a record are measurements. One that was cut short, changed by hand or written by another version is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, TypeVar

from autorev.analysis import converter
from autorev.errors import RecordError

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
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{name} is not valid JSON (line {error.lineno}: {error.msg}): it is truncated, or was edited; "
            "measure again, or take it from version control"
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


def read_text(path: str | Path) -> str:
    """The text of a record's file.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecordError(f"{path} cannot be read: {why}") from None


def write_whole(path: Path, text: str) -> Path:
    """Write `text`; whoever reads the file meanwhile, or after a crash, sees the old text or the new one, whole.

    Raises:
        RecordError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}; name another folder") from None
    return path


def _digest(data: Any) -> str:
    """Of the content, whatever the order of keys or the white space."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
