"""The scripts in examples/ do what they say: train, rebuild without drift, and leave a plain model behind."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autorev
from tests.helpers.tiny_llm import LENGTH, tiny_llm

EXAMPLES = Path(__file__).parents[2] / "examples"
_TRL = ("accelerate", "trl", "datasets", "peft")
NEEDS = {"plain_loop": (), "trainer": ("accelerate",), "sft": _TRL, "dpo": _TRL, "grpo": _TRL}
"""By script, what it needs beyond the tests' own packages."""
LEARN_THE_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("plain_loop", {}), ("trainer", {}), ("sft", {"lora": False}), ("sft", {"lora": True})
]  # fmt: skip
COMPARE = [(name, lora) for name in ("dpo", "grpo") for lora in (False, True)]
"""Scripts that compare the model with what it was, with and without adapters."""
STEPS, RATE = 12, 1e-2
"""Steps and learning rate for a model of random weights."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's DataLoader, on every machine without a GPU, whenever a Trainer is left at its default
    pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true but no accelerator:UserWarning"),
    # transformers 5.23 renames the option; its new name is unknown to 5.0, which autorev supports
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def script(name: str, run_name: str = "example") -> dict[str, Any]:
    """Run the script; what it defines."""
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"examples/{name}.py needs it")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)


def loss_of(folder: Path) -> float:
    """On the text that the examples train on, by plain transformers, of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(f"Explain {name}.\n{content[:LENGTH]}" for name, content in topics.items())
    rows = torch.tensor(tokenizer(text, verbose=False).input_ids)[: 16 * LENGTH].view(16, LENGTH)
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def check_left_a_plain_model(said: str, end: Path) -> None:
    """The drift was 0, and what is saved is the class it was, with nothing of autorev about it."""
    assert re.findall(r"^drift: (.*)$", said, re.MULTILINE) == ["{'model.layers': 0.0}"]
    assert "model.layers: 4 blocks reversible, momentum" in said
    config = json.loads((end / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "autorev" not in json.dumps(config)
    assert not (end / "adapter_config.json").exists()


@pytest.mark.parametrize(("name", "how"), LEARN_THE_TEXT)
def test_an_example_trains_and_leaves_a_plain_model(
    name: str, how: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is lower."""
    start, end = tiny_llm(tmp_path / "start"), tmp_path / "end"
    script(name)["main"](str(start), steps=STEPS, learning_rate=RATE, out=str(end), **how)
    check_left_a_plain_model(capsys.readouterr().out, end)
    before, after = loss_of(start), loss_of(end)
    assert before > 5
    assert after < before - 0.05


@pytest.mark.parametrize(("name", "lora"), COMPARE)
def test_an_example_that_compares_begins_at_what_it_compares_with(
    name: str, lora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of 0: preferences have the loss ln 2, a reward the divergence 0, in each of two steps."""
    start, end = tiny_llm(tmp_path / "start"), tmp_path / "end"
    script(name)["main"](str(start), lora=lora, steps=2, learning_rate=0.0, out=str(end))
    said = capsys.readouterr().out
    check_left_a_plain_model(said, end)
    figure, expected = ("loss", math.log(2)) if name == "dpo" else ("kl", 0.0)
    found = [float(number) for number in re.findall(rf"'{figure}': '?([-+.e\d]+)", said)]
    assert found == pytest.approx([expected] * 2, abs=1e-4)


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_the_logs_carry_the_figures_of_the_chain(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each step, with its side bits and drift; memory in the second one."""
    script(name)["main"](str(tiny_llm(tmp_path / "start")), steps=3, out=str(tmp_path / "end"))
    steps = [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if "{'loss'" in line]
    assert len(steps) == 3
    assert all("'side_bits': '3'" in line and "'drift': '0'" in line for line in steps)
    assert ["peak_bytes" in line for line in steps] == [False, True, False]


@pytest.mark.parametrize("name", [name for name, how in LEARN_THE_TEXT if not how.get("lora")])
def test_an_example_is_told_its_model_on_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One argument; without it, how it is called."""
    start = tiny_llm(tmp_path / "start", blocks=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match=rf"python examples/{name}\.py MODEL"):
        script(name, "__main__")
    assert not (tmp_path / "trained").exists()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(start)])
    script(name, "__main__")
    assert loss_of(tmp_path / "trained") < loss_of(start)


def test_a_loop_of_accelerate_trains_a_converted_model(tmp_path: Path) -> None:
    """`prepare` and `accumulate` leave the chain what it is: drift 0, a lower loss, the plain model again."""
    accelerate = pytest.importorskip("accelerate", reason="the loop is accelerate's")
    folder = tiny_llm(tmp_path / "start")
    start = loss_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    autorev.convert(model)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=RATE))
    ids = torch.tensor(tokenizer("\n\n".join(topics.values()), verbose=False).input_ids)
    for step in range(2 * STEPS):
        row = ids[step * LENGTH : (step + 1) * LENGTH][None]
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=row, labels=row, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert autorev.drift(model) == {"model.layers": 0.0}
    autorev.revert(model)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "end")
    tokenizer.save_pretrained(tmp_path / "end")
    assert loss_of(tmp_path / "end") < start - 0.1
