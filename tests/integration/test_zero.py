"""Converted models under DeepSpeed's ZeRO, in two processes on a CPU.

python -m pytest -m slow tests/integration/test_zero.py

`make test` installs DeepSpeed into a folder of its own: where it can be imported, transformers and accelerate use it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import autorev
from autorev.engine.mode import running
from tests.helpers import zoo
from tests.helpers.one_step import loss_of

DEEPSPEED = Path(sys.prefix) / "deepspeed"
RANKS, ROWS, STEPS, RATE = 2, 4, 2, 0.1
METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "float": {"method": "leapfrog", "arithmetic": "float"},
    "in steps": {"granularity": "sublayer"},
    "tiled": {"tile": 5},
}

pytestmark = [
    pytest.mark.slow,  # each way of training in both processes, and in one
    pytest.mark.skipif(not DEEPSPEED.is_dir(), reason=f"needs DeepSpeed in {DEEPSPEED}, where `make test` puts it"),
]


def batch(number: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 50, (ROWS, 12), generator=torch.Generator().manual_seed(number))
    return {"input_ids": tokens, "labels": tokens}


def converted(how: dict[str, Any]) -> Any:
    """The same weights in every process."""
    torch.manual_seed(0)
    model = zoo.build("llama").train()
    autorev.convert(model, batch(0), **how)
    return model


def trained_alone(how: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights after a few steps of the oracle, with all rows in one process."""
    model = converted(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for number in range(STEPS):
        optimizer.zero_grad()
        with running("oracle"):
            loss_of(model(**batch(number), use_cache=False)).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_by_zero(stage: int, how: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same by DeepSpeed, with half of the rows here."""
    import deepspeed

    model = converted(how)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // RANKS,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # Whatever its size, a parameter is divided.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rows = slice(dist.get_rank() * ROWS // RANKS, (dist.get_rank() + 1) * ROWS // RANKS)
    for number in range(STEPS):
        mine = {name: value[rows] for name, value in batch(number).items()}
        engine.backward(engine(**mine, use_cache=False).loss)
        engine.step()
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[name] = parameter.detach().clone()
    return found


def work(rank: int, folder: str) -> None:
    """One of the two processes: how far the weights are from those of one process, by stage and method."""
    sys.path.append(str(DEEPSPEED))
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401 - so that its module of collectives is there

    # It would compile an extension for shared memory, which takes minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined] # DeepSpeed's
    dist.init_process_group("gloo", init_method=(Path(folder) / "rendezvous").as_uri(), rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    expected = {name: trained_alone(how) for name, how in METHODS.items()}
    for stage in (2, 3):  # the third patches torch.nn.functional
        for name, how in METHODS.items():
            try:
                found = trained_by_zero(stage, how)
                gaps = [(found[key] - value).abs().max() for key, value in expected[name].items()]
                results[f"{stage}, {name}"] = float(torch.stack(gaps).max())
            except Exception:
                results[f"{stage}, {name}"] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of rank 0."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    found: dict[str, Any] = json.loads((folder / "0.json").read_text())
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_those_of_one_process(results: dict[str, Any], stage: int, method: str) -> None:
    """Optimiser states and gradients divided (2), and parameters, too (3): gathered for a block's second run as for
    its first."""
    found = results[f"{stage}, {method}"]
    assert isinstance(found, float), found
    assert found < 1e-6
