"""Converted models against the same coupling under ordinary autograd: what cannot be reconstructed.

python -m pytest tests/engine/test_errors.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autorev
from autorev.capture.generators import generator_state, set_generator
from autorev.errors import ReconstructionError
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    IMAGES,
    TOKENS,
    Chain,
    Crossing,
    Images,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    mean_square,
    small,
    states,
    step,
)


def _add_one(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.add_(1)


def _step_optimiser(model: Any) -> None:
    torch.optim.SGD(model.blocks.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [_add_one, _step_optimiser])
@each_setting
def test_a_parameter_changed_in_place_is_an_error(change: Callable[[Any], None], setting: Setting) -> None:
    """An optimiser step between forward and backward is seen, and the message says what was changed."""
    model = converted(setting, small, keep_last=0)
    step(model)
    loss = mean_square(model(TOKENS))
    change(model)
    with pytest.raises(ReconstructionError, match=r"blocks\.\d.*changed in place between forward and backward"):
        loss.backward()
    model.zero_grad(set_to_none=True)
    assert_like_oracle(model, setting)


def _add_to_data(weight: torch.Tensor) -> None:
    weight.data.add_(0.1)


def _replace_data(weight: torch.Tensor) -> None:
    weight.data = weight.data * 1.1


@each_setting
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("change", [_add_to_data, _replace_data])
def test_a_parameter_changed_behind_autograds_back_is_an_error(
    change: Callable[[torch.Tensor], None], block: int, setting: Setting
) -> None:
    """Through `.data` no version counts up; it is seen all the same, in the stored last block, too."""
    model = converted(setting, small, keep_last=1)
    loss = mean_square(model(TOKENS))
    change(model.blocks[block].mlp.up.weight)
    with pytest.raises(ReconstructionError, match=rf"blocks\.{block}\.mlp\.up\.weight was .*\.data"):
        loss.backward()


def _prune_a_row(weight: torch.Tensor) -> None:
    weight.data[3].zero_()


def _clip(weight: torch.Tensor) -> None:
    weight.data.clamp_(max=float(weight.data.flatten().sort().values[-2]))


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("change", [_prune_a_row, _clip])
def test_a_large_parameter_of_which_a_part_was_changed_is_an_error(
    change: Callable[[torch.Tensor], None], keep_last: int
) -> None:
    """Of a large one, a stored block is compared wholly, and one that is run again by what it returns."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(96, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.linear(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Wide() for _ in range(3))), torch.randn(5, 96)
    autorev.convert(model, batch=(x,), keep_last=keep_last)
    loss = model(x).square().mean()
    change(model[-1].linear.weight)
    with pytest.raises(ReconstructionError, match=r"2\.linear\.weight was .*\.data|2 returned something else"):
        loss.backward()


def test_a_parameter_that_was_replaced_is_still_the_old_one_for_backward() -> None:
    """A new tensor in a parameter's place does not matter to a graph that is under way."""
    model = converted(EXACT, small)
    expected = step(model)
    model.zero_grad(set_to_none=True)
    old = model.blocks[1].mlp.up.weight
    loss = mean_square(model(TOKENS))
    model.blocks[1].mlp.up.weight = nn.Parameter(torch.zeros_like(old))
    loss.backward()

    assert old.grad is not None
    assert_same({"old": old.grad}, {"old": expected["blocks.1.mlp.up.weight"]}, 0)


@each_setting
def test_an_argument_changed_in_place_is_an_error(setting: Setting) -> None:
    """Encoder states that are overwritten between forward and backward are seen."""

    class Given(Chain):
        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, memory=memory)
            return x

    memory = states(setting, 9)
    model = converted(setting, lambda: Given(*(Crossing() for _ in range(4))), states(setting), memory)
    loss = mean_square(model(states(setting), memory))
    memory.mul_(2)
    with pytest.raises(ReconstructionError, match=r"argument of blocks\.\d.*changed in place"):
        loss.backward()


@each_setting
@pytest.mark.parametrize("make", [lambda: small(block=hand.Dropping), Images], ids=["dropout", "batch-norm"])
def test_eval_mode_between_forward_and_backward(make: Callable[[], nn.Module], setting: Setting) -> None:
    """`model.eval()` after the forward pass does not change its gradients, and is still in force afterwards."""
    args = (IMAGES.to(setting.dtype),) if make is Images else (TOKENS,)
    model = converted(setting, make, *args)

    def run() -> Results:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = mean_square(model(*args))
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        return {"loss": loss.detach(), **gradients_of(model)}

    assert_like_oracle(model, setting, run)


