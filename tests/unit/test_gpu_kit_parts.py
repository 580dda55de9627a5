"""The GPU kit's own machinery: rows whatever becomes of a piece, what a GPU is asked, sizes, and the report.

`tests/integration/test_gpu_kit.py` runs all of it on a CPU.

python -m pytest tests/unit/test_gpu_kit_parts.py
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from autorev.errors import SettingError
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import size as sizes
from benchmarks.gpu.device import Device, NoTwin
from benchmarks.gpu.machine import record_of
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.report import markdown, wrong
from benchmarks.gpu.size import Size, size_for

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
SMALL = Size(2, 32, 256, 32, "fp32", 4, 2**21, 3, 1)
GIB = 2**30


class Forked(Device):
    """Its processes begin with what is imported here."""

    start_method = "fork"


HERE = Forked("cpu", "a CPU", GIB, 1, True)


def found(device: Device, size: Size, number: int) -> Row:
    """A piece that goes well, and prints."""
    print("on the way", number)
    return {"number": number, "passed": True}


def ends(device: Device, size: Size, how: str) -> Row:
    """A piece that does not."""
    if how == "fails":
        raise ValueError("what went wrong\nand more")
    if how == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "leaves":
        os._exit(7)
    if how == "hangs":
        time.sleep(60)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "is refused":
        raise NoTwin("there is no such thing here")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand much more")


ENDS = {
    "fails": ("failed", "ValueError: what went wrong"),
    "crashes": ("crashed", "signal 11"),
    "leaves": ("crashed", "exit code 7"),
    "hangs": ("stopped", "it was stopped after 1 s"),
    "is killed": ("crashed", "signal 9"),
    "is refused": ("refused", "there is no such thing here"),
    "does not fit": ("out of memory", "Tried to allocate 2.00 GiB"),
}


def test_whatever_becomes_of_a_piece_is_a_row_and_costs_the_others_nothing(tmp_path: Path) -> None:
    """And is not run again. What a piece prints is in the log, and so is the traceback of one that failed."""
    file = tmp_path / "rows.jsonl"
    record = Record(file, HERE, section="a")
    for how in ENDS:
        record.piece(how, ends, SMALL, how, limit=1 if how == "hangs" else 60)
    record.piece("goes well", found, SMALL, 3)
    assert {row["piece"]: row["status"] for row in record.of("a")} == {
        **{how: status for how, (status, _) in ENDS.items()},
        "goes well": "done",
    }
    for how, (_, reason) in ENDS.items():
        assert reason in record.rows["a", how]["reason"], how
        assert "more" not in record.rows["a", how]["reason"]
    assert record.rows["a", "goes well"]["number"] == 3
    log = file.with_suffix(".log").read_text()
    assert "on the way 3" in log and "and more" in log and "Segmentation fault" in log

    written = file.read_text()
    again = Record(file, HERE, section="a")
    assert again.rows == record.rows
    for how in ENDS:
        again.piece(how, found, SMALL, 1)
    assert file.read_text() == written


def test_what_there_was_no_time_for_is_said_and_run_later(tmp_path: Path) -> None:
    """Not begun, or stopped at the end of the section: a rerun has it."""
    file = tmp_path / "rows.jsonl"
    record = Record(file, HERE, section="a", deadline=time.monotonic() + 2.5)
    assert record.piece("long", ends, SMALL, "hangs")["status"] == "no time"
    assert "used up" in record.piece("late", found, SMALL, 1)["reason"]
    later = Record(file, HERE, section="a")
    assert later.piece("late", found, SMALL, 1)["status"] == "done"
    assert [row["piece"] for row in Record(file, HERE).of("a")] == ["long", "late"]
    assert len(file.read_text().splitlines()) == 3


def test_a_line_that_was_being_written_is_dropped_and_another_file_is_refused(tmp_path: Path) -> None:
    """The machine went down meanwhile."""
    file = tmp_path / "rows.jsonl"
    Record(file, HERE, section="a").piece("whole", found, SMALL, 1)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"section": "a", "pie')
    record = Record(file, HERE, section="a")
    record.piece("next", found, SMALL, 2)
    assert file.read_bytes().startswith(whole) and [*record.rows] == [("a", "whole"), ("a", "next")]
    file.write_text("{}\n")
    with pytest.raises(SettingError, match=r"line 1 of .*rows.jsonl is no row"):
        Record(file, HERE)


# -- what a GPU is asked


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`torch.cuda` as it is called: no other names, no other arguments."""
    spec = mock.create_autospec(torch.cuda)
    monkeypatch.setattr(torch, "cuda", spec)
    yield spec


CARD = Device("cuda", "a card", 80 * GIB, 1)


def test_peaks_of_a_gpu_are_its_allocators(cuda: Any) -> None:
    """Reset before, and read when the device has done what it was given."""
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 350
    run = mock.Mock()
    cuda.attach_mock(run, "run")
    assert CARD.highest(run) == 250
    names = [call[0] for call in cuda.mock_calls]
    assert names.index("reset_peak_memory_stats") < names.index("run") < names.index("max_memory_allocated")
    assert "synchronize" in names[names.index("run") :]
    assert CARD.peak(run, []) == 350


