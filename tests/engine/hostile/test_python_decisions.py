"""Python decides anew at every call: nothing that it decided in an earlier one stands for it.

python -m pytest tests/engine/hostile/test_python_decisions.py
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autorev
from autorev.errors import AutorevError, ConversionError
from tests.engine.hostile.by_hand import LEAPFROG, Leapfrog, assert_close, results_of

SCALE = 1.0


class Loop(nn.Module):
    """A loop of its own, without block modules; what it decides is up to its subclass."""

    keep = 1.0

    def __init__(self, d: int = 12, n: int = 4) -> None:
        super().__init__()
        self.inward = nn.Linear(d, d)
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(n))
        self.calls = 0
        self.state: Leapfrog | None = None
        """Set: the same code computes the coupling by itself."""

    def add(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """Only the oracle's way."""
        assert self.state is not None
        return self.state.step(x, x + branch)

    def factor(self, number: int) -> float:
        """Decided anew for each turn."""
        return 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.inward(x) * self.keep
        for number, layer in enumerate(self.layers):
            factor = self.factor(number)
            if self.state is not None:
                x = self.add(x, torch.tanh(layer(x)) * factor)
            else:
                x = x + torch.tanh(layer(x)) * factor
        return x * 1.5


class ByPython(Loop):
    """`random.random()`."""

    def factor(self, number: int) -> float:
        return 1.0 if random.random() < 0.5 else 0.25


class ByNumpy(Loop):
    """numpy's generator."""

    def factor(self, number: int) -> float:
        return float(np.random.rand())  # noqa: NPY002 - the stream that users draw from


class ByTorch(Loop):
    """A number drawn by torch and taken out of the tensor."""

    def factor(self, number: int) -> float:
        return float(torch.rand(()))


class ByCounter(Loop):
    """Its own count of calls."""

    def factor(self, number: int) -> float:
        return 1.0 / (1 + (self.calls + number) % 3)


class ByGlobal(Loop):
    """A global of its module."""

    def factor(self, number: int) -> float:
        return SCALE


class ByAttribute(Loop):
    """An attribute that the user changes between steps."""

    strength = 1.0

    def factor(self, number: int) -> float:
        return self.strength


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the stream that users draw from
    torch.manual_seed(seed)


@pytest.mark.parametrize("make", [ByPython, ByNumpy, ByTorch, ByCounter, ByGlobal, ByAttribute])
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_loop_decides_anew_at_every_call(
    make: type[Loop], keep_last: int, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six calls with other decisions each: loss, gradients and what is left of the random streams are the original
    code's under the coupling."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 12)
    original = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), keep_last=keep_last, arithmetic=arithmetic, **LEAPFROG)
    model.calls = original.calls = 0
    for call in range(6):
        monkeypatch.setattr(f"{__name__}.SCALE", 1.0 + call)
        model.strength = original.strength = 0.5 + call  # type: ignore[attr-defined]
        original.state = Leapfrog()
        seeded(call)
        expected = results_of(original, lambda: original(x))
        left = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002 - the stream that users draw from
        seeded(call)
        assert_close(results_of(model, lambda: model(x)), expected)
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == left  # noqa: NPY002 - the stream that users draw from
    assert model.calls == original.calls


class ByValue(Loop):
    """A number of a parameter's, taken out of it."""

    def factor(self, number: int) -> float:
        return float(self.inward.bias[number])


def test_a_decision_by_the_value_of_a_tensor_is_refused() -> None:
    """Before anything is lost, with the line."""
    with pytest.raises(ConversionError, match=r"data-dependent.*test_python_decisions\.py:\d+"):
        autorev.convert(ByValue(), batch=(torch.randn(5, 12),))


class Guided(Loop):
    """Classifier-free guidance: the condition is dropped by chance, and a factor stands in an attribute."""

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.training and random.random() < 0.5:
            condition = torch.zeros_like(condition)
        x = x + self.keep * self.inward(condition)
        for layer in self.layers:
            if self.state is not None:
                x = self.add(x, torch.tanh(layer(x)))
            else:
                x = torch.tanh(layer(x)) + x
        return x