class Noisy(hand.Parts):
    """Its noise comes from a generator of its own, once the test turns it on."""

    source: Callable[[], float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 1.0 if Noisy.source is None else Noisy.source()
        return x + self.mlp(self.norm1(x)) * factor


OUT_OF_SIGHT = {"generator": torch.Generator().manual_seed(0)}
"""No name of the code leads to it."""
GLOBAL = torch.Generator()


def from_global(shape: torch.Size) -> torch.Tensor:
    """As code has it that shares one generator."""
    return torch.rand(shape, generator=GLOBAL)


class OfItsClass(hand.Parts):
    """Every block draws from the one generator of their class."""

    generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x)) * (torch.rand(x.shape, generator=self.generator) > 0.1)


class Global(hand.Parts):
    """Likewise, from a global one, through a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x)) * (from_global(x.shape) > 0.1)


class OfNumpy(hand.Parts):
    """Likewise, from numpy's, and before its first sub-module runs."""

    generator = np.random.default_rng(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = float(self.generator.uniform(0.5, 1.5))
        return x + self.mlp(self.norm1(x)) * factor


SHARED: dict[type[hand.Parts], Any] = {OfItsClass: OfItsClass.generator, Global: GLOBAL, OfNumpy: OfNumpy.generator}


SOURCES: dict[str, Callable[[], float]] = {
    "torch-generator": lambda: float(torch.rand([], generator=OUT_OF_SIGHT["generator"])),
    "python": random.random,
    "numpy": lambda: __import__("numpy").random.rand(),
}


@each_setting
@pytest.mark.parametrize("name", ["python", "numpy"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_noise_of_the_usual_generators_is_repeated(name: str, keep_last: int, setting: Setting) -> None:
    """Python's and numpy's random numbers are drawn again in the second run, and the user's streams go on as if not."""
    model = converted(setting, lambda: small(block=Noisy), keep_last=keep_last)
    Noisy.source = SOURCES[name]

    def run() -> Results:
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002 - the stream that users draw from
        return {**step(model), "next": torch.tensor([random.random(), np.random.rand()])}  # noqa: NPY002 - the stream that users draw from

    try:
        assert_like_oracle(model, setting, run)
    finally:
        Noisy.source = None


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("block", SHARED, ids=lambda block: block.__name__)
def test_noise_of_a_generator_that_blocks_share_is_repeated(
    block: type[hand.Parts], keep_last: int, setting: Setting
) -> None:
    """And it goes on as if it had not been; an analysis and a conversion leave it alone."""
    generator = SHARED[block]
    begun, first = generator_state(generator), next_of(generator)
    autorev.analyze(small(block=block), (TOKENS,))
    model = converted(setting, lambda: small(block=block), keep_last=keep_last)
    assert torch.equal(next_of(generator), first)

    def run() -> Results:
        set_generator(generator, begun)
        results = step(model)
        assert not torch.equal(next_of(generator), first)
        return {**results, "next": next_of(generator)}

    assert_like_oracle(model, setting, run)


def next_of(generator: Any) -> torch.Tensor:
    """What it draws next; it stays where it is."""
    state = generator_state(generator)
    drawn = torch.rand(4, generator=generator) if isinstance(generator, torch.Generator) else generator.random(4)
    set_generator(generator, state)
    return torch.as_tensor(drawn)


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
def test_noise_that_cannot_be_repeated_is_an_error(keep_last: int, setting: Setting) -> None:
    """A block that draws from a generator of its own computes something else the second time, and is found out."""
    model = converted(setting, lambda: small(block=Noisy), keep_last=keep_last)
    Noisy.source = SOURCES["torch-generator"]
    try:
        with pytest.raises(ReconstructionError, match="computed something else in backward"):
            step(model)
    finally:
        Noisy.source = None
    assert_like_oracle(model, setting)


def test_noise_is_an_error_below_frozen_weights_too() -> None:
    """Where backward does not reach the chain's beginning, what it did rebuild is right or refused."""
    model = converted(EXACT, small)
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    loss = mean_square(model(TOKENS))
    model.blocks[2].mlp.up.weight.data.add_(1)
    with pytest.raises(ReconstructionError):
        loss.backward()
