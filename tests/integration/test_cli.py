"""The command line: what it prints where, its exit codes, and one clear message for every bad input."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autorev import pipeline
from autorev.analysis import Analysis, ModelInfo
from autorev.cli import main, output
from autorev.errors import NoBlocksError
from autorev.files import why_not_written
from autorev.workload import Workload

ROOT = Path(__file__).parents[2]
NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, post_norm):
        super().__init__()
        self.norm, self.linear, self.post_norm = nn.LayerNorm(16), nn.Linear(16, 16), post_norm

    def forward(self, x):
        if self.post_norm:
            return self.norm(x + self.linear(x))
        return x + self.linear(self.norm(x))

class Net(nn.Module):
    def __init__(self, post_norm=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(post_norm) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.mean()

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x)

def make():
    print("the user's own output")
    return Net(), (torch.randn(4, 16),)

def post_norm():
    return Net(post_norm=True), (torch.randn(4, 16),)

def without_blocks():
    return Plain(), (torch.randn(4, 16),)

def wrong_inputs():
    return Net(), (torch.randn(4, 7),)

def raises():
    raise ValueError("no such checkpoint")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every command runs in an empty folder that holds `user_net.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_net.py").write_text(NET)
    yield tmp_path
    sys.modules.pop("user_net", None)


def autorev(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["analyze", *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the analysis by a record of what it was asked for."""
    received: dict[str, Any] = {}

    def analyze_workload(workload: Workload, **setting: Any) -> Analysis:
        received.update(setting, workload=workload)
        return Analysis(ModelInfo(workload.name, "Net", 816, workload.source), (), ())

    monkeypatch.setattr(pipeline, "analyze_workload", analyze_workload)
    return received


def failing_with(error: BaseException) -> Callable[..., Analysis]:
    def analyze_workload(*args: Any, **kwargs: Any) -> Analysis:
        raise error

    return analyze_workload


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """The help of a checkout's cli.py is there before torch, pandas or transformers could be."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['cli.py', *{arguments}]\n"
        "try:\n"
        "    runpy.run_path('cli.py', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    assert not exit.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'plotly', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "autorev" in done.stdout or "Usage" in done.stdout


@pytest.mark.parametrize("command", ["analyze", "verify", "profile", "finetune", "evaluate", "export", "report"])
def test_help_names_no_bound_that_is_none(command: str) -> None:
    """click would write `x<=None`."""
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "None" not in result.output


def test_every_option_is_explained() -> None:
    """The help names all options of the setting, their defaults, and an example."""
    text = autorev("--help").output
    for option in ("--batch", "--sequence", "--dtype", "--optimizer", "--trains", "--lora-rank", "--loss"):
        assert option in text
    assert "default: h100-80gb" in text
    assert "autorev analyze llama-3.1-8b --lora-rank 16" in text


def test_options_reach_the_analysis(asked: dict[str, Any]) -> None:
    """Every option of the setting arrives under its own name, `--seq` as `sequence`."""
    given = "--batch 2 --seq 8 --dtype fp32 --optimizer sgd --trains head --loss chunked --device t4 --no-html"
    assert autorev("user_net:make", *given.split()).exit_code == 0
    setting = {key: asked[key] for key in ("batch", "sequence", "dtype", "optimizer", "trains")}
    assert setting == {"batch": 2, "sequence": 8, "dtype": "fp32", "optimizer": "sgd", "trains": "head"}
    assert (asked["lora_rank"], asked["loss"], asked["device"]) == (None, "chunked", "t4")
    assert asked["workload"].source == "user_net:make"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ("full", None)),
        (["--trains", "head"], ("head", None)),
        (["--trains", "lora"], ("lora", 16)),
        (["--lora-rank", "4"], ("lora", 4)),
        (["--trains", "lora", "--lora-rank", "4"], ("lora", 4)),
    ],
)
def test_a_rank_means_lora(asked: dict[str, Any], given: list[str], expected: tuple[str, int | None]) -> None:
    """Either option of LoRA alone is enough."""
    assert autorev("user_net:make", "--no-html", *given).exit_code == 0
    assert (asked["trains"], asked["lora_rank"]) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--trains", "full", "--lora-rank", "4"], "--lora-rank has no meaning with --trains full"),
        (["--trains", "head", "--lora-rank", "4"], "--lora-rank has no meaning with --trains head"),
        (["--html", "a.html", "--no-html"], "contradict each other"),
        (["--batch", "0"], "0 is not in the range"),
        (["--sequence", "many"], "'many' is not a valid integer"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--colour"], "No such option"),
    ],
)
def test_wrong_usage_ends_with_2(given: list[str], words: str) -> None:
    """What click can see to be wrong is told before anything is loaded."""
    result = autorev("user_net:make", *given)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "neither a file nor a profile"),
        (["gpt2-lrge"], "did you mean gpt2-large"),
        (["broken.json"], "not valid JSON (line 1"),
        (["cut.gguf"], "is cut short"),
        (["user_net:raises"], "raised ValueError at user_net.py"),
        (["user_net:Net"], "is a class"),
        (["user_net:nothing"], "has no nothing; its functions are make"),
        (["user_net:wrong_inputs"], "user_net.py"),
        (["user_net:without_blocks"], "no residual block"),
        (["user_net:make", "--sequence", "8"], "sequence"),
        (["user_net:make", "--device", "h10"], "The device profiles are"),
    ],
)
def test_bad_input_ends_with_1_and_one_message(folder: Path, arguments: list[str], words: str) -> None:
    """Each of our errors is a single line on stderr, without a traceback, and stdout stays empty."""
    (folder / "broken.json").write_text('{"model_type": ')
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x10")
    result = autorev(*arguments)
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_mistyped_device_is_told_before_the_model_is_read(asked: dict[str, Any]) -> None:
    """Nobody waits for a model only to learn that the device is unknown."""
    assert autorev("user_net:make", "--device", "h10").exit_code == 1
    assert "user_net" not in sys.modules


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is answered with one word and the exit code that shells expect."""
    monkeypatch.setattr(pipeline, "analyze_workload", failing_with(KeyboardInterrupt()))
    result = autorev("user_net:make")
    assert result.exit_code == 130
    assert result.stderr.endswith("Interrupted.\n")


