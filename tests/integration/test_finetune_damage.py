"""Weights that are not those that were written are not used: not to go on from, not to evaluate, not to export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import autorev
from autorev import records
from autorev.errors import AutorevError, DamagedError, TrainingError
from autorev.finetuning.examine import examine
from autorev.finetuning.export import export
from autorev.finetuning.record import FineTuning
from autorev.finetuning.run import finetune
from tests.helpers.tiny_run import At, figures, interrupt, tune, workplace

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")
RUNS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 4}, "plain": {"method": "plain"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that are complete, and one that was interrupted after step 3, with checkpoints of steps 2 and 3."""
    folder = workplace(tmp_path_factory.mktemp("damaged"))
    for name, how in RUNS.items():
        tune(folder, out=name, **how)
    with pytest.raises(TrainingError):
        tune(folder, out="stopped", callbacks=(At(2, interrupt, "on_step_begin"),))
    return folder


@pytest.fixture
def copies(place: Path, tmp_path: Path) -> Path:
    """The same place at another time, to be treated badly."""
    for name in (*RUNS, "stopped"):
        shutil.copytree(place / name, tmp_path / name)
    return workplace(tmp_path)


def flip(path: Path, where: float = 0.5, bit: int = 3) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    """All that a run wrote there."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def multiplied(path: Path, factor: float) -> None:
    """Weights of the same names, shapes and kind: of another moment of the training, or none."""
    save_file({name: value * factor for name, value in load_file(path).items()}, path, {"format": "pt"})


def resume(folder: Path, **how: Any) -> FineTuning:
    """Go on with the one that was interrupted."""
    return tune(folder, out="stopped", resume=True, **how)


def check_offered(folder: Path, file: str) -> None:
    """Resuming names the file, offers the checkpoint before, and trains nothing."""
    began: list[Any] = []
    said = (
        rf"{re.escape(file)} .*Move .*checkpoint-3 away, and give `resume` again to go on from .*checkpoint-2, which is"
    )
    with pytest.raises(DamagedError, match=said):
        resume(folder, callbacks=(At(2, began.append, "on_step_begin"),))
    assert not began
    assert sorted(path.name for path in (folder / "stopped").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_flipped_bit_in_any_file_of_a_checkpoint(copies: Path) -> None:
    """Weights, optimiser, random states, counters, the mark itself: at the beginning, within, at the end."""
    files = files_of(copies / "stopped" / "checkpoint-3")
    assert len(files) >= 8
    for path in files:
        before = path.read_bytes()
        for where in (0.0, 0.37, 0.9, 1.0):
            flip(path, where)
            check_offered(copies, path.name)
            path.write_bytes(before)
    assert resume(copies).complete  # whole again


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: multiplied(path, 0),
        lambda path: multiplied(path, 1.01),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: shutil.copy(path.parents[1] / "checkpoint-2" / path.name, path),
        lambda path: shutil.copy(path.parents[2] / "full" / path.name, path),
    ],
    ids=["zeroed", "scaled", "cut", "emptied", "missing", "of another step", "of another run"],
)
def test_other_weights_in_a_checkpoint(copies: Path, place: Path, damage: Callable[[Path], Any]) -> None:
    """They are not gone on from."""
    damage(copies / "stopped" / "checkpoint-3" / "model.safetensors")
    check_offered(copies, "model.safetensors")


def test_the_checkpoint_before_serves(copies: Path, place: Path) -> None:
    """By the way that the message says, to the same figures."""
    flip(copies / "stopped" / "checkpoint-3" / "model.safetensors")
    shutil.move(copies / "stopped" / "checkpoint-3", copies / "elsewhere")
    assert figures(resume(copies)) == figures(FineTuning.read(place / "full" / "run.json"))


def test_nothing_is_left_to_go_back_to(copies: Path) -> None:
    """Where the one before is damaged, too, says that the run would begin anew."""
    for step in (2, 3):
        flip(copies / "stopped" / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(DamagedError, match=r"Move .*checkpoint-3 away, and give `resume` again to begin anew"):
        resume(copies)


def test_a_whole_checkpoint_of_another_run(copies: Path, place: Path) -> None:
    """It lies where one of this run could, is not taken for one, and is left alone."""
    with pytest.raises(TrainingError):
        tune(copies, out="other", seed=1, callbacks=(At(4, interrupt, "on_step_begin"),))
    shutil.copytree(copies / "other" / "checkpoint-5", copies / "stopped" / "checkpoint-5")
    assert figures(resume(copies)) == figures(FineTuning.read(place / "full" / "run.json"))
    assert (copies / "stopped" / "checkpoint-5").is_dir()


# -- a model


def uses(run: Path, out: Path) -> list[Callable[[], Any]]:
    """Whatever takes up the model of a complete run."""
    return [lambda: examine(str(run)), lambda: export(run, out, force=True)]


@pytest.mark.parametrize("name", RUNS)
def test_a_flipped_bit_in_any_file_of_a_model(copies: Path, name: str) -> None:
    """Neither evaluated nor exported, and the file is named."""
    run = copies / name
    for path in files_of(run):
        before = path.read_bytes()
        for where in (0.2, 1.0):
            flip(path, where)
            for use in uses(run, copies / "out"):
                with pytest.raises(AutorevError, match=re.escape(path.name)):
                    use()
            path.write_bytes(before)
    assert not (copies / "out").exists() and examine(str(run)).tokens


@pytest.mark.parametrize("name", RUNS)
def test_other_weights_in_a_model(copies: Path, name: str) -> None:
    """Zeros, those of another moment, half of them: likewise, and by `autorev.load`."""
    run = copies / name
    weights = next(run.glob("*model.safetensors"))
    before = weights.read_bytes()
    for damage in (lambda: multiplied(weights, 0), lambda: multiplied(weights, 1.01), lambda: weights.write_bytes(b"")):
        damage()
        loads = [lambda: autorev.load(run)] if name == "full" else []
        for use in (*uses(run, copies / "out"), *loads):
            with pytest.raises(DamagedError, match=rf"{weights.name} .*damaged or replaced"):
                use()
        weights.write_bytes(before)
    assert not (copies / "out").exists()


def test_a_checkpoint_is_a_model_too(copies: Path) -> None:
    """Looked at by whoever takes it by its own name."""
    checkpoint = copies / "stopped" / "checkpoint-3"
    autorev.load(checkpoint)
    flip(checkpoint / "model.safetensors", 0.9)
    for use in (*uses(checkpoint, copies / "out"), lambda: autorev.load(checkpoint)):
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            use()


def test_a_model_without_its_record(copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its mark says after which step; that this was the last one, nobody knows. Adapters without a base are none."""
    for name in ("full", "lora", "plain"):
        (copies / name / "run.json").unlink()
    said = "full has no run.json: it is taken for the model of a run after step 7"
    for use in uses(copies / "full", copies / "out"):
        caplog.clear()
        use()
        assert said in caplog.text
    assert examine(str(copies / "plain")).tokens
    assert "plain has no run.json" in caplog.text
    for use in uses(copies / "lora", copies / "other"):
        with pytest.raises(DamagedError, match=r"run\.json, which says what model these adapters belong to, is"):
            use()
    caplog.clear()
    assert examine(str(copies / "out")).tokens  # no run's folder
    assert caplog.text == ""


