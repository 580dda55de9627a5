"""Loops whose turns read an older stream besides their own: the loop's first one, or one that waits in a list.

python -m pytest tests/engine/test_older_streams.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autorev
from autorev.engine.mode import running
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    Results,
    Setting,
    Storages,
    assert_like_oracle,
    assert_same,
    converted,
    gradients_of,
    mean_square,
    no_collection,
    oracle,
    states,
    step,
)

C = (1, 15 / 16, 15 / 16, 15 / 16, 15 / 16, 1)
DOUBLE = Setting("momentum-float64", {"arithmetic": "float"}, torch.float64, 1e-9)
METHODS = [EXACT, Setting("leapfrog", {"method": "leapfrog"}), Setting("pieces", {"granularity": "sublayer"})]
METHODS += [Setting("revnet", {"method": "revnet"}), Setting("hamiltonian", {"method": "hamiltonian"})]
each_method = pytest.mark.parametrize("setting", METHODS, ids=lambda s: s.name)


def long_skips() -> hand.LongSkips:
    """Three blocks down, and three up."""
    return hand.LongSkips(*(hand.Block() for _ in range(6)))


def injected_by_hand(model: hand.Injecting, x: torch.Tensor) -> Results:
    """The coupling's equations around the turns of the original code; gamma = 1/8."""
    model.zero_grad(set_to_none=True)
    with running("original"):
        h = first = model.stem(x)
        v = torch.zeros_like(h)
        for part, c in zip(model.parts, (*C[:4], 1), strict=True):
            v = v / 8 + c * (model.turn(part, h, first) - h)
            h = h + v
        loss = mean_square(model.head(h))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def skipped_by_hand(model: hand.LongSkips) -> Results:
    """The same of a turn that adds a state from the list before its block, as part of its step."""
    model.zero_grad(set_to_none=True)
    with running("original"):
        h, skips = model.embedding(TOKENS), []
        v = torch.zeros_like(h)
        for number, (block, c) in enumerate(zip(model.blocks, C, strict=True)):
            given = h if number < 3 else h + model.gains[number - 3] * skips.pop()
            v = v / 8 + c * (block(given) - h)
            h = h + v
            if number < 3:
                skips.append(h)
        loss = mean_square(model.head(model.norm(h)))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def test_the_first_stream_in_float64() -> None:
    """Its gradient is that of all turns together."""
    x = states(DOUBLE)
    model = converted(DOUBLE, hand.Injecting, x, keep_last=0)
    expected = injected_by_hand(model, x)
    assert_same(oracle(model, lambda: step(model, x)), expected, 1e-9)
    assert_same(step(model, x), expected, 1e-9)


def test_long_skips_in_float64() -> None:
    """The states that wait have a gradient from where they are added."""
    model = converted(DOUBLE, long_skips, keep_last=0)
    expected = skipped_by_hand(model)
    assert_same(oracle(model, lambda: step(model)), expected, 1e-9)
    assert_same(step(model), expected, 1e-9)


@each_method
def test_the_first_stream_exactly(setting: Setting) -> None:
    """Every coupling, to the last bit."""
    x = states(setting)
    model = converted(setting, hand.Injecting, x, keep_last=0)
    assert_like_oracle(model, EXACT, lambda: step(model, x))
    assert autorev.drift(model) == {"parts": 0.0}


@each_method
def test_long_skips_exactly(setting: Setting) -> None:
    """Every coupling, to the last bit."""
    model = converted(setting, long_skips, keep_last=0)
    assert_like_oracle(model, EXACT)
    assert autorev.drift(model) == {"blocks": 0.0}


def test_the_first_stream_is_kept_once() -> None:
    """However many turns read it: two further turns keep no further stream but their side bits."""

    def bytes_kept(depth: int) -> int:
        model: Any = hand.Injecting(depth)
        x = torch.randn(4, 64, hand.WIDTH)
        autorev.convert(model, batch=x, keep_last=0)
        with no_collection(), Storages() as storages:
            loss = mean_square(model(x))
        alive = sum(storages.alive())
        loss.backward()
        return alive

    stream = 4 * 64 * hand.WIDTH * 4
    assert bytes_kept(7) - bytes_kept(5) < stream / 2
