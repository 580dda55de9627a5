"""The second run of a branch is the first one's: what it depends on is put back, and what cannot be is compared.

python -m pytest tests/engine/hostile/test_second_run.py
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import autorev
from autorev.engine.digest import digest
from autorev.engine.modules import ModuleStates
from autorev.errors import ReconstructionError
from tests.engine.hostile.by_hand import LEAPFROG, Leapfrog, assert_close, results_of, run_blocks

ARITHMETICS = pytest.mark.parametrize("arithmetic", ["exact", "float"])
WAYS = pytest.mark.parametrize("granularity", ["block", "sublayer"])


@dataclass
class Numbers:
    """A config."""

    scale: float = 1.0
    more: list[float] = field(default_factory=lambda: [1.0])
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(scale=1.0))


class Schedule:
    """Is called for its number."""

    scale, calls = 1.0, 0

    def __call__(self) -> float:
        self.calls += 1
        return self.scale


class Block(nn.Module):
    """Two steps whose last matrix is zero, as in a fresh LoRA, ReZero or adaLN-zero: the output tells nothing."""

    offset = 0.0

    def __init__(self, zero: bool = True, d: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.c = nn.Linear(d, d)
        if zero:
            nn.init.zeros_(self.b.weight)
        self.scale, self.flag, self.table = 1.0, True, {"scale": 1.0}
        self.config, self.space = Numbers(), SimpleNamespace(scale=1.0)
        self.array, self.listed, self.schedule = np.ones(1), [SimpleNamespace(scale=1.0)], Schedule()
        self.counted = np.zeros(())
        self.seen = 0
        self.history: list[int] = []
        self.counts: dict[str, int] = {"calls": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.history.append(self.seen)
        self.counts["calls"] += 1
        h = self.a(self.norm(x)) * self.scale * self.table["scale"] * self.config.scale * self.space.scale
        h = h * self.config.more[0] + self.offset
        self.counted += 1
        h = h * float(self.array[0]) * self.config.inner.scale * self.listed[0].scale * self.schedule()
        x = x + self.b(h if self.flag else torch.tanh(h))
        return x + torch.tanh(self.c(x))


def pair(zero: bool, **how: Any) -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """(converted, the same in plain, an input)."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(*(Block(zero) for _ in range(4))), torch.randn(5, 8)
    model = copy.deepcopy(plain)
    autorev.convert(model, batch=(x,), keep_last=0, **LEAPFROG, **how)
    return model, plain, x


def _set(name: str, value: Any) -> Callable[[Block], None]:
    return lambda block: setattr(block, name, value)


def _change_what_is_further_away(block: Block) -> None:
    block.array[0] = 3.0
    block.config.inner.scale = block.listed[0].scale = block.schedule.scale = 3.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": _set("scale", 3.0),
    "flag": _set("flag", False),
    "new attribute": _set("offset", 0.7),
    "dict item": lambda block: block.table.update(scale=3.0),
    "dataclass": lambda block: setattr(block.config, "scale", 3.0),
    "namespace": lambda block: setattr(block.space, "scale", 3.0),
    "array and objects": _change_what_is_further_away,
    "another config": _set("config", Numbers(2.0)),
    "training": lambda block: block.train(not block.training),
    "module": lambda block: setattr(block, "a", nn.Linear(8, 8)),
    "frozen": lambda block: block.requires_grad_(False),
    "forward hook": lambda block: block.a.register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook": lambda block: block.a.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
}


@ARITHMETICS
@WAYS
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_forward_does_not_matter(
    change: str, zero: bool, granularity: str, arithmetic: str
) -> None:
    """Attributes, configs, modules, flags and hooks that are another in backward: gradients are the original's."""
    model, plain, x = pair(zero, arithmetic=arithmetic, granularity=granularity)
    by_block = granularity == "block"
    expected = results_of(plain, lambda: run_blocks(plain, x)) if by_block else results_of(model, lambda: model(x))
    model.zero_grad(set_to_none=True)
    parameters = dict(model.named_parameters())
    loss = model(x).square().mean()
    for block in model:
        CHANGES[change](block)
    loss.backward()
    if change == "frozen":
        return  # what backward does with it is autograd's affair; that it runs is ours
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert_close({"loss": loss.detach(), **found}, expected)


@ARITHMETICS
def test_hooks_that_are_removed_after_forward(arithmetic: str) -> None:
    """PEFT's aLoRA, `adapter_names=` and pyvene do that."""
    model, plain, x = pair(False, arithmetic=arithmetic)
    for one in (model, plain):
        one.handles = [block.a.register_forward_hook(lambda m, i, o: o * 2) for block in one]
    expected = results_of(plain, lambda: run_blocks(plain, x))
    loss = model(x).square().mean()
    for handle in model.handles:
        handle.remove()
    loss.backward()
    assert_close({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}, expected)


