"""Optimisers: what they hold against the allocator, and what they make of weights against the same rule run plainly.

python -m pytest tests/integration/test_optimizers.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autorev.methods import Method
from autorev.optimizers import Optimizer
from autorev.pipeline import prepare
from autorev.prediction.training import DTYPES
from tests.integration.test_prediction import FAMILIES, highest, predict, workload_of

pytestmark = pytest.mark.usefixtures("one_thread")


def torch_adamw(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    """Of all weights."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **how)


def eight_bits(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    """bitsandbytes' own, with fp32 states for embeddings, as a Trainer has them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW(model.parameters(), lr=1e-3, optim_bits=8)
    for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


PLAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch_adamw, {"foreach": False}),
    "adamw:foreach=on": (torch_adamw, {"foreach": True}),
    "adamw-fused": (torch_adamw, {"fused": True}),
    "adamw-8bit": (eight_bits, {}),
}
"""Who makes the optimiser of that name in a program without autorev."""


def as_the_tutorial(model: nn.Module, spec: str) -> list[torch.optim.Optimizer]:
    """One optimiser for each parameter, which steps in a hook."""
    found = []
    for parameter in model.parameters():
        holder = nn.ParameterList([parameter])
        make, how = PLAIN[spec]
        optimizer = make(holder, **how)

        def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
        found.append(optimizer)
    return found


SPECS = ("adamw", "adamw:foreach=on", "adamw-fused", "adamw:step=backward", "adamw-fused:step=backward")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", [*SPECS, "adamw:foreach=on,step=backward", "adamw-8bit"])
@pytest.mark.parametrize("family", ["llama"])
def test_a_peak_agrees_with_the_allocator(family: str, spec: str, dtype: str) -> None:
    """Where the update is the highest, and where backward is; the program knows nothing of autorev."""
    model_cls, config_cls, sizes, _, _ = FAMILIES[family]
    workload = workload_of(model_cls, config_cls(**sizes | {"vocab_size": 2000}))
    for batch, sequence in ((1, 8), (4, 64)):
        _, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype=dtype, device="cpu", optimizer=spec)
        predicted = predict(forecaster, "plain")
        model = workload.build(DTYPES[dtype]).train()
        args, kwargs = workload.example(batch, sequence)
        name, _, options = spec.partition(":step=backward") if spec.endswith(":step=backward") else (spec, "", "")
        name = spec.replace(",step=backward", "").replace(":step=backward", "")
        if "step=backward" in spec:
            optimizers = as_the_tutorial(model, name)
        else:
            make, how = PLAIN[name]
            optimizers = [make(model, **how)]

        def step() -> None:
            model(*args, **kwargs).loss.backward()
            if "step=backward" not in spec:
                optimizers[0].step()

        step()
        model.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
        state = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state}
        inputs = [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
        others = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in [*model.parameters(), *model.buffers(), *inputs]
        }
        peak = sum({**held, **others}.values()) + highest(profile)
        print(
            spec,
            dtype,
            batch,
            predicted.phase,
            predicted.peak_bytes,
            peak,
            predicted.peak_bytes / peak - 1,
            forecaster.update().state,
            sum(held.values()),
            {k: v for k, v in predicted.categories.items() if v},
        )
