"""`ReversibleCallback` under a plain `transformers.Trainer`: what stands in the logs, when, and that it is true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.conversion.convert import chains_of
from autorev.conversion.schedule import Schedule
from autorev.couplings.arithmetic import side_bits_of
from autorev.errors import ConversionError
from autorev.finetuning.callback import ReversibleCallback, chain_figures
from autorev.methods import Method
from autorev.plan import Plan
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.step import TrainingStep
from autorev.rewrite.replacement import replacements_of
from autorev.workload import Call
from tests.helpers.tiny_llm import LENGTH, tiny_model

transformers = pytest.importorskip("transformers", reason="the callback is for its Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

BATCH = 2
FIGURES = {"seconds", "gamma", "side_bits", "drift", "tokens", "peak_bytes"}


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> Iterator[None]:
    """The Trainer seeds the random numbers of the process."""
    with torch.random.fork_rng():
        yield


def converted(**how: Any) -> Any:
    """A tiny model of four blocks."""
    model = tiny_model()
    autorev.convert(model, **{"fraction_bits": 20, **how})
    return model


def trainer_of(model: nn.Module, folder: Path, steps: int, callbacks: Any = (), **how: Any) -> Any:
    """A Trainer on random rows that does nothing besides."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (64, LENGTH), generator=generator)
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch",
        "include_num_input_tokens_seen": "all",
        **how,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def logged(trainer: Any) -> list[dict[str, Any]]:
    """The log entries with a loss."""
    return [row for row in trainer.state.log_history if "loss" in row]


def trained(model: nn.Module, folder: Path, steps: int, callback: ReversibleCallback, **how: Any) -> Any:
    """The log entries of a run with the callback."""
    trainer = trainer_of(model, folder, steps, **how)
    callback.attach(trainer)
    trainer.train()
    return logged(trainer)