def test_a_decision_before_the_loop() -> None:
    """What reaches the loop is decided at each call, and verify compares with the original code."""
    torch.manual_seed(0)
    model, x, condition = Guided(), torch.randn(3, 12), torch.randn(3, 12)
    original = copy.deepcopy(model)
    autorev.convert(model, batch=(x, condition), **LEAPFROG)
    losses = set()
    for call in range(12):
        model.keep = original.keep = 0.0 if call > 8 else 1.0
        original.state = Leapfrog()
        random.seed(call)
        expected = results_of(original, lambda: original(x, condition))
        random.seed(call)
        found = results_of(model, lambda: model(x, condition))
        assert_close(found, expected)
        losses.add(round(float(found["loss"]), 5))
    assert len(losses) == 3  # with the condition, without it, and where it counts nothing
    assert autorev.verify(model, (x, condition)).passed


class Block(nn.Module):
    """Two residual steps; reads numbers off itself and off its config."""

    class Config:
        """Plain data."""

        scale = 1.0

    def __init__(self, config: Any, d: int = 12) -> None:
        super().__init__()
        self.config = config
        self.attention, self.mlp = nn.Linear(d, d), nn.Linear(d, d)
        self.dropout = 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.attention(x)) * self.config.scale
        x = x + F.dropout(h, self.dropout, self.training)
        if x.shape[1] > 6:
            return x - torch.tanh(self.mlp(x))
        return x + torch.tanh(self.mlp(x))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    config = Block.Config()
    config.scale = 1.0
    return nn.Sequential(*(Block(config) for _ in range(4)))


@pytest.mark.parametrize(
    "how", [{"granularity": "sublayer"}, {"method": "hamiltonian"}, {"method": "revnet"}, {"keep_last": 0}], ids=str
)
def test_a_block_in_steps_reads_its_attributes_anew(how: dict[str, Any]) -> None:
    """Dropout switched off by an attribute, a factor in a config, and other sizes after the first call: as a model
    that was converted with them."""
    x, longer = torch.randn(2, 5, 12), torch.randn(2, 9, 12)
    model = blocks()
    autorev.convert(model, batch=(x,), **how)
    results_of(model, lambda: model(x))
    fresh = blocks()
    for one in (model, fresh):
        for block in one:
            block.dropout = 0.0
        one[0].config.scale = 2.0
    autorev.convert(fresh, batch=(x,), **how)
    for given in (x, longer):
        found = results_of(model, lambda given=given: model(given))
        assert_close(found, results_of(model, lambda given=given: model(given)), 0)  # no dropout is left
        with autorev.engine.mode.running("oracle"):
            assert_close(found, results_of(fresh, lambda given=given: fresh(given)))
        with torch.no_grad():
            assert float(model(given).square().mean()) == pytest.approx(float(found["loss"]), rel=1e-6)


