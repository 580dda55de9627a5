"""What a profile measures, in which order, and what it does with budgets, refusals, models at hand and sweeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autorev.errors import AutorevError
from autorev.in_place import Blocks
from autorev.profiler import schedule
from autorev.profiler.job import Job, Outcome, Sweep
from autorev.profiler.passes.measure import measure
from autorev.profiler.passes.prepare import with_text
from autorev.profiler.passes.sweep import standing_bytes
from autorev.profiler.record import Status
from tests.helpers import handwritten as hand
from tests.helpers.blocks import TOKENS, small
from tests.helpers.profiling import job_of, run
from tests.helpers.zoo import build

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(("batch", "own"), [(None, 4), (2, 2), (7, 7)])
def test_a_factorys_inputs_are_made_as_large_as_the_setting_says(batch: int | None, own: int, jobs: list[Job]) -> None:
    """What is measured is the batch that the record names: its input, its peak, its prediction."""
    record = run("profiled_net:make", "plain", batch=batch)
    memory, prediction = record.results[0].memory, record.results[0].prediction
    assert record.setting.batch == own
    assert memory is not None
    assert prediction is not None
    assert prediction.peak_bytes == pytest.approx(memory.peak_bytes, rel=0.02)
    inputs = next(holder for holder in memory.holders if holder.path == "(inputs)")
    assert inputs.bytes == 4 * 16 * own


# -- turns, budgets, refusals


def test_methods_take_turns(jobs: list[Job]) -> None:
    """Each round measures all, beginning with another one; the passes beside the times are made once."""
    record = run("profiled_net:make", "plain", "checkpoint", "leapfrog", rounds=3, timed_steps=2)
    order = [(job.round, job.method.spec) for job in jobs]
    assert order == [
        *((0, spec) for spec in ("plain", "checkpoint", "leapfrog")),
        *((1, spec) for spec in ("checkpoint", "leapfrog", "plain")),
        *((2, spec) for spec in ("leapfrog", "plain", "checkpoint")),
    ]
    assert [job.passes for job in jobs] == [True] * 3 + [False] * 6
    assert all([r.number for r in result.rounds] == [0, 1, 2] for result in record.results)
    assert all(len(result.samples) == 6 for result in record.results)


def test_an_error_of_one_method_is_told_and_the_others_go_on(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Refused and failed methods are not tried again in later rounds; a later failure keeps what was measured."""
    here = schedule.run_in_fresh_process

    def moody(job: Job, scratch: Path) -> Outcome:
        if job.method.spec == "sac" and job.round == 1:
            return Outcome(Status.FAILED, "broken")
        return here(job, scratch)

    monkeypatch.setattr(schedule, "run_in_fresh_process", moody)
    record = run("profiled_net:make", "plain:loss=chunked", "plain", "sac", rounds=2, out="records")
    refused, plain, sac = record.results
    assert refused.status is Status.REFUSED
    assert "no loss to compute in chunks" in refused.reason
    assert plain.status is Status.MEASURED
    assert sac.status is Status.FAILED
    assert sac.reason == "broken"
    assert sac.memory is not None
    assert [job.method.spec for job in jobs].count("plain:loss=chunked") == 1
    assert record.complete


def test_a_budget_in_between_lets_one_method_through(jobs: list[Job]) -> None:
    """What needs more than the budget is out of memory, with its figures and both sizes in words."""
    free = run("tiny.json", sequence=64, batch=4)
    peaks = [r.memory.peak_bytes for r in free.results if r.memory]
    budget = sum(peaks) // 2
    record = run("tiny.json", sequence=64, batch=4, memory=str(budget))
    plain, checkpoint = record.results
    assert record.budget_bytes == budget
    assert (plain.status, checkpoint.status) == (Status.OUT_OF_MEMORY, Status.MEASURED)
    assert plain.memory is not None
    assert plain.memory.peak_bytes == peaks[0]
    assert plain.reason.startswith("it needs ")
    assert "and the budget is" in plain.reason
    relative = run("tiny.json", "plain", sequence=64, batch=4, memory="+1KiB")
    parameters = 4 * record.model.parameters
    assert relative.budget_bytes is not None
    assert 4 * parameters < relative.budget_bytes < 4 * parameters + 4096


def test_predicting_measures_nothing(jobs: list[Job]) -> None:
    """No process is started, every method that can be predicted is, and the record says so."""
    record = run("profiled_net:make", "plain", "momentum", "compile", predict=True, out="records")
    assert not jobs
    assert {r.status for r in record.results} == {Status.PREDICTED}
    assert [r.prediction is not None for r in record.results] == [True, True, False]
    assert all(r.memory is None and not r.rounds for r in record.results)
    assert record.complete
    assert record.recommendation is not None
    assert record.recommendation.why.startswith("predicted, nothing was measured")


# -- models in user code


def picklable() -> torch.nn.Module:
    """A model whose class another process can import."""
    torch.manual_seed(0)
    return small(3)


def local() -> torch.nn.Module:
    """A model whose class is known in this function alone."""

    class Here(hand.Stack):
        pass

    torch.manual_seed(0)
    return Here(*(hand.Block() for _ in range(3)))


