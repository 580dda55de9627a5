"""Long runs that are killed go on as if nothing had happened: the one with its own loop, and the ones by `finetune`.

python -m pytest tests/integration/test_long_runs_resumed.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.long_runs import context, trainings
from benchmarks.long_runs.block_by_block import FILE, BlockByBlock
from benchmarks.long_runs.quiz import answers
from benchmarks.long_runs.saved import Lines, State
from benchmarks.long_runs.trainings import Training
from tests.helpers.tiny_llm import tiny_llm
from tests.helpers.tiny_run import TEXT, At, kill

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_collections"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]
PLAN = context.Plan(
    width=16,
    blocks=3,
    length=64,
    limit=300 * 2**10,
    short=((32, 2, 4),),
    stages=((64, 1, 4),),
    asked=1,
    every=2,
    rates=(1e-2, 1e-2),
)
ROW = "autorev, momentum, tiles"
STEPS = 8
ROWS_OF_TOKENS = 4 * 2**10
"""Bytes, more than those of the tokens themselves."""


def command(run: Any, *words: str) -> None:
    """As on a command line."""
    before, sys.argv = sys.argv, ["command", *words]
    try:
        run()
    finally:
        sys.argv = before


def at_context(folder: Path, row: str = ROW, plan: context.Plan = PLAN) -> dict[str, Any]:
    """The line of one row, run to its end."""
    place = ["--record", str(folder / "record.jsonl"), "--folder", str(folder / "states")]
    command(lambda: context.main(plan), row, *place)
    line: dict[str, Any] = Lines(folder / "record.jsonl").by_name[row]
    return line


def _killed_at_a_save(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    save, left = State.save, [count]

    def dying(*args: Any) -> None:
        save(*args)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    State.save = dying  # type: ignore[method-assign]  # in a process of its own
    at_context(folder)


def ended(run: Any, *args: Any) -> int | None:
    """The exit code of a process that runs it."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["tests.helpers.tiny_run"])
    process = forked.Process(target=run, args=args)
    process.start()
    process.join()
    return process.exitcode


def test_a_context_that_is_killed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between the save of a state and that of the record, too: curve, answers and grids are the undisturbed run's."""
    whole = at_context(tmp_path / "whole")
    assert whole["status"] == "done"
    assert len(whole["curve"]) == whole["step"] == 4
    assert whole["highest"] <= whole["peak"] <= PLAN.limit
    assert ended(_killed_at_a_save, tmp_path / "killed", 4) == -signal.SIGKILL
    before = Lines(tmp_path / "killed" / "record.jsonl").by_name[ROW]
    assert (before["status"], before["step"]) == ("running", 2)
    after = at_context(tmp_path / "killed")
    assert {**after, "seconds": 0} == {**whole, "seconds": 0}
    assert [path.name for path in (tmp_path / "killed").rglob("*.pt")] == [context.WEIGHTS]
    capsys.readouterr()
    place = ["--record", str(tmp_path / "killed" / "record.jsonl"), "--folder", str(tmp_path / "killed" / "states")]
    command(lambda: context.main(PLAN), ROW, "--json", *place)
    assert json.loads(capsys.readouterr().out)[1] == after


def test_what_does_not_fit_trains_shorter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its peak at the full length is recorded; it is asked there all the same."""
    spec = context.ROWS["plain"]
    most, least = context.peaks(PLAN, spec, 64)[0], context.peaks(PLAN, spec, 32)[0]
    several = context.peaks(PLAN, spec, 32, passes=2)[0]
    assert least < several < several + ROWS_OF_TOKENS < most
    tight = context.Plan(**{**vars_of(PLAN), "stages": ((64, 2, 4),), "limit": several + ROWS_OF_TOKENS})
    line = at_context(tmp_path, "plain", tight)
    assert (line["fits"], line["peak"], line["trained_at"], line["together"]) == (False, most, 32, 32)
    assert {length for _, length, _ in line["curve"]} == {32}
    assert set(line["asked"][-1]["right"]) == {"32", "64"}
    assert least < line["highest"] <= tight.limit
    assert line["status"] == "done"
    (tmp_path / "record.jsonl").unlink()
    (tmp_path / "states" / context.WEIGHTS).touch()  # the base does not fit, either, and nothing asks for it
    none = at_context(tmp_path, "plain", context.Plan(**{**vars_of(PLAN), "limit": least - 1}))
    assert (none["status"], none["trained_at"]) == ("does not fit", 0)
    assert "| plain |" in capsys.readouterr().out


def vars_of(plan: context.Plan) -> dict[str, Any]:
    """Its fields."""
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def tiny(folder: Path, *callbacks: Any) -> dict[str, Training]:
    """One that is asked at its end, and one block by block."""
    shared = {
        "model": str(folder / "llm"), "text": str(folder / "text.txt"), "sequence": 48, "steps": STEPS,
        "learning_rate": 1e-2, "validation_rows": 6, "evaluate_every": 8, "save_every": 2, "method": "momentum:k=3",
    }  # fmt: skip
    moving = lambda out: (BlockByBlock("leapfrog", out, STEPS), *callbacks)  # noqa: E731 - as the benchmarks have it
    return {"asked": Training(shared, questions=answers), "moved": Training({**shared, "distill": True}, moving)}


def at_trainings(folder: Path, place: Path, *names: str, callbacks: tuple[Any, ...] = ()) -> Lines:
    """The record after these runs."""
    where = ["--record", str(place / "record.jsonl"), "--folder", str(place / "runs")]
    command(lambda: trainings.command("tiny", lambda lines: tiny(folder, *callbacks), Path(), Path()), *names, *where)
    return Lines(place / "record.jsonl")


def _killed_in_training(folder: Path, place: Path) -> None:
    torch.set_num_threads(1)
    at_trainings(folder, place, "moved", callbacks=(At(5, kill),))


def test_a_training_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Its curve so far is recorded; blocks that had moved are where they were, the others move when they did."""
    tiny_llm(tmp_path / "llm", blocks=3)
    (tmp_path / "text.txt").write_text(TEXT)
    whole = at_trainings(tmp_path, tmp_path / "whole", "moved").by_name["moved"]
    gammas = [gamma for _, gamma in whole["gamma"]]
    assert (whole["status"], whole["step"]) == ("done", STEPS)
    place = tmp_path / "killed"
    assert ended(_killed_in_training, tmp_path, place) == -signal.SIGKILL
    so_far = at_trainings(tmp_path, place, "--table").by_name["moved"]
    assert so_far["status"] == "running"
    assert 0 < so_far["step"] < STEPS
    moved = json.loads((place / "runs" / "moved" / FILE).read_text())["moves"]
    assert 0 < len(moved) < 3
    again = at_trainings(tmp_path, place).by_name  # all that are left
    assert again["moved"]["curve"] == whole["curve"]
    assert again["moved"]["evaluations"] == whole["evaluations"]
    assert [gamma for _, gamma in again["moved"]["gamma"]] == gammas
    both = [json.loads((p / "runs" / "moved" / FILE).read_text()) for p in (tmp_path / "whole", place)]
    assert both[0] == both[1]
    assert [gamma for _, _, gamma in both[0]["moves"]] == [1.0] * 3
    assert set(again["asked"]["answers"]) == {"right", "right, as the plain"}
    assert not list((place / "runs").rglob("*.safetensors"))
