"""Converted models against the same coupling under ordinary autograd: lifetimes.

python -m pytest tests/engine/test_lifetimes.py
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from autorev.engine.replay import hooks_of_others_off
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    TOKENS,
    Decoder,
    Setting,
    Storages,
    Unpacking,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    flexible,
    mean_square,
    no_collection,
    one_block,
    oracle,
    small,
    step,
)


class WithBias(hand.Parts):
    """The first block makes a bias that the others are given: T5's position bias."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm1(x)
        bias = self.mlp(h).mean(0, keepdim=True) if bias is None else bias
        return x + self.attention(h) * bias, bias


class HandingOn(hand.Stack):
    """Hands the bias from block to block."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, bias = self.embedding(tokens), None
        for block in self.blocks:
            x, bias = block(x, bias)
        return self.head(self.norm(x))


LIVES: dict[str, Callable[[], nn.Module]] = {
    "plain": small,
    "dropout": lambda: small(block=hand.Dropping),
    "shared": one_block,
    "tuples": lambda: Unpacking(*(hand.WithDataclass() for _ in range(4))),
    "position-bias": lambda: HandingOn(*(WithBias() for _ in range(4))),
    "collecting": lambda: hand.Collecting(*(hand.Block() for _ in range(4))),
    "cross-attention": Decoder,
}


@each_setting
@pytest.mark.parametrize("name", LIVES)
@pytest.mark.parametrize("backward", [True, False], ids=["step", "forward-only"])
def test_nothing_stays_alive_after_a_step(name: str, backward: bool, setting: Setting) -> None:
    """After a step, or a forward pass whose backward never runs, no tensor is left, without the garbage collector's
    help."""
    model = converted(setting, LIVES[name])
    with no_collection(), Storages() as storages:
        output = model(TOKENS)
        loss = mean_square(output)
        if backward:
            loss.backward()
            model.zero_grad(set_to_none=True)
        assert storages.alive()
        del output, loss

        assert storages.alive() == []


@each_setting
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("exit_at", [1, 3, 4])
def test_nothing_stays_alive_after_an_early_exit(exit_at: int, grad: bool, setting: Setting) -> None:
    """Where the chain's last block is not reached, no state waits for it."""
    model = converted(setting, flexible)
    model.depth = exit_at
    with no_collection(), Storages() as storages:
        with torch.set_grad_enabled(grad):
            model(TOKENS)

        assert storages.alive() == []


@each_setting
def test_nothing_stays_alive_while_a_loss_is_kept(setting: Setting) -> None:
    """After backward, a loss that is kept for a printout holds on to no activation."""
    model = converted(setting, small)
    with no_collection(), Storages() as storages:
        loss = mean_square(model(TOKENS))
        loss.backward()
        model.zero_grad(set_to_none=True)

        assert sum(storages.alive()) <= 16


@each_setting
def test_the_position_bias_has_its_gradient(setting: Setting) -> None:
    """An output of the first block that later blocks read brings their gradients back to it."""
    model = converted(setting, LIVES["position-bias"])
    assert assert_like_oracle(model, setting)["blocks.0.mlp.up.weight"].any()


class Failing(hand.Block):
    """Raises when it is told to."""

    armed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self).armed and self.fails:
            type(self).armed -= 1
            if not type(self).armed:
                raise OverflowError("on purpose")
        return super().forward(x)

    fails = False


@each_setting
@pytest.mark.parametrize("when", [1, 2], ids=["in-forward", "in-backward"])
def test_an_exception_in_the_middle_leaves_no_trace(when: int, setting: Setting) -> None:
    """After a step that fails in a block, in forward or when the block is run again, the next one is as ever."""
    model = converted(setting, lambda: small(block=Failing), keep_last=0)
    model.blocks[2].fails = True
    expected = oracle(model, lambda: step(model))
    with no_collection(), Storages() as storages:
        Failing.armed = when
        try:
            with contextlib.suppress(OverflowError):
                step(model)
            assert Failing.armed == 0
        finally:
            Failing.armed = 0
        model.zero_grad(set_to_none=True)
        assert storages.alive() == []

    assert_same(step(model), expected, setting.tolerance)


@each_setting
def test_an_exception_in_a_hook_during_backward(setting: Setting) -> None:
    """A hook that raises leaves a chain half-way back; the next step begins anew."""
    model = converted(setting, lambda: small(block=hand.Dropping))
    expected = oracle(model, lambda: step(model))

    def fail(grad: torch.Tensor) -> None:
        raise OverflowError("on purpose")

    handle = model.blocks[1].mlp.up.weight.register_hook(fail)
    with pytest.raises(OverflowError):
        step(model)
    handle.remove()
    after = torch.get_rng_state()
    assert_same(step(model), expected, setting.tolerance)
    assert torch.get_rng_state().shape == after.shape


def test_a_node_that_saves_what_it_returned_is_freed() -> None:
    """Torch gives a hook the output itself: held by the node whose graph it leads to, it would stay for ever."""
    with no_collection(), hooks_of_others_off():
        out = torch.rsqrt(torch.ones(4, requires_grad=True))
        gone = weakref.ref(out)
        del out
        assert gone() is None
