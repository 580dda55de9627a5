"""A run that was killed, interrupted or left without space goes on as if nothing had happened, or says why not."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from autorev import records
from autorev.errors import AutorevError, RecordError, SettingError, TrainingError
from autorev.finetuning.record import FineTuning
from autorev.finetuning.run import finetune
from tests.helpers.tiny_llm import tiny_llm
from tests.helpers.tiny_run import GPT2, USUAL, At, figures, interrupt, run_and_kill, tune, workplace

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quick_collections"),
    # Python 3.12 on: the processes that are killed are forked from one that imports, whose threads sleep
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    # PEFT, of GPT-2's layers, which it then treats rightly
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but:UserWarning"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text for all."""
    folder = workplace(tmp_path_factory.mktemp("resumed"))
    tiny_llm(folder / "gpt2", **GPT2)
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> FineTuning:
    """What a run comes to that nothing happens to."""
    return tune(place, out="undisturbed")


@pytest.fixture(scope="module")
def _stopped(place: Path) -> Path:
    with pytest.raises(TrainingError):
        tune(place, out="stopped", callbacks=(At(2, interrupt, "on_step_begin"),))
    return place / "stopped"


@pytest.fixture
def stopped(_stopped: Path, place: Path) -> Path:
    """A run that was interrupted after step 3, to be treated badly."""
    shutil.rmtree(place / "run", ignore_errors=True)
    return Path(shutil.copytree(_stopped, place / "run"))


def left_in(run: Path) -> list[str]:
    """What a person sees there."""
    return sorted(path.name for path in run.iterdir() if not path.name.startswith("."))


