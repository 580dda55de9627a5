"""One record, one profile: a second one of the same name is told so, and killed ones leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

from autorev.errors import SettingError
from autorev.profiler import scratch as scratch_module
from autorev.profiler.job import Job
from autorev.profiler.scratch import scratch
from tests.helpers.profiling import run

pytestmark = pytest.mark.usefixtures("folder")


def test_two_of_one_name(jobs: list[Job], tmp_path: Path) -> None:
    """The second says who is at work, and writes nothing; under another name it runs."""
    seen: list[str] = []

    def again(what: str, fraction: float) -> None:
        if "predicting" in what and not seen:
            seen.append(what)
            for resume in (False, True):
                with pytest.raises(SettingError, match=r"one\.json is in use by process \d+ .*another `name`"):
                    run(out="records", name="one", resume=resume)
            run("profiled_net:make", "plain", out="records", name="two")

    run("profiled_net:make", "plain", out="records", name="one", progress=again)
    assert seen and sorted(path.name for path in Path("records").iterdir()) == ["one.json", "two.json"]


def _killed(folder: str | None) -> None:
    def kill(what: str, fraction: float) -> None:
        if "predicting" in what:
            os.kill(os.getpid(), signal.SIGKILL)

    run("profiled_net:make", "plain", out=folder, name="one", progress=kill)


@pytest.mark.parametrize("place", ["records", None])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_killed_ones_leave_nothing(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    """Nothing in the system's folder where there is a record's; where there is none, the next one removes it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(scratch_module, "_YOUNG", 0.0)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(place,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = list((tmp_path / "temporary").iterdir())
    assert bool(left) == (place is None)
    mine = tmp_path / "temporary" / "autorev-scratch-mine"
    mine.mkdir()
    run("profiled_net:make", "plain", out=place, name="one")
    assert list((tmp_path / "temporary").iterdir()) == [mine]  # which has no lock, and may be anybody's
    assert place is None or [path.name for path in Path(place).iterdir()] == ["one.json"]


def test_what_is_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another profile that goes on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch_module, "_YOUNG", 0.0)
    with scratch(None, "x") as one, scratch(None, "x") as other:
        assert one != other and one.is_dir() and other.is_dir()
    assert not list(tmp_path.glob("autorev-*"))
