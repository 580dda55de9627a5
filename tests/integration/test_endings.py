"""How a command ends: 0 means that the result was printed, whatever a model's code does and wherever stdout leads."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from autorev import pipeline, records
from autorev.cli import main
from autorev.errors import RecordError, Terminated
from autorev.packages import is_installed
from autorev.profiler import launch, schedule
from autorev.profiler.job import Job, Outcome
from autorev.profiler.record import Status

ROOT = Path(__file__).parents[2]
CODE = """
import os, sys, time
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)

class Net(nn.Module):
    def __init__(self, act=lambda: None):
        super().__init__()
        self.blocks, self.act = nn.ModuleList(Block() for _ in range(2)), act

    def forward(self, x):
        self.act()
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

class Stop(BaseException):
    pass

def make(act=lambda: None):
    return Net(act), (torch.randn(2, 8),)

def _raise(error):
    raise error

def factory_exits():
    sys.exit(0)

def factory_stops():
    raise Stop("enough")

def forward_exits():
    return make(lambda: sys.exit(0))

def forward_stops():
    return make(lambda: _raise(Stop("enough")))

def factory_leaves():
    os._exit(0)

def forward_leaves():
    return make(lambda: os._exit(0))

def forward_becomes_another():
    return make(lambda: os.execv("/bin/true", ["true"]))

def forward_becomes_one_on_the_path():
    return make(lambda: os.execlp("true", "true"))

def forward_becomes_one_elsewhere():
    return make(lambda: os.execvpe("/bin/true", ["true"], {}))

class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")

def factory_mute():
    raise Mute()

def forward_mute():
    return make(lambda: _raise(Mute()))

def forks():
    for end in (lambda: os._exit(0), lambda: os.execv("/bin/true", ["true"])):
        if os.fork() == 0:
            end()
        assert os.wait()[1] == 0
    return make()

def waits():
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "ends.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("ends", None)


def process(*arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    """A real process, with real streams."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.run(command, text=True, check=False, env=environment, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("command", [("analyze", "--no-html"), ("verify",), ("profile", "--predict", "--no-html")])
@pytest.mark.parametrize("name", ["factory_exits", "factory_stops", "forward_exits", "forward_stops"])
def test_code_that_ends_the_program_is_an_error(command: tuple[str, ...], name: str) -> None:
    """`sys.exit(0)`, and what is no `Exception`: one line with its place, and 1."""
    result = CliRunner().invoke(main, [*command, f"ends:{name}"])
    assert result.exit_code == 1, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert ("SystemExit" if name.endswith("exits") else "Stop") in last
    assert "ends.py:" in last
    assert "bug in autorev" not in last
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["factory_leaves", "forward_leaves"])
def test_a_process_that_code_ends_at_once_says_so(name: str) -> None:
    """`os._exit(0)` runs no handler of an exception; a forked process may end so."""
    done = process("analyze", f"ends:{name}", "--no-html", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "os._exit(0) in ends.py" in done.stderr
    assert os._exit.__module__ == "posix"


@pytest.mark.parametrize(
    ("name", "way"), [("another", "execv"), ("one_on_the_path", "execv"), ("one_elsewhere", "execve")]
)
@pytest.mark.parametrize("command", ["analyze", "verify"])
def test_a_process_that_becomes_another_program_says_so(command: str, name: str, way: str) -> None:
    """`os.execv` and its kin: /bin/true would end with 0."""
    done = process(command, f"ends:forward_becomes_{name}", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the process was ended by os.{way}() in ends.py, <lambda>, so there is no result" in done.stderr
    assert os.execv.__module__ == "posix"


def test_a_forked_process_may_end_so() -> None:
    """As those of `multiprocessing` do."""
    result = CliRunner().invoke(main, ["analyze", "ends:forks", "--no-html"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("status", "code"), [(Status.FAILED, 1), (Status.REFUSED, 1), (Status.OUT_OF_MEMORY, 0)])
def test_a_profile_without_a_figure_ends_with_1(status: Status, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is written and shown all the same; what does not fit is a finding."""
    monkeypatch.setattr(schedule, "run_in_fresh_process", lambda job, scratch: Outcome(status, "so it was"))
    result = CliRunner().invoke(main, ["profile", "ends:make", "--method", "plain", "--name", "mine", "--no-html"])
    assert result.exit_code == code, result.output
    assert "Record: profiles/recorded/mine.json" in result.stdout
    assert ("no method of make has a result: " in result.stderr) == bool(code)


def test_a_worker_that_ends_with_0_has_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent looks for what came of it, and not at its exit code."""
    monkeypatch.setattr(launch.sys, "executable", "/bin/true")
    outcome = launch.run_in_fresh_process(_any_job(monkeypatch), folder)
    assert outcome.status is Status.FAILED
    assert "exit code 0" in outcome.reason


def _any_job(monkeypatch: pytest.MonkeyPatch) -> Job:
    asked: list[Job] = []

    def note(job: Job, scratch: Path) -> Outcome:
        asked.append(job)
        return Outcome(Status.FAILED)

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "run_in_fresh_process", note)
        CliRunner().invoke(main, ["profile", "ends:make", "--method", "plain", "--rounds", "1", "--no-html"])
    return asked[0]


class Speechless(Exception):  # noqa: N818 - its name is told
    """An error that cannot even say what it is."""

    def __str__(self) -> str:
        raise ValueError("nothing to say")


def failing_with(error: BaseException) -> Callable[..., object]:
    def analyze_workload(*args: object, **kwargs: object) -> object:
        raise error

    return analyze_workload


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (MemoryError(), 1, "this machine has not the memory for it"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "this machine has not the memory for it"),
        (
            ModuleNotFoundError("No module named 'nothing_9'", name="nothing_9.part"),
            1,
            "this needs nothing_9, which is",
        ),
        (ImportError("tell: 'x>=1' is required", name="The 'x>=1' package"), 1, "failed on ImportError: tell: 'x>=1'"),
        (
            PackageNotFoundError(
                "The 'nothing_9>=0.8' distribution was not found and is required by this application."
            ),
            *(1, "this needs nothing_9>=0.8, which is not installed: "),
        ),
        (
            ImportError(
                "nothing_9>=2,<3 is required for a normal functioning of this module, but found nothing_9==1.0."
            ),
            *(1, "this needs nothing_9>=2,<3, and nothing_9==1.0 is installed: "),
        ),
        (ImportError("cannot import name 'x' from 'torch'", name="torch"), 1, "This is a bug in autorev"),
        (ZeroDivisionError("x"), 1, "This is a bug in autorev"),
        (Speechless(), 1, "autorev failed on Speechless. This is a bug in autorev"),
    ],
)
def test_what_an_exception_becomes(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is left over is called a bug."""
    monkeypatch.setattr(pipeline, "analyze_workload", failing_with(error))
    result = CliRunner().invoke(main, ["analyze", "ends:make"])
    assert result.exit_code == code
    assert words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["factory_mute", "forward_mute"])
