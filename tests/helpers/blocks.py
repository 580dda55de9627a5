"""Small models, one training step of them, and how it is compared with the oracle: what the tests beside this share.

The oracle stores every activation and lets autograd do the rest.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autorev
from autorev.engine.mode import running
from autorev.errors import AutorevError
from tests.helpers import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)


OTHER_TOKENS = TOKENS + 20


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """How a model is converted, and how near to the oracle it then has to be."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


EXACT = Setting("momentum-exact")


EXACT_LEAPFROG = Setting("leapfrog-exact", {"method": "leapfrog"})


DOUBLE = Setting("leapfrog-float64", {"method": "leapfrog", "arithmetic": "float"}, torch.float64, 1e-9)


each_setting = pytest.mark.parametrize("setting", [EXACT, DOUBLE], ids=lambda s: s.name)


stored: dict[Any, int] = {}
"""How many blocks `convert` has chosen to store: it simulates two steps for that, which is most of its time."""


def converted(setting: Setting, make: Callable[[], nn.Module], *args: Any, **options: Any) -> Any:
    """A model from fixed random numbers, all of whose blocks are converted; what to store is chosen the first time."""
    torch.manual_seed(0)
    model = make().to(setting.dtype)
    args, options = args or (TOKENS,), {**setting.options, **options}
    key = make, setting.dtype, str([tuple(getattr(a, "shape", ())) for a in args]), str(sorted(options.items()))
    if key in stored:
        options["keep_last"] = stored[key]
    chains = autorev.convert(model, batch=args, **options).chains
    if len(chains) == 1 and "keep_last" not in options:
        stored[key] = chains[0].stored_blocks
    return model


def mean_square(output: Any) -> torch.Tensor:
    """A loss of whatever a model returned."""
    return sum(t.double().square().mean() for t in tree_leaves(output) if isinstance(t, torch.Tensor))


def gradients_of(model: nn.Module) -> Results:
    """By parameter name, where there is one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, *args: Any, **kwargs: Any) -> Results:
    """The loss and every gradient of one training step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = mean_square(model(*(args or (TOKENS,)), **kwargs))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def oracle(model: nn.Module, run: Callable[[], Results]) -> Results:
    """What `run` returns where nothing is reconstructed; buffers are as before."""
    before = copy.deepcopy(dict(model.named_buffers()))
    with running("oracle"):
        results = run()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return results


def assert_same(actual: Results, expected: Results, tolerance: float) -> None:
    """Relative errors, in norm; tensors that are next to nothing beside the others are measured on those."""
    assert actual.keys() == expected.keys()
    largest = max(float(t.double().norm()) for t in expected.values())
    assert largest > 0
    for name, right in expected.items():
        error = float((actual[name].double() - right.double()).norm())
        assert error <= tolerance * max(float(right.double().norm()), 0.01 * largest), (name, error, right.norm())


def assert_like_oracle(model: nn.Module, setting: Setting, run: Callable[[], Results] | None = None) -> Results:
    """`run`, by default one step, gives the oracle's results; returns them."""
    run = run or (lambda: step(model))
    expected = oracle(model, run)
    actual = run()
    assert_same(actual, expected, setting.tolerance)
    return actual


def assert_right_or_refused(model: nn.Module, setting: Setting, run: Callable[[], Results] | None = None) -> None:
    """Never silently wrong."""
    run = run or (lambda: step(model))
    expected = oracle(model, run)
    try:
        actual = run()
    except AutorevError:
        return
    assert_same(actual, expected, setting.tolerance)


class Storages(TorchDispatchMode):
    """Every storage that an operator makes while this is active: how much of it is still alive?"""

    def __init__(self) -> None:
        super().__init__()
        # A weak reference keeps the address taken, so that no two storages are one here.
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages((args, kwargs)):
            if storage._cdata not in self.made:
                self.given.setdefault(storage._cdata, StorageWeakRef(storage))
        returned = func(*args, **(kwargs or {}))
        for storage in self._storages(returned):
            if storage._cdata not in self.given:
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return returned

    def _storages(self, structure: Any) -> list[torch.UntypedStorage]:
        return [t.untyped_storage() for t in tree_leaves(structure) if isinstance(t, torch.Tensor)]

    def alive(self) -> list[int]:
        """Bytes of each storage that is still there."""
        return [nbytes for reference, nbytes in self.made.values() if not reference.expired()]


