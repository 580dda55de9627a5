"""A whole profile in fresh processes, and records that are gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

import autorev
from autorev.detection import call_of
from autorev.errors import SettingError
from autorev.profiler.job import Job
from autorev.profiler.launch import run_in_fresh_process
from autorev.profiler.record import Profile, Status
from tests.helpers.profiling import job_of, run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("folder")

# -- fresh processes


def test_a_tokenizers_batch_is_profiled_without_a_cache() -> None:
    """Neither labels nor use_cache are given: what can be had is predicted, and the step fills no cache."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(0, 99, (2, 16))
    batch = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert call_of(model, batch, "profile")[1]["use_cache"] is False
    assert call_of(model, {**batch, "use_cache": True}, "profile")[1]["use_cache"] is True  # it was asked for
    record = autorev.profile(model, batch, predict=True)
    known = {result.method.spec for result in record.results if result.prediction is not None}
    assert known == {"plain", "checkpoint", "momentum:k=3"}
    assert record.notes == (
        "momentum k=3, chunked loss could not be predicted: the batch holds no labels, so there is no loss to compute "
        "in chunks",
    )


def test_why_a_prediction_failed_is_told() -> None:
    """The type and the message of whatever it was."""

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise KeyError(f"gradient of {tuple(gradient.shape)}")

    class Picky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return Refuses.apply(x)

    record = autorev.profile(Picky(), torch.randn(4, 8), predict=True, methods=["plain"])
    assert "plain could not be predicted: KeyError: 'gradient of (4, 8)'" in " ".join(record.notes)


def test_a_profile_in_fresh_processes(folder: Path) -> None:
    """Everything is measured and predicted, the record is complete, and reading it gives the same."""
    record = run("tiny.json", "plain", "momentum", sequence=16, out="records")
    assert record.complete
    assert [r.method.spec for r in record.results] == ["plain", "momentum:k=3"]
    for result in record.results:
        assert result.status is Status.MEASURED, result.reason
        assert len(result.samples) == 1
        assert result.memory is not None
        assert result.memory.attributed_bytes == pytest.approx(result.memory.peak_bytes, rel=1e-3)
        assert result.work is not None
        assert result.fidelity is not None
        assert result.fidelity.gradient_error < 1e-5
        assert result.prediction is not None
        assert result.prediction.peak_bytes == pytest.approx(result.memory.peak_bytes, rel=0.05)
    assert record.result("momentum:k=3").side_bits == 3  # type: ignore[union-attr]
    assert record.recommendation is not None
    assert not record.pretrained
    assert list((folder / "records").iterdir()) == [folder / "records" / f"{record.name}.json"]
    assert Profile.read(folder / "records" / f"{record.name}.json") == record


@pytest.mark.parametrize(
    ("factory", "status", "words"),
    [
        ("killed", Status.OUT_OF_MEMORY, "the process was killed (signal 9), as the system does when its memory runs"),
        ("leaves", Status.FAILED, "the process ended with exit code 3: the last words"),
        ("fails", Status.FAILED, "profiled_net:fails raised ValueError"),
    ],
)
def test_a_worker_that_dies_is_an_outcome(folder: Path, factory: str, status: Status, words: str) -> None:
    """Killed means out of memory; an exit says its code and the last line; an exception is told as itself."""
    outcome = run_in_fresh_process(job_of(factory), folder)
    assert outcome.status is status
    assert words in outcome.reason
    assert "\n" not in outcome.reason


def test_half_an_outcome_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed while it writes has not measured anything."""

    class Killed:
        def __init__(self, command: list[str], **how: Any) -> None:
            Path(command[-1]).write_text('{"status": "meas')
            self.returncode = -signal.SIGKILL

        def wait(self) -> None: ...

        kill = communicate = wait

    monkeypatch.setattr(subprocess, "Popen", Killed)
    assert run_in_fresh_process(job_of("make"), folder).status is Status.OUT_OF_MEMORY


def test_an_interrupt_ends_the_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the parent leaves no process behind."""
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    class Interrupted(real):  # type: ignore[type-arg, misc, valid-type]
        def wait(self, timeout: float | None = None) -> int:
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_fresh_process(job_of("make"), folder)
    assert started[0].poll() is not None


