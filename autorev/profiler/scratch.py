"""Files that a profile and its processes hand to each other: none of them outlives the profile, or the next one."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autorev.errors import SettingError
from autorev.lock import held, lock_files

_PREFIX = "autorev-scratch-"
_LOCK = "scratch"
_YOUNG = 60.0
"""Seconds: of a folder this young the lock may be in the making."""


@contextmanager
def scratch(folder: str | Path | None, name: str) -> Iterator[Path]:
    """A folder for such files while it lasts: beside the record, or the system's where there is none.

    A process that was killed could not remove its own. Beside a record the next profile of that name does, which is the
    only one (it holds the record's lock); in the system's folder any next profile does.
    """
    if folder is None:
        _remove_abandoned()
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as made, held(Path(made), _LOCK, made, "start it again"):
            yield Path(made)
        return
    place = Path(folder) / f".{name}.scratch"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if not lock_files(path, _LOCK)[0].is_file() or time.time() - path.stat().st_mtime < _YOUNG:
                continue
            with held(path, _LOCK, str(path), "start it again"):
                shutil.rmtree(path, ignore_errors=True)
        except (OSError, SettingError):  # in use, of another user, or gone
            continue