def test_backward_hooks_see_the_gradients_once() -> None:
    """Of a child inside the branch."""
    model, plain, x = pair(False)
    seen: dict[str, list[torch.Tensor]] = {"model": [], "plain": []}
    for name, one in (("model", model), ("plain", plain)):
        one[1].a.register_full_backward_hook(lambda m, i, o, name=name: seen[name].append(o[0].clone()))
    results_of(plain, lambda: run_blocks(plain, x))
    results_of(model, lambda: model(x))
    assert len(seen["model"]) == len(seen["plain"]) == 1
    torch.testing.assert_close(seen["model"][0], seen["plain"][0], rtol=1e-4, atol=1e-6)


@ARITHMETICS
@WAYS
def test_a_forward_leaves_its_traces_once(granularity: str, arithmetic: str) -> None:
    """Counters, lists and dicts are after a step as after one of the plain model, and after `convert` as before it."""

    def traces(blocks: nn.Sequential) -> list[Any]:
        return [(b.seen, b.history, b.counts, float(b.counted), b.schedule.calls) for b in blocks]

    model, plain, x = pair(False, arithmetic=arithmetic, granularity=granularity)
    assert traces(model) == [(0, [], {"calls": 0}, 0.0, 0)] * 4
    for _ in range(3):
        results_of(plain, lambda: plain(x))
        results_of(model, lambda: model(x))
    assert traces(model) == traces(plain)


class Drawing(nn.Module):
    """Draws from a generator that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, generator: Any) -> torch.Tensor:
        if isinstance(generator, torch.Generator):
            return x + torch.tanh(self.a(x)) * torch.rand(x.shape, generator=generator)
        return x + torch.tanh(self.a(x)) * generator.random()


class Handing(nn.Module):
    """Hands one generator to all of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Drawing() for _ in range(4))

    def forward(self, x: torch.Tensor, generator: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, generator)
        return x


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
    "numpy": lambda: np.random.default_rng(3),
}


@pytest.mark.parametrize(("granularity", "arithmetic"), [("block", "exact"), ("sublayer", "float")])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_that_is_given_is_drawn_from_once(kind: str, granularity: str, arithmetic: str) -> None:
    """What the branch draws again is what it drew, and the caller's generator moves as with the plain model."""
    torch.manual_seed(0)
    plain, x, given, other = Handing(), torch.randn(5, 8), GENERATORS[kind](), GENERATORS[kind]()
    model = copy.deepcopy(plain)
    autorev.convert(model, batch=(x, given), keep_last=0, arithmetic=arithmetic, granularity=granularity, **LEAPFROG)

    def by_hand(generator: Any) -> torch.Tensor:
        state, h = Leapfrog(), x
        for block in plain.blocks:
            h = state.step(h, block(h, generator))
        return h

    assert autorev.verify(model, (x, given)).passed
    for _ in range(2):
        assert_close(results_of(model, lambda: model(x, given)), results_of(plain, lambda: by_hand(other)))


class FromOutside(nn.Module):
    """Reads a number that no module holds; its branch is multiplied by zero."""

    number: ClassVar[list[float]] = [1.0]

    def __init__(self, d: int = 70) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return x + self.b(h * FromOutside.number[0])


@ARITHMETICS
@WAYS
@pytest.mark.parametrize("factor", [1.2, 3.0])
def test_what_cannot_be_put_back_is_an_error(factor: float, granularity: str, arithmetic: str) -> None:
    """A number from outside of all modules, in a branch whose output is zero either way."""
    model, x = nn.Sequential(*(FromOutside() for _ in range(4))), torch.randn(6, 70)
    autorev.convert(model, batch=(x,), arithmetic=arithmetic, granularity=granularity, **LEAPFROG)
    loss = model(x).square().sum()
    FromOutside.number[0] = factor
    try:
        if granularity == "sublayer":  # the number was read once; what was done with it is done again
            loss.backward()
            found = {n: p.grad for n, p in model.named_parameters()}
            FromOutside.number[0] = 1.0
            model.zero_grad()
            model(x).square().sum().backward()
            assert all(torch.equal(p.grad, found[n]) for n, p in model.named_parameters() if p.grad is not None)
        else:
            with pytest.raises(ReconstructionError, match="computed something else in backward"):
                loss.backward()
    finally:
        FromOutside.number[0] = 1.0


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "math attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "device": lambda: torch.device("cpu"),
}