def check_same(found: FineTuning, expected: FineTuning) -> None:
    """To the last digit."""
    assert found.complete and figures(found) == figures(expected)
    assert found.evaluations == expected.evaluations and found.original == expected.original
    assert (found.vanilla, found.chains, found.calibration) == (
        expected.vanilla,
        expected.chains,
        expected.calibration,
    )


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"schedule": "leapfrog", "schedule_steps": 6},
        {"lora_rank": 4, "model": "gpt2"},
        {"method": "bdia"},
        {"max_loss_increase": 2e-3, "method": "momentum:k=2"},
    ],
    ids=lambda how: "-".join(map(str, how.values())) or "usual",
)
def test_a_killed_run_goes_on(
    place: Path, undisturbed: FineTuning, how: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """kill -9 after step 5, a checkpoint of step 4: every later loss is the same, with dropout and drawn couplings."""
    out = request.node.callspec.id
    assert run_and_kill(place, 5, out=f"killed-{out}", **how) == -signal.SIGKILL
    assert left_in(place / f"killed-{out}") == ["checkpoint-2", "checkpoint-4", "run.json", "validation.json"]
    before = FineTuning.read(place / f"killed-{out}" / "run.json")
    assert not before.complete and len(before.logged) == 4 and before.final is None
    found = tune(place, out=f"killed-{out}", resume=True, **how)
    check_same(found, tune(place, out=f"whole-{out}", **how) if how else undisturbed)
    assert not list((place / f"killed-{out}").glob("checkpoint-*"))


def test_killed_in_a_checkpoint(place: Path, undisturbed: FineTuning) -> None:
    """The checkpoint that was being written is dropped, and the run goes on from the one before."""
    assert run_and_kill(place, 4, in_checkpoint=True, out="half") == -signal.SIGKILL
    half = place / "half" / ".part" / "checkpoint-4"
    assert half.is_dir() and not (place / "half" / "checkpoint-4").exists()
    began: list[Any] = []
    look = At(2, lambda model: began.append(half.exists()), "on_step_begin")
    check_same(tune(place, out="half", resume=True, callbacks=(look,)), undisturbed)
    assert began == [False]


def test_killed_before_a_checkpoint(place: Path, undisturbed: FineTuning) -> None:
    """Without any checkpoint, the run begins anew, from what was evaluated already."""
    assert run_and_kill(place, 1, out="early") == -signal.SIGKILL
    check_same(tune(place, out="early", resume=True), undisturbed)


def test_ctrl_c_saves(stopped: Path, place: Path, undisturbed: FineTuning) -> None:
    """The first Ctrl-C ends the run after its step, with a checkpoint, and says how to go on; it goes on the same."""
    assert (stopped / "checkpoint-3" / "autorev.json").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    message = r"^interrupted after step 4 of 7\. The last good checkpoint is .*checkpoint-4\. Go on with `resume`$"
    with pytest.raises(TrainingError, match=message):
        tune(place, resume=True, callbacks=(At(3, interrupt, "on_step_begin"),))
    check_same(tune(place, resume=True), undisturbed)


def test_the_second_ctrl_c_stops_at_once(place: Path, undisturbed: FineTuning) -> None:
    """It leaves the run as it was at the last checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        tune(place, out="twice", callbacks=(At(2, interrupt), At(2, interrupt)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (place / "twice" / "run.json").exists() or not list((place / "twice").glob("checkpoint-*"))


def test_ctrl_c_in_the_last_step(place: Path, undisturbed: FineTuning) -> None:
    """Nothing is left to interrupt: the run is complete."""
    check_same(tune(place, out="last", callbacks=(At(USUAL["steps"], interrupt),)), undisturbed)


@pytest.mark.parametrize(
    "how", [{"decay": "constant", "lora_rank": 2}, {"schedule": "midpoint", "schedule_steps": 7}], ids=str
)
def test_stopped_after_the_last_step(place: Path, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Only the evaluations are left to do: no further step is taken."""
    out = request.node.callspec.id

    def stop(what: str, fraction: float) -> None:
        if "trained model" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(place, out=out, progress=stop, **how)
    check_same(tune(place, out=out, resume=True, **how), tune(place, out=f"whole {out}", **how))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora_rank": 2, "distill": True, "distill_weight": 0.25, "accumulate": 2, "clip": 0.5},
        {"schedule": "leapfrog", "schedule_steps": 5, "decay": "cosine", "seed": 3, "pack": False},
    ],
    ids=["usual", "lora", "schedule"],
)
def test_a_run_goes_on_by_its_own_options(place: Path, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """`finetune --resume --out FOLDER` alone, as if nothing had been."""
    out = f"alone-{request.node.callspec.id}"
    with pytest.raises(TrainingError, match="interrupted"):
        tune(place, out=out, callbacks=(At(2, interrupt, "on_step_begin"),), **how)
    check_same(finetune(out=place / out, resume=True), tune(place, out=f"{out}-whole", **how))


def test_what_went_on_says_so(stopped: Path, place: Path) -> None:
    """The record has a command for each run that had a part in it."""
    tune(place, resume=True, command="autorev finetune ... --resume")
    record = FineTuning.read(stopped / "run.json")
    assert record.command.splitlines() == ["autorev.finetune(...)", "autorev finetune ... --resume"]


def test_what_the_run_did_not_write_stays(stopped: Path, place: Path, undisturbed: FineTuning) -> None:
    """Folders of the user's that are called as checkpoints are: empty, full, a copy of one, and a link."""
    mine = {name: stopped / f"checkpoint-{name}" for name in ("77", "1", "of-mine", "99", "88")}
    for name in ("77", "1", "of-mine"):
        mine[name].mkdir()
    (mine["77"] / "model.safetensors").write_text("mine")
    shutil.copytree(stopped / "checkpoint-3", mine["99"])
    mine["88"].symlink_to(stopped / "checkpoint-3")
    check_same(tune(place, resume=True), undisturbed)
    assert all(path.is_dir() for path in mine.values() if not path.is_symlink()) and mine["88"].is_symlink()
    assert (mine["77"] / "model.safetensors").read_text() == "mine"
    assert (mine["99"] / "model.safetensors").is_file() and not (stopped / "checkpoint-3").exists()


def test_a_folder_in_the_way_of_a_checkpoint(stopped: Path, place: Path) -> None:
    """It is named before anything is trained, and not written into."""
    (stopped / "checkpoint-4").mkdir()
    began: list[Any] = []
    with pytest.raises(TrainingError, match=r"checkpoint-4 is there and was not written by this run.*move it away"):
        tune(place, resume=True, callbacks=(At(3, began.append, "on_step_begin"),))
    assert not began and not list((stopped / "checkpoint-4").iterdir())
    (stopped / "checkpoint-4").rmdir()
    assert tune(place, resume=True).complete


def test_a_complete_run_is_not_resumed(place: Path, undisturbed: FineTuning) -> None:
    """There is nothing to go on with."""
    with pytest.raises(SettingError, match="is complete; name another `out`"):
        tune(place, out="undisturbed", resume=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "leapfrog"}, "trains as momentum k=3, not as leapfrog"),
        ({"method": "plain"}, "trains as momentum k=3, not as plain"),
        ({"steps": 9}, "was begun with `steps=7`, not 9; leave out what differs, `resume` takes it from the run"),
        ({"sequence": 32, "batch": 2}, "`sequence=48`, not 32, `batch=1`, not 2"),
        ({"seed": 1}, "`seed=0`, not 1"),
        ({"autocast": "bf16"}, "`autocast=None`, not bf16"),
        ({"lora_rank": 2}, "`lora_rank=None`, not 2"),
        ({"distill": True}, "`distill=False`, not True"),
        ({"schedule": "leapfrog"}, "`schedule=None`, not leapfrog"),
        ({"decay": "constant"}, "`decay=linear`, not constant"),
        ({"warmup": 3}, "`warmup=1`, not 3"),
        ({"clip": 0.1}, "`clip=1.0`, not 0.1"),
        ({"pack": False}, "`pack=True`, not False"),
        ({"validation_rows": 3}, "`validation_rows=4`, not 3"),
        ({"model": "gpt2"}, r"another model's name \(llm, now gpt2\)"),
        ({"text": "other.txt"}, r"another data's source \(.*text.txt, now .*other.txt\)"),
    ],
    ids=lambda how: str(how) if isinstance(how, dict) else "",
)
def test_another_recipe_is_not_resumed(stopped: Path, place: Path, how: dict[str, Any], said: str) -> None:
    """What differs is named, nothing is trained, and the checkpoints stay."""
    (place / "other.txt").write_text("Something else. " * 99)
    with pytest.raises(SettingError, match=said) as caught:
        tune(place, resume=True, **how)
    assert "(ModelInfo" not in str(caught.value) and "Corpus(" not in str(caught.value)
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_another_learning_rate_is_gone_on_with(stopped: Path, place: Path, undisturbed: FineTuning) -> None:
    """The steps that are left are taken with it, the record says so, and the steps before stay as they were."""
    found = tune(place, resume=True, learning_rate=2e-2)
    assert found.complete
    assert found.recipe.learning_rate == 2e-2
    assert any("learning rate of 0.02 instead of 0.01" in note for note in found.notes)
    rates = [row.learning_rate for row in found.logged]
    before = [row.learning_rate for row in undisturbed.logged]
    assert rates[:3] == before[:3]
    assert rates[3:] == pytest.approx([2 * rate for rate in before[3:]])


