"""A run's folder: one run's, one process's at a time, and nobody's before the first record lies in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autorev.errors import SettingError
from autorev.files import why_not_written
from autorev.finetuning.checkpoints import checkpoints_of, clear_parts, discard, last_checkpoint
from autorev.finetuning.record import FILE, HELD_OUT, FineTuning
from autorev.intact import FILE as MARK
from autorev.lock import held, lock_files
from autorev.records import drop_parts

_LOCK = "run"
_INSTEAD = "name another `out`"


@contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[FineTuning | None]:
    """Have the folder for a run while it lasts; the record that the run goes on with, if it is to `resume` one.

    Raises:
        SettingError: there is no such run, another one, or another process at work on it.
        RecordError: its record is damaged.
        DamagedError: its newest checkpoint is.
    """
    _check_place(folder)
    with held(folder, _LOCK, str(folder), _INSTEAD):
        if resume:
            yield _interrupted(folder)
        else:
            _check_free(folder)
            yield None


def finished(folder: Path) -> FineTuning | None:
    """The record of a run that is complete, and has nothing left to do but to be reported; None for any other.

    Raises:
        AutorevError: the record is damaged, or another process is at work on it.
    """
    path = folder / FILE
    if not path.is_file() or not (record := FineTuning.read(path)).complete:
        return None
    with held(folder, _LOCK, str(folder), _INSTEAD):
        _tidy(folder, record)
    return record


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{folder} is there already, and holds no run; {_INSTEAD}")
    if why := why_not_written(folder):
        raise SettingError(f"{folder} cannot be written to: {why}; {_INSTEAD}")


def _check_free(folder: Path) -> None:
    path = folder / FILE
    if path.is_file():
        raise SettingError(f"{folder} is there already; go on with its run by `resume`, or {_INSTEAD}")
    drop_parts(path)  # of a start that was killed before its first record
    if set(folder.iterdir()) - set(lock_files(folder, _LOCK)):
        raise SettingError(f"{folder} is there already, and holds no run; {_INSTEAD}")


def _interrupted(folder: Path) -> FineTuning:
    path = folder / FILE
    if not path.is_file():
        raise SettingError(f"{folder} holds no run to go on with ({FILE} is missing); leave `resume` out")
    record = FineTuning.read(path)
    _tidy(folder, record)
    if record.complete:
        raise SettingError(f"the run in {folder} is complete; {_INSTEAD} for a new one")
    last_checkpoint(folder, record.run)  # one that is damaged had better be said before the model is loaded
    return record


def _tidy(folder: Path, record: FineTuning) -> None:
    """Remove what a process that was killed left behind."""
    for name in (FILE, HELD_OUT, MARK):
        drop_parts(folder / name)
    clear_parts(folder)
    if record.complete:
        for checkpoint in checkpoints_of(folder, record.run):
            discard(checkpoint)
