"""Streams that their blocks multiply by constants, against the coupling's equations written down.

    v' = gamma factor v + c (out - factor h)        out = factor h + f(h) is what the block's own code returns
    h' = factor h + v'

python -m pytest tests/engine/test_multiplied.py
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.couplings.arithmetic import FixedPoint
from autorev.engine.lane import Lane
from autorev.engine.mode import running
from autorev.errors import ConversionError
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
    states,
    step,
)

DEPTH = 5
C = {0.125: (1, 15 / 16, 15 / 16, 15 / 16, 1), 1.0: (1,) * DEPTH}
"""By gamma."""
FACTORS: dict[type[nn.Module], float] = {
    hand.HalvedSum: 0.5**0.5,
    hand.ScaledShortcut: 0.9,
    hand.ScaledByAlpha: 2.0,
    hand.NegatedShortcut: -1.0,
    hand.Interpolated: 0.9,
    hand.LayerScalar: 0.8,
}
METHODS = {"momentum": 0.125, "leapfrog": 1.0}


class Shrinking(hand.Parts):
    """Each block leaves a quarter of its stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.mlp(self.norm1(x))) / 4


def by_hand(model: hand.Stack, gamma: float, factor: float) -> Results:
    """One step of the coupling, as a loop around the original blocks in ordinary autograd."""
    model.zero_grad(set_to_none=True)
    with running("original"):
        h = model.embedding(TOKENS)
        v = torch.zeros_like(h)
        for block, c in zip(model.blocks, C[gamma], strict=True):
            v = gamma * factor * v + c * (block(h.clone()) - factor * h)
            h = factor * h + v
        loss = mean_square(model.head(model.norm(h)))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def stack(block: type[nn.Module]) -> Callable[[], hand.Stack]:
    """Of five blocks."""
    return lambda: hand.stack_of(block, DEPTH)


