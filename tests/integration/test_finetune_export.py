"""Train reversible, ship vanilla: what `export` writes is plain transformers' model, or nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autorev
from autorev.errors import AutorevError, ExportError, ModelNotFoundError, SettingError, TrainingError
from autorev.finetuning.export import export
from autorev.finetuning.record import FineTuning
from tests.helpers.tiny_llm import tiny_llm, tokenizer_of_bytes
from tests.helpers.tiny_run import At, interrupt, loss_of, tune, workplace

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")
RUNS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "lora": {"lora_rank": 4},
    "lora-schedule": {"lora_rank": 4, "schedule": "leapfrog", "learning_rate": 1e-3},
    "plain": {"method": "plain"},
    "hamiltonian": {"method": "hamiltonian"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs."""
    folder = workplace(tmp_path_factory.mktemp("exported"))
    for name, how in RUNS.items():
        tune(folder, out=name, save_every=7, evaluate_every=7, **how)
    return folder


def record_of(run: Path) -> FineTuning:
    """Its record."""
    return FineTuning.read(run / "run.json")


@pytest.mark.parametrize("name", ["momentum", "lora", "lora-schedule", "plain"])
def test_plain_transformers_loads_it(place: Path, tmp_path: Path, name: str) -> None:
    """The loss is the record's of the plain architecture, in a model without any trace of autorev or adapters."""
    record, out = record_of(place / name), tmp_path / "out"
    done = export(place / name, out)
    assert record.vanilla and record.final
    assert done.vanilla_loss == pytest.approx(record.vanilla.loss, abs=1e-6)
    assert done.loss == pytest.approx(record.final.loss, abs=1e-6)
    assert done.tokens == record.corpus.validation_tokens and not done.forced
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loss_of(model, place / name) == pytest.approx(record.vanilla.loss, abs=1e-5)
    assert not [key for key in model.state_dict() if "lora" in key]
    assert AutoTokenizer.from_pretrained(out).chat_template
    config, before = (json.loads((path / "config.json").read_text()) for path in (out, place / "llm"))
    assert config == before  # no autorev entry; use_cache as it was
    files = {path.name for path in (place / "llm").iterdir()}
    assert {path.name for path in out.iterdir()} == files | {"validation.json"}


def test_the_run_stays_as_it_was(place: Path, tmp_path: Path) -> None:
    """Exporting reads."""
    before = {path.name: path.read_bytes() for path in (place / "momentum").iterdir()}
    export(place / "momentum", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (place / "momentum").iterdir()} == before


def test_another_function_is_refused(place: Path, tmp_path: Path) -> None:
    """Where the plain architecture is another model, it takes --force; both losses are told."""
    run, out = place / "hamiltonian", tmp_path / "out"
    record = record_of(run)
    assert record.vanilla and record.final
    said = f"the loss is {record.vanilla.loss:.3f} instead of {record.final.loss:.3f}: more than 0.05 higher.*`force`"
    with pytest.raises(ExportError, match=said):
        export(run, out)
    assert list(tmp_path.iterdir()) == []
    done = export(run, out, force=True)
    assert done.forced and done.vanilla_loss > done.loss + 0.05
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loss_of(model, run) == pytest.approx(record.vanilla.loss, abs=1e-5)
    assert not export(run, tmp_path / "allowed", max_loss_increase=1.0).forced


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_was_converted_in_user_code(place: Path, tmp_path: Path, family: str) -> None:
    """Converted, saved by `save_pretrained`, no run: compared on a text that is given, in rows that it can read."""
    tiny_llm(tmp_path / "start", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    autorev.convert(model)
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(SettingError, match="no tokenizer"):
        export(tmp_path / "mine", tmp_path / "out", text=place / "text.txt")
    tokenizer_of_bytes().save_pretrained(tmp_path / "mine")
    done = export(tmp_path / "mine", tmp_path / "out", text=place / "text.txt")
    assert abs(done.vanilla_loss - done.loss) < 0.01
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


# -- refusals


def test_an_incomplete_run(place: Path, tmp_path: Path) -> None:
    """It has no model yet; says how to get one."""
    with pytest.raises(TrainingError):
        tune(place, out="incomplete", callbacks=(At(2, interrupt),))
    with pytest.raises(SettingError, match=r"not complete; finish it with `resume`"):
        export(place / "incomplete", tmp_path / "out")


def test_no_run(place: Path, tmp_path: Path) -> None:
    """A folder that is not there, is empty, or holds a model that was never converted."""
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (tmp_path / "nowhere", "is no folder; give the one that autorev finetune wrote"),
        (place / "text.txt", "is no folder"),
        (tmp_path / "empty", r"holds no config\.json"),
        (place / "llm", "was not converted"),
    ):
        with pytest.raises(AutorevError, match=said):
            export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there(place: Path, tmp_path: Path) -> None:
    """It is not written over; an empty one is used."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for out in (tmp_path / "out", place / "text.txt", place / "momentum"):
        with pytest.raises(SettingError, match="is there already; name another folder for `out`"):
            export(place / "momentum", out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    export(place / "momentum", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def _no_json(run: Path) -> None:
    (run / "validation.json").write_text("{")


def _no_rows(run: Path) -> None:
    (run / "validation.json").write_text("{}")


def _no_adapters(run: Path) -> None:
    (run / "adapter_model.safetensors").unlink()


def _cut_adapters(run: Path) -> None:
    (run / "adapter_model.safetensors").write_bytes(b"cut")


def _cut_weights(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"cut")


def _edited(run: Path) -> None:
    (run / "run.json").write_text((run / "run.json").read_text().replace('"complete": true', '"complete": false'))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("momentum", _no_json, r"validation\.json has 1 bytes instead of .* damaged or replaced"),
        ("momentum", _no_rows, r"validation\.json has 2 bytes instead of"),
        ("momentum", _cut_weights, r"model\.safetensors has 3 bytes .*remove autorev\.json and run\.json there"),
        ("momentum", _edited, "was changed after it was written"),
        ("lora", _no_adapters, r"adapter_model\.safetensors cannot be read \(No such file or directory\)"),
        ("lora", _cut_adapters, r"adapter_model\.safetensors has 3 bytes instead of"),
    ],
)
def test_a_damaged_run(place: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str) -> None:
    """Says which file, and writes nothing."""
    shutil.copytree(place / name, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(AutorevError, match=said):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_adapters_without_their_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to a model that is elsewhere now; says to which."""
    monkeypatch.setattr("autorev.finetuning.trained.load_model", _moved)
    with pytest.raises(AutorevError, match=r"adapters in .*lora belong to the model .*llm, which cannot be found"):
        export(place / "lora", tmp_path / "out")


def _moved(*args: Any, **how: Any) -> Any:
    raise ModelNotFoundError("gone")


@pytest.mark.parametrize("what", ["transformers.modeling_utils.safe_save_file", "pathlib.Path.rename"])
def test_a_full_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The folder appears whole or not at all, and nothing is left beside it."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(ExportError, match=r"could not be written .*No space left"):
        patched.setattr(what, full)
        export(place / "momentum", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_read_back(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that compute something else do not become the exported model."""
    save = type(AutoModelForCausalLM.from_pretrained(place / "llm")).save_pretrained

    def broken(self: Any, folder: Path, **how: Any) -> None:
        with torch.no_grad():
            self.lm_head.weight.mul_(2)
        save(self, folder, **how)

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", broken)
    with pytest.raises(ExportError, match="what was written has a loss of"):
        export(place / "momentum", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
