"""What `convert` says of memory, against what is alive in a real step.

python -m pytest tests/engine/test_summary.py
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autorev
from autorev.conversion.summary import Held
from tests.engine.test_memory import PeakBytes
from tests.helpers.blocks import Storages, no_collection

ROWS, WIDTH = 512, 16
STREAM = 4 * ROWS * WIDTH


class Mlp(nn.Module):
    """A block of a width of its own."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> the same."""
        out: torch.Tensor = self.down(self.up(x).tanh())
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> the same."""
        return x + self.branch(x)


class _Tanh(torch.autograd.Function):
    """Keeps its output where no hook of saved tensors sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.out = x.tanh()
        return ctx.out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * (1 - ctx.out**2)


class OnCtx(Mlp):
    """A tensor is kept as an attribute of the autograd context."""

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> the same."""
        out: torch.Tensor = self.down(_Tanh.apply(self.up(x)))
        return out


class OnModule(Mlp):
    """A tensor is kept on the module."""

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> the same."""
        self.seen = self.up(x).detach()
        return super().branch(x)


class Stages(nn.Module):
    """Two chains, the second one on a quarter of the rows."""

    def __init__(self, later: int = 32) -> None:
        super().__init__()
        self.first = nn.ModuleList(Mlp(64) for _ in range(4))
        self.second = nn.ModuleList(Mlp(later) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> a quarter of the rows."""
        for block in self.first:
            x = block(x)
        x = x.view(-1, 4, WIDTH).mean(1)
        for block in self.second:
            x = block(x)
        return x


class WideHead(nn.Module):
    """A chain below logits that dwarf it."""

    def __init__(self, logits: int = 2048) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(64) for _ in range(6))
        self.head = nn.Linear(WIDTH, logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> one number a row."""
        for block in self.blocks:
            x = block(x)
        return self.head(x).logsumexp(-1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one width": lambda: nn.Sequential(*(Mlp(64) for _ in range(6))),
    "a narrow first": lambda: nn.Sequential(*(Mlp(hidden) for hidden in (8, *[256] * 7))),
    "a narrow last": lambda: nn.Sequential(*(Mlp(hidden) for hidden in (*[256] * 7, 8))),
    "kept on ctx": lambda: nn.Sequential(*(OnCtx(64) for _ in range(5))),
    "kept on the module": lambda: nn.Sequential(*(OnModule(64) for _ in range(5))),
    "stages": Stages,
    "a wide later stage": lambda: Stages(1024),
    "a wide head": WideHead,
}


def measured(model: nn.Module, x: torch.Tensor) -> Held:
    """The same of a real step, the output's own bytes in what is kept."""
    model(x).mean().backward()
    with no_collection(), Storages() as storages:
        out = model(x)
        kept = sum(storages.alive())
    del out
    with no_collection(), PeakBytes() as peak:
        model(x).mean().backward()
    return Held(kept, x.nbytes + peak.peak)


def checkpointed(model: nn.Module) -> None:
    """A checkpoint around every block."""
    for module in model.modules():
        if isinstance(module, Mlp):
            module.__dict__["forward"] = partial(checkpoint, module.forward, use_reentrant=False)


@pytest.mark.parametrize("name", MODELS)
def test_each_block_is_counted_by_itself(name: str) -> None:
    """Plain, checkpointing and as converted: what is told is what is alive, wherever a block keeps it."""
    x, model = torch.randn(ROWS, WIDTH), MODELS[name]()
    told = autorev.convert(model, batch=(x,)).memory
    assert told is not None
    converted = measured(model, x)
    autorev.revert(model)
    plain = measured(model, x)
    checkpointed(model)
    for found, real in ((told.plain, plain), (told.checkpoint, measured(model, x)), (told.converted, converted)):
        if name != "a wide head":  # whose logits are kept, too, and not by a block
            assert found.kept == real.kept
        assert found.peak == pytest.approx(real.peak, rel=0.06)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_stored_raises_no_peak(name: str) -> None:
    """And where nothing is stored, storing would have raised it: in each chain, behind those that are stored."""
    x, peaks = torch.randn(ROWS, WIDTH), {}
    for keep_last in ("auto", 0, 1):
        model = MODELS[name]()
        done = autorev.convert(model, batch=(x,), keep_last=keep_last)  # type: ignore[arg-type]
        peaks[keep_last] = measured(model, x).peak
        if keep_last == "auto":
            chosen = [chain.stored_blocks for chain in done.chains]
    streams = 3 * STREAM  # a stored step has a state of its own
    assert peaks["auto"] <= peaks[0] + streams
    assert all(chosen) or peaks[1] > peaks[0]
    assert chosen == CHOSEN.get(name, [1])


CHOSEN = {"a wide head": [0], "stages": [1, 1], "a wide later stage": [0, 1]}


@pytest.mark.slow
def test_the_choice_does_not_depend_on_the_size_of_the_example() -> None:
    """One row or thousands: the proportions are the same."""
    for name, make in MODELS.items():
        found = {
            tuple(c.stored_blocks for c in autorev.convert(make(), batch=(torch.randn(rows, WIDTH),)).chains)
            for rows in (8, 4096)
        }
        assert found == {tuple(CHOSEN.get(name, [1]))}, name


def test_a_conversion_that_saves_nothing_is_said_to_save_nothing() -> None:
    """Against the lower of its rivals, with the reason."""
    x = torch.randn(ROWS, WIDTH)
    text = str(autorev.convert(nn.Sequential(Mlp(64), Mlp(64)), batch=(x,)))
    assert "Do not convert to save memory: checkpointing peaks lower here, because two streams in 32 bits" in text
    done = autorev.convert(WideHead(), batch=(x,))
    deep = str(done)
    assert str(pickle.loads(pickle.dumps(done))) == str(copy.deepcopy(done)) == deep
    assert "Do not convert" not in deep
    assert "No block is stored (keep_last=0): its activations would lie beside the peak" in deep


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": 0}, "blocks: 6 blocks converted, and none of them recomputed, momentum"),
        ({"keep_last": 9}, "blocks: 6 blocks converted, and none of them recomputed, momentum"),
        ({"gamma": {"blocks.[01]": 0}, "keep_last": 1}, "blocks: 4 of 6 blocks reversible, momentum"),
        ({"gamma": {"blocks.5": 0}, "keep_last": 1}, "blocks: 6 blocks reversible, momentum"),
        ({"gamma": 0.125}, "blocks: 6 blocks reversible, momentum"),
    ],
    ids=str,
)
def test_a_block_that_is_stored_is_not_said_to_be_reversible(options: dict[str, Any], said: str) -> None:
    """With gamma = 0 nothing is inverted, and what `keep_last` covers is not run again."""
    done = autorev.convert(WideHead(), batch=(torch.randn(ROWS, WIDTH),), **options)
    assert str(done).startswith(said)
    stored = done.chains[0].plain_blocks
    assert ("With gamma = 0 nothing inverts a block" in str(done)) == (stored > 0)