def test_an_exception_that_cannot_be_printed(name: str) -> None:
    """Its type and its line are told all the same."""
    result = CliRunner().invoke(main, ["analyze", f"ends:{name}", "--no-html"])
    assert result.exit_code == 1
    assert "Mute" in result.stderr
    assert "ends.py:" in result.stderr
    assert "bug in autorev" not in result.stderr


def test_without_a_stdout_there_is_no_result() -> None:
    """`autorev analyze >&-`: said before the work is done."""
    shell = f"exec {sys.executable} {ROOT / 'cli.py'} analyze ends:waits >&-"
    done = subprocess.run(["sh", "-c", shell], text=True, check=False, stderr=subprocess.PIPE, timeout=50)
    assert done.returncode == 1
    assert done.stderr == "Error: there is no stdout to print the result to; leave it open, or send it to /dev/null\n"


def test_links_that_lead_to_each_other_are_no_place_for_a_report(folder: Path) -> None:
    """The system says so."""
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        records.replace_whole(folder / "loop", "text")
    with pytest.raises(RecordError, match="loop cannot be written: Too many levels of symbolic links"):
        records.write_whole(folder / "loop", "text")


def test_a_module_without_a_spec_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was put in place by hand; a finder that refuses to look is none of ours."""
    stub = ModuleType("nothing_9")
    assert stub.__spec__ is None
    monkeypatch.setitem(sys.modules, "nothing_9", stub)
    assert is_installed("nothing_9")

    class Refuses:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "nothing_8":
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    assert not is_installed("nothing_8")


@pytest.mark.parametrize("arguments", [("--json",), ("--no-html",)])
def test_a_full_disk_behind_stdout_is_an_error(arguments: tuple[str, ...]) -> None:
    """As JSON and as tables; Python adds nothing at its end."""
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = process("analyze", "ends:make", *arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "Error: the output could not be written: No space left on device\n"


def test_a_terminal_of_few_letters_gets_the_others_as_escapes(folder: Path) -> None:
    """LC_ALL=C: reports have letters that ASCII lacks."""
    plain = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = process("analyze", "ends:make", "--no-html", env=plain, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    done = process("analyze", "\u00e9\u03b3", env=plain, stdout=subprocess.PIPE)
    assert done.returncode == 1
    assert "bug in autorev" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_quiet() -> None:
    """`autorev analyze | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = process("analyze", "ends:make", "--no-html", stdout=writing)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("number", "typed", "said"),
    [
        (signal.SIGINT, "analyze", "Interrupted."),
        (signal.SIGTERM, "analyze", "Terminated: ended by SIGTERM, so there is no result."),
        (signal.SIGTERM, "verify", "Terminated: ended by SIGTERM, so there is no result."),
        (signal.SIGTERM, "profile", "Terminated: ended by SIGTERM; what was written until then stays, and a run whose "
         "record is there goes on by --resume."),
    ],
)  # fmt: skip
def test_what_ends_a_command_from_outside(number: int, typed: str, said: str) -> None:
    """In the model's own code, too: the exit code of a shell, and one line that promises nothing else."""
    command = [sys.executable, str(ROOT / "cli.py"), typed, "ends:waits"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stderr is not None
        while "waiting" not in running.stderr.readline():
            time.sleep(0.01)
        running.send_signal(number)
        assert running.stderr.read() == said + "\n"
    assert running.returncode == 128 + number


def _terminated(*args: object, **kwargs: object) -> None:
    raise Terminated


def test_every_command_promises_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume` is spoken of where there is one."""
    for name, command in main.commands.items():
        needed = {"export": ["x", "--out", "y"]}.get(name, ["x"])
        monkeypatch.setattr(command, "callback", _terminated)
        result = CliRunner().invoke(main, [name, *needed])
        assert result.exit_code == 143
        has = any(option.name == "resume" for option in command.params)
        assert ("--resume" in result.stderr) == has, result.stderr
        assert ("there is no result" in result.stderr) != has
