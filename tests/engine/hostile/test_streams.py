"""The state follows the stream by what it is; where a new chain really starts, that is said.

python -m pytest tests/engine/hostile/test_streams.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autorev
from autorev.engine.carried import pass_of
from autorev.engine.chain import ReversibleChain
from autorev.engine.mode import running
from autorev.engine.tape import Tape
from tests.engine.hostile.by_hand import LEAPFROG, Results, assert_close, results_of, run_blocks

COUPLINGS = pytest.mark.parametrize(
    "how",
    [LEAPFROG, {**LEAPFROG, "arithmetic": "float"}, {"method": "momentum"}, {"method": "hamiltonian"}],
    ids=["leapfrog", "float", "momentum", "hamiltonian"],
)
Between = Callable[[int, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Two residual steps."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.a(self.norm(x)))
        return x + torch.tanh(self.b(x))


class Stack(nn.Module):
    """Its loop does to the stream what the test says."""

    between: Between | None = None
    casts = False

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inward(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.between is not None:
                x = self.between(number, x)
        return x


def make(**how: Any) -> tuple[Stack, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 5, 8)
    autorev.convert(model, batch=(x,), **how)
    return model, x


COPIES: dict[str, Between] = {
    "clone": lambda number, x: x.clone(),
    "times one": lambda number, x: x * 1.0,
    "view": lambda number, x: x.view(x.shape),
    "a new tensor": lambda number, x: torch.cat([x[:1], x[1:]]),
    "contiguous": lambda number, x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "wider and back": lambda number, x: x.double().float(),
}


def tape_behind(chain: ReversibleChain) -> Tape | None:
    """What the step that was taken last is on."""
    latest = pass_of(chain).latest
    return latest.tape if latest is not None and latest.tape.steps else None


@COUPLINGS
@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("by_hook", [False, True])
def test_a_copy_is_followed(name: str, by_hook: bool, how: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A hook or the loop hands on another tensor of the same values: same function, one tape, nothing to say."""
    model, x = make(**how)
    expected = results_of(model, lambda: model(x))
    tapes = set()
    chain = model.blocks[0].forward.chain  # type: ignore[union-attr]
    if by_hook:
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out: COPIES[name](0, out))
    else:
        model.between = COPIES[name]
    for block in model.blocks:
        block.register_forward_hook(lambda *call: tapes.add(tape_behind(chain)), prepend=True)  # type: ignore[call-overload]
    assert_close(results_of(model, lambda: model(x)), expected, 0 if how.get("arithmetic") != "float" else 1e-6)
    assert len(tapes - {None}) == 1
    assert set(autorev.drift(model)) == {"blocks"}
    with torch.no_grad():
        assert float(model(x).square().mean()) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_a_cast_between_blocks_is_followed(dtype: torch.dtype, exact: bool) -> None:
    """The second half reads the stream in another dtype: as by the oracle, in training and without gradients."""
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 5, 8)
    model.blocks[3:].to(dtype)
    model.between = lambda number, x: x.to(dtype) if number == 2 else x
    how = LEAPFROG if exact else {**LEAPFROG, "arithmetic": "float"}
    autorev.convert(model, batch=(x,), **how)
    found = results_of(model, lambda: model(x).float())
    with running("oracle"):
        assert_close(found, results_of(model, lambda: model(x).float()), 1e-5 if dtype is torch.float64 else 2e-2)
    with torch.no_grad():
        assert float(model(x).float().square().mean()) == pytest.approx(float(found["loss"]), rel=1e-5)


@COUPLINGS
@pytest.mark.parametrize("keep_last", [0, 2])
def test_a_detached_stream_is_the_same_function(keep_last: int, how: dict[str, Any]) -> None:
    """`detach` between blocks stops the gradient, of the velocity, too, and changes no number of the forward pass."""
    model, x = make(keep_last=keep_last, **how)
    whole = float(results_of(model, lambda: model(x))["loss"])
    model.between = lambda number, x: x.detach() if number == 2 else x
    found = results_of(model, lambda: model(x))
    assert float(found["loss"]) == pytest.approx(whole, rel=1e-6)
    assert {name.split(".")[1] for name in found if "." in name} == {"3", "4", "5"}
    with running("oracle"):
        assert_close(found, results_of(model, lambda: model(x)))
    with torch.no_grad():
        assert float(model(x).square().mean()) == pytest.approx(whole, rel=1e-6)


def test_a_detached_stream_by_hand() -> None:
    """Against leapfrog written down, with the velocity detached beside the stream."""
    model, x = make(keep_last=0, **LEAPFROG)
    model.between = lambda number, x: x.detach() if number == 2 else x
    found = results_of(model, lambda: model(x))
    autorev.revert(model)
    model.between = None

    def by_hand() -> torch.Tensor:
        h, v = model.inward(x), None
        for number, block in enumerate(model.blocks):
            change = block(h) - h
            v = change if v is None else v + change
            h = h + v
            if number == 2:
                h, v = h.detach(), v.detach()
        return h

    assert_close(found, results_of(model, by_hand))