def test_another_grid_is_gone_on_with(stopped: Path, place: Path) -> None:
    """`fraction_bits` named anew are those of the chain from here on."""
    found = tune(place, resume=True, method="momentum:k=3,fraction_bits=14")
    assert found.complete
    assert {chain.fraction_bits for chain in found.chains} == {14}
    assert any("fraction_bits=14" in note for note in found.notes)


def test_edited_data_is_noticed(stopped: Path, place: Path) -> None:
    """The same file with as many other letters is another text."""
    text = (place / "text.txt").read_text()
    (place / "text.txt").write_text(text.replace("repeats", "repaets"))
    try:
        with pytest.raises(SettingError, match="another data's content"):
            tune(place, resume=True)
    finally:
        (place / "text.txt").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"steps": 7', '"steps": 8'), "was changed after it was written"),
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "", "not valid JSON"),
        (lambda text: json.dumps({**json.loads(text), "schema_version": 99}), "schema version 99"),
        (lambda text: "[]", "no record of a fine-tuning"),
    ],
    ids=["edited", "cut", "empty", "of another version", "another file"],
)
def test_a_damaged_record(stopped: Path, place: Path, damage: Any, said: str) -> None:
    """It is refused, and left as it is."""
    path = stopped / "run.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError, match=said):
        tune(place, resume=True)
    assert (stopped / "checkpoint-3").is_dir()


