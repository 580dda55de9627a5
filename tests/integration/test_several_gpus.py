"""What each of several GPUs is predicted to hold: against FSDP2 in two processes, published figures, and arithmetic.

python -m pytest tests/integration/test_several_gpus.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from click.testing import CliRunner

import autorev
from autorev.analysis import Analysis, Category, Prediction, Setting
from autorev.cli import main
from autorev.errors import SettingError
from autorev.methods import Method
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster
from autorev.prediction.sharding import REDUCE_BUCKET, Division
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.step import TrainingStep, optimizer_for
from autorev.workload import Workload

hf = pytest.importorskip("transformers")
from tests.integration.test_prediction import workload_of  # noqa: E402 - it needs transformers, too

RANKS = 2
BATCH, TOKENS = 8, 64
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 101,  # no multiple of two
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 501,
}
ADAM = 2
"""Tensors of AdamW's state."""


def workload(**changes: Any) -> Workload:
    """A small Llama."""
    return workload_of(hf.LlamaForCausalLM, hf.LlamaConfig(**CONFIG | changes))


def forecast(given: Workload | None = None, **setting: Any) -> tuple[Analysis, Forecaster]:
    """Of one step on a CPU in fp32."""
    usual: dict[str, Any] = {"batch": BATCH, "sequence": TOKENS, "dtype": "fp32", "device": "cpu"}
    return prepare(given or workload(), **usual | setting)


def predicted(forecaster: Forecaster, name: str = "plain") -> Prediction:
    """A method's step."""
    setting, method = forecaster.setting, Method.parse(name)
    return forecaster.prediction(method, forecaster.trace(method, setting.batch, setting.sequence))


def divided(forecaster: Forecaster) -> Division:
    """How the model is divided."""
    assert forecaster.division is not None
    return forecaster.division


# -- FSDP2


def work(rank: int, folder: str) -> None:
    """One of two processes: the bytes of what it holds after two steps, and the peak of the third."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "meet").as_uri(), rank=rank, world_size=RANKS)
    given = workload()
    model: Any = given.build(torch.float32).train()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step = TrainingStep(model, given.example(BATCH, TOKENS), optimizer_for(model, "adamw"))
    for _ in range(2):
        step.run()
    parts = [p.to_local() for p in model.parameters()]
    states = [s for p in model.parameters() for s in step.optimizer.state[p].values()]
    local = [s.to_local() if hasattr(s, "to_local") else s for s in states]
    measured = measure_memory(step)
    found = {
        "parameters": sum(t.numel() * t.element_size() for t in parts),
        "states": sum(t.numel() * t.element_size() for t in local),
        "peaks": measured.phase_peaks,
    }
    step.run(update=False)
    model(**step.call[1]).loss.backward()
    found["gradients"] = sum(p.grad.to_local().numel() * p.element_size() for p in model.parameters())
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_parts_are_those_of_fsdp2_to_the_byte(ranks: list[dict[str, Any]]) -> None:
    """Weights, gradients and states of the rank that holds most; the other one has what is left."""
    _, forecaster = forecast(gpus=RANKS, shard="fsdp")
    division, plain = divided(forecaster), predicted(forecaster)
    whole = sum(p.numel() * p.element_size() for p in forecaster.twin.parameters())
    first, second = ranks
    groups = (*division.blocks, division.rest)
    assert sum(group.part for group in groups) == first["parameters"] > second["parameters"]
    assert first["parameters"] + second["parameters"] == whole
    assert sum(group.gradient_part for group in groups) == first["gradients"]
    assert division.optimizer("adamw", "cpu")[0] == first["states"]
    assert plain.categories[Category.OPTIMIZER_STATE] == first["states"]


@pytest.mark.slow
def test_peaks_of_a_step_are_those_of_fsdp2(ranks: list[dict[str, Any]]) -> None:
    """What is gathered, and what is reduced meanwhile, included."""
    plain = predicted(forecast(gpus=RANKS, shard="fsdp")[1])
    print(plain.phase_peaks, ranks[0]["peaks"], predicted(forecast()[1]).phase_peaks)
    for phase in ("forward", "backward", "optimizer"):
        assert plain.phase_peaks[phase] == pytest.approx(ranks[0]["peaks"][phase], rel=0.02), phase
