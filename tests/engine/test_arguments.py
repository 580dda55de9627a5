"""Converted models against the same coupling under ordinary autograd: arguments and results.

python -m pytest tests/engine/test_arguments.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from autorev.engine.mode import running
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    Decoder,
    Results,
    Setting,
    Unpacking,
    assert_like_oracle,
    converted,
    each_setting,
    small,
    states,
    step,
)


@each_setting
def test_tensor_keywords_get_their_gradients(setting: Setting) -> None:
    """Encoder states and a learned bias that all blocks read are trained, frozen encoder or not."""
    model = converted(setting, Decoder)
    results = assert_like_oracle(model, setting)
    assert results["bias"].any()
    assert results["encoder.weight"].any()

    model.encoder.requires_grad_(False)
    model.embedding.requires_grad_(False)
    assert_like_oracle(model, setting)


class Rotating(hand.Parts):
    """Is given a tuple of tensors, and None for a mask."""

    def forward(
        self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert mask is None
        cosine, sine = positions
        h = self.norm1(x)
        return x + self.mlp(h * cosine + h.roll(1, -1) * sine)


class Rotary(hand.Stack):
    """Makes them."""

    def __init__(self) -> None:
        super().__init__(*(Rotating() for _ in range(4)))
        self.frequency = nn.Parameter(torch.linspace(0, 1, hand.WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        angles = torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] * self.frequency
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()), None)
        return self.head(self.norm(x))


@each_setting
def test_tuples_and_none_as_arguments(setting: Setting) -> None:
    """A block is handed what it was called with, and tensors inside of a tuple get gradients."""
    model = converted(setting, Rotary)
    assert assert_like_oracle(model, setting)["frequency"].any()


class OneTuple(hand.Block):
    """Returns a tuple of one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (super().forward(x),)


class Named(NamedTuple):
    """What `WithNamed` returns."""

    score: torch.Tensor
    hidden: torch.Tensor


class WithNamed(hand.Parts):
    """Returns its stream in second place."""

    def forward(self, x: torch.Tensor) -> Named:
        h = self.mlp(self.norm1(x))
        return Named(h.mean((1, 2)), x + h)


class WithDict(hand.Parts):
    """Returns its stream under a key."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.mlp(self.norm1(x))
        return {"hidden": x + h, "score": h.mean()}


@each_setting
@pytest.mark.parametrize("block", [hand.Block, OneTuple, hand.WithTuple, hand.WithDataclass, WithNamed, WithDict])
def test_whatever_a_block_returns(block: type[nn.Module], setting: Setting) -> None:
    """Tensors, tuples, dataclasses, named tuples and dicts come back as they were, side values with their gradients."""
    model = converted(setting, lambda: Unpacking(*(block() for _ in range(4))))
    inner = model.blocks[1]
    with running("original"):
        plain = inner(states(setting))
    assert type(inner(states(setting))) is type(plain)

    assert_like_oracle(model, setting)


class ReadingATensor(hand.Parts):
    """Reads a trained tensor that is nobody's parameter."""

    reached: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x)) * type(self).reached


@each_setting
def test_a_tensor_reached_by_closure_gets_its_gradient(setting: Setting) -> None:
    """A leaf, and a tensor with a history of its own, that no argument holds."""
    leaf = torch.linspace(0.5, 1, hand.WIDTH, dtype=setting.dtype).requires_grad_()
    ReadingATensor.reached = leaf
    model = converted(setting, lambda: small(block=ReadingATensor))

    def run() -> Results:
        leaf.grad = None
        ReadingATensor.reached = leaf * 2
        results = step(model)
        assert leaf.grad is not None
        return {**results, "leaf": leaf.grad.clone()}

    assert assert_like_oracle(model, setting, run)["leaf"].any()
