"""Side bits that wait on the host: the same numbers, and their bytes are counted apart.

python -m pytest tests/engine/test_host.py
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import autorev
from autorev.conversion.convert import chains_of
from autorev.engine.host_store import HostStore
from autorev.errors import ConversionError, SettingError
from autorev.methods import Method
from tests.helpers import handwritten as hand
from tests.helpers.blocks import EXACT, TOKENS, assert_like_oracle, assert_same, converted, mean_square, small, step

ELEMENTS = TOKENS.numel() * hand.WIDTH


def store_of(model: Any) -> HostStore:
    """Of its one chain."""
    (chain,) = chains_of(model)
    assert chain.host is not None
    return chain.host


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"granularity": "sublayer"}, {"method": "bdia"}, {"tile": 3}])
def test_the_numbers_are_those_of_side_bits_on_the_device(options: dict[str, Any]) -> None:
    """Bit for bit."""
    there = converted(EXACT, small, keep_last=0, host="side_bits", **options)
    here = converted(EXACT, small, keep_last=0, **options)
    assert_same(step(there), step(here), 0)
    assert_like_oracle(there, EXACT)


def test_what_lies_on_the_host_is_the_side_bits_of_a_forward_pass() -> None:
    """Three bits an element and block, from the forward pass until its backward pass has come by."""
    model = converted(EXACT, lambda: small(6), keep_last=1, host="side_bits")
    store = store_of(model)
    loss = mean_square(model(TOKENS))
    assert store.bytes == 5 * 3 * ELEMENTS // 8
    loss.backward()
    assert store.bytes == 0
    assert store.peak == 5 * 3 * ELEMENTS // 8


def test_a_forward_pass_without_backward_leaves_nothing_there() -> None:
    """Its tape goes with its graph."""
    model = converted(EXACT, small, keep_last=0, host="side_bits")
    out = model(TOKENS)
    assert store_of(model).bytes > 0
    del out
    assert store_of(model).bytes == 0


def test_two_backward_passes_of_one_forward() -> None:
    """The tape makes side bits anew on its way forward."""

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = mean_square(model(TOKENS))
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = converted(EXACT, small, keep_last=0, host="side_bits")
    assert_like_oracle(model, EXACT, run)


def test_a_copy_has_a_store_of_its_own() -> None:
    """It holds nothing of the original's."""
    model = converted(EXACT, small, keep_last=0, host="side_bits")
    loss = mean_square(model(TOKENS))
    twin = copy.deepcopy(model)
    assert store_of(twin).bytes == 0
    assert store_of(twin) is not store_of(model)
    loss.backward()
    assert store_of(model).bytes == 0
    assert_same(step(twin), step(model), 0)


@pytest.mark.parametrize("method", ["leapfrog", "hamiltonian", "momentum:arithmetic=float"])
def test_a_method_without_side_bits_is_refused(method: str) -> None:
    """In one sentence; the model is as it was."""
    model = small()
    with pytest.raises(ConversionError, match="keeps no side bits that the host could hold"):
        autorev.convert(model, batch=(TOKENS,), method=method, host="side_bits")
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_values_are_refused() -> None:
    """The ones there are, are named."""
    with pytest.raises(SettingError, match="host of momentum is 'side_bits', not 'disk'"):
        Method.parse("momentum:host=disk")
    with pytest.raises(SettingError, match="has no option 'host=side_bits'"):
        Method.parse("checkpoint:host=side_bits")
    assert str(Method.parse("momentum:host=side_bits,tile=auto")) == "momentum:k=3,tile=auto,host=side_bits"


def test_where_no_memory_can_be_pinned_ordinary_memory_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once."""
    empty = torch.empty

    def refusing(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nat somewhere")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refusing)
    store = HostStore()
    with caplog.at_level(logging.WARNING, "autorev"):
        rooms = [store._room(torch.zeros(3, 4, dtype=torch.uint8)) for _ in range(2)]
    assert [tuple(room.shape) for room in rooms] == [(3, 4), (3, 4)]
    (said,) = caplog.messages
    assert "pins no more host memory (CUDA error: out of memory): ordinary memory takes its place" in said
