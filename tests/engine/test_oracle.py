"""Converted models against the same coupling under ordinary autograd: the oracle itself.

python -m pytest tests/engine/test_oracle.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.engine.mode import running
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    gradients_of,
    mean_square,
    oracle,
    small,
    step,
)

BY_HAND: dict[str, tuple[dict[str, Any], float, tuple[float, ...]]] = {
    "leapfrog": ({"method": "leapfrog"}, 1.0, (1, 1, 1, 1)),
    "midpoint": ({"method": "midpoint"}, -1.0, (2, 2, 2, 2)),
    "momentum": ({}, 1 / 8, (1, 15 / 16, 15 / 16, 1)),
    "momentum-other": ({"gamma": -0.375, "c": 0.5}, -0.375, (0.5, 0.5, 0.5, 0.5)),
}


def by_hand(model: hand.Stack, gamma: float, c: tuple[float, ...]) -> Results:
    """One step of the coupling, written as a loop in ordinary autograd."""
    model.zero_grad(set_to_none=True)
    with running("original"):
        h = model.embedding(TOKENS)
        v = torch.zeros_like(h)
        for block, factor in zip(model.blocks, c, strict=True):
            v = gamma * v + factor * (block(h) - h)
            h = h + v
        loss = mean_square(model.head(model.norm(h)))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def by_hand_in_pieces(model: hand.Stack, coupling: str) -> Results:
    """The same, with a step for each half of a block, for one stream and for two."""
    model.zero_grad(set_to_none=True)
    halves = [
        half
        for block in model.blocks
        for half in (
            lambda x, block=block: block.attention(block.norm1(x)),
            lambda x, block=block: block.mlp(block.norm2(x)),
        )
    ]
    first, second = model.embedding(TOKENS), model.embedding(TOKENS)
    velocity = torch.zeros_like(first)
    for half in halves:
        if coupling == "leapfrog":
            velocity = velocity + half(first)
            first = first + velocity
        else:
            first, second = second + half(first), first
    loss = mean_square(model.head(model.norm((first + second) / 2 if coupling == "revnet" else first)))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


@pytest.mark.parametrize("coupling", ["leapfrog", "hamiltonian", "revnet"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_float64_training_in_pieces_is_the_loop_written_by_hand(coupling: str, keep_last: int) -> None:
    """With a step for each residual add, one stream or two, reversible and oracle are ordinary autograd's loop."""
    options = {"method": coupling, "arithmetic": "float", "granularity": "sublayer"}
    model = converted(Setting(coupling, options, torch.float64, 1e-9), small, keep_last=keep_last)
    expected = by_hand_in_pieces(model, coupling)

    assert_same(oracle(model, lambda: step(model)), expected, 1e-9)
    assert_same(step(model), expected, 1e-9)


@pytest.mark.parametrize("coupling", ["momentum", "leapfrog", "midpoint", "hamiltonian", "revnet"])
@pytest.mark.parametrize("block", [hand.Block, hand.Dropping, hand.Rescaled])
def test_exact_training_in_pieces(block: type[nn.Module], coupling: str) -> None:
    """With a step for each residual add, in exact arithmetic, with dropout, gates and scales."""
    options = {"method": coupling, "granularity": "sublayer"}
    model = converted(Setting(coupling, options), lambda: small(block=block))
    assert_like_oracle(model, EXACT)
    assert autorev.drift(model) == {"blocks": 0.0}


@pytest.mark.parametrize(
    "options",
    [{}, {"tile": "auto"}, {"tile": 2}, {"granularity": "sublayer"}],
    ids=["block", "auto", "tiles", "sublayer"],
)
def test_blocks_that_take_their_stream_apart_are_one_step(options: dict[str, Any]) -> None:
    """An add on some of the tokens is one on the stream, and whatever is asked for, the block is taken whole."""
    setting = Setting("leapfrog", {**options, "method": "leapfrog", "arithmetic": "float"}, torch.float64, 1e-9)
    model = converted(setting, lambda: small(block=hand.FirstTokenApart), keep_last=0)
    expected = by_hand(model, 1.0, (1, 1, 1, 1))
    assert_same(oracle(model, lambda: step(model)), expected, 1e-9)
    assert_same(step(model), expected, 1e-9)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_float64_training_is_the_loop_written_by_hand(name: str, keep_last: int) -> None:
    """Reversible and oracle both give the gradients of `v = gamma v + c f(h); h = h + v` under ordinary autograd."""
    options, gamma, c = BY_HAND[name]
    setting = Setting(name, {**options, "arithmetic": "float"}, torch.float64, 1e-9)
    model = converted(setting, small, keep_last=keep_last)
    expected = by_hand(model, gamma, c)

    assert_same(oracle(model, lambda: step(model)), expected, 1e-9)
    assert_same(step(model), expected, 1e-9)


@pytest.mark.parametrize("name", BY_HAND)
def test_exact_training_is_the_loop_written_by_hand_up_to_the_grid(name: str) -> None:
    """On the grid the loss and the gradients differ by as much as float32 rounding would make them."""
    options, gamma, c = BY_HAND[name]
    model = converted(Setting(name, options), small)
    expected = by_hand(model.double(), gamma, c)
    model.float()

    assert_same(step(model), expected, 1e-4)
    assert autorev.drift(model) == {"blocks": 0.0}
