"""Attention that is computed once: the numbers are those of computing it twice.

python -m pytest tests/engine/test_kept.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autorev
from autorev.engine.kept import ATTENTION
from autorev.errors import ConversionError, SettingError
from autorev.methods import Method
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    Storages,
    assert_like_oracle,
    assert_same,
    converted,
    no_collection,
    small,
    step,
    taken_half_way,
    two_backward_passes,
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"method": "leapfrog"},
    {"method": "leapfrog", "arithmetic": "float"},
    {"granularity": "sublayer"},
    {"method": "hamiltonian"},
    {"tile": 3},
]


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often a fused attention kernel runs."""
    runs = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            runs[0] += func in ATTENTION
            return func(*args, **(kwargs or {}))

    with Count():
        yield runs


@pytest.mark.parametrize("how", OPTIONS, ids=str)
def test_attention_runs_once_and_the_numbers_are_the_same(how: dict[str, Any]) -> None:
    """Bit for bit in exact arithmetic; without the option it runs twice."""
    twice = converted(EXACT, small, keep_last=0, **how)
    once = converted(EXACT, small, keep_last=0, keep="attention", **how)
    with counted() as runs:
        expected = step(twice)
    assert runs[0] == (24 if "tile" in how else 8)  # three tiles of each
    with counted() as runs:
        actual = step(once)
    assert runs[0] == 4
    # A rebuilt float stream is off by a rounding, and so is attention that is kept, and not tiled.
    assert_same(actual, expected, 1e-6 if "arithmetic" in how or "tile" in how else 0)
    assert_like_oracle(once, EXACT)


class TwoAttentions(hand.Parts):
    """Both in one step; each has a result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.second = hand.Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        return x + self.attention(y) * 0.5 - self.second(y).tanh()


@pytest.mark.parametrize("how", [{}, {"tile": 3}, {"granularity": "sublayer"}], ids=str)
def test_each_of_several_results_is_returned_in_its_place(how: dict[str, Any]) -> None:
    """Two attentions in a step, in order."""
    if "tile" in how:
        with pytest.raises(ConversionError, match="no part of the blocks"):
            converted(EXACT, lambda: small(3, TwoAttentions), keep_last=0, keep="attention", **how)
        return
    model = converted(EXACT, lambda: small(3, TwoAttentions), keep_last=0, keep="attention", **how)
    with counted() as runs:
        step(model)
    assert runs[0] == 6
    assert_like_oracle(model, EXACT)


def test_compiled_blocks_run_eagerly_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    """A mode does not see into compiled code."""
    model = converted(EXACT, small, keep_last=0, keep="attention")
    expected = step(model)
    for block in model.blocks:
        block.compile(backend="eager")
    with caplog.at_level("WARNING", "autorev"):
        assert_same(step(model), expected, 1e-6)
    assert any("run eagerly, as the results of attention are kept" in message for message in caplog.messages)


@pytest.mark.parametrize("name", ["checkpoint", "offload"])
def test_checkpoints_keep_it_too(name: str) -> None:
    """By PyTorch's own selective checkpoint."""
    torch.manual_seed(0)
    model = small()
    expected = step(model)
    autorev.convert(model, (TOKENS,), method=name, keep="attention")
    with counted() as runs:
        actual = step(model)
    assert runs[0] == 4
    assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize(("spec", "runs"), [("momentum:k=3,keep_last=1", 5), ("checkpoint:keep_last=0", 6)])
def test_so_many_blocks_keep_it(spec: str, runs: int) -> None:
    """The last two that run twice; the others compute it once more."""
    torch.manual_seed(0)
    model = small()
    autorev.convert(model, (TOKENS,), method=f"{spec},keep=attention:2")
    with counted() as counts:
        actual = step(model)
    assert counts[0] == runs
    if "momentum" in spec:
        assert_like_oracle(model, EXACT)
    else:
        autorev.revert(model)
        assert_same(actual, step(model), 0)


def test_a_second_backward_computes_it_again() -> None:
    """What was kept is let go once it has been used."""
    model = converted(EXACT, small, keep_last=0, keep="attention")
    assert_like_oracle(model, EXACT, lambda: two_backward_passes(model))


def test_a_gradient_taken_half_way() -> None:
    """Steps that autograd does not ask for are undone with what was kept."""
    model = converted(EXACT, small, keep_last=0, keep="attention")
    assert_like_oracle(model, EXACT, lambda: taken_half_way(model, model.blocks[1].mlp.down.weight))


def test_what_is_kept_goes_with_the_graph() -> None:
    """No circle holds it: without a collection, nothing is left of a forward pass whose backward never runs."""
    model = converted(EXACT, small, keep_last=0, keep="attention")
    step(model)
    with no_collection(), Storages() as storages:
        out = model(TOKENS)
        before = sum(storages.alive())
        del out
        assert sum(storages.alive()) < before / 4


def test_written_out_attention_is_said() -> None:
    """There is no kernel whose result could be kept."""

    class Eager(hand.Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.mT).softmax(-1) @ v)

    class Block(hand.Block):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Eager()

    torch.manual_seed(0)
    conversion = autorev.convert(small(3, Block), (TOKENS,), keep="attention")
    assert any("none of PyTorch's fused kernels ran in blocks.0" in note for note in conversion.notes)
    assert not autorev.convert(small(3), (TOKENS,), keep="attention").notes


def test_methods_without_a_second_run_have_no_such_option() -> None:
    """Plain training computes nothing twice, and sac keeps what it keeps."""
    for spec in ("plain:keep=attention", "sac:keep=attention", "compile:keep=attention"):
        with pytest.raises(SettingError, match="has no option 'keep=attention'"):
            Method.parse(spec)
    with pytest.raises(SettingError, match="keep of momentum is 'attention', not 'mlp'"):
        Method.parse("momentum:keep=mlp")


@pytest.mark.parametrize("how", [{"keep": "attention:2"}, {"keep": "attention:2", "host": "attention:1+side_bits:3"}])
def test_what_is_said_of_so_many_blocks_goes_with_any_choice_of_stored_ones(how: dict[str, Any]) -> None:
    """Whether the last block is stored is decided by two simulated steps, which have to run the same blocks."""
    model = hand.stack_of(hand.Block, 8).train()
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    autorev.convert(model, tokens, **how)
    assert autorev.verify(model, tokens).passed
