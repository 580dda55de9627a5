"""Records as files: frozen data to JSON with a digest of its content, and back, with a clear word about what is wrong.

Numbers in a record are measurements. One that was cut short, changed by hand or written by another version is refused.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from autorev.errors import RecordError, UnreadableError
from autorev.files import parse_json, read_bytes, shortened

if TYPE_CHECKING:
    from cattrs import Converter

LONGEST_NAME = 150
"""Letters: a file system takes 255 bytes."""
_NUMBERS = re.compile(r"\[\s+(?:[-+.\deE]+,\s+)*[-+.\deE]+\s+\]")
"""A list of numbers: a time line has hundreds, and each would have a line of its own."""


class Record:
    """The base of frozen data that is written to files; each kind has the fields `kind` and `schema_version`."""

    __slots__ = ()

    def to_json(self) -> str:
        """One JSON object, with a digest of its content at its end."""
        data = converter().unstructure(self)
        text = json.dumps({**data, "digest": _digest(data)}, indent=1)
        return _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)

    @classmethod
    def from_json(cls, text: str, name: str = "this record") -> Self:
        """Read back what `to_json` wrote; `name` is what errors call it.

        Raises:
            RecordError: it is truncated, of another kind or schema version, or was changed by hand.
        """
        own: Any = cls  # a dataclass, as every subclass is
        kind, version = (next(f.default for f in fields(own) if f.name == n) for n in ("kind", "schema_version"))
        try:
            data = parse_json(text)
        except UnreadableError as error:
            raise RecordError(
                f"{name} {error}: it is truncated, or was edited; measure again, or take it from version control"
            ) from None
        if not isinstance(data, dict) or data.get("kind") != kind or "digest" not in data:
            raise RecordError(f"{name} is no record of {_with_article(kind)}; name one that autorev wrote")
        found = data.get("schema_version")
        if found != version:
            raise RecordError(f"{name} has schema version {found}, and this autorev reads {version}; measure again")
        digest = data.pop("digest")
        from cattrs.errors import BaseValidationError
        from cattrs.v import transform_error

        try:
            record = converter().structure(data, cls)
        except BaseValidationError as error:
            problems = "; ".join(transform_error(error)[:3])
            raise RecordError(f"{name} does not follow its schema: {problems}") from None
        if digest != _digest(data):
            raise RecordError(
                f"{name} was changed after it was written (its digest does not match), so its figures are no "
                "measurement; measure again, or take it from version control"
            )
        return record

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The record in a file.

        Raises:
            RecordError: it cannot be read, or see `from_json`.
        """
        return cls.from_json(read_text(path), str(path))

    def write(self, path: str | Path) -> Path:
        """Write it to `path`; whoever reads it meanwhile sees the old record or the new one, whole.

        Raises:
            RecordError: the file cannot be written.
        """
        return write_whole(Path(path), self.to_json())


def kind_of(path: str | Path) -> str | None:
    """The kind of the record in a file, as it says itself; None for what is no record, or cannot be read."""
    try:
        data = parse_json(read_text(path))
    except (RecordError, UnreadableError):
        return None
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind if isinstance(kind, str) else None


def converter() -> Converter:
    """Dataclasses to JSON and back; Python's `class_name` is JSON's `class`."""
    from cattrs import Converter
    from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

    made = Converter(forbid_extra_keys=True)
    rename = override(rename="class")
    made.register_unstructure_hook_factory(_is_spelt, lambda cls: str)
    made.register_structure_hook_factory(_is_spelt, lambda cls: lambda text, _: cls.parse(text))
    made.register_unstructure_hook_factory(
        _names_a_class, lambda cls: make_dict_unstructure_fn(cls, made, class_name=rename)
    )
    made.register_structure_hook_factory(
        _names_a_class,
        lambda cls: make_dict_structure_fn(cls, made, class_name=rename, _cattrs_forbid_extra_keys=True),
    )
    return made


def _is_spelt(cls: Any) -> bool:
    """Is it written as text, which its `parse` reads?"""
    return is_dataclass(cls) and hasattr(cls, "parse")


def _names_a_class(cls: Any) -> bool:
    return is_dataclass(cls) and any(field.name == "class_name" for field in fields(cls))


def _with_article(kind: Any) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def check_name(name: str, where: str) -> None:
    """Raise unless a record that is written to a file of its own name may be called `name`.

    Raises:
        RecordError: it may not.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or set(name) & set("/\\")
        or name in ("", ".", "..")
        or len(name) > LONGEST_NAME
    ):
        raise RecordError(
            f"{where} has the name {shortened(str(name))!r}, which a record cannot have: it is 1 to {LONGEST_NAME} "
            "letters, without slashes and control characters"
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
    try:
        path = path.resolve()
    except RuntimeError:  # links that lead to each other
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
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