def test_the_model_of_another_run(copies: Path) -> None:
    """Its files with their mark, in the place of this run's; or without any mark."""
    tune(copies, out="other", seed=1)
    for path in (copies / "other").iterdir():
        if path.name != "run.json":
            shutil.copy(path, copies / "full")
    with pytest.raises(DamagedError, match="not the one that its run left there"):
        examine(str(copies / "full"))
    (copies / "full" / "autorev.json").unlink()
    with pytest.raises(DamagedError, match=r"autorev\.json, which says what the trained model is, is missing"):
        export(copies / "full", copies / "out")


def test_a_run_of_an_earlier_version(copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without digests, it is used, and the log says that nothing is known."""
    run = copies / "full"
    record = json.loads((run / "run.json").read_text())
    for key in ("run", "base", "digest"):
        record.pop(key)
    (run / "run.json").write_text(json.dumps({**record, "digest": records._digest(record)}))
    (run / "autorev.json").unlink()
    assert examine(str(run)).tokens
    assert "kept no digests" in caplog.text


def test_a_run_on_what_a_run_left(copies: Path) -> None:
    """It may be the model of another one; a damaged one is not trained on."""
    flip(copies / "plain" / "model.safetensors", 0.9)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        tune(copies, out="next", model="plain")
    assert not (copies / "next").exists()


# -- what adapters belong to


HOW: dict[str, Any] = {"sequence": 48, "validation_rows": 4, "learning_rate": 1e-2, "lora_rank": 2}


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of adapters on the model that is called `llm` where they were started, which is where we are."""
    monkeypatch.chdir(workplace(tmp_path))
    finetune("llm", out="adapters", text="text.txt", steps=2, **HOW)
    with pytest.raises(TrainingError):
        half = {"steps": 3, "save_every": 1, "callbacks": (At(1, interrupt, "on_step_begin"),)}
        finetune("llm", out="half", text="text.txt", **HOW, **half)
    return tmp_path


def test_adapters_on_another_model(adapters: Path) -> None:
    """The name that the record has leads to other weights: neither evaluated, nor exported, nor gone on with."""
    weights = adapters / "llm" / "model.safetensors"
    before = weights.read_bytes()
    for change in (lambda: multiplied(weights, 1.001), lambda: flip(weights, 0.9)):
        change()
        for use in uses(Path("adapters"), Path("out")):
            with pytest.raises(
                DamagedError, match="adapters in adapters were trained on other weights than those of llm"
            ):
                use()
        with pytest.raises(AutorevError, match=r"another model's weights \([0-9a-f]{12}, now [0-9a-f]{12}\)"):
            finetune("llm", out="half", text="text.txt", steps=3, save_every=1, resume=True, **HOW)
        weights.write_bytes(before)
    assert examine("adapters").tokens and not Path("out").exists()


def test_adapters_on_the_same_model_elsewhere(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved, or saved once more in several files: the weights count."""
    loss = examine("adapters").evaluation.loss
    new = adapters / "new"
    new.mkdir()
    AutoModelForCausalLM.from_pretrained("llm").save_pretrained(new / "llm", max_shard_size="20KB")
    assert len(list((new / "llm").glob("*.safetensors"))) > 1
    for path in (*(adapters / "llm").glob("*token*"), *(adapters / "llm").glob("*.jinja")):
        shutil.copy(path, new / "llm")
    for name in ("adapters", "half", "text.txt"):
        shutil.move(name, new)
    shutil.rmtree(adapters / "llm")
    monkeypatch.chdir(new)
    assert examine("adapters").evaluation.loss == pytest.approx(loss, abs=1e-6)
    assert export(Path("adapters"), Path("out")).loss == pytest.approx(loss, abs=1e-6)
    shutil.move("llm", "moved")
    found = finetune("moved", out="half", text="text.txt", steps=3, save_every=1, resume=True, **HOW)
    assert found.complete and found.model.source == "moved"
