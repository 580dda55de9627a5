"""A full disk, a kill, another process at work: at any write, and the folder is not lost to its run.

Writes are noticed by Python's audit events, and by those of torch and safetensors, which make none.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils as modeling

from autorev.errors import AutorevError, SettingError, Terminated
from autorev.finetuning.export import export
from autorev.finetuning.folder import claimed, finished
from autorev.finetuning.record import FineTuning
from autorev.lock import held, lock_files
from tests.helpers.tiny_run import At, figures, run_and_die, tune, workplace

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_collections"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]
SHORT: dict[str, Any] = {"steps": 2, "save_every": 1, "evaluate_every": 2, "validation_rows": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    return workplace(tmp_path_factory.mktemp("faults"))


class Writes:
    """Calls `act` with the number and the path of each write below `folder`."""

    def __init__(self) -> None:
        self.folder, self.count, self.act = "", 0, lambda number, path: None
        sys.addaudithook(self._noticed)  # for good: it does nothing without a folder

    def watch(self, folder: Path, act: Callable[[int, str], None] = lambda number, path: None) -> None:
        """From now on."""
        self.folder, self.count, self.act = str(folder), 0, act

    def _noticed(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or event not in ("open", "os.mkdir", "os.rename"):
            return
        path = str(args[1] if event == "os.rename" else args[0])
        reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if path.startswith(self.folder) and not reads:
            self.count += 1
            self.act(self.count, path)


def telling(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save(what, path)`, with the event that it makes none of."""

    def told(what: Any, path: Any, *args: Any, **how: Any) -> Any:
        sys.audit("open", str(path), "w", os.O_WRONLY)
        return save(what, path, *args, **how)

    return told


@pytest.fixture(scope="module")
def _writes() -> Writes:
    return Writes()


@pytest.fixture
def writes(_writes: Writes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writes]:
    """Also of what is written outside Python."""
    for owner, name in ((torch, "save"), (modeling, "safe_save_file")):
        monkeypatch.setattr(owner, name, telling(getattr(owner, name)))
    yield _writes
    _writes.folder = ""


def check_free(folder: Path) -> None:
    """A run can be started there, or gone on with, or is complete."""
    if finished(folder) is None:
        with claimed(folder, (folder / "run.json").is_file()):
            pass


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(place: Path, writes: Writes) -> None:
    """One sentence says so, nothing half written is left, and the folder takes the run again."""
    writes.watch(place / "whole")
    tune(place, out="whole", **SHORT)
    total = writes.count
    assert total > 30
    for full_at in (
        *range(1, 9),
        *range(9, total, 16),
        total - 1,
        total,
    ):  # each until the first record, and some of the others
        folder = place / f"full-{full_at}"

        def full(number: int, path: str, full_at: int = full_at) -> None:
            if number >= full_at:
                raise OSError(errno.ENOSPC, "No space left on device", path)

        writes.watch(folder, full)
        try:
            tune(place, out=folder.name, **SHORT)
        except AutorevError as error:
            assert "No space left on device" in str(error), (full_at, str(error))
        finally:
            writes.folder = ""
        if folder.exists():
            left = [path.name for path in folder.rglob("*") if path.name.startswith(".")]
            assert not left, (full_at, left)
            check_free(folder)


@pytest.mark.parametrize(
    ("name", "last"),
    [("run.lock", False), ("run.json", False), ("validation.json", False), ("autorev.json", True), ("run.json", True)],
)
def test_a_process_that_is_killed_in_a_write(place: Path, name: str, last: bool, request: Any) -> None:
    """Before the first record, in a checkpoint, while the model is put in its place: the run begins, or goes on."""
    out = f"killed {request.node.callspec.id}"
    assert run_and_die(place, name, last, out=out, **SHORT) == -signal.SIGKILL
    found = finished(place / out) or tune(place, out=out, resume=(place / out / "run.json").is_file(), **SHORT)
    whole = place / "never killed"
    expected = FineTuning.read(whole / "run.json") if whole.exists() else tune(place, out=whole.name, **SHORT)
    assert figures(found) == figures(expected)
    assert not [path.name for path in (place / out).iterdir() if path.name.startswith((".", "checkpoint"))]


# -- one run, one folder


def test_two_at_once(place: Path, tmp_path: Path) -> None:
    """The second says who holds the folder, trains nothing, and leaves everything as it is; for going on, too."""
    seen: list[str] = []

    def again(model: Any) -> None:
        for resume in (False, True):
            with pytest.raises(
                SettingError, match=r"both is in use by process \d+ on .*, since 20.*name another `out`"
            ):
                tune(place, out="both", resume=resume, **SHORT)
        seen.extend(sorted(path.name for path in (place / "both").iterdir() if not path.name.startswith(".")))

    assert tune(place, out="both", callbacks=(At(2, again, "on_step_end"),), **SHORT).complete
    assert seen == ["checkpoint-1", "run.json", "validation.json"]

    def exports(what: str, fraction: float) -> None:
        if fraction == 0.2:
            with pytest.raises(SettingError, match=r"out is in use by process \d+"):
                export(place / "both", tmp_path / "out")

    export(place / "both", tmp_path / "out", progress=exports, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stale_lock_is_none(tmp_path: Path) -> None:
    """Files that a killed process left do not hold anything; and what was made for a lock alone goes again."""
    for path in lock_files(tmp_path, "run"):
        path.write_text("process 1 on nowhere, since ever")
    here = pytest.raises(SettingError, match=f"process {os.getpid()} on")
    with held(tmp_path, "run", "it", "wait"), here, held(tmp_path, "run", "it", "wait"):
        pass
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "new" / "folder", "run", "it", "wait"):
        assert (tmp_path / "new" / "folder").is_dir()
    assert not list(tmp_path.iterdir())


# -- SIGTERM


def test_sigterm_saves(place: Path) -> None:
    """As Ctrl-C does: after the step at hand, with a checkpoint, and a word on how to go on."""
    before = signal.getsignal(signal.SIGTERM)
    end = At(0, lambda model: os.kill(os.getpid(), signal.SIGTERM), "on_step_begin")
    said = r"^ended by SIGTERM after step 1 of 3\. The last good checkpoint is .*checkpoint-1\. Go on with `resume`$"
    with pytest.raises(Terminated, match=said):
        tune(place, out="ended", **{**SHORT, "steps": 3, "save_every": 3}, callbacks=(end,))
    assert signal.getsignal(signal.SIGTERM) is before
    found = tune(place, out="ended", resume=True, **{**SHORT, "steps": 3, "save_every": 3})
    assert found.complete
