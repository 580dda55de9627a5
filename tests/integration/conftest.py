"""What the tests of profiles share: a folder with a small model, and workers that run here."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autorev import pipeline
from autorev.analysis import Analysis
from autorev.profiler import schedule
from autorev.profiler.job import Job, Outcome
from autorev.profiler.passes.measure import measure
from autorev.workload import Workload
from tests.helpers.zoo import HEADS

NET = """
import os, signal, sys
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.linear(self.norm(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

def make():
    return Net(), (torch.randn(4, 16),)

def in_a_worker():
    return sys.argv[0].endswith("worker.py")

def killed():
    if in_a_worker():
        os.kill(os.getpid(), signal.SIGKILL)
    return make()

def leaves():
    if in_a_worker():
        print("first words")
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
    return make()

def fails():
    if in_a_worker():
        raise ValueError("only here")
    return make()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Path]:
    """The test runs in an empty folder with `profiled_net.py` and a tiny config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "profiled_net.py").write_text(NET)
    (tmp_path / "tiny.json").write_text(json.dumps({"model_type": "llama", **HEADS, "num_hidden_layers": 2}))
    with torch.random.fork_rng():
        yield tmp_path
    sys.modules.pop("profiled_net", None)


@pytest.fixture
def without_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """`analyze` and `forecast` find the blocks, and do not simulate a hundred steps to compare methods."""

    def analyze_workload(workload: Workload, **asked: Any) -> Analysis:
        setting = {name: value for name, value in asked.items() if name not in ("named", "progress")}
        return pipeline.prepare(workload, **setting)[0]

    monkeypatch.setattr(pipeline, "analyze_workload", analyze_workload)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would run in fresh processes runs here, and is written down."""
    asked: list[Job] = []

    def here(job: Job, scratch: Path) -> Outcome:
        asked.append(job)
        return measure(job)

    monkeypatch.setattr(schedule, "run_in_fresh_process", here)
    return asked


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """`accelerate` collects garbage in every training run: it need not look at all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
