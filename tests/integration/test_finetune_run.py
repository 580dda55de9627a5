"""Whole fine-tunings of a tiny model: what they compute, what they write down, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import autorev
from autorev.engine.mode import ORACLE, running
from autorev.finetuning.record import FineTuning
from tests.helpers.tiny_llm import tiny_llm, tiny_model
from tests.helpers.tiny_run import GPT2, USUAL, figures, loss_of, tune, workplace

STEPS = USUAL["steps"]
pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")


@dataclass(frozen=True)
class Done:
    """Finished runs, by name, each made when it is first asked for."""

    folder: Path
    records: dict[str, FineTuning]

    def __call__(self, name: str, **how: Any) -> FineTuning:
        """The record of the run `name`."""
        if name not in self.records:
            self.records[name] = tune(self.folder, out=name, **{"save_every": STEPS, **how})
        return self.records[name]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """What it wrote."""
        return load_file(self.folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Runs that several tests look at."""
    return Done(workplace(tmp_path_factory.mktemp("runs")), {})


def losses(record: FineTuning) -> list[float]:
    """Of all steps."""
    return [row.loss for row in record.logged]


def test_the_record_says_everything(done: Done) -> None:
    """All steps, and all evaluations, are in the record, which is in the folder."""
    record = done("reversible")
    assert record.complete and record.pretrained
    assert FineTuning.read(done.folder / "reversible" / "run.json") == record
    assert [row.step for row in record.logged] == list(range(1, STEPS + 1))
    assert [e.step for e in record.evaluations] == [0, 2, 4, 6, 7]
    assert all(row.seconds and row.tokens == USUAL["sequence"] for row in record.logged)
    assert record.peak_bytes and record.tokens_per_second
    assert (
        record.recipe.trained_parameters == record.model.parameters == sum(p.numel() for p in tiny_model().parameters())
    )
    assert (record.recipe.decay, record.recipe.warmup, record.recipe.clip) == ("linear", 1, 1.0)
    assert record.corpus.packed and record.corpus.documents == 1 and len(record.corpus.content) == 32
    assert record.corpus.source == str(done.folder / "text.txt")
    assert record.name == "reversible" and record.method.spec == "momentum:k=3"


def test_it_learns(done: Done) -> None:
    """The loss falls, on what is learned and on what is held out."""
    record = done("reversible")
    assert record.original and record.zero_shot and record.final and record.vanilla
    assert losses(record)[-1] < losses(record)[0] - 0.5
    assert record.final.loss < record.original.loss - 0.5
    assert abs(record.zero_shot.loss - record.original.loss) < 0.01
    assert abs(record.vanilla.loss - record.final.loss) < 0.01
    assert all(e.standard_error for e in (record.original, record.vanilla, *record.evaluations))


def test_agreement_is_with_the_original(done: Done) -> None:
    """Before training nearly the same function, afterwards another one; the original is not compared with itself."""
    record = done("reversible")
    assert record.original and record.zero_shot and record.final
    assert record.original.agreement is None
    assert record.zero_shot.agreement is not None and record.zero_shot.agreement > 0.8
    assert record.final.agreement is not None and record.final.agreement < record.zero_shot.agreement
    assert 0 < (record.zero_shot.divergence or 0) < 1e-3 < (record.final.divergence or 0)


def test_nothing_drifts(done: Done) -> None:
    """Every step rebuilds its activations without any error."""
    record = done("reversible")
    assert [row.drift for row in record.logged] == [0.0] * STEPS
    assert [row.side_bits for row in record.logged] == [3.0] * STEPS
    assert [row.gamma for row in record.logged] == [0.125] * STEPS
    (chain,) = record.chains
    assert chain.side_bits == (3,) * 4 and chain.gamma == (0.125,) * 4 and chain.fraction_bits


def test_the_folder_loads(done: Done) -> None:
    """`autorev.load` gives the model of the final evaluation; nothing of the training is left beside it."""
    record, run = done("reversible"), done.folder / "reversible"
    assert record.final
    assert loss_of(autorev.load(run), run) == pytest.approx(record.final.loss, abs=1e-6)
    config = json.loads((run / "config.json").read_text())
    before = json.loads((done.folder / "llm" / "config.json").read_text())
    assert config.pop("autorev") and config == before
    assert not list(run.glob("checkpoint-*")) and not list(run.glob("training_args*"))