@pytest.mark.parametrize("make", [picklable, local])
def test_a_model_at_hand_is_profiled_and_left_alone(make: Callable[[], torch.nn.Module]) -> None:
    """In a fresh process where its class can be found, here on a copy where not, and a note says why."""
    model = make().eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    record = run(model, "plain", batch=(TOKENS,))
    assert record.results[0].status is Status.MEASURED, record.results[0].reason
    notes = [note for note in record.notes if "in one process" in note]
    assert len(notes) == (make is local)
    if make is local:
        assert "it cannot be saved" in notes[0]
        assert notes[0].endswith("give package.module:factory for fresh ones")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == 1
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert record.setting.batch == 2


def test_options_that_a_model_at_hand_cannot_have(jobs: list[Job]) -> None:
    """A batch has its size; a name needs a number; a model needs a batch."""
    for model, options, words in (
        (picklable(), {"batch": (TOKENS,), "sequence": 8}, "leave sequence out"),
        (picklable(), {"batch": (TOKENS,), "sweeps": ["batch"]}, "cannot be swept"),
        (picklable(), {}, "needs a batch"),
        (picklable(), {"batch": (TOKENS,), "depth": 3}, "depth"),
        (picklable(), {"batch": (TOKENS,), "text": "a.txt"}, "text"),
        ("profiled_net:make", {"batch": (TOKENS,)}, "batch is a number"),
        ("profiled_net:make", {"sweeps": ["depth=1"], "trains": "head", "lora_rank": 4}, "lora_rank has no meaning"),
        ("profiled_net:make", {"sweeps": ["sequence"]}, "no sequence axis"),
    ):
        with pytest.raises(AutorevError, match=words):
            run(model, "plain", **options)
    assert not jobs


# -- sweeps


@pytest.mark.parametrize("spec", ["plain", "checkpoint"])
def test_the_largest_batch_fits_by_the_allocator(jobs: list[Job], spec: str) -> None:
    """Beside what stands, the marked batch fits into the budget, and the one tried after it does not."""
    record = run("tiny.json", spec, sequence=16, sweeps=["batch"], memory="+300KiB")
    points = [p for p in record.points if p.axis == "batch"]
    found = next(p for p in points if p.largest)
    beyond = next(p for p in points if p.value == found.value + 1)
    assert record.budget_bytes is not None
    assert found.peak_bytes is not None
    assert beyond.peak_bytes is not None
    assert found.peak_bytes <= record.budget_bytes < beyond.peak_bytes
    assert beyond.status is Status.OUT_OF_MEMORY
    assert len(found.seconds) == 3
    again = run("tiny.json", spec, sequence=16, batch=found.value)
    assert again.results[0].memory is not None
    assert again.results[0].memory.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)


def test_the_budget_beside_the_weights_is_what_stands() -> None:
    """Parameters, gradients, AdamW's state and the step counts."""
    model = build("llama")
    parameters = sum(4 * p.numel() for p in model.parameters())
    buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
    assert standing_bytes(model, "adamw") == 4 * parameters + 4 * len(list(model.parameters())) + buffers
    assert standing_bytes(model, "sgd") == 2 * parameters + buffers


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_a_sweep_along_depth(jobs: list[Job], trains: str) -> None:
    """Shallower and deeper than the config, with as many blocks each, all of them wrapped and adapted."""
    rank = 4 if trains == "lora" else None
    record = run("tiny.json", "plain", "checkpoint", sequence=64, sweeps=["depth=4,1,2"], trains=trains, lora_rank=rank)
    assert all(job.sweep is None or job.sweep.values == (1, 2, 4) for job in jobs)
    peaks = {spec: [p.peak_bytes or 0 for p in record.points if p.method == spec] for spec in ("plain", "checkpoint")}
    assert [p.value for p in record.points] == [1, 2, 4, 1, 2, 4], record.notes
    for one, two, four in peaks.values():
        assert (four - two) == pytest.approx(2 * (two - one), rel=0.1)  # every block costs the same
    assert peaks["checkpoint"][2] < peaks["plain"][2]


def test_a_cpu_without_memory_ends_the_sweep_not_the_record(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before is kept when the CPU's allocator gives up."""
    from autorev.profiler.passes import sweep

    real = sweep.measure_memory

    def failing(step: Any) -> Any:
        if step.call[1]["input_ids"].shape[0] > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return real(step)

    job = job_of("make")
    job = replace(
        job,
        source=replace(job.source, model="tiny.json"),
        blocks=Blocks(("model.layers.0", "model.layers.1"), inline=False, draws_random=False),
        setting=replace(job.setting, batch=1, sequence=16),
        sweep=Sweep("batch", (1, 2, 4), None, None, None, 1, 60.0),
    )
    monkeypatch.setattr(sweep, "measure_memory", failing)
    outcome = measure(job)
    assert [(p.value, p.status) for p in outcome.points] == [(1, Status.MEASURED), (2, Status.OUT_OF_MEMORY)]


def test_a_decoder_reads_the_text_too() -> None:
    """A call of another size has decoder inputs of that size."""
    ids = torch.arange(10)
    call = ((), {"input_ids": torch.zeros(1, 4), "decoder_input_ids": torch.zeros(1, 4), "use_cache": False})
    _, kwargs = with_text(call, ids, 3, 5)
    expected = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]])  # the text begins again
    assert all(torch.equal(kwargs[name], expected) for name in ("input_ids", "decoder_input_ids", "labels"))
    assert "decoder_input_ids" not in with_text(((), {"input_ids": ids}), ids, 1, 5)[1]
