"""Checkpoints in a run's folder: written aside, marked, put in place whole. What the run did not write is left alone.

A folder `checkpoint-N` is the run's if its mark names the run and step N. What is being written lies in `.part`, which
is emptied when the next one starts.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from autorev import intact, records
from autorev.errors import DamagedError, TrainingError
from autorev.intact import Mark

KEPT = 2
"""Checkpoints: the newest, and one to go back to."""
_PART = ".part"
_GONE = ".old"
_NAME = "checkpoint"
"""Before the step, as `transformers` has it."""


def part_of(folder: Path) -> Path:
    """Where the run's files are while they are not whole."""
    return folder / _PART


def clear_parts(folder: Path) -> None:
    """Remove what was not finished: written, or removed."""
    for path in (part_of(folder), *folder.glob(f".{_NAME}-*{_GONE}")):
        shutil.rmtree(path, ignore_errors=True)


def put_in_place(folder: Path, mark: Mark) -> Path:
    """Mark the checkpoint that lies in the parts, move it to its place, and drop those that are too old.

    Raises:
        OSError: the disk is full, or the like.
        TrainingError: something else is in its place.
    """
    name = f"{_NAME}-{mark.step}"
    new, place = part_of(folder) / name, folder / name
    _make_room(place, mark.run)
    records.replace_whole(new / intact.FILE, mark.to_json())
    new.rename(place)
    for old in checkpoints_of(folder, mark.run)[:-KEPT]:
        discard(old)
    return place


def move_in(folder: Path, mark: Mark) -> None:
    """Move the model that lies in the parts to the folder itself, the mark last.

    Raises:
        OSError: the disk is full, or the like.
    """
    for file in mark.files:
        place = folder / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        (part_of(folder) / "model" / file.name).replace(place)
    records.replace_whole(folder / intact.FILE, mark.to_json())


def check_room(folder: Path, run: str, steps: list[int]) -> None:
    """Raise where a checkpoint of one of these steps could not be written, before anything is trained.

    Raises:
        TrainingError: a folder that is not the run's has its name.
    """
    for step in steps:
        place = folder / f"{_NAME}-{step}"
        if place.exists() and not _is_of(place, run):
            raise TrainingError(_IN_THE_WAY.format(place))


def checkpoints_of(folder: Path, run: str) -> list[Path]:
    """Those of `run`, the oldest first. Whether their files are intact is not looked at."""
    found = [path for path in folder.glob(f"{_NAME}-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted((path for path in found if _is_of(path, run)), key=step_of)


def last_checkpoint(folder: Path, run: str) -> Path | None:
    """The newest one of `run`.

    Raises:
        DamagedError: it is not what was written; says which file, and how to go on from the one before.
    """
    found = checkpoints_of(folder, run)
    why = intact.damage(found[-1]) if found else ""
    if why:
        before = next((path for path in reversed(found[:-1]) if not intact.damage(path)), None)
        go_on = "begin anew" if before is None else f"go on from {before}, which is intact"
        raise DamagedError(
            f"{why}: it was damaged or replaced, and training would go on from something else. Move {found[-1]} away, "
            f"and give `resume` again to {go_on}"
        )
    return found[-1] if found else None


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint such that no half of it is ever found in its place; on a full disk, the next start does."""
    gone = checkpoint.with_name(f".{checkpoint.name}{_GONE}")
    with suppress(OSError):
        checkpoint.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step that it was written after."""
    return int(checkpoint.name.rpartition("-")[2])


_IN_THE_WAY = (
    "{} is there and was not written by this run, which needs the place for a checkpoint of its own; move it away, and "
    "go on with `resume`"
)


def _make_room(place: Path, run: str) -> None:
    if _is_of(place, run):  # of a learning rate that was gone back on
        discard(place)
    if place.exists():
        raise TrainingError(_IN_THE_WAY.format(place))


def _is_of(place: Path, run: str) -> bool:
    """Did `run` write it? A damaged mark is nobody's but ours: nothing else has one."""
    if place.is_symlink() or not place.is_dir():
        return False
    try:
        mark = intact.read_mark(place)
    except DamagedError:
        return True
    return mark is not None and (mark.run, mark.step) == (run, step_of(place))
