"""In-place adds and writes in code that is run in steps: what PyTorch makes of them, written by hand.

python -m pytest tests/engine/hostile/test_in_place.py
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.errors import AutorevError, ConversionError
from tests.engine.hostile.by_hand import LEAPFROG, Leapfrog, assert_close, results_of

D = 8
FLOAT = {**LEAPFROG, "arithmetic": "float"}


class Branch(nn.Module):
    """f."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.norm(x)))


class Loop(nn.Module):
    """An inline loop whose way of adding is the test's."""

    turn: Any = None

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.inward = nn.Linear(D, D)
        self.layers = nn.ModuleList(Branch() for _ in range(n))

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self.inward(x))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def by_hand(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every state, under leapfrog."""
        x, state = self.inward(x), Leapfrog()
        states = [x]
        for layer in self.layers:
            x = state.step(x, x + layer(x))
            states.append(x)
        return states


class AddedAsStatement(Loop):
    """`x.add_(f(x))`, four times to one tensor."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x.add_(layer(x))
        return x


class IntoTheBranch(Loop):
    """`r = x; x = f(x); x.add_(r)`: the branch is written to."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            residual = x
            x = layer(x)
            x.add_(residual)
        return x


class Augmented(Loop):
    """`x = f(x); x += residual`."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            residual = x
            x = layer(x)
            x += residual
        return x


class LongSkip(Loop):
    """The same, and the first state is read once more behind the loop."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for layer in self.layers:
            residual = x
            x = layer(x)
            x += residual
        return x * 1.5 + first

    def by_hand(self, x: torch.Tensor) -> list[torch.Tensor]:
        states = super().by_hand(x)
        return [*states, states[-1] * 1.5 + states[0]]


class Expanded(Loop):
    """Between two turns the stream is a view of itself that no reshape made."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x[None]
            x = x + layer(x)
            x = x[0].expand(2, 4, D)
        return x


@pytest.mark.parametrize("make", [AddedAsStatement, IntoTheBranch, Augmented, LongSkip, Expanded])
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("how", [LEAPFROG, FLOAT], ids=["exact", "float"])
def test_a_loop_that_adds_in_its_own_way(make: type[Loop], keep_last: int, how: dict[str, Any]) -> None:
    """In training, without gradients and in inference mode."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 4, D)
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), keep_last=keep_last, **how)
    found = results_of(model, lambda: model(x))
    assert_close(found, results_of(plain, lambda: plain.by_hand(x)[-1]))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert float(model(x).square().mean()) == pytest.approx(float(found["loss"]), rel=1e-5)


class Collecting(Loop):
    """Returns every state."""

    def run(self, x: torch.Tensor) -> Any:
        states = [x]
        for layer in self.layers:
            residual = x
            x = layer(x)
            x += residual
            states.append(x)
        return torch.stack(states)


def test_states_that_were_read_before_the_add_stay_what_they_were() -> None:
    """The old stream is not the new one's name."""
    torch.manual_seed(0)
    model, x = Collecting(), torch.randn(2, 4, D)
    plain = copy.deepcopy(model)
    autorev.convert(model, batch=(x,), **FLOAT)
    found = results_of(model, lambda: model(x))
    assert_close(found, results_of(plain, lambda: torch.stack(plain.by_hand(x))))


class Bent(Loop):
    """Once it is told to, the stream goes through a function between two turns."""

    flag = False

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if self.flag and number == 2:
                x = torch.tanh(x)
            x = x + layer(x)
        return x


def test_a_stream_that_is_lost_on_the_way_is_an_error() -> None:
    """Not a plain residual network from there on, in silence; with the line."""
    model, x = Bent(), torch.randn(2, 4, D)
    autorev.convert(model, batch=(x,))
    model.flag = True
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(ConversionError, match=r"test_in_place\.py:\d+ ended a residual step"):
            model(x)


class Half(nn.Module):
    """A residual half of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Halves(nn.Module):
    """Its adds stand in its sub-modules, which are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_hook_that_observes_a_half_changes_nothing() -> None:
    """A full backward hook hands on an alias of the stream; a forward hook that changes it is an error."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Halves() for _ in range(3))), torch.randn(2, 4, D, requires_grad=True)
    autorev.convert(model, batch=(x,), granularity="sublayer", **LEAPFROG)
    expected = results_of(model, lambda: model(x))
    for block in model:
        block.first.register_full_backward_hook(lambda module, into, out: None)
    assert_close(results_of(model, lambda: model(x)), expected, 1e-6)
    with torch.no_grad():
        assert float(model(x).square().mean()) == pytest.approx(float(expected["loss"]), rel=1e-6)
    model[1].first.register_forward_hook(lambda module, args, out: out.clamp(-99, 99))
    with pytest.raises(ConversionError, match="the code, or a hook, has replaced"):
        model(x)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda e: e.add_(1),
    "view": lambda e: e[1:].add_(1),
    "setitem": lambda e: e.__setitem__(1, e[1] + 1),
    "data": lambda e: e.data.add_(1),
    "out": lambda e: torch.add(e, 1, out=e),
    "foreach": lambda e: torch._foreach_add_([e], 1),
}


class Writing(nn.Module):
    """Updates a buffer of its own in its own code."""

    def __init__(self, how: str, large: bool) -> None:
        super().__init__()
        self.how, self.a, self.b = how, Branch(), Branch()
        self.register_buffer("e", torch.zeros(9000 if large else 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        WRITES[self.how](self.e)
        x = x + h * (1 + self.e[1])
        return x + self.b(x)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("large", [False, True])
def test_a_buffer_is_written_once_and_read_as_it_was(how: str, granularity: str, large: bool) -> None:
    """By whatever operator; right, or refused before the buffer is written twice."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(*(Writing(how, large) for _ in range(3))), torch.randn(2, 4, D)
    model = copy.deepcopy(plain)
    autorev.convert(model, batch=(x,), granularity=granularity, keep_last=0)
    with autorev.engine.mode.running("oracle"):
        twin = copy.deepcopy(model)
        expected = results_of(twin, lambda: twin(x))
    loss = model(x).square().mean()
    try:
        loss.backward()
    except AutorevError:
        assert large and granularity == "block"  # a large buffer is not copied on the chance that it is written to
        return
    found = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    assert_close(found, expected)
    assert [float(block.e[1]) for block in model] == [1.0] * 3


class Keeping(Loop):
    """Keeps its stream on itself, and adds to it in place afterwards."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0
        self.kept, self.seen, self.by_name = None, [], {}
        for number, layer in enumerate(self.layers):
            self.kept = x
            self.seen.append(x)
            self.by_name[f"{number}"] = x
            x += layer(x)
        return x


@pytest.mark.parametrize("read", [lambda m: m.kept, lambda m: m.seen[1], lambda m: m.by_name["2"]])
def test_what_is_kept_before_an_add_in_place_is_added_to(read: Callable[[Any], torch.Tensor]) -> None:
    """As in the code as it was, where all of them are one tensor; values and gradients."""
    torch.manual_seed(0)
    plain, x = Keeping(), torch.randn(2, 4, D)
    model = copy.deepcopy(plain)
    autorev.convert(model, batch=(x,), keep_last=0, **FLOAT)
    expected = results_of(plain, lambda: 2 * plain.by_hand(x)[-1])
    assert_close(results_of(model, lambda: model(x) + read(model)), expected)


@dataclass
class Context:
    """Handed to an operator beside its input."""

    h: Any


class Scaling(torch.autograd.Function):
    """Reads a tensor out of an object."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, context: Context) -> torch.Tensor:
        ctx.save_for_backward(context.h.detach())
        return a * context.h

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None


class WithContext(Loop):
    """Calls a function of its own."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + Scaling.apply(layer(x), Context(torch.tanh(x)))
        return x


def test_an_object_with_a_tensor_of_the_step_keeps_no_step_alive() -> None:
    """After each step, with and without backward, as many tensors are alive as before."""
    torch.manual_seed(0)
    model, x = WithContext(), torch.randn(64, 16, D)
    autorev.convert(model, batch=(x,), keep_last=0)
    counts = []
    for backward in (True, True, True, False, False):
        loss = model(x).square().mean()
        if backward:
            loss.backward()
        del loss
        model.zero_grad(set_to_none=True)
        gc.collect()
        counts.append(sum(type(t) is torch.Tensor and t.numel() >= x.numel() for t in gc.get_objects()))
    assert len(set(counts[1:])) == 1


class Energy(Loop):
    """Its step is a gradient."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(x)
            if torch.is_grad_enabled() and self.turn:
                torch.autograd.grad(h.square().sum(), x, retain_graph=True)
            x = x + h
        return x


@pytest.mark.parametrize("keep_last", [0, 4])
def test_a_gradient_taken_within_a_step_is_right_or_refused(keep_last: int) -> None:
    """A clear error where the step is rebuilt; the numbers of the oracle where it is stored."""
    torch.manual_seed(0)
    model, x = Energy(), torch.randn(2, 4, D)
    autorev.convert(model, batch=(x,), keep_last=keep_last, **LEAPFROG)
    expected = results_of(model, lambda: model(x))
    model.turn = True
    if keep_last:
        assert_close(results_of(model, lambda: model(x)), expected, 1e-6)
    else:
        with pytest.raises(AutorevError, match="a gradient was taken through"):
            model(x)
