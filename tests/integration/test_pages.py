"""What README and docs show is true: Python blocks run, commands parse, and outputs are what the commands print."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from datasets import Dataset
from torch import fx, nn

from autorev.cli import main
from tests.helpers.pages import ROOT, Command, Fence, commands, fences, run
from tests.helpers.tiny_llm import tiny_llm, tiny_model, tokenizer_of_bytes

OBSTACLES = ROOT / "docs" / "obstacles.md"
"""Its examples have a test of their own (tests/unit/test_docs.py)."""
NUMBER = re.compile(r"[-+]?\b\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?\b(?: (?:[KMGT]i)?B\b)?")
DETERMINED = ("analyze", "fit", "report")
"""Commands whose figures are the same on every machine."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's DataLoader, on every machine without a GPU, whenever a Trainer is left at its default
    pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true but no accelerator:UserWarning"),
    # torch's own, when the compiler is first imported
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
    # transformers 5.23 renames the option; its new name is unknown to 5.0, which autorev supports
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What blocks and commands write lies in an empty folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def stand_ins(folder: Path) -> dict[str, Any]:
    """What the blocks take as given: a tiny language model, its data, and a module that `torch.fx` traces."""
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    return {
        "folder": str(tiny_llm(folder / "a model of yours", blocks=4)),
        "model": tiny_model(),
        "tokenizer": tokenizer_of_bytes(),
        "batch": {"input_ids": ids, "labels": ids},
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "pairs": Dataset.from_list([{"prompt": "2 + 2 is", "chosen": " 4", "rejected": " 5"}] * 4),
        "gm": fx.symbolic_trace(Residual()),
        "x": torch.randn(2, 8),
    }


def python_blocks() -> list[Any]:
    found = [fence for fence in fences("python") if fence.page != OBSTACLES]
    return [pytest.param(f, id=str(f), marks=pytest.mark.slow if f.slow else ()) for f in found]


def shown_commands() -> list[Any]:
    return [pytest.param(command, id=str(command)) for command in commands()]


@pytest.mark.parametrize("fence", python_blocks())
def test_python_blocks_run(fence: Fence, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With stand-ins for what they take as given; what they print has the lines that the page shows, in order."""
    if fence.not_run:
        pytest.skip(f"{fence}: {fence.not_run}")
    exec(compile(fence.text, str(fence), "exec"), stand_ins(folder))
    printed = iter([without_numbers(line) for line in capsys.readouterr().out.splitlines()])
    for line in fence.printed.splitlines():
        assert without_numbers(line) in printed, line


@pytest.mark.parametrize("command", shown_commands())
def test_commands_are_understood(command: Command) -> None:
    """By click, with every option and value; of other programs, what is run exists."""
    match command.words:
        case ["autorev" | "python", *rest] if command.words[0] == "autorev" or rest[0] == "cli.py":
            name, *arguments = rest if command.words[0] == "autorev" else rest[1:]
            try:
                main.commands[name].make_context(name, arguments)
            except click.exceptions.Exit as ended:  # --help
                assert ended.exit_code == 0
        case ["torchrun", *rest]:
            name, *arguments = rest[rest.index("cli.py") + 1 :]
            main.commands[name].make_context(name, arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        case ["chromium", *_, page]:
            assert (ROOT / page).is_file()
        case ["pip", "install", *packages]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            asked = [name for package in packages for name in re.findall(r"\.\[(.*)\]", package)]
            assert {name for names in asked for name in names.split(",")} <= project["optional-dependencies"].keys()
        case _:
            pytest.fail(f"nothing here knows {command.words[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in shown_commands() if c.values[0].output])
def test_shown_output_is_what_the_command_prints(command: Command, folder: Path) -> None:
    """Word for word; figures, too, where they do not depend on the machine."""
    if command.fence.not_run:
        pytest.skip(f"{command.fence}: {command.fence.not_run}")
    printed, shown = run(command, folder), command.output
    if not set(command.words) & set(DETERMINED):
        printed, shown = without_numbers(printed), without_numbers(shown)
    assert printed == shown, "run python -m tests.helpers.pages"


def test_numbers_are_left_out() -> None:
    """With their units, and nothing else."""
    assert without_numbers("k=3: 1.92 MiB of 163 GiB, -0.0357, 1e-05, 2^-10") == "k=#: # of #, #, #, #^#"


def without_numbers(text: str) -> str:
    """Each number, with its unit of bytes, as `#`."""
    return NUMBER.sub("#", text)


def test_blocks_are_of_known_languages() -> None:
    """A block of no language is run by no test."""
    known = {"python", "console", "text"}
    assert [str(fence) for fence in fences() if fence.language not in known] == []
    assert len(python_blocks()) > 8 and len(shown_commands()) > 20