def test_a_gpu_is_waited_for_around_what_is_timed(cuda: Any) -> None:
    """Before the clock starts, and before it stops."""
    run = mock.Mock()
    cuda.attach_mock(run, "run")
    assert CARD.seconds(run) >= 0
    assert [call[0] for call in cuda.mock_calls] == ["synchronize", "run", "synchronize"]
    CARD.free()
    assert cuda.mock_calls[-1][0] == "empty_cache"


def test_synchronisations_are_counted_and_the_mode_is_put_back(cuda: Any) -> None:
    """In torch's words; other warnings are none."""
    cuda.get_sync_debug_mode.return_value = 0

    def run() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert CARD.waits(run) == 2
    assert [call.args for call in cuda.set_sync_debug_mode.mock_calls] == [("warn",), (0,)]


def test_another_stream_waits_for_the_usual_one_and_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a step would read what is not there yet."""
    told = mock.MagicMock()
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: told.usual)
    monkeypatch.setattr(torch, "Stream", lambda device: told.other)
    with CARD.on_another_stream():
        told.work()
    names = [call[0] for call in told.mock_calls]
    assert names == ["other.wait_stream", "other.__enter__", "work", "other.__exit__", "usual.wait_stream"]


def test_a_gpus_processes_are_not_forked_and_a_cpu_has_no_twin_of_a_second_one() -> None:
    """A context of CUDA outlives no fork."""
    assert (CARD.start_method, Device("cpu", "", 1, 1).start_method) == ("spawn", "forkserver")
    with pytest.raises(NoTwin, match="how often a program waits for xpu"):
        Device("xpu", "", 1, 1).waits(lambda: None)


@pytest.mark.parametrize(
    ("memory", "shape", "packed"),
    [
        (8, (16, 2048), (28, 3072)),
        (16, (16, 2048), (32, 4096)),
        (24, (16, 2048), (32, 4096)),
        (80, (32, 4096), (32, 4096)),
    ],
)
def test_models_are_sized_to_the_card(memory: int, shape: tuple[int, int], packed: tuple[int, int]) -> None:
    """With room for activations, and tokens that plain autograd has room for."""
    card = Device("cuda", "a card", memory * GIB, 1)
    size = size_for(card)
    assert ((size.blocks, size.width), (size_for(card, "nf4").blocks, size_for(card, "nf4").width)) == (shape, packed)
    weights = 2 * 13 * size.blocks * size.width**2
    stored = sizes.STORED * size.blocks * size.width * 2 * size.tokens
    assert weights + stored <= memory * GIB and size.tokens >= 256 and size.memory == (memory - 1) * GIB


# -- which record, and the report

ENVIRONMENT: Row = {
    "section": "environment",
    "piece": "cuda",
    "status": "done",
    "machine": {
        "machine": "NVIDIA X",
        "versions": {"torch": "2.13"},
        "commit": "abc",
        "date": "2026-11-30T00:00:00",
        "system": "Linux",
    },
    "kind": "cuda",
    "count": 1,
    "memory": 8 * GIB,
    "quick": False,
    "size": {"blocks": 16, "width": 2048, "dtype": "bf16", "rank": 16, "tokens": 1024},
}


def test_rows_of_another_machine_or_version_are_not_mixed(tmp_path: Path) -> None:
    """Nor those of a quick run with others."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ENVIRONMENT) + "\n")
    assert record_of(ENVIRONMENT, file) == file
    for change in ({"quick": True}, {"count": 2}, {"machine": {**ENVIRONMENT["machine"], "versions": {"torch": "3"}}}):
        with pytest.raises(SettingError, match="is of another run"):
            record_of({**ENVIRONMENT, **change}, file)


def test_the_report_has_what_is_there_what_is_wrong_and_what_is_not_there() -> None:
    """From rows alone, such as a run that was stopped leaves."""
    rows: list[Row] = [
        ENVIRONMENT,
        {"section": "correctness", "piece": "a", "status": "done", "passed": True, "found": "x | y"},
        {"section": "correctness", "piece": "b", "status": "done", "passed": False, "found": "off by 1"},
        {"section": "memory", "piece": "plain", "status": "out of memory", "reason": "CUDA out of memory"},
        {"section": "speed", "piece": "eager", "status": "no time", "reason": "used up"},
        {"section": "qlora", "piece": "offload", "status": "crashed", "reason": "signal 11"},
    ]
    page = markdown(rows)
    assert "# The GPU kit on NVIDIA X" in page and "1 x 8.00 GiB" in page and "torch 2.13, commit abc" in page
    assert "3 pieces done, 2 wrong, 2 without a figure" in page
    assert "| a | right | x / y |" in page and "| b | WRONG | off by 1 |" in page
    assert "- plain: out of memory: CUDA out of memory" in page and "- eager: no time: used up" in page
    assert "- **WRONG** correctness, b: off by 1" in page and "- **WRONG** qlora, offload: signal 11" in page
    assert page.count("\nNot run.") == 3
    assert [row["piece"] for row in wrong(rows)] == ["b", "offload"]
    assert "an unknown device" in markdown([])


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And what can be had."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 1
    assert "there is no CUDA device; `--device cpu --quick`" in capsys.readouterr().err
