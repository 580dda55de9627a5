"""What `finetune`, `export`, `evaluate` and `report` say of one run is said of the same tokens, steps and options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autorev.cli import main
from autorev.errors import TrainingError
from autorev.finetuning.progress import Told
from autorev.finetuning.record import FineTuning
from tests.helpers.profile_examples import lora as profiled
from tests.helpers.tiny_run import At, figures, interrupt, tune, workplace

pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")


@pytest.fixture(scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workplace(tmp_path_factory.mktemp("agrees"))
    (folder / "other.txt").write_text("".join(f"Nothing of the {n}th kind was read before. " for n in range(400)))
    tune(folder, out="runs/full", validation_rows=3)
    tune(folder, out="runs/lora", lora_rank=4, pack=False)
    return folder


@pytest.fixture
def place(_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs beside a model, a text and two runs."""
    monkeypatch.chdir(_place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return _place


def run(*arguments: str, code: int = 0) -> Result:
    """A command, in this process."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    return done


def evaluated(*arguments: str) -> dict[str, Any]:
    """What `evaluate` finds."""
    found: dict[str, Any] = json.loads(run("evaluate", *arguments, "--json").stdout)
    return found


# -- the same tokens


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_and_its_export_read_the_same_tokens(place: Path, name: str, tmp_path: Path) -> None:
    """Those that the run held out; of another text as many rows, as long: so that their losses can be compared."""
    out = tmp_path / "plain"
    told = run("export", f"runs/{name}", "--out", str(out)).stdout
    assert "validation.json holds those that the run held out" in told
    record = FineTuning.read(place / "runs" / name / "run.json")
    for text in ((), ("--text", "other.txt")):
        ours, theirs = evaluated(f"runs/{name}", *text), evaluated(str(out), *text)
        assert (ours["tokens"], ours["text"]) == (theirs["tokens"], theirs["text"])
        assert ours["evaluation"]["tokens"] == theirs["evaluation"]["tokens"]
        assert record.vanilla is not None
        if not text:
            assert ours["tokens"] == record.corpus.validation_tokens
            assert theirs["evaluation"]["losses"] == pytest.approx(record.vanilla.losses, abs=1e-5)
    assert ours["text"] != evaluated(f"runs/{name}")["text"]
    assert f"(digest {ours['text']})" in run("evaluate", f"runs/{name}", "--text", "other.txt").stdout


# -- the same options


def test_a_run_is_resumed_by_its_folder_alone(place: Path) -> None:
    """The options are the run's, not the defaults; one that differs is named; the learning rate may."""
    options = {"lora_rank": 4, "accumulate": 2, "seed": 5}
    with pytest.raises(TrainingError, match="interrupted"):
        tune(place, out="runs/stopped", callbacks=(At(2, interrupt, "on_step_begin"),), **options)
    shutil.copytree("runs/stopped", "runs/faster")
    told = run("finetune", "--resume", "--out", "runs/stopped", "--seq", "48", "--batch", "2", "--seed", "0", code=1)
    assert "was begun with --batch 1, not 2, --seed 5, not 0; leave out what differs" in " ".join(told.stderr.split())
    run("finetune", "--resume", "--out", "runs/stopped")
    found = FineTuning.read("runs/stopped/run.json")
    assert figures(found) == figures(tune(place, out="whole", **options))
    run("finetune", "--resume", "--out", "runs/faster", "--lr", "0.02")
    assert FineTuning.read("runs/faster/run.json").recipe.learning_rate == 0.02


# -- the same records


def test_report_takes_a_run_s_folder(place: Path) -> None:
    """Though it holds other JSON files; and a folder of runs as a comparison; and a record."""
    one = json.loads(run("report", "runs/full", "--json").stdout)
    assert one == json.loads((place / "runs" / "full" / "run.json").read_text())
    assert one == json.loads(run("report", "runs/full/run.json", "--json").stdout)
    several = json.loads(run("report", "runs/full", "runs/lora", "--json").stdout)
    assert [each["name"] for each in several] == ["full", "lora"]
    assert {each["name"] for each in json.loads(run("report", "runs", "--json").stdout)} >= {"full", "lora"}
    assert "Verdict" in run("report", "runs/full").stdout


def test_report_takes_profiles(tmp_path: Path) -> None:
    """One, and a folder of them beside what is no record, which is said."""
    for name in ("one", "two"):
        replace(profiled(), name=name).write_into(tmp_path)
    (tmp_path / "package.json").write_text('{"name": "else"}')
    assert "results" in json.loads(run("report", str(tmp_path / "one.json"), "--json").stdout)
    done = run("report", str(tmp_path), "--json")
    assert len(json.loads(done.stdout)) == 2
    assert "as they are no records: package.json" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no record"),
        ({"config.json": "{}", "tokenizer.json": "[]"}, "holds no record"),
        ({"cut.json": '{"results": ['}, "cut.json is not valid JSON"),
        ({"run.json": "{}"}, "run.json is no record"),
    ],
)
def test_report_of_a_folder_without_records(tmp_path: Path, content: dict[str, str], said: str) -> None:
    """Says what is missing, or damaged."""
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    assert said in " ".join(done.stderr.split()) and "bug in autorev" not in done.stderr


# -- the same step


def test_the_validation_is_of_the_step_that_it_stands_beside() -> None:
    """The Trainer logs a step's loss before it evaluates: later steps say which one the validation is of."""
    said: list[str] = []
    told = Told(lambda what, fraction: said.append(what), lambda: None)

    def log(step: int, **logs: float) -> None:
        told.on_log(None, SimpleNamespace(global_step=step, max_steps=4), None, logs=logs)

    log(1, loss=3.0)
    log(2, loss=2.5)
    log(2, eval_loss=2.75)
    log(3, loss=2.0)
    assert said == [
        "step 1 of 4: loss 3.000",
        "step 2 of 4: loss 2.500",
        "step 2 of 4: validation 2.750",
        "step 3 of 4: loss 2.000, validation 2.750 after step 2",
    ]


def test_pytorch_s_profiler_says_nothing() -> None:
    """It looks at the memory of a step, in whosever program the callback is."""
    program = (
        "import torch\nfrom autorev.profiler.passes.watch import PeakWatch\nwatch = PeakWatch(torch.device('cpu'))\n"
        "watch.begin([])\nkept = torch.ones(1000)\nprint(watch.end())"
    )
    environment = {name: value for name, value in os.environ.items() if "LOG_LEVEL" not in name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) >= 4000 and done.stderr == ""