def test_ranges_of_one_number_are_that_number() -> None:
    """Two blocks have no inner steps; a number is shown once, whatever lies beyond what is shown."""
    x = torch.randn(ROWS, WIDTH)
    two = str(autorev.convert(nn.Sequential(Mlp(64), Mlp(64)), batch=(x,)))
    assert "(gamma 0.125, c 1)" in two
    mixed = {"0": 1 / 8, "*": 1 / 4}
    text = str(autorev.convert(nn.Sequential(*(Mlp(64) for _ in range(4))), batch=(x,), gamma=mixed))
    assert "(gamma 0.125 to 0.25, c 0.875, at the ends 1)" in text and "2 to 3 side bits" in text


def test_what_cannot_be_simulated_is_said() -> None:
    """Nothing is stored then, and no figure is made up."""

    class Frozen(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(-1)  # no gradient comes back from there

    x = torch.randn(ROWS, WIDTH)
    done = autorev.convert(Frozen(*(Mlp(64) for _ in range(3))), batch=(x,))
    assert done.memory is None and done.chains[0].stored_blocks == 0
    assert "not counted: a training step of the example call cannot be simulated (no output of Frozen" in str(done)


def test_why_experts_that_tokens_choose_have_no_figure() -> None:
    """Their sizes depend on values, which a simulation has none of: it says so, where, and what measures instead."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out, chosen = torch.zeros_like(x), x.argmax(-1) % 2
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero().flatten()
                out = out.index_add(0, rows, expert(x[rows]))
            return x + out

    model, x = nn.Sequential(*(Experts() for _ in range(3))), torch.randn(ROWS, WIDTH)
    done = autorev.convert(model, batch=(x,))
    assert done.memory is None
    why = r"its forward looks at the values of its tensors, \S*test_summary\.py:\d+, as .* before the conversion"
    assert re.search(rf"cannot be simulated \({why}", str(done))
