"""One run, one place: whoever writes there holds a lock, which the system takes back when the process ends, however."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from autorev.errors import SettingError

_PATIENCE = 0.2
"""Seconds: a lock that is being given back is waited for."""


@contextmanager
def held(folder: Path, name: str, what: str, instead: str) -> Iterator[None]:
    """Hold the lock NAME of `folder` while it lasts.

    The folder is made where there is none; if nothing was put into it, it goes again.

    Args:
        folder: where the lock lies.
        name: what it guards there.
        what: the same, in the words of an error.
        instead: how to be out of the other's way, in an imperative.

    Raises:
        SettingError: another process holds it, or the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    lock_file, holder = lock_files(folder, name)
    lock = FileLock(lock_file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise SettingError(f"{what} is in use by {_who(holder)}; wait for it to end, or {instead}") from None
    except OSError as error:
        _remove_empty(made)
        raise SettingError(f"{folder} cannot be written to: {error.strerror}; {instead}") from None
    try:
        with suppress(OSError):  # on a full disk, the lock holds all the same
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}", encoding="utf-8")
        yield
    finally:
        # While it is held: whoever waits for the file looks whether it is still there.
        for path in (holder, lock_file):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        lock.release()
        _remove_empty(made)


def lock_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The lock, and the file that says who holds it."""
    return folder / f".{name}.lock", folder / f".{name}.holder"


def _who(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for path in folders:
            path.rmdir()
