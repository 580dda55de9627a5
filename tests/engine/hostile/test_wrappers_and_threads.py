"""Whoever wraps a converted block, copies it or runs beside it: revert, drift, verify and gradients stay right.

python -m pytest tests/engine/hostile/test_wrappers_and_threads.py
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import autorev
from autorev.engine.mode import ORIGINAL, running
from autorev.errors import ConversionError
from tests.engine.hostile.by_hand import LEAPFROG, assert_close, results_of


class Block(nn.Module):
    """Two residual steps and a count."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.calls.add_(1)
        x = x + torch.tanh(self.a(x))
        return x + torch.tanh(self.b(x))


def make(n: int = 6) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(n))), torch.randn(5, 8)


def _decorated(block: nn.Module) -> None:
    forward = block.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    block.forward = wrapped  # type: ignore[method-assign]


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "accelerate": lambda block: add_hook_to_module(block, ModelHook()),
    "lambda": lambda block: setattr(block, "forward", (lambda f: lambda *a, **k: f(*a, **k))(block.forward)),
    "decorator": _decorated,
    "partial": lambda block: setattr(block, "forward", functools.partial(block.forward)),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("how", [LEAPFROG, {"granularity": "sublayer"}], ids=str)
def test_a_block_that_was_wrapped_afterwards(name: str, how: dict[str, Any]) -> None:
    """drift, verify, a second convert and revert see it, and after revert it is the plain block within its wrapper."""
    model, x = make()
    plain = model(x).detach()
    autorev.convert(model, batch=(x,), **how)
    expected = results_of(model, lambda: model(x))
    for block in model:
        WRAPPERS[name](block)
    assert_close(results_of(model, lambda: model(x)), expected, 0)
    assert autorev.drift(model) == {"(the model itself)": 0.0}
    assert autorev.verify(model, (x,)).passed
    with pytest.raises(ConversionError, match="is converted already"):
        autorev.convert(model, batch=(x,))
    assert autorev.revert(model) == len(model)
    assert torch.equal(model(x), plain)
    assert autorev.drift(model) == {}
    autorev.convert(model, batch=(x,), **how)
    assert_close(results_of(model, lambda: model(x)), expected, 1e-6)


class Around(nn.Module):
    """The loop over blocks stands in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = make()[0], nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


def _by_a_function_that_holds_itself(module: nn.Module) -> None:
    forward, count = module.forward, 0

    def wrapped(x: torch.Tensor, again: bool = True) -> torch.Tensor:
        nonlocal count
        count += 1
        return wrapped(x, again=False) if again else forward(x)

    module.forward = wrapped  # type: ignore[method-assign]  # as libraries do


def _scaled(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) + 0.1  # type: ignore[method-assign]  # likewise


_AROUND = {**WRAPPERS, "a function that holds itself": _by_a_function_that_holds_itself, "scaled": _scaled}


@pytest.mark.parametrize("name", _AROUND)
@pytest.mark.parametrize("where", ["inner", "inner.2", "inner.2.a"])
@pytest.mark.parametrize("how", [LEAPFROG, {"granularity": "sublayer"}], ids=str)
def test_a_module_that_was_wrapped_before(name: str, where: str, how: dict[str, Any]) -> None:
    """The wrapper leads to the module itself, and in the copy that is analysed to the copy's."""
    model, x = Around(), make()[1]
    _AROUND[name](model.get_submodule(where))
    forward = model.get_submodule(where).forward
    found = autorev.convert(model, batch=(x,), **how)
    assert [len(chain.blocks) for chain in found.chains] == [6]
    assert autorev.verify(model, x).passed
    autorev.revert(model)
    assert model.get_submodule(where).forward is forward or where == "inner.2.a"


def test_a_wrapper_that_is_taken_off_again() -> None:
    """accelerate restores what it found: after a revert in between, that is a forward that passes through."""
    model, x = make()
    plain = model(x).detach()
    autorev.convert(model, batch=(x,), **LEAPFROG)
    for block in model:
        add_hook_to_module(block, ModelHook())
    autorev.revert(model)
    for block in model:
        remove_hook_from_module(block)
    assert torch.equal(model(x), plain)


