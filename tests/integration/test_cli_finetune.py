"""`finetune`, `export` and `evaluate` on the command line: what they print where, and one message for an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from autorev.cli import main
from autorev.finetuning.record import FineTuning
from tests.helpers.tiny_run import At, figures, interrupt, workplace

ROOT = Path(__file__).parents[2]
QUICK = (
    *("--text", "text.txt", "--seq", "48", "--steps", "4", "--lr", "1e-2"),
    *("--validation-rows", "4", "--evaluate-every", "4", "--save-every", "2"),
)
pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")


@pytest.fixture(scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workplace(tmp_path_factory.mktemp("typed"))
    (folder / "empty.txt").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{oops')
    return folder


@pytest.fixture(autouse=True)
def place(_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs beside a model and a text."""
    monkeypatch.chdir(_place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return _place


@pytest.fixture(scope="module")
def trained(_place: Path) -> Path:
    """A finished run's folder, made by the command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(_place)
        done = run("finetune", "llm", *QUICK)
    assert done.exit_code == 0, done.output
    return Path("runs") / "llm-momentum-k-3"


def run(*arguments: str) -> Result:
    """A command, in this process."""
    return CliRunner().invoke(main, arguments)


def check_error(done: Result, said: str, code: int = 1) -> None:
    """One message, and nothing that looks like an accident."""
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    assert said in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "Error: " in line][-1] == done.stderr.splitlines()[-1]
    for accident in ("Traceback", "bug in autorev", "Warning"):
        assert accident not in done.output


# -- what works


def test_a_run_by_default(trained: Path, place: Path) -> None:
    """The folder is named after the model and the coupling; the report is there; the record knows its command."""
    record = FineTuning.read(place / trained / "run.json")
    assert record.complete and record.name == trained.name
    assert record.command.startswith("autorev finetune llm --text text.txt")
    page = (place / trained / "report.html").read_text()
    assert "momentum" in page and "<html" in page


def test_what_is_printed(place: Path) -> None:
    """Results on stdout, progress on stderr."""
    done = run("finetune", "llm", *QUICK, "--method", "plain", "--out", "plain", "--html", "mine.html")
    assert done.exit_code == 0, done.output
    assert "Model and record: plain" in done.stdout and "mine.html" in done.stdout
    assert "loading the model" in done.stderr or "step" in done.stderr or "starting" in done.stderr
    assert "starting" not in done.stdout and "step 1 of" not in done.stdout
    assert (place / "mine.html").is_file() and not (place / "plain" / "report.html").exists()


def test_json_is_the_record_and_nothing_else(place: Path) -> None:
    """stdout can be parsed, and is what the file says."""
    done = run("finetune", "llm", *QUICK, "--lora-rank", "4", "--out", "lora", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((place / "lora" / "run.json").read_text())
    assert FineTuning.from_json(done.stdout).recipe.lora_rank == 4


def test_export_and_evaluate(trained: Path, place: Path) -> None:
    """The exported model's loss is what export and evaluate say of it, with the original's beside it."""
    done = run("export", str(trained), "--out", "plain-model", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["folder"] == "plain-model" and not found["forced"]
    assert "autorev" not in (place / "plain-model" / "config.json").read_text()
    again = run("evaluate", str(trained), "--original", "llm", "--json")
    assert again.exit_code == 0, again.output
    record = FineTuning.read(place / trained / "run.json")
    assert record.final
    evaluation = json.loads(again.stdout)["evaluation"]
    assert evaluation["loss"] == pytest.approx(record.final.loss, abs=1e-6) == pytest.approx(found["loss"], abs=1e-6)
    assert evaluation["agreement"] == pytest.approx(record.final.agreement)
    assert evaluation["divergence"] == pytest.approx(record.final.divergence, abs=1e-6)
    told = run("export", str(trained), "--out", "plain-again")
    assert told.exit_code == 0 and "which transformers loads without autorev" in told.stdout


# -- what does not


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nowhere", "nowhere is neither a file nor a profile"),
        ("llm --text nowhere.txt", "Error: nowhere.txt cannot be read: No such file or directory"),
        ("llm --text empty.txt", "Error: empty.txt is empty; there is nothing to train on"),
        ("llm --text broken.jsonl", "Error: broken.jsonl line 2 is not JSON"),
        ("llm --seq 129", "llm reads 128 tokens at most"),
        ("llm --seq 1", "sequence is a whole number, 2 or more, not 1"),
        ("llm --method nonsense", "there is no method 'nonsense'"),
        ("llm --distill --distill-weight 2", "at most 1, not 2"),
        ("llm --method plain --schedule leapfrog", "plain has no gamma that can be moved"),
        ("llm --lr -1", "learning rate is a number above 0, not -1"),
        ("llm --decay foo", "not 'foo'"),
        ("llm --resume", "holds no run to go on with"),
        ("llm --out text.txt/x", "cannot be written to: Not a directory; name another --out"),
        ("llm --html text.txt/x", "Could not open file 'text.txt/x': Not a directory; name another file"),
        ("llm --lr 1e30 --clip 0 --out broken", "holds values that are not numbers"),
    ],
)
def test_an_error_is_one_message(place: Path, arguments: str, said: str) -> None:
    """Exit code 1, the message as the last line on stderr, and nothing on stdout."""
    typed = arguments.split()
    out = () if "--out" in typed else ("--out", "refused")
    check_error(run("finetune", *QUICK, *out, *typed), said)
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("llm --text llm", "File 'llm' is a directory"),
        ("llm --accumulate 0", "0 is not in the range 1<="),
        ("llm --seed -1", "-1 is not in the range 0<="),
        ("llm --lr nan", "nan is no finite number"),
        ("llm --clip nan", "nan is no finite number"),
        ("llm --max-loss-increase nan", "nan is no finite number"),
        ("llm --steps x", "'x' is not a valid integer"),
        ("llm --schedule elsewhere", "'elsewhere' is not one of"),
        ("llm --max-loss-increase -1", "-1.0 is not in the range x>=0"),
        ("llm --out text.txt", "Directory 'text.txt' is a file"),
        ("llm --nonsense", "No such option"),
    ],
)
def test_what_click_refuses(place: Path, arguments: str, said: str) -> None:
    """Exit code 2, as for every command."""
    check_error(run("finetune", *QUICK, "--out", "refused", *arguments.split()), said, code=2)
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("export nowhere --out x", "nowhere is no folder"),
        ("export llm --out x", "was not converted"),
        ("export TRAINED --out llm", "llm is there already; name another folder for --out"),
        ("export TRAINED --out x --text nowhere.txt", "nowhere.txt cannot be read"),
        ("export TRAINED --out text.txt/x", "cannot be written to"),
        ("evaluate nowhere", "nowhere is neither a file nor a profile"),
        ("evaluate TRAINED --original nowhere", "nowhere is neither a file nor a profile"),
        ("finetune llm --out TRAINED", "is there already; go on with its run by --resume"),
        ("finetune llm --out TRAINED --resume", "is complete; name another --out"),
    ],
)
def test_errors_of_a_finished_run(trained: Path, place: Path, arguments: str, said: str) -> None:
    """Likewise of the other commands."""
    check_error(run(*arguments.replace("TRAINED", str(trained)).split()), said)
    assert not (place / "x").exists()


# -- Ctrl-C


def test_ctrl_c_and_resume(place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves, says how to go on, and exits with 1; what is typed then gives the figures of a run without it."""
    from autorev.finetuning import run as module

    finetune = module.finetune

    def interrupted(*arguments: Any, **how: Any) -> FineTuning:
        return finetune(*arguments, **how, callbacks=(At(2, interrupt, "on_step_begin"),))

    monkeypatch.setattr(module, "finetune", interrupted)
    stopped = run("finetune", "llm", *QUICK, "--out", "stopped")
    check_error(
        stopped, "Error: interrupted after step 3 of 4. The last good checkpoint is stopped/checkpoint-3. Go on"
    )
    monkeypatch.setattr(module, "finetune", finetune)
    check_error(run("finetune", "llm", *QUICK, "--out", "stopped", "--resume", "--seed", "3"), "--seed 0, not 3")
    done = run("finetune", "llm", *QUICK, "--out", "stopped", "--resume")
    assert done.exit_code == 0, done.output
    record, expected = (FineTuning.read(place / path / "run.json") for path in ("stopped", trained))
    assert figures(record) == figures(expected) and record.final == expected.final
    assert record.command.splitlines()[1].endswith("--resume")


def test_a_run_that_is_complete_but_for_its_report(place: Path, trained: Path) -> None:
    """Killed while it was rendered, or the disk was full: `--resume` renders it, and trains nothing."""
    page, weights = place / trained / "report.html", place / trained / "model.safetensors"
    page.unlink()
    before = weights.stat().st_mtime_ns, FineTuning.read(place / trained / "run.json")
    done = run("finetune", "--resume", "--out", str(trained))
    assert done.exit_code == 0, done.output
    assert "<html" in page.read_text()
    assert (weights.stat().st_mtime_ns, FineTuning.read(place / trained / "run.json")) == before


def test_ctrl_c_of_a_terminal(place: Path) -> None:
    """The whole program: SIGINT in the middle of a long run ends it with a checkpoint, a message and exit code 1."""
    command = [sys.executable, "cli.py", "finetune", str(place / "llm"), *QUICK, "--steps", "100000"]
    command[command.index("text.txt")] = str(place / "text.txt")
    program = subprocess.Popen(
        [*command, "--out", str(place / "long"), "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not list(place.glob("long/checkpoint-*/autorev.json")) and time.monotonic() < until:
            assert program.poll() is None, program.communicate()
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        said, told = program.communicate(timeout=60)
    finally:
        program.kill()
        program.wait()
    assert program.returncode == 1 and said == ""
    last = told.splitlines()[-1]
    assert last.startswith("Error: interrupted after step ") and last.endswith("Go on with --resume")
    assert "Traceback" not in told and "Warning" not in told
    step = int(last.split("step ")[1].split()[0])
    assert (place / "long" / f"checkpoint-{step}" / "autorev.json").is_file()
    assert not FineTuning.read(place / "long" / "run.json").complete


def test_without_what_it_needs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to install."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    check_error(
        run("finetune", "llm", *QUICK, "--out", "refused"), "fine-tuning needs accelerate, which is not installed: "
    )


def test_an_out_of_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no bug of autorev's."""

    def none(*arguments: Any, **how: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.Trainer.training_step", none)
    check_error(run("finetune", "llm", *QUICK, "--out", "memory"), "step 1 found no memory. No checkpoint was written")
