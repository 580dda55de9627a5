"""Steps compiled into one pass: the bits of single operators, one kernel for every length, and never waited for.

The oracle is the step by single operators, which `test_couplings` holds against the equations. Devices of what is
fused, and of what is not waited for, are sets: here the CPU plays the GPU.

python -m pytest tests/engine/test_fused.py
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import autorev
from autorev.couplings import fused
from autorev.couplings.arithmetic import LIMIT, FixedPoint
from autorev.couplings.coupling import State
from autorev.couplings.velocity import Velocity
from autorev.engine import digest
from autorev.engine.grid import _step_by_operators
from autorev.errors import FixedPointRangeError
from tests.helpers import handwritten as hand
from tests.helpers.one_step import gap, one_step

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
GRID, COMPILE = FixedPoint(12), torch.compile
ON_CPU, NOWHERE = frozenset({"cpu"}), frozenset[str]()


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Fused on the CPU, by torch's own tracing without a C++ compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "FUSED_ON", ON_CPU)
        patch.setattr(torch, "compile", lambda function, **how: COMPILE(function, backend="aot_eager"))
        patch.setattr(fused, "_tried", lru_cache(fused._tried.__wrapped__))
        yield


def step_of(coupling: Velocity, shape: tuple[int, ...], dtype: torch.dtype, largest: int) -> tuple[State, Any, Any]:
    """A state, and what a branch returned of what it read: (state, out, value)."""
    generator = torch.Generator().manual_seed(len(shape))
    ints = [torch.randint(-n, n, shape, generator=generator, dtype=torch.int32) for n in (largest, largest // 4)]
    value = GRID.decode(ints[0], dtype)
    return State(*ints), value + torch.randn(shape, generator=generator).to(dtype), value


def check_step(coupling: Velocity, state: State, out: torch.Tensor, value: torch.Tensor) -> None:
    """There and back, beside single operators."""
    before, other = state.clone(), state.clone()
    side = coupling.step(other, out, value, GRID)
    found = coupling.fused_step(state, out, value, GRID)
    assert found is not None
    assert torch.equal(state.stream, other.stream)
    assert torch.equal(state.partner, other.partner)
    assert torch.equal(found.new, GRID.decode(other.stream, out.dtype))
    assert (side is None and found.side is None) or torch.equal(side, found.side)
    assert int(found.largest) == int(other.stream.long().abs().max())
    coupling.recover_input(state, GRID)
    coupling.recover_partner(state, out, value, side, GRID)
    assert torch.equal(state.stream, before.stream)
    assert torch.equal(state.partner, before.partner)


GAMMAS = [Fraction(n) for n in ("1", "-1", "1/2", "-3/4", "1/8", "-7/8", "15/16", "-77/256")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("gamma", "dtype"), [*product(GAMMAS, DTYPES[:1]), *product(GAMMAS[-4:-2], DTYPES[1:])])
def test_a_fused_step_and_its_inverse_have_the_bits_of_single_operators(
    on_cpu: None, gamma: Fraction, dtype: torch.dtype
) -> None:
    """Side bits, new state, decoded stream and largest value, of positive and negative numbers."""
    coupling = Velocity(gamma, 0.9375)
    check_step(coupling, *step_of(coupling, (2, 3, 8), dtype, 2**20))


@pytest.mark.slow
@pytest.mark.parametrize(("gamma", "dtype"), list(zip(GAMMAS[2:7], [*DTYPES[:2], *DTYPES], strict=True)), ids=str)
def test_so_has_what_inductor_makes_of_it(gamma: Fraction, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four side bits, with a C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(fused, "_said", [])
    monkeypatch.setattr(fused, "FUSED_ON", ON_CPU)
    monkeypatch.setattr(fused, "_tried", lru_cache(fused._tried.__wrapped__))
    monkeypatch.setattr(torch, "compile", COMPILE)
    coupling = Velocity(gamma, 0.9375)
    check_step(coupling, *step_of(coupling, (3, 40, 24), dtype, 2**20))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0, 3)])
def test_what_is_no_eight_rows_is_taken_by_single_operators(on_cpu: None, shape: tuple[int, ...]) -> None:
    """As is what has another order in memory, and what is of a class of its own."""
    coupling = Velocity(Fraction(1, 8), 0.9375)
    assert coupling.fused_step(*step_of(coupling, shape, torch.float32, 2**20), GRID) is None
    state, out, value = step_of(coupling, (4, 4, 8), torch.float32, 2**20)
    assert coupling.fused_step(state, out.mT.contiguous().mT, value, GRID) is None
    assert coupling.fused_step(state, nn.Parameter(out), value, GRID) is None
    with torch.device("cpu"):  # a mode
        assert coupling.fused_step(state, out, value, GRID) is None
    assert coupling.fused_step(state, out, value, GRID) is not None


def test_one_kernel_serves_every_length_and_every_number(on_cpu: None) -> None:
    """Five lengths, two c and three n / 8: compiled once each way, where it was tried."""
    fused._tried.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for number, length in enumerate((16, 24, 40, 8, 104)):
        coupling = Velocity(Fraction((1, 3, -7)[number % 3], 8), (1.0, 0.9375)[number % 2])
        check_step(coupling, *step_of(coupling, (1, length, 8), torch.float32, 2**20))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_product_that_leaves_int32_is_told_and_undone_all_the_same(on_cpu: None, sign: int) -> None:
    """V n wraps round: the largest value says so, fused or not, and the way back is exact."""
    coupling = Velocity(Fraction(7, 8), 1.0)
    for velocity, leaves in ((2**31 // 7, False), (2**31 // 7 + 1, True)):
        state = State(torch.zeros(8, dtype=torch.int32), torch.full((8,), sign * velocity, dtype=torch.int32))
        before, zeros = state.clone(), torch.zeros(8)
        by_operators = _step_by_operators(coupling, state.clone(), zeros, zeros, GRID)[1]
        found = coupling.fused_step(state, zeros, zeros, GRID)
        assert found is not None
        assert by_operators is not None
        assert (int(found.largest) >= LIMIT, int(by_operators) >= LIMIT) == (leaves, leaves)
        coupling.recover_input(state, GRID)
        coupling.recover_partner(state, zeros, zeros, found.side, GRID)
        assert torch.equal(state.partner, before.partner)


@pytest.mark.parametrize("fails", ["raises", "differs"])
def test_without_a_compiler_single_operators_go_on_and_that_is_said_once(
    fails: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is one used whose results are others."""

    def broken(function: Any, **how: Any) -> Any:
        def run(*args: Any) -> Any:
            if fails == "raises":
                raise RuntimeError("no compiler here\nand much more")
            found = function(*args)
            args[0].add_(1)
            return found

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(fused, "_tried", fused._tried.__wrapped__)
    monkeypatch.setattr(fused, "_said", [])
    with caplog.at_level(logging.WARNING, "autorev"):
        for gamma in (Fraction(1, 8), Fraction(1, 4)):
            assert Velocity(gamma, 1.0).fused_step(*step_of(Velocity(gamma, 1.0), (8,), torch.float32, 9), GRID) is None
    (message,) = (record.getMessage() for record in caplog.records)
    assert "single operators" in message
    assert ("no compiler here" if fails == "raises" else "its results are others") in message
    assert "much more" not in message


