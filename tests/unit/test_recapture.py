"""Blocks and loops that are taken apart: one graph serves many sizes, and none that it does not hold for.

python -m pytest tests/unit/test_recapture.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import autorev
from autorev.engine.chain import running
from autorev.errors import ConversionError
from autorev.rewrite import recapture
from tests import handwritten as hand

# The residual network itself, on a fine grid: what is computed is what the blocks compute.
RESIDUAL: dict[str, Any] = {"gamma": 0, "c": 1.0, "fraction_bits": 22}


class SizedBlock(hand.Parts):
    """Takes another sign where the sequence is long: the code of short ones does not tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        if x.shape[1] > 6:
            return x - self.mlp(self.norm2(x))
        return x + self.mlp(self.norm2(x))


class SizedLoop(hand.Loop):
    """The same in a loop without block modules."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mlp, norm in zip(self.mlps, self.norms, strict=True):
            x = x - mlp(norm(x)) if x.shape[1] > 6 else x + mlp(norm(x))
        return x


def tokens(length: int) -> torch.Tensor:
    return torch.arange(2 * length).reshape(2, length) % 50


def captures_of(model: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many graphs a call has made."""
    made: list[Any] = []
    original = recapture.fake_call
    monkeypatch.setattr("autorev.rewrite.in_pieces.fake_call", lambda *a: made.append(a) or original(*a))
    call()
    monkeypatch.undo()
    return len(made)


@pytest.mark.parametrize("length", [3, 4, 5, 6, 7, 9])
def test_a_block_that_decides_by_size_is_computed_as_it_is(length: int) -> None:
    """Two short calls give one code; a long one is compared before it is served by it, and captured anew."""
    torch.manual_seed(0)
    model = hand.stack_of(SizedBlock, 3)
    autorev.convert(model, granularity="sublayer", example_args=(tokens(3),), **RESIDUAL)
    for shorter in (3, 4):
        model(tokens(shorter))
    with running("original"):
        expected = model(tokens(length))
    torch.testing.assert_close(model(tokens(length)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [3, 4, 5, 7, 9])
def test_a_loop_that_decides_by_size_is_computed_as_it_is(length: int) -> None:
    """The same for turns of a loop."""
    torch.manual_seed(0)
    model = SizedLoop()
    autorev.convert(model, example_args=(torch.randn(2, 3, hand.WIDTH),), **RESIDUAL)
    for shorter in (3, 4):
        model(torch.randn(2, shorter, hand.WIDTH))
    x = torch.randn(2, length, hand.WIDTH)
    with running("original"):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_third_length_needs_no_third_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two captures agree on serves other lengths, after a comparison; a length seen before needs not even that."""
    torch.manual_seed(0)
    model = hand.stack_of(hand.Block, 3)
    autorev.convert(model, granularity="sublayer", example_args=(tokens(3),))
    assert captures_of(model, lambda: model(tokens(3)), monkeypatch) == 3
    assert captures_of(model, lambda: model(tokens(5)), monkeypatch) == 3
    assert captures_of(model, lambda: model(tokens(7)), monkeypatch) == 0
    compared: list[Any] = []
    monkeypatch.setattr(recapture, "agree", lambda *a: compared.append(a) or True)
    model(tokens(7))
    assert not compared
    model(tokens(8))
    assert len(compared) == 3


def test_a_cut_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that computes something else than the block is an error with the block's path, in conversion already."""
    model = hand.stack_of(hand.Block, 3)
    before = [dict(vars(module)) for module in model.modules()]
    monkeypatch.setattr(recapture, "agree", lambda *a: False)
    with pytest.raises(ConversionError, match=r"blocks\.0, taken apart"):
        autorev.convert(model, granularity="sublayer", example_args=(tokens(3),))
    assert [dict(vars(module)) for module in model.modules()] == before


def test_hooks_fire_in_the_user_s_calls_only() -> None:
    """Neither the weightless copy's call nor the comparison is seen by a hook, and hooks are as before."""
    model = hand.stack_of(hand.Block, 3)
    autorev.convert(model, granularity="sublayer", example_args=(tokens(3),))
    seen: list[torch.Tensor] = []
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(tokens(4))
    assert [type(output) for output in seen] == [torch.Tensor]
    handle.remove()
    assert not model.blocks[1].mlp._forward_hooks


def test_a_copy_makes_its_own_graphs() -> None:
    """Graphs run on one live block: a copied model starts without any."""
    model = hand.stack_of(hand.Block, 3)
    autorev.convert(model, granularity="sublayer", example_args=(tokens(3),))
    model(tokens(3))
    assert model.blocks[0].forward.cuts.entries
    assert not copy.deepcopy(model).blocks[0].forward.cuts.entries
