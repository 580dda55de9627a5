"""Converted models against the same coupling under ordinary autograd: what the model's own loop may do.

python -m pytest tests/engine/test_loops.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    Chain,
    Results,
    Setting,
    assert_like_oracle,
    assert_right_or_refused,
    assert_same,
    converted,
    each_setting,
    flexible,
    gradients_of,
    mean_square,
    oracle,
    small,
    states,
    step,
)


@each_setting
@pytest.mark.parametrize("keep_last", [0, 2])
def test_states_in_the_middle_are_part_of_the_loss(keep_last: int, setting: Setting) -> None:
    """All states are collected, and all have a gradient of their own."""
    model = converted(setting, lambda: hand.Collecting(*(hand.Block() for _ in range(5))), keep_last=keep_last)
    assert_like_oracle(model, setting)


@each_setting
def test_a_head_on_every_state(setting: Setting) -> None:
    """Deep supervision."""
    model = converted(setting, lambda: hand.DeeplySupervised(*(hand.Block() for _ in range(4))))
    assert_like_oracle(model, setting)


@each_setting
@pytest.mark.parametrize("skipped", [(0,), (2,), (4,), (1, 3), (0, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_layer_drop(skipped: tuple[int, ...], setting: Setting) -> None:
    """Any of the blocks may be left out of a step."""
    model = converted(setting, flexible)
    model.skipped = skipped
    assert_like_oracle(model, setting)


def test_layer_drop_by_random_numbers() -> None:
    """A loop that skips by torch's generator, and one that skips by Python's, over several steps."""
    for make in (hand.Skipping, hand.SkippingInPython):
        model = converted(EXACT, lambda make=make: make(*(hand.Block() for _ in range(6))))

        def run(model: nn.Module = model) -> Results:
            model.zero_grad(set_to_none=True)
            random.seed(3)
            torch.manual_seed(3)
            for _ in range(4):
                mean_square(model(TOKENS)).backward()
            return gradients_of(model)

        assert_like_oracle(model, EXACT, run)


@each_setting
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_early_exit(depth: int, setting: Setting) -> None:
    """The last blocks are not reached."""
    model = converted(setting, flexible)
    model.depth = depth
    results = assert_like_oracle(model, setting)

    assert not any(name.startswith(f"blocks.{depth}") for name in results)


def add_the_first(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """A long skip from the first block to behind the fourth."""
    return x + seen[0] if number == 3 else x


def add_the_first_at_the_end(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """A long skip to the head."""
    return x + seen[0] if number == 4 else x


def go_back_to_the_second(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """The last block reads what the third did."""
    return seen[1] if number == 3 else x


@each_setting
@pytest.mark.parametrize("between", [add_the_first, add_the_first_at_the_end])
def test_a_long_skip(between: Callable[..., torch.Tensor], setting: Setting) -> None:
    """An activation that is read again later, in the loop or behind it."""
    model = converted(setting, flexible)
    model.between = between
    assert_like_oracle(model, setting)


@each_setting
def test_a_state_with_two_readers(setting: Setting) -> None:
    """A state that two blocks read: training, inference and oracle compute the same, and the gradients are right."""
    model = converted(setting, flexible)
    model.between = go_back_to_the_second
    results = step(model)
    with torch.no_grad():
        assert_same({"loss": mean_square(model(TOKENS))}, {"loss": results["loss"]}, setting.tolerance)
    assert_same(results, oracle(model, lambda: step(model)), setting.tolerance)


INPLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda x: x.mul_(0.5),
    "add_": lambda x: x.add_(torch.linspace(-1, 1, hand.WIDTH, dtype=x.dtype)),
    "setitem": lambda x: x.__setitem__((slice(None), 0), 0),
    "masked_fill_": lambda x: x.masked_fill_(x > 1, 0),
    "alias": lambda x: x.detach().mul_(0.5),
}


@each_setting
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("name", INPLACE)
def test_writing_to_a_state_between_blocks_is_right_or_refused(name: str, at: int, setting: Setting) -> None:
    """An in-place operation on a block's output never makes a wrong gradient."""
    model = converted(setting, flexible)

    def between(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        if number == at:
            INPLACE[name](x)
        return x

    model.between = between
    assert_right_or_refused(model, setting)


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("name", ["mul_", "add_", "setitem", "masked_fill_"])
def test_writing_to_a_state_between_blocks_is_right_in_exact_arithmetic(name: str, at: int) -> None:
    """There the chain's state is not the tensor that the model was given."""
    model = converted(EXACT, flexible)

    def between(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        if number == at:
            INPLACE[name](x)
        return x

    model.between = between
    assert_like_oracle(model, EXACT)


@each_setting
def test_a_detached_state_cuts_the_gradient(setting: Setting) -> None:
    """`x.detach()` between two blocks stops the gradient there; what is below gets none."""
    model = converted(setting, flexible)
    model.between = lambda number, x, seen: x.detach() if number == 2 else x
    results = assert_like_oracle(model, setting)

    assert "blocks.3.norm1.weight" in results
    assert "blocks.2.norm1.weight" not in results


@each_setting
def test_the_callers_tensors_are_untouched(setting: Setting) -> None:
    """Input, mask and states that the caller holds are bit-identical after a step, and so is the output."""
    model = converted(setting, lambda: Chain(*(hand.Block() for _ in range(4))), states(setting))
    x = states(setting, 7).requires_grad_()
    before = x.detach().clone()
    out = model(x)
    returned = out.detach().clone()
    mean_square(out).backward()

    assert torch.equal(x, before)
    assert torch.equal(out, returned)
    assert x.grad is not None
    assert x.grad.any()


class AddingInPlace(hand.Parts):
    """Writes to its argument, which its branch has not saved: so it trains in plain PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.mlp(self.norm1(torch.tanh(x)))
        return x


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
def test_blocks_that_add_in_place(keep_last: int, setting: Setting) -> None:
    """`x += f(x)` inside a block is a step like any other."""
    model = converted(setting, lambda: small(block=AddingInPlace), keep_last=keep_last)
    assert_like_oracle(model, setting)