class Attending(nn.Module):
    """Makes tensors of its own, in the default dtype."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h.transpose(1, 2).flatten(2) * torch.ones(h.shape[2], 1).to(x.dtype)
        return x + self.out(h)


@ARITHMETICS
@WAYS
@pytest.mark.parametrize("name", AMBIENT)
def test_what_held_around_forward_alone_holds_in_the_second_run(name: str, granularity: str, arithmetic: str) -> None:
    """`with ...: loss = model(x)` and backward outside of it."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(*(Attending() for _ in range(4))), torch.randn(2, 5, 8)
    model = copy.deepcopy(plain)
    autorev.convert(model, batch=(x,), arithmetic=arithmetic, granularity=granularity, **LEAPFROG)
    with AMBIENT[name]():
        expected = run_blocks(plain, x).float().square().mean()
        loss = model(x).float().square().mean()
    expected.backward()
    loss.backward()
    tolerance = 3e-2 if name == "autocast" else 2e-5  # hand-written, the sum is rounded to bfloat16 at each block
    assert_close(
        {n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()}, tolerance
    )


def test_requires_grad_is_flipped_between_forward_and_backward() -> None:
    """As in the training of a GAN: the discriminator is frozen while the generator's loss is computed."""
    results = {}
    for converted in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(*(Attending() for _ in range(4))), torch.randn(2, 5, 8)
        if converted:
            autorev.convert(model, batch=(x,), gamma=1 / 256, keep_last=0)
        first = model(x).mean()
        model.requires_grad_(False)
        z = x.clone().requires_grad_()
        second = model(z).mean()
        model.requires_grad_(True)
        (first + second).backward()
        assert z.grad is not None
        results[converted] = {"z": z.grad, **{n: p.grad for n, p in model.named_parameters()}}
    assert_close(results[True], results[False], 2e-2)  # gamma is nearly 0


class GatedFromOutside(nn.Module):
    """Its branch is multiplied by a gate that it is given, and by a mask that no module holds."""

    mask = torch.ones(64, 96)

    def __init__(self, d: int = 96) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x + gate * self.b(torch.tanh(self.a(x)) * GatedFromOutside.mask)


class Gating(nn.Module):
    """adaLN-zero with one modulation for all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(3, 96)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.blocks = nn.ModuleList(GatedFromOutside() for _ in range(3))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gate = self.modulation(condition)
        for block in self.blocks:
            x = block(x, gate)
        return x


@ARITHMETICS
def test_a_gate_of_zero_from_outside_hides_nothing(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a mask are another in the second run: the output is the same, and the gate's gradient is not."""
    torch.manual_seed(0)
    model, call = Gating(), (torch.randn(64, 96), torch.randn(3))
    autorev.convert(model, batch=call, arithmetic=arithmetic, keep_last=0, **LEAPFROG)
    results_of(model, lambda: model(*call))
    loss = model(*call).square().mean()
    other = torch.ones(64, 96)
    other[3:5] = 0.0
    monkeypatch.setattr(GatedFromOutside, "mask", other)
    with pytest.raises(ReconstructionError, match="computed something else in backward"):
        loss.backward()


class Recurrent(nn.Module):
    """Its kernel saves its own memory, of which it writes a part."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(d), nn.LSTM(d, d, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.rnn(self.norm(x))[0]


@ARITHMETICS
def test_a_kernels_own_memory_is_not_compared(arithmetic: str) -> None:
    """oneDNN's LSTM leaves in it what was there before, which is another thing in the second run."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(*(Recurrent() for _ in range(3))), torch.randn(2, 12, 32)
    model = copy.deepcopy(plain)
    autorev.convert(model, batch=(x,), arithmetic=arithmetic, keep_last=0, **LEAPFROG)
    expected = results_of(plain, lambda: run_blocks(plain, x))
    for number in range(3):
        model.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        used = [torch.full((size,), 1.5 + number) for size in (1000, 5000, 14336, 20000)]
        del used
        loss.backward()
        assert_close({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}, expected)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_either_sign_hide_what_is_before_them(zero: float) -> None:
    linear, states = nn.Linear(80, 80, bias=False), ModuleStates()
    nn.init.constant_(linear.weight, zero)
    states.add(linear, "linear", lambda module, name: False)
    assert states.hides
    with torch.no_grad():
        linear.weight[0, 0] = 2.0**-130  # the smallest of floats are numbers, too
    other = ModuleStates()
    other.add(linear, "linear", lambda module, name: False)
    assert not other.hides


def test_a_glance_sees_heads_of_attention() -> None:
    heads = torch.randn(2, 64, 4, 32).transpose(1, 2)
    before = digest(heads, exact=True, wholly=False)
    assert digest(heads.clone(), exact=True, wholly=False) == before
    assert digest(heads.contiguous() + 1, exact=True, wholly=False) != before
    part = torch.randn(64, 256)[:, :128]  # between its rows is memory of others
    before = digest(part, exact=True, wholly=False)
    part._base[:, 128:] = 7
    assert digest(part, exact=True, wholly=False) == before