def test_a_bug_of_ours_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception is one line with its type, and the traceback is there for the asking."""
    monkeypatch.setattr(pipeline, "analyze_workload", failing_with(ZeroDivisionError("by\nzero")))
    monkeypatch.delenv("AUTOREV_TRACEBACK", raising=False)
    result = autorev("user_net:make")
    assert result.exit_code == 1
    assert "Error: autorev failed on ZeroDivisionError: by zero. This is a bug" in result.stderr
    assert "AUTOREV_TRACEBACK=1" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("AUTOREV_TRACEBACK", "1")
    assert "Traceback" in autorev("user_net:make").stderr


def test_our_errors_are_not_reported_as_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user can act on is said without asking for a report."""
    monkeypatch.setattr(pipeline, "analyze_workload", failing_with(NoBlocksError("nothing is added")))
    result = autorev("user_net:make")
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: nothing is added\n")


def test_json_is_one_object_and_nothing_else(folder: Path) -> None:
    """What the model's own code prints goes to stderr, and no report is written unasked."""
    result = autorev("user_net:make", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert {"model", "setting", "chains", "refused", "predictions", "frontier", "recommendation"} <= set(data)
    assert [block["path"] for chain in data["chains"] for block in chain["blocks"]] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    assert {block["verdict"] for block in data["chains"][0]["blocks"]} == {"eligible"}
    for prediction in data["predictions"]:
        assert sum(prediction["categories"].values()) == prediction["peak_bytes"]
    assert Analysis.from_json(result.stdout).model.name == "make"
    assert "the user's own output" in result.stderr
    assert not (folder / "reports").exists()


def test_nothing_eligible_is_an_answer() -> None:
    """A model of post-norm blocks is refused block by block, with reasons, and that is no failure."""
    result = autorev("user_net:post_norm", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["chains"] == []
    assert len(data["refused"]) == 3
    assert all(block["verdict"] == "refused" and block["reasons"] for block in data["refused"])


@pytest.mark.usefixtures("without_predictions")
def test_reports_are_written_where_they_are_said_to_be(folder: Path) -> None:
    """The HTML report goes to reports/ unless a path is given, and Markdown only where one is."""
    result = autorev("user_net:make")
    assert result.exit_code == 0, result.stderr
    default = folder / "reports" / "analyze-make.html"
    assert "Report: reports/analyze-make.html" in result.stdout
    assert "autorev analyze user_net:make" in default.read_text(encoding="utf-8")

    result = autorev("user_net:make", "--html", "new/one.html", "--markdown", "new/one.md")
    assert result.exit_code == 0, result.stderr
    assert "<html" in (folder / "new" / "one.html").read_text(encoding="utf-8")
    assert "blocks" in (folder / "new" / "one.md").read_text(encoding="utf-8")

    default.unlink()
    assert autorev("user_net:make", "--no-html").exit_code == 0
    assert not default.exists()


@pytest.mark.parametrize("option", ["--html", "--markdown"])
@pytest.mark.parametrize("place", ["taken/report.html", "/proc/report.html", "loop"])
def test_a_report_that_cannot_be_written_is_said(asked: dict[str, Any], folder: Path, option: str, place: str) -> None:
    """A path below a file is answered with the path and the reason, before the work."""
    (folder / "taken").write_text("")
    (folder / "loop").symlink_to("loop")
    result = autorev("user_net:make", option, place)
    assert result.exit_code == 1
    assert place in result.stderr
    assert "name another file" in result.stderr
    assert not asked


def test_no_place_for_the_report_of_its_own(asked: dict[str, Any], folder: Path) -> None:
    """Likewise; whoever wants no page needs none."""
    (folder / "reports").write_text("")
    result = autorev("user_net:make")
    assert (result.exit_code, asked) == (1, {})
    assert "'reports/analyze-MODEL.html'" in result.stderr
    assert autorev("user_net:make", "--no-html").exit_code == 0


def test_a_report_that_cannot_be_written_any_more(asked: dict[str, Any], folder: Path, monkeypatch: Any) -> None:
    """The disk may become full meanwhile."""
    (folder / "taken").write_text("")
    monkeypatch.setattr(output, "why_not_written", lambda path: "")
    result = autorev("user_net:make", "--html", "taken/report.html")
    assert (result.exit_code, bool(asked)) == (1, True)
    assert "taken/report.html" in result.stderr
    assert "name another file" in result.stderr


def test_whether_a_place_can_be_written_to(folder: Path) -> None:
    """Nothing is left behind: not the file, nor its folder."""
    before = sorted(folder.iterdir())
    for place in (folder / "new" / "deep" / "report.html", folder / "user_net.py", Path("/dev/null"), folder):
        assert why_not_written(place) == ""
    (folder / "link").symlink_to("/proc/absent")
    assert why_not_written(folder / "link")
    (folder / "link").unlink()
    assert sorted(folder.iterdir()) == before


def test_the_installed_command_runs_as_a_program(folder: Path) -> None:
    """`python cli.py` in a shell: JSON on stdout, no progress bar where nobody watches, exit code 0."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "analyze", "user_net:make", "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["name"] == "make"
    assert done.stderr == "the user's own output\n" * done.stderr.count("\n")


def test_an_analysis_is_rendered_again(folder: Path) -> None:
    """What `--json` wrote is a record: the same tables on the screen, and the same page, without the model."""

    def report(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["report", *arguments])

    arguments = ("user_net:make", "--batch", "4")
    (folder / "a.json").write_text(autorev(*arguments, "--json", "--html", "first.html").stdout)
    shown = report("a.json", "--html", "again.html", "--markdown", "again.md")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith(autorev(*arguments, "--no-html").stdout.rstrip())
    assert "| method |" in (folder / "again.md").read_text()
    table = re.compile(r"<tbody>.*?</tbody>", re.DOTALL)
    first, again = (table.findall((folder / name).read_text()) for name in ("first.html", "again.html"))
    assert first == again != []
    assert report("a.json", "--csv", "a.csv").exit_code == 2
    (folder / "b.json").write_text((folder / "a.json").read_text())
    assert report("a.json", "b.json", "--html", "both.html").exit_code == 2
