"""Fine-tunings by every optimiser that runs on this machine, and what none can do.

python -m pytest tests/integration/test_finetune_optimizers.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import TrainerCallback

from autorev.cli import main
from autorev.errors import AutorevError, TrainingError
from autorev.finetuning.record import FineTuning
from tests.helpers.a_gpu import be_a_gpu
from tests.helpers.tiny_run import At, interrupt, tune, workplace
from tests.integration.test_finetune_resume import check_same

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")
USUAL: dict[str, Any] = {"steps": 4, "save_every": 2, "evaluate_every": 4}


@dataclass(frozen=True)
class Done:
    """Finished runs, by method and optimiser, each made when it is first asked for."""

    folder: Path
    records: dict[str, FineTuning]

    def __call__(self, method: str, optimizer: str, **how: Any) -> tuple[FineTuning, dict[str, torch.Tensor]]:
        """The record, and the weights."""
        out = re.sub(r"\W+", "-", f"{method} {optimizer} {how}")
        if out not in self.records:
            given = {**USUAL, "method": method, "optimizer": optimizer, **how}
            self.records[out] = tune(self.folder, out=out, **given)
        return self.records[out], load_file(self.folder / out / "model.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Runs that several tests look at."""
    return Done(workplace(tmp_path_factory.mktemp("runs")), {})


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("method", ["plain", "momentum:k=3,loss=chunked,tile=16"])
def test_steps_in_backward_are_the_same_steps(method: str, done: Done) -> None:
    """Tied weights, tiles and chunks of the loss included: each gradient arrives once, and whole."""
    usual, weights = done(method, "adamw", clip=0.0)
    record, stepped = done(method, "adamw:step=backward")
    assert furthest(stepped, weights) == 0
    assert [row.loss for row in record.logged] == [row.loss for row in usual.logged]
    assert all(row.gradient_norm for row in usual.logged)
    assert all(row.gradient_norm is None for row in record.logged)
    assert record.recipe.clip == 0
    assert any("gradients are not clipped" in note for note in record.notes)
    assert record.recipe.optimizer == "adamw:step=backward"


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw:foreach=on", "adamw-fused:step=backward"])
def test_other_kernels_are_the_same_rule(optimizer: str, done: Done) -> None:
    """Up to rounding."""
    _, weights = done("plain", "adamw", clip=0.0)
    _, found = done("plain", optimizer, clip=0.0)
    assert furthest(found, weights) < 1e-6


@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw-8bit"])
def test_whatever_the_rule_backward_takes_the_same_steps(name: str, done: Done) -> None:
    """bitsandbytes' keeps embeddings in fp32 either way."""
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    _, weights = done("plain", name, clip=0.0)
    _, found = done("plain", f"{name}:step=backward")
    assert furthest(found, weights) == 0
    assert furthest(found, done("plain", "adamw", clip=0.0)[1]) > 1e-4


@pytest.mark.parametrize("optimizer", ["adamw-fused:step=backward", "adamw-8bit:step=backward", "adamw-8bit"])
def test_a_stopped_run_goes_on(optimizer: str, done: Done) -> None:
    """The state of every parameter is in the checkpoint, and taken up again."""
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    whole, weights = done("momentum:k=3", optimizer)
    out = re.sub(r"\W+", "-", f"stopped {optimizer}")
    given: dict[str, Any] = {**USUAL, "method": "momentum:k=3"}
    with pytest.raises(TrainingError, match="interrupted after step 3"):
        tune(done.folder, out=out, optimizer=optimizer, callbacks=(At(2, interrupt, "on_step_begin"),), **given)
    check_same(tune(done.folder, out=out, resume=True, **given), whole)
    assert furthest(load_file(done.folder / out / "model.safetensors"), weights) == 0