# -- a model


class Reads(TorchDispatchMode):
    """In which functions of autorev a program waits for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            frame = sys._getframe(1)
            while "autorev" not in frame.f_code.co_filename:
                assert frame.f_back is not None
                frame = frame.f_back
            by = frame.f_code.co_qualname.split(".<locals>")[0]
            if by != "_same":  # random states, which lie on the host
                self.by.append(by)
        return func(*args, **(kwargs or {}))


def converted() -> tuple[nn.Module, torch.Tensor]:
    """Three blocks with side bits, the last of them stored, and what they are called with."""
    torch.manual_seed(0)
    model, x = hand.stack_of(hand.Block), torch.randint(50, (2, 8))
    autorev.convert(model, x, keep_last=1)
    return model, x


def test_a_model_trains_with_the_same_bits_fused_or_not(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and loss; both ways there and back, and one way there and the other back."""
    model, x = converted()
    with monkeypatch.context() as patch:
        patch.setattr(fused, "FUSED_ON", NOWHERE)
        expected = one_step(model, x)
    taken: list[int] = []
    step = fused.Fused.step
    monkeypatch.setattr(fused.Fused, "step", lambda self, *args: taken.append(1) or step(self, *args))
    found = one_step(model, x)
    assert len(taken) == 3
    assert torch.equal(found[0], expected[0])
    assert gap(found[1], expected[1]) == 0
    assert autorev.drift(model) == {"blocks": 0.0}
    model.zero_grad()
    loss = model(x).float().square().mean()
    monkeypatch.setattr(fused, "FUSED_ON", NOWHERE)
    loss.backward()
    assert all(torch.equal(p.grad, expected[1][name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_step_waits_for_its_device(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are read where a pass chooses its grid, at its end, and in the checks around backward."""
    monkeypatch.setattr(digest, "WAITED_FOR", NOWHERE)
    model, x = converted()
    model.train(train)
    with Reads() as reads, torch.set_grad_enabled(train):
        model(x)
    forward = ["grid_at_start"] * 4 + ([] if train else ["check_largest"])
    assert reads.by == forward
    if train:
        with Reads() as reads:
            one_step(model, x)
        assert reads.by == [*forward, "check_largest", "Lane.left_over", "Comparison.settle"]


def test_a_grid_that_an_evaluation_outgrew_is_told_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one begins on a coarser grid; on a device that is waited for, it is coarsened on the way."""
    model, x = converted()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.mul_(1e5)
    monkeypatch.setattr(digest, "WAITED_FOR", NOWHERE)
    model.eval()
    raised = 0
    for _ in range(10):
        try:
            with torch.no_grad():
                found = model(x)
            break
        except FixedPointRangeError as error:
            assert "run the step again" in str(error)
            raised += 1
    assert raised
    monkeypatch.setattr(digest, "WAITED_FOR", ON_CPU)
    with torch.no_grad():
        assert torch.allclose(found, model(x))