@pytest.mark.parametrize("spec", ["plain", "checkpoint"])
def test_without_a_coupling(done: Done, spec: str) -> None:
    """The comparison runs train the model as it is, to the same losses."""
    record, run = done(spec, method=spec), done.folder / spec
    assert record.complete and record.chains == () and record.vanilla == record.final
    assert [(row.drift, row.gamma, row.side_bits) for row in record.logged] == [(None, None, None)] * STEPS
    assert losses(record) == pytest.approx(losses(done("plain", method="plain")), abs=1e-5)
    assert abs(losses(record)[-1] - losses(done("reversible"))[-1]) < 0.1
    assert "autorev" not in json.loads((run / "config.json").read_text())


@pytest.mark.parametrize("spec", ["momentum:k=3", "leapfrog", "hamiltonian"])
def test_training_is_that_of_ordinary_autograd(done: Done, spec: str) -> None:
    """The weights at the end are those that the same coupling gets with every activation stored."""
    name = "reversible" if spec == "momentum:k=3" else spec
    done(name, method=spec)
    with running(ORACLE):
        record = done(f"oracle-{name}", method=spec)
    assert [row.drift for row in record.logged] == [None] * STEPS  # nothing was rebuilt
    expected = done.weights(f"oracle-{name}")
    for key, value in done.weights(name).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        ({"method": "momentum:k=3,loss=chunked"}, 1e-5),
        ({"autocast": "bf16"}, 0.05),
        ({"method": "momentum:k=2"}, 0.1),
        ({"method": "momentum:k=3,granularity=sublayer"}, 0.2),
    ],
    ids=str,
)
def test_other_ways_to_train(done: Done, how: dict[str, Any], tolerance: float) -> None:
    """They go where the usual one goes, without drift."""
    record = done("".join(filter(str.isalnum, str(how))), **how)
    assert record.complete and [row.drift for row in record.logged] == [0.0] * STEPS
    assert losses(record) == pytest.approx(losses(done("reversible")), abs=tolerance)
    assert losses(record) != losses(done("reversible"))
    assert record.recipe.dtype == (how.get("autocast") or "fp32")
    assert record.side_bits() == (2.0 if "k=2" in record.method.spec else 3.0)