@pytest.mark.parametrize("keep_last", [0, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", FACTORS)
def test_float64_training_is_the_loop_written_by_hand(block: type[nn.Module], method: str, keep_last: int) -> None:
    """Reversible and oracle, with blocks that are recomputed and with some that are stored."""
    setting = Setting(method, {"method": method, "arithmetic": "float"}, torch.float64)
    model = converted(setting, stack(block), keep_last=keep_last)
    expected = by_hand(model, METHODS[method], FACTORS[block])

    tolerance = 1e-7 if block is hand.LayerScalar else 1e-9  # its buffer was a float32
    assert_same(oracle(model, lambda: step(model)), expected, tolerance)
    assert_same(step(model), expected, tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [*FACTORS, Shrinking])
def test_exact_training_is_the_loop_up_to_the_grid(block: type[nn.Module], method: str) -> None:
    """And every stream is rebuilt to the last bit, in bfloat16, too."""
    setting = Setting(method, {"method": method})
    model = converted(setting, stack(block), keep_last=0)
    factor = FACTORS.get(block, 0.25)
    expected = by_hand(model.double(), METHODS[method], factor)
    assert_same(step(model.float()), expected, 1e-4)
    assert autorev.drift(model) == {"blocks": 0.0}

    half = converted(Setting(method, {"method": method}, torch.bfloat16), stack(block), keep_last=0)
    step(half)
    assert autorev.drift(half) == {"blocks": 0.0}


@pytest.mark.parametrize("method", ["momentum", "leapfrog", "hamiltonian", "revnet"])
@pytest.mark.parametrize("make", [hand.WaveNet, hand.Leaking])
def test_loops(make: type[nn.Module], method: str) -> None:
    """A product at the end of each turn, or at its beginning, or around the loop."""
    setting = Setting(method, {"method": method, "granularity": "sublayer"})
    x = states(setting)
    model = converted(setting, make, x, keep_last=0)
    assert_like_oracle(model, setting, lambda: step(model, x))
    assert autorev.drift(model) == {"parts": 0.0}


@pytest.mark.parametrize("block", [hand.LayerScalar, hand.ScaledShortcut, hand.NegatedShortcut])
@pytest.mark.parametrize("method", ["momentum", "hamiltonian", "revnet"])
def test_steps_of_a_block(block: type[nn.Module], method: str) -> None:
    """What multiplies the block's sum belongs to its last step."""
    model = converted(Setting(method, {"method": method, "granularity": "sublayer"}), stack(block))
    assert_like_oracle(model, EXACT)
    assert autorev.drift(model) == {"blocks": 0.0}


@pytest.mark.parametrize("block", [hand.HalvedSum, hand.LayerScalar, Shrinking])
def test_the_function_is_the_pretrained_one_as_gamma_goes_to_zero(block: type[nn.Module]) -> None:
    """An error of the order of gamma, and none where gamma is 0."""
    errors = []
    for gamma in (1 / 8, 1 / 64, 1 / 256):
        model = stack(block)()
        wanted = model(TOKENS).detach()
        autorev.convert(model, batch=TOKENS, gamma=gamma, c=1.0, keep_last=0)
        errors.append(float((model(TOKENS).detach() - wanted).norm() / wanted.norm()))
    assert errors[2] < errors[1] / 3 < errors[0] / 12
    assert errors[2] < 0.01


def test_a_stream_that_shrinks_keeps_the_resolution_it_began_with(caplog: pytest.LogCaptureFixture) -> None:
    """24 blocks of a quarter are 2^48: on one grid, nothing would be left of the input. Nothing outgrows it, either."""
    model = hand.stack_of(Shrinking, 24)
    autorev.convert(model, batch=TOKENS, keep_last=0)
    chain = model.blocks[0].forward.chain
    bits = chain.arithmetic.fraction_bits
    with caplog.at_level(logging.WARNING, "autorev"):
        assert_like_oracle(model, EXACT)
    assert not caplog.records
    assert autorev.drift(model) == {"blocks": 0.0}
    assert chain.arithmetic.fraction_bits == bits


@pytest.mark.parametrize("factor", [0.7, -0.3, 0.5, 4.0, -1.0, 1e-3])
def test_no_grid_point_moves_with_the_factor(factor: float) -> None:
    """The unit does; what is left of it besides powers of two stays between 1/2 and 1."""
    grid, product = FixedPoint(16), 1.0
    for _ in range(20):
        grid, product = grid.multiplied(factor), product * factor
        assert 0.5 < abs(grid.factor) <= 1
        assert math.isclose(grid.unit, 2.0**-16 * product, rel_tol=1e-12)


def test_a_grid_that_became_coarser_for_a_large_factor_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 and then 1/2 leaves the first one, and no bit is dropped."""
    model = hand.Stack(*(block() for _ in range(3) for block in (hand.ScaledByAlpha, Halving)))
    autorev.convert(model, batch=TOKENS, keep_last=0)
    seen = []
    take = Lane.take

    def watched(self: Any, *given: Any, **how: Any) -> Any:
        taken = take(self, *given, **how)
        seen.append((taken.dropped is not None, self.arithmetic.fraction_bits))
        return taken

    monkeypatch.setattr(Lane, "take", watched)
    step(model)
    assert not any(dropped for dropped, _ in seen)
    first = seen[1][1]
    assert [bits for _, bits in seen[:6]] == [first - 1, first] * 3


class Halving(hand.Parts):
    """The other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2 + self.mlp(self.norm1(x))


def test_a_buffer_that_is_set_later_is_read_again() -> None:
    """As where weights are loaded into a converted model."""
    model = converted(EXACT, stack(hand.LayerScalar), keep_last=0)
    for block in model.blocks:
        block.layer_scalar.fill_(0.5)
    expected = by_hand(model.double(), 0.125, 0.5)
    assert_same(step(model.float()), expected, 1e-4)


def test_a_factor_of_nothing_or_one_that_is_trained_is_an_error() -> None:
    """No wrong gradient, and the module is named."""
    model = converted(EXACT, stack(hand.LayerScalar))
    model.blocks[1].layer_scalar.zero_()
    with pytest.raises(ConversionError, match=r"blocks\.1 multiplies its stream by 0"):
        step(model)
    model.blocks[1].layer_scalar.fill_(1)
    model.blocks[1].layer_scalar.requires_grad_()
    with pytest.raises(ConversionError, match="layer_scalar of LayerScalar"):
        step(model)


def test_factors_that_are_too_much_together_are_refused() -> None:
    """Each is held, and their product is not."""
    analysis = autorev.analyze(hand.stack_of(hand.ScaledByAlpha, 24), TOKENS)
    assert analysis.chains == ()
    assert "over the 24 blocks its stream is multiplied by 2.1e+06" in analysis.refused[0].reasons[0]


def test_reverting_leaves_the_original() -> None:
    """To the last bit."""
    model = stack(hand.LayerScalar)()
    wanted = model(TOKENS)
    autorev.convert(model, batch=TOKENS)
    autorev.revert(model)
    assert torch.equal(model(TOKENS), wanted)


class Weighing(hand.Joint):
    """Two streams, each with a constant of its own."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = super().forward(image, text)
        return image * 0.5**0.5, -text


def test_each_of_several_streams_has_its_own_factor() -> None:
    """In float64, the loop written by hand; exactly, to the last bit."""
    double = Setting("leapfrog", {"method": "leapfrog", "arithmetic": "float"}, torch.float64)
    model = converted(double, lambda: hand.ImageAndText(*(Weighing() for _ in range(4))), keep_last=0)
    model.zero_grad(set_to_none=True)
    with running("original"):
        streams, factors = [model.embedding(TOKENS), model.embedding(TOKENS[:, :3])], (0.5**0.5, -1.0)
        velocities = [torch.zeros_like(x) for x in streams]
        for block in model.blocks:
            every = list(zip(velocities, block(*streams), streams, factors, strict=True))
            velocities = [factor * v + out - factor * x for v, out, x, factor in every]
            streams = [factor * x + v for v, x, factor in zip(velocities, streams, factors, strict=True)]
        loss = mean_square(model.head(model.norm(streams[0])))
    loss.backward()
    assert_same(step(model), {"loss": loss.detach(), **gradients_of(model)}, 1e-9)

    exact = converted(EXACT, lambda: hand.ImageAndText(*(Weighing() for _ in range(4))), keep_last=0)
    assert_like_oracle(exact, EXACT)
    assert autorev.drift(exact) == {"blocks": 0.0}


def test_a_hook_that_multiplies_what_a_block_returns() -> None:
    """It is part of the loop's code, as the call shows it."""
    model = hand.stack_of(hand.Block)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: output * 0.5)
    autorev.convert(model, batch=TOKENS, keep_last=0)
    assert_like_oracle(model, EXACT)
    assert autorev.drift(model) == {"blocks": 0.0}