def test_a_folder_that_is_there(stopped: Path, place: Path) -> None:
    """A run is not written over; nor is anything else, and then nobody is sent to --resume."""
    with pytest.raises(SettingError, match="go on with its run by `resume`"):
        tune(place)
    (stopped / "run.json").unlink()
    with pytest.raises(SettingError, match="holds no run; name another `out`"):
        tune(place)
    with pytest.raises(SettingError, match="holds no run to go on with"):
        tune(place, resume=True)
    with pytest.raises(SettingError, match="holds no run; name another `out`"):
        tune(place, out="text.txt")
    with pytest.raises(SettingError, match=r"text\.txt/run cannot be written to: Not a directory; name another `out`"):
        tune(place, out="text.txt/run")


# -- a full disk


def _full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["torch.save", "transformers.modeling_utils.safe_save_file"])
def test_a_full_disk(place: Path, undisturbed: FineTuning, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """What was half written goes away, the checkpoint before stays, and the run goes on once there is space."""
    out = f"full {what}"
    fill = At(3, lambda model: monkeypatch.setattr(what, _full))
    said = r"checkpoint of step 4 could not be written to .*No space left on device.*checkpoint-2\. Free some space"
    with pytest.raises(TrainingError, match=said):
        tune(place, out=out, callbacks=(fill,))
    assert sorted(path.name for path in (place / out).iterdir()) == ["checkpoint-2", "run.json", "validation.json"]
    monkeypatch.undo()
    check_same(tune(place, out=out, resume=True), undisturbed)


def test_a_disk_that_is_full_at_the_end(place: Path, undisturbed: FineTuning, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model is in its last checkpoint still, and written once there is space."""

    def fill(what: str, fraction: float) -> None:
        if "trained model" in what:
            monkeypatch.setattr("transformers.modeling_utils.safe_save_file", _full)

    with pytest.raises(TrainingError, match=r"model could not be written .*checkpoint-7\. Free some space"):
        tune(place, out="full end", progress=fill)
    assert not FineTuning.read(place / "full end" / "run.json").complete
    monkeypatch.undo()
    check_same(tune(place, out="full end", resume=True), undisturbed)


def test_a_record_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so; the checkpoint that was just written stays."""
    write = records.replace_whole

    def full(path: Path, text: str) -> None:
        write(path, text) if path.name != "run.json" else _full()

    fill = At(3, lambda model: monkeypatch.setattr(records, "replace_whole", full))
    with pytest.raises(AutorevError, match=r"run\.json cannot be written: No space left on device"):
        tune(place, out="full record", callbacks=(fill,))
    monkeypatch.undo()
    assert (place / "full record" / "checkpoint-4" / "autorev.json").is_file()
    assert tune(place, out="full record", resume=True).complete


def test_the_record_is_complete_before_the_checkpoints_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the run is complete; the other way round, it would train from its first step again."""
    seen: list[bool] = []
    remove = shutil.rmtree

    def removing(path: Path, **how: Any) -> None:
        if Path(path).name == ".checkpoint-7.old":
            seen.append(FineTuning.read(place / "order" / "run.json").complete)
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", removing)
    tune(place, out="order")
    assert seen == [True]