def test_a_document_in_each_row(done: Done) -> None:
    """Without packing, short documents are padded, and nothing is learned of the padding."""
    lines = [{"prompt": f"say {n}", "completion": f" {n}" * (1 + n % 5)} for n in range(30)]
    (done.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    packed, padded = (done(f"pairs-{pack}", text="pairs.jsonl", pack=pack, batch=2) for pack in (True, False))
    for record in (packed, padded):
        assert record.complete and [row.drift for row in record.logged] == [0.0] * STEPS
        assert losses(record)[-1] < losses(record)[0] - 0.1
    assert packed.corpus.packed and not padded.corpus.packed
    assert packed.corpus.training_tokens == padded.corpus.training_tokens  # that are learned
    assert packed.original and padded.original
    assert packed.original.loss == pytest.approx(padded.original.loss, abs=1e-5)
    assert all((row.tokens or 0) < 2 * USUAL["sequence"] for row in padded.logged)


@pytest.mark.parametrize("how", [{}, {"distill": True}], ids=str)
def test_accumulating_is_a_larger_batch(done: Done, how: dict[str, Any]) -> None:
    """Two rows one after the other, or at once: the same steps to the accuracy of floats."""
    name = "".join(filter(str.isalnum, str(how)))
    single = done(f"2x1{name}", batch=1, accumulate=2, clip=0.0, **how)
    double = done(f"1x2{name}", batch=2, accumulate=1, clip=0.0, **how)
    assert losses(single) == pytest.approx(losses(double), abs=2e-4)
    norms = [[row.gradient_norm for row in record.logged] for record in (single, double)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


@pytest.mark.parametrize("spec", ["leapfrog", "midpoint", "hamiltonian"])
def test_from_scratch(done: Done, spec: str) -> None:
    """A config without weights is trained under the coupling from its first step."""
    if not (done.folder / "scratch").exists():
        tiny_llm(done.folder / "scratch", weights=False)
    record = done(f"scratch-{spec}", model="scratch", method=spec)
    assert not record.pretrained and record.recipe.trains == "scratch"
    assert losses(record)[-1] < losses(record)[0] - 0.5
    assert [(row.drift, row.side_bits) for row in record.logged] == [(0.0, 0.0)] * STEPS
    run = done.folder / f"scratch-{spec}"
    assert record.final and loss_of(autorev.load(run), run) == pytest.approx(record.final.loss, abs=1e-6)


@pytest.mark.parametrize(("target", "gamma"), [("leapfrog", 1.0), ("midpoint", -1.0)])
def test_a_schedule_ends_without_side_bits(done: Done, target: str, gamma: float) -> None:
    """gamma moves to its target and the side bits go away, exact all the time; the folder holds the last of it."""
    record = done(f"to-{target}", schedule=target, schedule_steps=5)
    moved = [abs(row.gamma or 0) for row in record.logged]
    assert moved == sorted(moved) and moved[0] == 0.125 and moved[-1] == 1.0
    assert [row.drift for row in record.logged] == [0.0] * STEPS
    assert record.logged[-1].side_bits == 0.0 and record.chains[0].gamma == (gamma,) * 4
    run = done.folder / f"to-{target}"
    assert record.final and loss_of(autorev.load(run), run) == pytest.approx(record.final.loss, abs=1e-6)


@pytest.mark.parametrize("lora", [None, 4])
def test_distillation(done: Done, lora: int | None) -> None:
    """The loss is (1 - w) cross entropy + w KL; a teacher of its own is needed for full weights alone."""
    record = done(f"distilled-{lora}", distill=True, distill_weight=0.25, lora_rank=lora)
    bytes_of_weights = 4 * record.model.parameters
    assert (
        bytes_of_weights <= record.teacher_bytes < 1.05 * bytes_of_weights
        if lora is None
        else record.teacher_bytes == 0
    )
    for row in record.logged:
        assert row.cross_entropy is not None and row.divergence is not None
        assert row.loss == pytest.approx(0.75 * row.cross_entropy + 0.25 * row.divergence, abs=1e-5)
    first, last = (row.divergence for row in (record.logged[0], record.logged[-1]))
    assert first is not None and last is not None
    assert first < 1e-3 < last
    assert done("reversible").logged[0].divergence is None


def test_a_teacher_holds_the_model_back(done: Done) -> None:
    """The more weight it has, the less the model moves away from the original."""
    free, held = done("reversible").final, done("held", distill=True, distill_weight=1.0).final
    assert free and held and held.divergence is not None and held.divergence < (free.divergence or 0)


def test_lora(done: Done) -> None:
    """The adapters alone are trained and written."""
    record, run = done("lora", lora_rank=4), done.folder / "lora"
    assert record.recipe.trains == "lora" and 0 < record.recipe.trained_parameters < record.model.parameters / 5
    assert [row.drift for row in record.logged] == [0.0] * STEPS
    assert record.original and record.final and record.final.loss < record.original.loss - 0.01
    assert (run / "adapter_model.safetensors").is_file() and not (run / "model.safetensors").exists()
    assert not (run / "README.md").exists()


def test_calibration(done: Done) -> None:
    """The measured increase of what was chosen is within the budget, and the run trains with just that."""
    budget = 2e-3
    record = done("calibrated", max_loss_increase=budget, steps=2)
    found = record.calibration
    assert found and found.budget == budget and found.tokens and len(found.sensitivities) == 16
    (chosen,) = [row for row in found.assignments if row.chosen]
    assert chosen.increase <= budget
    assert record.side_bits() == chosen.side_bits == sum(record.chains[0].side_bits) / 4 < 4
    run = done.folder / "calibrated"
    assert record.final and loss_of(autorev.load(run), run) == pytest.approx(record.final.loss, abs=1e-6)


def test_dropout_is_replayed(done: Done) -> None:
    """A model with dropout is rebuilt without drift, and its evaluations have none."""
    tiny_llm(done.folder / "gpt2", **GPT2)
    record = done("dropout", model="gpt2")
    assert [row.drift for row in record.logged] == [0.0] * STEPS
    run = done.folder / "dropout"
    assert record.final and loss_of(autorev.load(run), run) == pytest.approx(record.final.loss, abs=1e-6)


def test_a_seed_is_a_run(done: Done) -> None:
    """The same seed gives the same figures, another seed others."""
    assert figures(done("again")) == figures(done("reversible"))
    assert done.weights("again").keys() == done.weights("reversible").keys()
    assert all(torch.equal(value, done.weights("again")[key]) for key, value in done.weights("reversible").items())
    assert figures(done("other", seed=1)) != figures(done("reversible"))