def test_a_replica_of_data_parallel_runs_its_own_parameters() -> None:
    """What `nn.DataParallel` does on several devices: the modules are copied by their attributes."""
    model, x = make()
    autorev.convert(model, batch=(x,), **LEAPFROG)
    replica = model._replicate_for_data_parallel()  # type: ignore[operator]
    replica._modules = {}
    for name, block in model.named_children():
        copied = block._replicate_for_data_parallel()  # type: ignore[operator]
        copied._modules = {child: nn.Linear(8, 8) for child in ("a", "b")}
        copied._buffers = {"calls": torch.zeros(())}
        replica._modules[name] = copied
    twin, _ = make()
    for block, copied in zip(twin, replica.children(), strict=True):
        block.a, block.b = copied._modules["a"], copied._modules["b"]
    autorev.convert(twin, batch=(x,), **LEAPFROG)
    torch.testing.assert_close(replica(x), twin(x), rtol=1e-4, atol=1e-4)  # each has its own grid
    loss = replica(x).square().mean()
    found = torch.autograd.grad(loss, [p for block in replica.children() for p in block._modules["a"].parameters()])
    expected = torch.autograd.grad(twin(x).square().mean(), [p for block in twin for p in block.a.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [LEAPFROG, {"granularity": "sublayer"}, {"method": "hamiltonian"}], ids=str)
def test_conversion_and_verification_leave_buffers_and_counters(how: dict[str, Any]) -> None:
    """The probe and the three runs of verify are no calls of the user's."""
    model, x = make()
    autorev.convert(model, batch=(x,), **how)
    assert autorev.verify(model, (x,)).passed
    assert [(block.count, float(block.calls)) for block in model] == [(0, 0.0)] * 6
    results_of(model, lambda: model(x))
    assert [(block.count, float(block.calls)) for block in model] == [(1, 1.0)] * 6


def test_verify_says_when_nothing_was_rebuilt() -> None:
    """A chain whose blocks are all stored is no evidence; a freshly loaded model in eval mode, with its cache, is run
    without one."""
    model, x = make()
    autorev.convert(model, batch=(x,), keep_last=6)
    found = autorev.verify(model, (x,))
    assert not found.passed
    assert found.rebuilt == {"(the model itself)": 0}
    assert "NOTHING VERIFIED" in str(found)
    from tests.helpers.tiny_llm import tiny_model

    loaded = tiny_model("llama", 4).eval()
    assert loaded.config.use_cache
    autorev.convert(loaded)
    found = autorev.verify(loaded, {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]})
    assert found.passed
    assert found.rebuilt == {"model.layers": 4}
    assert found.drift == {"model.layers": 0.0}


def test_verify_does_not_share_a_fault_of_the_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that differ between training and the original code are seen: here a recording that forgets its last
    call but one."""
    from autorev.rewrite import recording

    model, x = make()
    autorev.convert(model, batch=(x,), granularity="sublayer", keep_last=0)
    finish = recording.Recording.finish

    def forgetful(self: recording.Recording, *how: Any) -> Any:
        for call in self.calls:
            if getattr(call.function, "__name__", "") == "tanh":
                call.function = torch.sigmoid
        return finish(self, *how)

    monkeypatch.setattr(recording.Recording, "finish", forgetful)
    with pytest.raises(autorev.AutorevError, match="something else"):
        autorev.verify(model, (x,))


@pytest.mark.parametrize("how", [{}, {"granularity": "sublayer"}], ids=str)
def test_verify_in_one_thread_and_training_in_another(how: dict[str, Any]) -> None:
    """The mode that a model runs in is the thread's own."""
    (mine, x), (other, y) = make(), make()
    for model, given in ((mine, x), (other, y)):
        autorev.convert(model, batch=(given,), **how)
    expected = results_of(mine, lambda: mine(x))
    stop, wrong, errors = threading.Event(), [], []

    def verify() -> None:
        try:
            while not stop.is_set():
                with contextlib.redirect_stdout(io.StringIO()):
                    autorev.verification.verify_call(other, (y,), {})
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=verify)
    thread.start()
    try:
        for _ in range(40):
            found = results_of(mine, lambda: mine(x))
            wrong += [name for name in found if not torch.equal(found[name], expected[name])]
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert not errors


def test_a_mode_is_the_threads_own() -> None:
    """While another thread runs the original, this one runs reversibly."""
    model, x = make()
    autorev.convert(model, batch=(x,), **LEAPFROG)
    expected, inside, leave = model(x).detach(), threading.Event(), threading.Event()

    def other() -> None:
        with running(ORIGINAL):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    try:
        assert torch.equal(model(x), expected)
    finally:
        leave.set()
        thread.join()


def test_a_copy_of_a_converted_model_is_its_own() -> None:
    """deepcopy: the copy's blocks run the copy's weights, and reverting it leaves the original converted."""
    model, x = make()
    autorev.convert(model, batch=(x,), granularity="sublayer")
    expected = results_of(model, lambda: model(x))
    twin = copy.deepcopy(model)
    assert_close(results_of(twin, lambda: twin(x)), expected, 0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_close(results_of(model, lambda: model(x)), expected, 0)
    assert autorev.revert(twin) == 6
    assert autorev.drift(model) == {"(the model itself)": 0.0}
