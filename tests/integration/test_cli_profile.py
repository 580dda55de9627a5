"""`autorev profile` and `autorev report`: what they print where, and one clear line for every wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autorev.cli import main, output
from autorev.profiler.job import Job
from autorev.profiler.record import Profile, Status
from tests.helpers import profile_examples as examples

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("folder")
QUICK = ("--rounds", "1", "--timed-steps", "1", "--method", "plain")


def autorev(*arguments: Any) -> Result:
    """The command, as a shell would run it."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, words: str, code: int = 1) -> None:
    """The last line of stderr says what is wrong; no traceback, nothing on stdout."""
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert "This is a bug in autorev" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert result.stdout == ""


# -- profile


def test_json_is_one_object_and_nothing_else(folder: Path, jobs: list[Job]) -> None:
    """The record as JSON on stdout, which reads back; no report is written unasked; the record lies in its folder."""
    result = autorev("profile", "profiled_net:make", *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    record = Profile.from_json(result.stdout)
    assert Profile.read(folder / "profiles" / "recorded" / f"{record.name}.json") == record
    assert record.complete
    assert record.command.startswith("autorev profile profiled_net:make --rounds 1")
    assert not (folder / "reports").exists()


def test_json_in_a_shell_is_alone_on_stdout(folder: Path) -> None:
    """With real worker processes and a model that prints, stdout is JSON and stderr holds no traceback."""
    net = (folder / "profiled_net.py").read_text()
    (folder / "profiled_net.py").write_text(net.replace("def make():", "def make():\n    print('the model speaks')"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "profile", "profiled_net:make", *QUICK, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Profile.from_json(done.stdout).results[0].status is Status.MEASURED
    assert set(done.stderr.splitlines()) == {"the model speaks"}


def test_it_says_where_everything_is(folder: Path, jobs: list[Job]) -> None:
    """Terminal output, the page in reports/ and the record, each named; --no-html writes no page."""
    result = autorev("profile", "profiled_net:make", *QUICK, "--name", "mine", "--out", "kept")
    assert result.exit_code == 0, result.stderr
    assert "Report: reports/profile-mine.html" in result.stdout
    assert "Record: kept/mine.json" in result.stdout
    assert "<html" in (folder / "reports" / "profile-mine.html").read_text(encoding="utf-8")
    assert "plain" in result.stdout
    (folder / "reports" / "profile-mine.html").unlink()
    assert autorev("profile", "profiled_net:make", *QUICK, "--no-html", "--name", "mine").exit_code == 0
    assert not (folder / "reports" / "profile-mine.html").exists()


def test_every_option_arrives(folder: Path, jobs: list[Job]) -> None:
    """Methods, sizes, optimiser, LoRA, depth, sweeps, budget and goal are what the record says."""
    result = autorev(
        *("profile", "tiny.json", "--method", "plain", "--method", "momentum:k=2", "--batch", 2, "--seq", 16),
        *(
            "--optimizer",
            "sgd",
            "--lora-rank",
            4,
            "--depth",
            3,
            "--rounds",
            2,
            "--timed-steps",
            1,
            "--sweep",
            "batch=1,2",
        ),
        *("--memory", "+1MiB", "--goal", "throughput", "--dtype", "fp32", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    record = Profile.from_json(result.stdout)
    assert [r.method.spec for r in record.results] == ["plain", "momentum:k=2"]
    setting = record.setting
    assert (setting.batch, setting.sequence, setting.dtype, setting.optimizer) == (2, 16, "fp32", "sgd")
    assert (setting.trains, setting.lora_rank) == ("lora", 4)
    assert (record.blocks, record.goal, record.memory_limit) == (3, "throughput", "+1MiB")
    assert [(p.method, p.value) for p in record.points] == [
        (spec, value) for spec in ("plain", "momentum:k=2") for value in (1, 2)
    ]
    assert all(len(r.rounds) == 2 for r in record.results)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "neither a file nor a profile"),
        (["profiled_net:nothing"], "has no nothing; its functions are"),
        (["profiled_net:make", "--method", "reversible"], "there is no method 'reversible'; choose of plain"),
        (["profiled_net:make", "--method", "momentum:k=9"], "k of the method momentum is 1 to 7, not 9"),
        (["profiled_net:make", "--sweep", "width"], "a sweep goes along batch, sequence, depth, not 'width'"),
        (["profiled_net:make", "--sweep", "batch=1,x"], "are whole numbers, as in batch=1,2,4"),
        (["profiled_net:make", "--sweep", "batch=0"], "are 1 or more"),
        (["tiny.json", "--sweep", "depth"], "needs its depths, as in depth=8,16,32"),
        (["profiled_net:make", "--sweep", "sequence"], "has no sequence axis"),
        (["profiled_net:make", "--memory", "much"], "'much' is no amount of memory; write 2GiB"),
        (["profiled_net:make", "--memory", "0"], "'0' is no amount of memory"),
        (["profiled_net:make", "--memory", "-1GiB"], "'-1GiB' is no amount of memory"),
        (["profiled_net:make", "--device", "h10"], "The device profiles are"),
        (["profiled_net:make", "--depth", "3"], "leave --depth out"),
        (["profiled_net:make", "--resume"], "there is no record"),
        (["tiny.json", "--sequence", "4096"], "takes at most 128 tokens"),
        (["tiny.json", "--text", "missing.txt"], "the text missing.txt cannot be read: No such file"),
        (["tiny.json", "--text", "empty.txt"], "the text empty.txt is empty; give a file with some text in it"),
        (["tiny.json", "--text", "binary.txt"], "the text binary.txt cannot be read: it is not UTF-8 text"),
        (["tiny.json", "--text", "."], "the text . cannot be read: Is a directory"),
        (["tiny.json", "--text", "words.txt"], "has no tokenizer that could read words.txt; leave --text out"),
        (["profiled_net:make", "--text", "words.txt"], "reads no text"),
        (["profiled_net:make", "--out", "taken/below"], "taken/below"),
    ],
)
def test_a_wrong_profile_ends_with_1(folder: Path, jobs: list[Job], arguments: list[str], words: str) -> None:
    """One line that says what was wrong and what would do, before anything is measured."""
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)))
    (folder / "words.txt").write_text("some words")
    (folder / "taken").write_text("")
    assert_one_line(autorev("profile", *arguments), words)
    assert not jobs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html", "a.html", "--no-html"], "contradict each other"),
        (["--trains", "full", "--lora-rank", "4"], "--lora-rank has no meaning with --trains full"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--goal", "speed"], "'speed' is not one of"),
        (["--longest-step", "0"], "0.0 is not in the range"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], words: str) -> None:
    """What click can see is told before anything is loaded."""
    assert_one_line(autorev("profile", "profiled_net:make", *arguments), words, 2)