class Skipping(Loop):
    """Turns are left out by chance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inward(x)
        for layer in self.layers:
            if random.random() < 0.4:
                continue
            x = self.add(x, torch.tanh(layer(x))) if self.state is not None else x + torch.tanh(layer(x))
        return x * 2


def test_turns_that_are_left_out() -> None:
    """A loop may take fewer turns than it was converted with: what stands behind the last one is run again, too."""
    torch.manual_seed(0)
    model, x = Skipping(n=5), torch.randn(4, 12)
    original = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), keep_last=0, **LEAPFROG)
    taken = set()
    for call in range(12):
        random.seed(call)
        taken.add(sum(random.random() >= 0.4 for _ in range(5)))
        if not sum(random.random() >= 0.4 for _ in [random.seed(call)] for _ in range(5)):
            random.seed(call)
            with pytest.raises(ConversionError, match="it takes none"):
                model(x)
            continue
        random.seed(call)
        original.state = Leapfrog()
        expected = results_of(original, lambda: original(x))
        random.seed(call)
        assert_close(results_of(model, lambda: model(x)), expected)
    assert len(taken) > 2


class Longer(Loop):
    """Goes round as often as it is told."""

    turns = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inward(x)
        for number in range(self.turns):
            x = x + torch.tanh(self.layers[number % 4](x))
        return x


def test_more_turns_than_at_the_conversion_are_refused() -> None:
    """Not run uncoupled in silence."""
    model, x = Longer(), torch.randn(4, 12)
    autorev.convert(model, batch=(x,))
    model.turns = 6
    with pytest.raises(ConversionError, match="takes more residual steps"):
        model(x)
    model.turns = 3
    model(x).sum().backward()


class OtherPath(Loop):
    """Takes a way that no analysis has seen, once it is armed: by chance, so that an analysis does not come by."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inward(x)
        for layer in self.layers:
            if self.armed and random.random() < 0.9:
                x = x + torch.relu(layer(x))
            else:
                x = x + torch.tanh(layer(x))
        return x


def test_an_add_that_no_analysis_has_seen_is_an_error() -> None:
    """Whether it ends a step cannot be known; and an attribute alone is seen by analysing the call."""
    model, x = OtherPath(), torch.randn(4, 12)
    autorev.convert(model, batch=(x,))
    model.armed = True
    random.seed(0)
    with pytest.raises(ConversionError, match=r"adds to its stream at .*which it did not when it was analysed"):
        model(x)
    model.armed = False
    assert autorev.verify(model, (x,)).passed


class MoE(nn.Module):
    """Routes tokens to experts: sizes depend on the values."""

    def __init__(self, found_by: str, d: int = 8) -> None:
        super().__init__()
        self.found_by = found_by
        self.router = nn.Linear(d, 2)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(2))
        self.mlp = nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, weights = torch.zeros_like(x), self.router(x).softmax(-1)
        chosen = weights.argmax(-1)
        if self.found_by == "counts":
            order, counts = chosen.argsort(), torch.bincount(chosen, minlength=2).tolist()
            parts = [expert(rows) for expert, rows in zip(self.experts, x[order].split(counts), strict=True)]
            out = out.index_copy(0, order, torch.cat(parts)) * weights.amax(-1, keepdim=True)
        for number, expert in enumerate(self.experts if self.found_by != "counts" else ()):
            if self.found_by == "mask":
                out[chosen == number] = expert(x[chosen == number]) * weights[chosen == number, number, None]
                continue
            rows = (chosen == number).nonzero().flatten()
            if self.found_by == "rows" or rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
        x = x + out
        return x + torch.tanh(self.mlp(x))


@pytest.mark.parametrize("how", [{}, {"granularity": "sublayer"}, {"method": "hamiltonian"}], ids=str)
@pytest.mark.parametrize("found_by", ["rows", "rows, if any", "mask", "counts"])
def test_sizes_that_depend_on_values_are_right_or_refused_at_once(how: dict[str, Any], found_by: str) -> None:
    """Never accepted and then failing."""
    torch.manual_seed(0)
    model = nn.Sequential(*(MoE(found_by) for _ in range(4)))
    try:
        autorev.convert(model, batch=(torch.randn(6, 8),), **how)
    except AutorevError:
        return
    for size in (6, 9, 3):
        assert autorev.verify(model, (torch.randn(size, 8),)).passed


@pytest.mark.parametrize("how", [{"method": "hamiltonian"}, {"granularity": "sublayer"}, {}], ids=str)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_on_other_sizes(how: dict[str, Any], context: Callable[[], Any]) -> None:
    """In eval mode, without gradients, on lengths that training never saw: what training computes."""
    model = blocks().eval()
    autorev.convert(model, batch=(torch.randn(2, 5, 12),), **how)
    longer = torch.randn(2, 9, 12)
    expected = model(longer).detach()
    with context():
        assert torch.equal(model(longer), expected)