@pytest.mark.parametrize("optimizer", ["adamw-host", "adamw-host:gradients=host"])
def test_the_host_takes_the_same_steps(optimizer: str, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Trainer, with its schedule, from a checkpoint, too; torchao's own, with a CPU for the GPU."""
    be_a_gpu(monkeypatch)
    usual, weights = done("plain", "adamw-fused", clip=0.0)
    whole, found = done("plain", optimizer)
    assert furthest(found, weights) < 1e-6
    assert [row.loss for row in whole.logged] == pytest.approx([row.loss for row in usual.logged], abs=1e-5)
    out, given = f"stopped {optimizer}".replace(":", " "), {**USUAL, "method": "plain", "optimizer": optimizer}
    with pytest.raises(TrainingError, match="interrupted after step 3"):
        tune(done.folder, out=out, callbacks=(At(2, interrupt, "on_step_begin"),), **given)
    check_same(tune(done.folder, out=out, resume=True, **given), whole)


class Looks(TrainerCallback):
    """What there is before the optimiser's step."""

    def __init__(self) -> None:
        self.gradients: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer is about to clip and step."""
        self.gradients.append(sum(p.grad is not None for p in kwargs["model"].parameters()))


def test_no_gradient_is_left(done: Done) -> None:
    """By any parameter."""
    looks = Looks()
    tune(done.folder, out="looked at", optimizer="adamw-fused:step=backward", callbacks=(looks,), **USUAL)
    assert looks.gradients == [0] * USUAL["steps"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--optimizer adamw-fused:step=backward --accumulate 2", "those of 2 passes are never added up"),
        ("--optimizer adamw:step=backward --clip 1", "their common norm is not known in time to clip them"),
        ("--optimizer adamw-paged", "moves state between a GPU and its host"),
        ("--optimizer adamw-host", "moves state between a GPU and its host"),
        ("--optimizer adamw-host:step=backward", "the optimizer adamw-host has no option 'step=backward'"),
        ("--optimizer adagrad", "optimizer is adamw, adamw-fused"),
        ("--optimizer adamw:step=forward", "step of the optimizer adamw is backward, not 'forward'"),
        ("--optimizer adamw:step=backward,step=backward", "gives step twice"),
        ("--optimizer adamw-fused:foreach=on", "the optimizer adamw-fused has no option 'foreach=on'"),
    ],
)
def test_what_cannot_be(options: str, said: str, done: Done) -> None:
    """One sentence, and nothing is written."""
    command = ["finetune", str(done.folder / "llm"), "--text", str(done.folder / "text.txt"), *options.split()]
    refused = CliRunner().invoke(main, [*command, "--out", str(done.folder / "refused")])
    assert refused.exit_code in (1, 2)
    assert said in " ".join(refused.output.split())
    assert "Traceback" not in refused.output
    assert not (done.folder / "refused").exists()


def test_a_run_is_gone_on_with_by_its_own_optimizer(done: Done) -> None:
    """Another one is refused."""
    out = "another"
    with pytest.raises(TrainingError):
        tune(done.folder, out=out, optimizer="adamw", callbacks=(At(2, interrupt, "on_step_begin"),), **USUAL)
    with pytest.raises(AutorevError, match="was begun with `optimizer=adamw`, not adamw-fused"):
        tune(done.folder, out=out, optimizer="adamw-fused", resume=True, **USUAL)


def test_a_loss_that_is_no_number_reaches_no_weight(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the step would be taken in backward."""
    from autorev.finetuning.trainer import FineTuner

    kept: dict[str, torch.Tensor] = {}
    usual = FineTuner._loss

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = usual(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
            found.append(model)
            return loss * float("nan")
        return loss

    found: list[Any] = []
    monkeypatch.setattr(FineTuner, "_loss", broken)
    with pytest.raises(TrainingError, match="the loss of step 3 is nan, no number; the weights are those of the step"):
        tune(done.folder, out="nan", optimizer="adamw:step=backward", **USUAL)
    assert all(torch.equal(p, kept[name]) for name, p in found[0].named_parameters())