def test_a_page_that_cannot_be_written_is_said(folder: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the work; the record is kept all the same, where it is noticed only then."""
    (folder / "taken").write_text("")
    typed = ("profile", "profiled_net:make", *QUICK, "--html", "taken/page.html", "--json", "--name", "mine")
    result = autorev(*typed)
    assert result.exit_code == 1
    assert "name another file" in result.stderr
    assert not jobs and not (folder / "profiles").exists()
    monkeypatch.setattr(output, "why_not_written", lambda path: "")
    result = autorev(*typed)
    assert result.exit_code == 1
    assert "taken/page.html" in result.stderr
    assert "name another file" in result.stderr
    assert Profile.read(folder / "profiles" / "recorded" / "mine.json").complete


# -- report


@pytest.fixture
def records(folder: Path) -> Path:
    """Two records in a folder, and several files that are none."""
    for profile in (examples.unequal(), examples.smollm2()):
        profile.write_into(folder / "records")
    text = examples.unequal().to_json()
    (folder / "half.json").write_text(text[: len(text) // 2])
    (folder / "edited.json").write_text(text.replace('"blocks": 12', '"blocks": 13'))
    (folder / "binary.json").write_bytes(bytes(range(128, 256)))
    (folder / "other.json").write_text("{}")
    (folder / "taken").write_text("")
    (folder / "nothing").mkdir()
    return folder / "records"


def test_records_become_one_json(records: Path) -> None:
    """One record is one object, several are a list, in the order given; both read back."""
    files = sorted(records.glob("*.json"))
    one = autorev("report", files[0], "--json")
    assert one.exit_code == 0, one.stderr
    assert Profile.from_json(one.stdout) == Profile.read(files[0])
    both = autorev("report", *reversed(files), files[1], "--json")
    assert [Profile.from_json(json.dumps(data)) for data in json.loads(both.stdout)] == [
        Profile.read(file) for file in reversed(files)
    ]
    assert autorev("report", records, "--json").exit_code == 0


def test_every_output_is_written_and_named(records: Path, folder: Path) -> None:
    """Terminal, page, Markdown, CSV and trace at once; folders are made; with --json nothing is said."""
    file = records / f"{examples.smollm2().name}.json"
    outputs = {"--html": "out/a.html", "--markdown": "out/a.md", "--csv": "out/a.csv", "--trace": "out/a.trace.json"}
    arguments = [part for pair in outputs.items() for part in pair]
    result = autorev("report", file, *arguments)
    assert result.exit_code == 0, result.stderr
    for path in outputs.values():
        assert (folder / path).stat().st_size > 0
        assert path in result.stdout
    silent = autorev("report", file, *arguments, "--json")
    assert Profile.from_json(silent.stdout) == Profile.read(file)


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["missing.json"], "missing.json cannot be read: No such file", 1),
        (["half.json"], "half.json is not valid JSON (line ", 1),
        (["edited.json"], "edited.json was changed after it was written (its digest does not match)", 1),
        (["binary.json"], "binary.json cannot be read: it is not text", 1),
        (["other.json"], "other.json is no record of a profile", 1),
        (["tiny.json"], "tiny.json is no record of a profile", 1),
        (["nothing"], "nothing holds no record; `autorev profile` and `autorev finetune` write them", 2),
        (["records", "--trace", "t.json"], "--trace is of one record; name one", 2),
        ([], "Missing argument 'RECORD...'", 2),
    ],
)
def test_a_wrong_record_is_one_line(records: Path, arguments: list[str], words: str, code: int) -> None:
    """Truncated, edited, binary, missing, or something else: named, with what to do."""
    assert_one_line(autorev("report", *arguments), words, code)


@pytest.mark.parametrize("option", ["--html", "--markdown", "--csv", "--trace", "--parquet"])
def test_an_output_that_cannot_be_written_is_one_line(records: Path, option: str) -> None:
    """A path below a file: the path, the reason, and no traceback."""
    if option == "--parquet":
        pytest.importorskip("pyarrow")
    result = autorev("report", records / f"{examples.smollm2().name}.json", option, "taken/out")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "This is a bug" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "taken/out" in last


def test_an_interrupted_record_is_shown(folder: Path) -> None:
    """What is there is rendered, and that it is not all is said."""
    record = replace(examples.interrupted(), name="r")
    result = autorev("report", record.write_into(folder), "--html", "r.html")
    assert result.exit_code == 0, result.stderr
    for text in (result.stdout, (folder / "r.html").read_text()):
        assert "--resume" in text


def test_a_folder_without_a_record_is_not_blamed_on_its_other_files(folder: Path) -> None:
    """The longest text of a tokenizer is larger than any size, and its file is still no record that was damaged."""
    (folder / "saved").mkdir()
    (folder / "saved" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    assert_one_line(autorev("report", folder / "saved"), "holds no record", code=2)