def two_backward_passes(model: Any) -> Results:
    """Of one forward pass, by `retain_graph`; their gradients add up."""
    model.zero_grad()
    loss = mean_square(model(TOKENS))
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients_of(model)


def taken_half_way(model: Any, weight: torch.Tensor) -> Results:
    """The gradient of `weight` alone, and then those of all."""
    model.zero_grad()
    loss = mean_square(model(TOKENS))
    (some,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.backward()
    return {"some": some, **gradients_of(model)}


def frozen_but(model: Any, frozen: str) -> None:
    """Freeze the parameters whose names have `frozen`, or `all but the last block` and the head."""
    for name, parameter in model.named_parameters():
        last = name.startswith(f"blocks.{len(model.blocks) - 1}") or "head" in name
        parameter.requires_grad_(last if frozen == "all but the last block" else frozen not in name)


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """What only the garbage collector would free counts as alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def small(depth: int = 4, block: Callable[[], nn.Module] | None = None) -> hand.Stack:
    """A stack of hand-written blocks."""
    return hand.Stack(*((block or hand.Block)() for _ in range(depth)))


class Mlp(hand.Parts):
    """One residual add, of a branch without attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x))


class Chain(nn.Module):
    """Blocks whose input is the model's own."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def states(setting: Setting, seed: int = 5) -> torch.Tensor:
    """An input of such a chain."""
    return torch.randn(2, 8, hand.WIDTH, generator=torch.Generator().manual_seed(seed)).to(setting.dtype)


class Images(nn.Module):
    """One stage of a pre-activation ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stage = nn.Sequential(*(hand.PreActivation(8, 8) for _ in range(4)))
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(self.stem(images)).mean((2, 3)))


class Crossing(hand.Parts):
    """Reads encoder states by keyword, and a bias that belongs to the model."""

    def forward(self, x: torch.Tensor, *, memory: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        h = self.mlp(self.norm1(x) * memory.mean(1, keepdim=True))
        return x + (h if bias is None else h * bias)


class Decoder(hand.Stack):
    """Hands encoder states and a learned bias to all blocks."""

    def __init__(self) -> None:
        super().__init__(*(Crossing() for _ in range(4)))
        self.encoder = nn.Linear(hand.WIDTH, hand.WIDTH)
        self.bias = nn.Parameter(torch.randn(hand.WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        memory = self.encoder(x.flip(0))
        for block in self.blocks:
            x = block(x, memory=memory, bias=self.bias)
        return self.head(self.norm(x))


class Unpacking(hand.Stack):
    """Takes apart what its blocks return, and returns the side values too."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embedding(tokens)
        scores = []
        for block in self.blocks:
            out = block(x)
            if isinstance(out, torch.Tensor):
                x = out
                continue
            if isinstance(out, dict):
                out = hand.BlockOutput(**out)
            x = out.hidden if hasattr(out, "hidden") else out[0]
            if hasattr(out, "score"):
                scores.append(out.score)
        return self.head(self.norm(x)), *scores


def one_block() -> hand.Stack:
    """One block, five times."""
    return hand.Stack(*[hand.Block()] * 5)


class Flexible(hand.Stack):
    """What its loop does is chosen from outside, after the conversion."""

    skipped: tuple[int, ...] = ()
    between: Any = None
    depth = 99

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        seen = []
        for number, block in enumerate(self.blocks[: self.depth]):
            if number not in self.skipped:
                x = block(x)
                seen.append(x)
                if self.between is not None:
                    x = self.between(number, x, seen)
        return self.head(self.norm(x))


def flexible() -> Flexible:
    """Five blocks."""
    return Flexible(*(hand.Block() for _ in range(5)))