@COUPLINGS
def test_a_gradient_half_way_does_not_change_what_follows(how: dict[str, Any]) -> None:
    """`autograd.grad` of a state in the middle, then the loop goes on: same output, same gradients."""
    model, x = make(keep_last=0, **how)
    x.requires_grad_()
    expected = results_of(model, lambda: model(x))
    taken = []

    def half_way(number: int, h: torch.Tensor) -> torch.Tensor:
        if number == 3:
            taken.append(torch.autograd.grad(h.square().sum(), x, retain_graph=True)[0])
        return h

    model.between = half_way
    assert_close(results_of(model, lambda: model(x)), expected, 1e-5)
    with running("oracle"):
        results_of(model, lambda: model(x))
    torch.testing.assert_close(taken[0], taken[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change", [lambda x: x * 0.5, lambda x: x + 1, lambda x: x[:, :3]], ids=["scaled", "moved", "cut"]
)
def test_a_new_chain_says_where_it_starts_and_drift_knows(
    change: Callable[[torch.Tensor], torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, however often it happens; by the equations each piece is a chain of its own."""
    model, x = make(keep_last=0, **LEAPFROG)
    model.between = lambda number, h: change(h) if number == 2 else h
    with caplog.at_level(logging.WARNING, "autorev"):
        found = results_of(model, lambda: model(x))
        assert set(autorev.drift(model)) == {"blocks", "blocks from blocks.3"}
        assert set(autorev.drift(model).values()) == {0.0}
        results_of(model, lambda: model(x))
        with torch.no_grad():
            assert float(model(x).square().mean()) == pytest.approx(float(found["loss"]), rel=1e-6)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "blocks.3" in message and "starts a new chain" in message
    autorev.revert(model)
    by_hand = lambda: run_blocks(model.blocks[3:], change(run_blocks(model.blocks[:3], model.inward(x))))  # noqa: E731
    assert_close(found, results_of(model, by_hand))


UNCOUNTED: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda h: h.data.mul_(0.5),
    "numpy": lambda h: np.multiply(h.detach().numpy(), 0.5, out=h.detach().numpy()),
    "a part": lambda h: h.data[:, 1:2].mul_(0.5),
}


@pytest.mark.parametrize("how", [{}, {"arithmetic": "float"}, {"keep_last": 6}], ids=str)
@pytest.mark.parametrize("name", UNCOUNTED)
@pytest.mark.parametrize("size", [5, 300])
def test_a_stream_that_is_written_to_uncounted_starts_a_new_chain(
    name: str, size: int, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """No version tells of a hook that writes through `.data` or NumPy: its values do, in training and without
    gradients."""
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, size, 8)
    autorev.convert(model, batch=(x,), **{"keep_last": 0, **LEAPFROG, **how})
    model.blocks[2].register_forward_hook(lambda module, args, out: (UNCOUNTED[name](out), None)[1])
    found = results_of(model, lambda: model(x))
    with torch.no_grad():
        assert float(model(x).square().mean()) == pytest.approx(float(found["loss"]), rel=1e-6)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "blocks.3" in message and "changed on the way" in message
    autorev.revert(model)
    model.blocks[2]._forward_hooks.clear()

    def by_hand() -> torch.Tensor:
        h = run_blocks(model.blocks[:3], model.inward(x))
        UNCOUNTED[name](h)
        return run_blocks(model.blocks[3:], h)

    assert_close(found, results_of(model, by_hand))


def test_the_conversion_tells_of_a_new_chain() -> None:
    """A loop that changes the stream is seen in the example call, and stands in the summary."""
    torch.manual_seed(0)
    model = Stack()
    model.between = lambda number, h: h * 0.5 if number == 2 else h
    conversion = autorev.convert(model, batch=(torch.randn(3, 5, 8),))
    chains = [len(chain.blocks) for chain in conversion.chains]
    assert chains == [3, 3]  # analysis sees that the loop changes the stream

    torch.manual_seed(0)
    hooked = Stack()
    hooked.blocks[2].register_forward_hook(lambda module, args, out: None if module.training else out * 0.5)
    conversion = autorev.convert(hooked, batch=(torch.randn(3, 5, 8),))
    assert any("starts a new chain at blocks.3" in note for note in conversion.notes), conversion


def test_drift_of_a_partial_backward_is_not_an_older_one() -> None:
    """What no backward pass has checked is missing, not 0."""
    model, x = make(**LEAPFROG)
    results_of(model, lambda: model(x))
    assert autorev.drift(model) == {"blocks": 0.0}
    out = model(x)
    torch.autograd.grad(out.sum(), list(model.blocks[4].parameters()))
    assert autorev.drift(model) == {}


def test_interleaved_forwards_and_blocks_called_one_by_one() -> None:
    """Two batches at once, and a loop outside of the model's forward."""
    model, x = make(**LEAPFROG)
    y = torch.randn(3, 5, 8)
    expected = [results_of(model, lambda given=given: model(given)) for given in (x, y)]

    def by_one(given: torch.Tensor) -> torch.Tensor:
        h = model.inward(given)
        for block in model.blocks:
            h = block(h.clone())
        return h

    assert_close(results_of(model, lambda: by_one(x)), expected[0], 1e-6)
    model.zero_grad()
    h, g = model.inward(x), model.inward(y)
    for block in model.blocks:
        h, g = block(h), block(g)
    (h.square().mean() + g.square().mean()).backward()
    total: Results = {n: expected[0][n] + expected[1][n] for n in expected[0] if n != "loss"}
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, total, 1e-5)
