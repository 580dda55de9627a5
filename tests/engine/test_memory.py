"""Converted models against the same coupling under ordinary autograd: what is stored and what is computed.

python -m pytest tests/engine/test_memory.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import autorev
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    DOUBLE,
    EXACT,
    EXACT_LEAPFROG,
    TOKENS,
    Chain,
    PeakBytes,
    Setting,
    Storages,
    assert_like_oracle,
    converted,
    each_setting,
    mean_square,
    no_collection,
    small,
    states,
)


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1, 3, 4, 9])
def test_keep_last(keep_last: int, setting: Setting) -> None:
    """Any number of blocks at the end may be stored; the gradients are the same."""
    torch.manual_seed(0)
    model = small().to(setting.dtype)
    conversion = autorev.convert(model, keep_last=keep_last, batch=(TOKENS,), **setting.options)
    assert [chain.stored_steps for chain in conversion.chains] == [min(keep_last, 4)]

    assert_like_oracle(model, setting)


def kept_after_forward(make: Callable[[int], Any], depth: int, **options: Any) -> int:
    """Bytes of all tensors but parameters that are alive between forward and backward, the output's included."""
    x = states(EXACT).requires_grad_()
    model = make(depth)
    if options:
        autorev.convert(model, batch=(x,), **options)
    model(x)
    with no_collection(), Storages() as storages:
        out = model(x)
        assert out.requires_grad
        return sum(storages.alive())


class Checkpointing(Chain):
    """Checkpoints every block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def chain_of(depth: int) -> Chain:
    """To be converted."""
    return Chain(*(hand.Block() for _ in range(depth)))


def checkpointing(depth: int) -> Checkpointing:
    """To compare with."""
    return Checkpointing(*(hand.Block() for _ in range(depth)))


ELEMENTS = 2 * 8 * hand.WIDTH


DEPTHS = (3, 5, 7)


SLOPES: dict[str, tuple[dict[str, Any], int]] = {
    "leapfrog": ({"method": "leapfrog"}, 0),
    "midpoint": ({"method": "midpoint"}, 0),
    "leapfrog-float": ({"method": "leapfrog", "arithmetic": "float"}, 0),
    "momentum-1/8": ({}, 3 * ELEMENTS // 8),
    "momentum-1/2": ({"gamma": 0.5}, ELEMENTS // 8),
    "momentum-77/256": ({"gamma": 77 / 256}, ELEMENTS),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_memory_grows_by_the_side_bits_and_nothing_else(name: str, keep_last: int) -> None:
    """For each added block, forward leaves exactly k/8 bytes an element behind: nothing for leapfrog."""
    options, slope = SLOPES[name]
    kept = [kept_after_forward(chain_of, depth, keep_last=keep_last, **options) for depth in DEPTHS]

    assert [b - a for a, b in itertools.pairwise(kept)] == [2 * slope, 2 * slope]


def peak_of_a_step(make: Callable[[int], Any], depth: int, **options: Any) -> int:
    """Bytes alive at the highest point of forward and backward; a gradient is dropped as soon as it is complete."""
    x = states(EXACT).requires_grad_()
    model = make(depth)
    if options:
        autorev.convert(model, batch=(x,), **options)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    mean_square(model(x)).backward()
    x.grad = None
    with no_collection(), PeakBytes() as counted:
        mean_square(model(x)).backward()
    return counted.peak


@pytest.mark.parametrize("name", SLOPES)
def test_the_peak_of_a_step_grows_by_the_side_bits_and_nothing_else(name: str) -> None:
    """Forward and backward together: an added block raises the step's highest point by its side bits alone."""
    options, slope = SLOPES[name]
    peaks = [peak_of_a_step(chain_of, depth, keep_last=0, **options) for depth in DEPTHS]

    assert [b - a for a, b in itertools.pairwise(peaks)] == [2 * slope, 2 * slope]


def test_the_peak_of_checkpointing_and_of_plain_autograd_grows_faster() -> None:
    """The same count sees one input per block under checkpointing, and every activation without it."""
    plain, stored = ([peak_of_a_step(make, depth) for depth in DEPTHS] for make in (chain_of, checkpointing))

    assert [b - a for a, b in itertools.pairwise(stored)] == [2 * 4 * ELEMENTS] * 2
    assert min(b - a for a, b in itertools.pairwise(plain)) > 2 * 10 * 4 * ELEMENTS


@pytest.mark.parametrize("name", SLOPES)
def test_the_peak_is_below_checkpointing_from_eight_blocks_on(name: str) -> None:
    """Not what is kept alone, but the whole step."""
    reversible = peak_of_a_step(chain_of, 8, keep_last=0, **SLOPES[name][0])
    assert reversible < peak_of_a_step(checkpointing, 8)


def test_dropout_keeps_no_mask() -> None:
    """A second run draws its masks again; the generator's state, which no operator makes, is not counted here."""

    def dropping(depth: int) -> Chain:
        return Chain(*(hand.Dropping() for _ in range(depth)))

    kept = [kept_after_forward(dropping, depth, method="leapfrog") for depth in DEPTHS]

    assert [b - a for a, b in itertools.pairwise(kept)] == [0, 0]


@pytest.mark.parametrize("name", SLOPES)
def test_memory_is_below_checkpointing_from_eight_blocks_on(name: str) -> None:
    """Per-block checkpointing keeps every block's input; a reversible chain its last state and fewer bytes a block."""
    reversible = kept_after_forward(chain_of, 8, keep_last=0, **SLOPES[name][0])
    per_block = 4 * ELEMENTS - SLOPES[name][1]

    assert reversible < kept_after_forward(checkpointing, 8)
    assert per_block > 0


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    counted = frozenset({"mm", "addmm", "bmm", "baddbmm"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.counted
        return func(*args, **(kwargs or {}))


def matmuls_of_a_step(model: nn.Module) -> int:
    """In forward and backward."""
    x = states(EXACT).requires_grad_()
    with Matmuls() as matmuls, set_checkpoint_early_stop(False):
        mean_square(model(x)).backward()
    return matmuls.count


@pytest.mark.parametrize("keep_last", [0, 1, 3, 6])
@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG, Setting("float", {**DOUBLE.options})], ids=lambda s: s.name)
def test_a_step_computes_no_more_than_checkpointing(keep_last: int, setting: Setting) -> None:
    """Each block runs twice, less those that are stored; reconstruction comes with the second run for free."""
    depth = 6
    with Matmuls() as matmuls, torch.no_grad():
        hand.Block()(states(EXACT))
    model = converted(setting, lambda: chain_of(depth), states(EXACT), keep_last=keep_last)

    assert matmuls.count == 4
    assert matmuls_of_a_step(model) == matmuls_of_a_step(checkpointing(depth)) - keep_last * matmuls.count
