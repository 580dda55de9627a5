"""A fine-tuning of the tiny language model, which takes a second, and ways to disturb one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

import autorev.finetuning.session  # noqa: F401 - whoever is forked from here has it imported
from autorev.finetuning.evaluate import evaluate, logits_of
from autorev.finetuning.packing import Collator, Rows
from autorev.finetuning.record import FineTuning
from autorev.finetuning.run import finetune
from tests.helpers.tiny_llm import tiny_llm

TEXT = "\n".join(f"line {n} of a text that repeats itself: {n * n}." for n in range(120))
USUAL: dict[str, Any] = {
    "sequence": 48,
    "steps": 7,
    "learning_rate": 1e-2,
    "validation_rows": 4,
    "save_every": 2,
    "evaluate_every": 2,
}
GPT2 = {"family": "gpt2", "dropout": 0.1}


def workplace(folder: Path) -> Path:
    """Put a model and a text there."""
    folder.mkdir(exist_ok=True)
    tiny_llm(folder / "llm")
    (folder / "text.txt").write_text(TEXT)
    return folder


def tune(folder: Path, out: str = "run", model: str = "llm", text: str = "text.txt", **how: Any) -> FineTuning:
    """Fine-tune `folder/model` on `folder/text` into `folder/out`."""
    return finetune(str(folder / model), out=folder / out, text=folder / text, **{**USUAL, **how})


def figures(record: FineTuning) -> list[tuple[Any, ...]]:
    """Everything that was logged and is no measurement of this machine."""
    return [
        (r.step, r.loss, r.learning_rate, r.gradient_norm, r.tokens, r.drift, r.gamma, r.side_bits, r.divergence)
        for r in record.logged
    ]


def loss_of(model: nn.Module, run: Path) -> float:
    """Of a model, on what the run held out."""
    rows = Rows.from_json((run / "validation.json").read_text())
    return evaluate(logits_of(model), rows, Collator(rows.packed, rows.length, 0), 0).loss


class At(TrainerCallback):
    """Does something to the model at the end (or at the beginning, `on_step_begin`) of a step."""

    def __init__(self, step: int, act: Callable[[Any], Any], event: str = "on_step_end") -> None:
        self.step, self.act = step, act
        setattr(self, event, self._on)

    def _on(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(model)


def interrupt(model: Any) -> None:
    """As Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def kill(model: Any) -> None:
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _die(folder: Path, at: int, in_checkpoint: bool, how: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if in_checkpoint:
        save = torch.save

        def dying(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if f"checkpoint-{at}" in str(path):
                Path(path).write_bytes(b"half")
                kill(None)
            save(what, path, *args, **kwargs)

        torch.save = dying
    tune(folder, callbacks=() if in_checkpoint else (At(at, kill),), **how)


def _die_in_a_write(folder: Path, name: str, last: bool, how: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    seen, most = [0], [1]
    out = str(folder / how["out"])

    def noticed(event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.mkdir"):
            return
        path = str(args[1] if event == "os.rename" else args[0])
        if path.startswith(out) and Path(path).name.strip(".").startswith(name):
            seen[0] += event != "open" or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            if seen[0] == most[0]:
                kill(None)

    if last:  # a run that is left alone counts them
        most[0] = 10**9
        sys.addaudithook(noticed)
        tune(folder, **{**how, "out": f"{how['out']} counted"})
        most[0], seen[0] = seen[0], 0
    else:
        sys.addaudithook(noticed)
    tune(folder, **how)


def run_and_die(folder: Path, name: str, last: bool, **how: Any) -> int | None:
    """Run `tune` in a process that is killed where it first (last) writes a file of that name; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.tiny_run"])
    process = context.Process(target=_die_in_a_write, args=(folder, name, last, how))
    process.start()
    process.join()
    return process.exitcode


def run_and_kill(folder: Path, at: int, in_checkpoint: bool = False, **how: Any) -> int | None:
    """Run `tune` in a process that is killed after step `at`, or while it writes that checkpoint; its exit code."""
    context = multiprocessing.get_context("forkserver")  # imports once, for all
    context.set_forkserver_preload(["tests.helpers.tiny_run"])
    process = context.Process(target=_die, args=(folder, at, in_checkpoint, how))
    process.start()
    process.join()
    return process.exitcode
