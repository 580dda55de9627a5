"""What waits on the host: the same numbers, and its bytes are counted apart.

python -m pytest tests/engine/test_host.py
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
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
    for spec, said in (
        ("momentum:host=disk", "host of momentum is 'side_bits' or 'attention', or several joined by \\+, not 'disk'"),
        ("checkpoint:host=side_bits", "host of checkpoint is 'attention', not 'side_bits'"),
        ("checkpoint:host=inputs", "host of checkpoint is 'attention', not 'inputs'"),
        ("momentum:host=side_bits:0", "not 'side_bits:0'; 'attention:8' is of 8 blocks"),
        ("momentum:host=side_bits:x", "not 'side_bits:x'"),
        ("momentum:host=side_bits+side_bits", "not 'side_bits\\+side_bits'"),
        ("offload:host=attention", "offload keeps no attention that the host could hold; add keep=attention"),
        ("momentum:keep=attention:-1", "keep of momentum is 'attention', not 'attention:-1'"),
        ("plain:host=attention", "has no option 'host=attention'"),
    ):
        with pytest.raises(SettingError, match=said):
            Method.parse(spec)
    with pytest.raises(SettingError, match="not 3"):
        Method("momentum", host=3)  # type: ignore[arg-type]  # what a caller may give all the same


def test_one_spelling() -> None:
    """In one order; what is as usual is left out."""
    for given, spelt in (
        ("momentum:host=side_bits,tile=auto", "momentum:k=3,tile=auto,host=side_bits"),
        (
            "momentum:keep=attention,host=attention:2+side_bits",
            "momentum:k=3,keep=attention,host=side_bits+attention:2",
        ),
        ("offload:host=inputs", "offload"),
        ("offload:keep=attention,host=attention+inputs", "offload:keep=attention,host=attention"),
        ("offload:host=inputs:3", "offload:host=inputs:3"),
    ):
        assert str(Method.parse(given)) == spelt
        assert Method.parse(spelt) == Method.parse(given)


SIDE, STREAM, SUMS = 3 * ELEMENTS // 8, 4 * ELEMENTS, 4 * TOKENS.numel()
"""Bytes of a block's side bits, of a hidden state, and of the log-sum-exps of an attention of one head."""


@pytest.mark.parametrize(
    ("method", "there"),
    [
        ("momentum:keep=attention,host=attention", 4 * (STREAM + SUMS)),
        ("momentum:keep=attention:3,host=attention:2+side_bits:1", 2 * (STREAM + SUMS) + SIDE),
        ("momentum:keep=attention,host=attention,tile=3", 4 * (STREAM + SUMS)),
        ("leapfrog:keep=attention:1,host=attention", STREAM + SUMS),
        ("hamiltonian:keep=attention,host=attention", 4 * (STREAM + SUMS)),
        ("checkpoint:keep=attention,host=attention", 4 * (STREAM + SUMS)),
        ("checkpoint:keep=attention,host=attention:1,keep_last=1", STREAM + SUMS),
        ("offload:keep=attention", 4 * STREAM),
        ("offload:keep=attention,host=attention", 4 * (2 * STREAM + SUMS)),
        ("offload:host=inputs:3", 3 * STREAM),
    ],
)
def test_so_much_waits_there_and_the_numbers_are_the_same(method: str, there: int) -> None:
    """Bit for bit those of the same method without the host, and of the oracle; afterwards nothing is left there."""

    def trained(spec: str) -> tuple[Any, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = small()
        how = Method.parse(spec)
        autorev.convert(model, (TOKENS,), method=how if how.keep_last != "auto" else replace(how, keep_last=0))
        return model, step(model)

    name, _, options = method.partition(":")
    without = ",".join(part for part in options.split(",") if not part.startswith("host="))
    model, actual = trained(method)
    _, expected = trained(f"{name.replace('offload', 'checkpoint')}:{without}".rstrip(":"))
    assert_same(actual, expected, 0)
    if Method.parse(method).reversible:
        assert_like_oracle(model, EXACT)
    store = store_of(model) if chains_of(model) else vars(model.blocks[0])["forward"].host
    assert store.peak == there
    assert store.bytes == 0


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


@pytest.mark.parametrize(
    "tensor", [torch.arange(24.0).reshape(2, 3, 4).mT, torch.ones(1, 3).expand(2, 3), torch.tensor(7)]
)
def test_what_comes_back_is_what_was_put_there(tensor: torch.Tensor) -> None:
    """Values, shape, and the layout in memory: an attention's result is laid out otherwise than its shape says."""
    back = HostStore().put(tensor).back()
    assert torch.equal(back, tensor)
    assert back.dtype is tensor.dtype
    assert back.stride() == tensor.stride() or 0 in tensor.stride()