def test_a_run_that_is_killed_is_gone_on_with(folder: Path, jobs: list[Job]) -> None:
    """After kill -9: a readable record, incomplete; refused without --resume; finished with it, nothing run twice."""
    specs = ("plain", "checkpoint", "leapfrog")
    code = (
        "from autorev.profiler.run import profile\n"
        f"profile('profiled_net:make', methods={specs}, rounds=1, timed_steps=1, out='records', name='r')"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    file = folder / "records" / "r.json"
    try:
        deadline = time.monotonic() + 120
        while not measured_one(file) and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.kill()
    finally:
        parent.wait()
        os.killpg(parent.pid, signal.SIGKILL) if group_lives(parent.pid) else None
    half = Profile.read(file)
    assert not half.complete
    done = [r for r in half.results if r.status is Status.MEASURED]
    assert 1 <= len(done) < 3
    assert {r.status for r in half.results} == {Status.MEASURED, Status.PENDING}
    with pytest.raises(SettingError, match=r"is an interrupted run: go on with it \(`resume`\), give .*`name`"):
        run("profiled_net:make", *specs, out="records", name="r")
    assert not jobs
    whole = run("profiled_net:make", *specs, out="records", name="r", resume=True)
    assert [job.method.spec for job in jobs] == [r.method.spec for r in half.results if r not in done]
    assert whole.complete
    assert [r for r in whole.results if r.method in [d.method for d in done]] == done
    assert Profile.read(file) == whole


def measured_one(file: Path) -> bool:
    """Is a method's result written?"""
    return file.is_file() and any(r.status is Status.MEASURED for r in Profile.read(file).results)


def group_lives(group: int) -> bool:
    """Is a process of the group, such as the killed parent's worker, still there?"""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# -- going on


def test_a_record_of_another_run_is_not_gone_on_with(jobs: list[Job], folder: Path) -> None:
    """Other settings, another budget, another goal: told by name, and the record stays as it is."""
    name: dict[str, Any] = {"out": "records", "name": "r"}
    run("profiled_net:make", "plain", **name)
    file = folder / "records" / "r.json"
    before = file.read_text()
    for change, word in (
        ({"optimizer": "sgd"}, "setting"),
        ({"memory": "1GiB"}, "budget_bytes"),
        ({"goal": "throughput"}, "goal"),
    ):
        with pytest.raises(SettingError, match=rf"of another run \(its .*{word}.* differ\); give this one"):
            run("profiled_net:make", "plain", **name, resume=True, **change)
    assert file.read_text() == before
    with pytest.raises(SettingError, match=r"there is no record .*other\.json to go on with; leave `resume` out"):
        run("profiled_net:make", "plain", out="records", name="other", resume=True)


def test_more_is_measured_of_a_complete_record(jobs: list[Job]) -> None:
    """--resume with another method, more rounds or a sweep runs what is missing and keeps the rest."""
    name: dict[str, Any] = {"out": "records", "name": "r"}
    first = run("profiled_net:make", "plain", **name)
    jobs.clear()
    assert run("profiled_net:make", "plain", **name, resume=True) == first
    assert not jobs
    both = run("profiled_net:make", "plain", "checkpoint", **name, resume=True)
    assert [job.method.spec for job in jobs] == ["checkpoint"]
    assert both.results[0] == first.results[0]
    jobs.clear()
    more = run("profiled_net:make", "plain", "checkpoint", **name, rounds=2, resume=True)
    assert sorted((job.method.spec, job.round) for job in jobs) == [("checkpoint", 1), ("plain", 1)]
    assert all(len(r.rounds) == 2 for r in more.results)
    jobs.clear()
    swept = run("profiled_net:make", "plain", **name, sweeps=["batch=1,2"], command="again", resume=True)
    assert swept.command.splitlines() == [first.command, "again"]
    assert all(job.sweep for job in jobs)
    assert len(swept.points) == 4
    assert swept.complete