def test_a_log_entry_carries_the_figures_of_its_step(tmp_path: Path) -> None:
    """Beside the loss that the Trainer logs without it; memory at the second step, beside the optimiser's state."""
    rows = trained(converted(gamma=1 / 4), tmp_path, 4, ReversibleCallback())
    assert [set(row) & FIGURES for row in rows] == [
        FIGURES if step == 1 else FIGURES - {"peak_bytes"} for step in range(4)
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert (row["gamma"], row["side_bits"], row["drift"]) == (0.25, 2.0, 0.0)
        assert row["tokens"] == BATCH * LENGTH
    without = trainer_of(converted(gamma=1 / 4), tmp_path, 4)
    without.train()
    assert [row["loss"] for row in rows] == [row["loss"] for row in logged(without)]
    assert not any(set(row) & FIGURES for row in logged(without))


@pytest.mark.parametrize("target", ["leapfrog", "midpoint"])
def test_a_schedule_moves_gamma_and_ends_without_side_bits(target: str, tmp_path: Path) -> None:
    """Every step has the schedule's gamma; memory is looked at after each move; nothing drifts; the config knows."""
    model = converted(gamma=(1 if target == "leapfrog" else -1) / 8)
    schedule = Schedule(target, steps=8, blocks=12)
    rows = trained(model, tmp_path, 11, ReversibleCallback(schedule))
    gammas = [schedule.gamma(step) for step in range(11)]
    assert [row["gamma"] for row in rows] == [float(gamma) for gamma in gammas]
    assert [row["side_bits"] for row in rows] == [side_bits_of(gamma) for gamma in gammas]
    assert {row["drift"] for row in rows} == {0.0}
    first = [step for step in range(11) if step > 0 and (step == 1 or gammas[step] != gammas[step - 1])]
    assert [step for step, row in enumerate(rows) if "peak_bytes" in row] == first
    assert len(first) > 3
    assert {c.gamma for chain in chains_of(model) for c in chain.couplings} == {gammas[-1]}
    assert rows[-1]["side_bits"] == 0
    assert {gamma for _, gamma in model.config.autorev["gamma"]} == {float(gammas[-1])}


def test_a_schedule_frees_the_side_bits_memory(tmp_path: Path) -> None:
    """Once they are gone the peak is lower, by what the tape held of them: 3 bits of each element in each block."""
    model = converted(gamma=1 / 16, keep_last=0)
    schedule = Schedule("leapfrog", steps=2, blocks=2, start=Fraction(1, 16))
    rows = trained(model, tmp_path, 3, ReversibleCallback(schedule))
    assert [row["side_bits"] for row in rows] == [4.0, 3.0, 0.0]
    elements = model.config.num_hidden_layers * BATCH * LENGTH * model.config.hidden_size
    assert rows[1]["peak_bytes"] - rows[2]["peak_bytes"] == pytest.approx(elements * 3 / 8, rel=0.3)


class Reporter(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """What W&B or TensorBoard would be handed."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A copy, as it is at that moment."""
        self.seen.append(dict(logs))


def test_callbacks_that_report_see_the_figures(tmp_path: Path) -> None:
    """`attach` puts it before them, also before those that were there first."""
    reporter = Reporter()
    trainer = trainer_of(converted(), tmp_path, 2, [reporter])
    callback = ReversibleCallback()
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    assert [FIGURES - set(row) for row in reporter.seen if "loss" in row] == [{"peak_bytes"}, set()]
    assert not any(set(row) & FIGURES for row in reporter.seen if "loss" not in row)


@pytest.mark.parametrize("coupling", [None, "momentum", "leapfrog"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_peak_is_what_the_profiler_measures(coupling: str | None, tied: bool, tmp_path: Path) -> None:
    """Within 2 % of `autorev.profiler`'s own measurement of a step of the same model, optimiser and batch."""
    family = "gpt2" if tied else "llama"
    models = [tiny_model(family).train() for _ in range(2)]
    if coupling is not None:
        for model in models:
            autorev.convert(model, method=coupling, fraction_bits=20)
    rows = trained(models[0], tmp_path, 2, ReversibleCallback())
    ids = torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    call: Call = ((), {"input_ids": ids, "labels": ids, "use_cache": False})
    step = TrainingStep(models[1], call, torch.optim.AdamW(models[1].parameters(), lr=1e-3))
    step.run()
    expected = measure_memory(step).peak_bytes
    assert rows[1]["peak_bytes"] == pytest.approx(expected, rel=0.02)


def test_tensors_beside_the_model_count(tmp_path: Path) -> None:
    """A teacher's, say: the peak is higher by their bytes."""
    beside = (torch.zeros(1000, 1000),)
    peaks = [trained(converted(), tmp_path, 2, ReversibleCallback(beside=b))[1]["peak_bytes"] for b in ((), beside)]
    assert peaks[1] - peaks[0] == pytest.approx(4_000_000, abs=20_000)


def test_a_peak_waits_for_the_next_entry(tmp_path: Path) -> None:
    """Where not every step is logged; and it is logged once."""
    rows = trained(converted(), tmp_path, 8, ReversibleCallback(), logging_steps=4)
    assert len(rows) == 2
    assert ["peak_bytes" in row for row in rows] == [True, False]
    assert all(set(row) >= FIGURES - {"peak_bytes"} for row in rows)


def test_a_step_of_several_passes_is_one_entry(tmp_path: Path) -> None:
    """With gradient accumulation its tokens are those of all of them."""
    rows = trained(converted(), tmp_path, 3, ReversibleCallback(), gradient_accumulation_steps=3)
    assert [row["tokens"] for row in rows] == [3 * BATCH * LENGTH] * 3
    assert ["peak_bytes" in row for row in rows] == [False, True, False]


def test_nothing_of_an_earlier_run_counts(tmp_path: Path) -> None:
    """A second `train` with the same callback: its memory at its own second step; a resumed one, its own tokens."""
    trainer = trainer_of(converted(), tmp_path, 3, save_strategy="steps", save_steps=2)
    ReversibleCallback().attach(trainer)
    trainer.train()
    first = logged(trainer)
    trainer.train()
    second = logged(trainer)
    for rows in (first, second):
        assert ["peak_bytes" in row for row in rows] == [False, True, False]
        assert [row["tokens"] for row in rows] == [BATCH * LENGTH] * 3
    later = trainer_of(converted(), tmp_path, 4)
    ReversibleCallback().attach(later)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["tokens"] for row in logged(later)[-2:]] == [BATCH * LENGTH] * 2


def test_a_model_that_is_not_converted_has_no_chain_figures(tmp_path: Path) -> None:
    """Memory and speed all the same, for comparison."""
    rows = trained(tiny_model(), tmp_path, 2, ReversibleCallback())
    assert [set(row) & FIGURES for row in rows] == [{"seconds", "tokens"}, {"seconds", "tokens", "peak_bytes"}]


def test_figures_are_means_over_the_steps() -> None:
    """Of gamma and of side bits; the drift is the largest, and there once a backward was; two streams have no gamma."""
    model = converted(gamma={"*.0": 1 / 2, "*.1": 1.0, "*": 1 / 8})
    assert chain_figures(model) == {"gamma": (1 / 2 + 1 + 1 / 8 + 1 / 8) / 4, "side_bits": (1 + 0 + 3 + 3) / 4}
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert chain_figures(model)["drift"] == 0.0
    assert chain_figures(converted(method="revnet")) == {"side_bits": 0.0}
    assert chain_figures(tiny_model()) == {}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """For the trainer's batch."""
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 256
    return autorev.fit(tiny_model(), {"input_ids": ids, "labels": ids}, memory="+1GiB", device="cpu")


@pytest.mark.parametrize("attached", [False, True], ids=["among the callbacks", "attached"])
@pytest.mark.parametrize("spec", ["plain", "checkpoint:loss=chunked", "momentum:k=2,keep_last=1,loss=chunked"])
def test_a_plan_is_put_in_place(spec: str, attached: bool, plan: Plan, tmp_path: Path) -> None:
    """Before the first step; the losses are those of a model that was converted by hand."""
    plan = replace(plan, method=Method.parse(spec))
    by_hand, model = tiny_model(), tiny_model()
    autorev.convert(by_hand, plan)
    expected = trainer_of(by_hand, tmp_path, 2)
    expected.train()
    callback = ReversibleCallback(plan=plan)
    trainer = trainer_of(model, tmp_path, 2, callbacks=[] if attached else [callback])
    if attached:
        callback.attach(trainer)
    assert bool(chains_of(model)) == ("momentum" in spec)
    assert bool(list(replacements_of(model))) == (spec != "plain")
    trainer.train()
    assert [row["loss"] for row in logged(trainer)] == [row["loss"] for row in logged(expected)]


def test_what_does_not_go_with_a_plan(plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints of the trainer's are refused, and a larger batch is said."""
    plan = replace(plan, method=Method.parse("checkpoint"))
    name = next(field.name for field in fields(transformers.TrainingArguments) if field.name.endswith("_checkpointing"))
    name = "activation_checkpointing" if hasattr(transformers.TrainingArguments, "activation_checkpointing") else name
    model = tiny_model()
    with pytest.raises(ConversionError, match="own checkpointing would run all of them once more"):
        trainer_of(model, tmp_path, 1, [ReversibleCallback(plan=plan)], **{name: True})
    assert not list(replacements_of(model))
    with caplog.at_level("WARNING", "autorev"):
        trainer_of(model, tmp_path, 1, [ReversibleCallback(plan=plan)], per_device_train_batch_size=BATCH + 1)
    assert f"the plan is for a batch of {BATCH}, and the trainer takes {BATCH + 1}" in caplog.text
