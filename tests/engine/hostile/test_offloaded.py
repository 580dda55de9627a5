"""`device_map` with accelerate's hooks: weights that are fetched for each call are fetched for the second run, too.

python -m pytest tests/engine/hostile/test_offloaded.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import autorev
from tests.engine.hostile.by_hand import assert_close, results_of

DEPTH, WIDTH = 4, 8
X = torch.linspace(-1, 1, 6 * WIDTH).reshape(6, WIDTH)
CPU = torch.device("cpu")


class Block(nn.Module):
    """A frozen base and a trained adapter, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.full((WIDTH,), 0.5))
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.base(x) + self.up(self.down(x)))


class Model(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make() -> Any:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def adapted(model: Any) -> Any:
    """With adapters that are trained, and in memory whatever happened to the rest."""
    torch.manual_seed(1)
    for block in model.blocks:
        for name in ("down", "up"):
            fresh = nn.Linear(*getattr(block, name).weight.shape[::-1], bias=False)
            setattr(block, name, fresh)
    return model


PLACED = {"stem": "cpu", "head": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk", "blocks.3": "cpu"}
PLACES: dict[str, Callable[[Any, Path], Any]] = {
    "one device": lambda model, folder: dispatch_model(model, {"": "cpu"}),
    "hooks": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "in memory": lambda model, folder: cpu_offload(model, CPU),
    "on disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "some on disk": lambda model, folder: dispatch_model(model, PLACED, main_device="cpu", offload_dir=str(folder)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", [{}, {"granularity": "sublayer"}, {"method": "leapfrog"}], ids=str)
def test_a_model_that_was_dispatched_is_converted(place: str, how: dict[str, Any], tmp_path: Path) -> None:
    """The grid is that of the real weights; losses and gradients are those of a model in memory."""
    reference = adapted(make())
    expected_grids = autorev.convert(reference, batch=(X,), **how).chains[0].fraction_bits
    expected = results_of(reference, lambda: reference(X))
    model = adapted(PLACES[place](make(), tmp_path))
    conversion = autorev.convert(model, batch=(X,), **how)
    assert conversion.chains[0].fraction_bits == expected_grids
    assert conversion.notes == ()
    assert_close(results_of(model, lambda: model(X)), expected, 1e-6)
    assert autorev.drift(model) == {"blocks": 0.0}
    assert autorev.verify(model, (X,)).passed
    if place in ("in memory", "on disk"):
        assert model.blocks[0].base.weight.is_meta, "the weights stayed where they were fetched to"
    plain = adapted(make())
    autorev.revert(model)
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_is_dispatched_after_its_conversion(place: str, tmp_path: Path) -> None:
    """accelerate's hooks are around the converted forward then."""
    reference, model = adapted(make()), make()
    autorev.convert(reference, batch=(X,))
    expected = results_of(reference, lambda: reference(X))
    autorev.convert(model, batch=(X,))
    model = adapted(PLACES[place](model, tmp_path))
    assert_close(results_of(model, lambda: model(X)), expected, 1e-5)
    assert autorev.drift(model) == {"blocks": 0.0}


def test_trained_weights_that_are_fetched_are_noted() -> None:
    """accelerate drops their gradients, converted or not: nothing would say so."""
    model = cpu_offload(make().requires_grad_(), CPU)
    (note,) = autorev.convert(model, batch=(X,)).notes
    assert "accelerate fetches 24 trained parameters for each call (blocks.0.base.bias, ...)" in note
