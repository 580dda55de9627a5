"""Converted blocks under torch.compile: the branch is compiled in both runs, and everything stays as right as it was.

The backend here is AOTAutograd without inductor, counting what is compiled and how often it runs; one test is on
inductor itself.

python -m pytest tests/engine/test_compiled.py
"""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import autorev
from autorev.errors import ReconstructionError
from tests.helpers.one_step import gap, one_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute",  # of torch's own compiler, as the next ones
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
)
DEPTH, WIDTH = 4, 8
RUNS = DEPTH + DEPTH - 1
"""Of branches in one step: all of them forward, and all but the stored last one again."""
X = torch.linspace(-2, 2, 3 * 8 * WIDTH).reshape(3, 8, WIDTH)
factor = 1.0
"""Read by every block."""


class MLP(nn.Module):
    """With dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(self.up(x)))


class Block(nn.Module):
    """Two residual steps."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.mlp = nn.Linear(WIDTH, WIDTH), MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.sin(self.mixing(x.flip(1)))
        return x + factor * self.mlp(x)


class Model(nn.Module):
    """Something before the loop, and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Backend:
    """What it compiled, and how often that ran."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1
        run = aot_eager(graph, inputs)

        def counted(*args: Any) -> Any:
            self.runs += 1
            return run(*args)

        return counted


def make() -> Model:
    torch.manual_seed(0)
    return Model().train()


def converted(model: nn.Module, **how: Any) -> nn.Module:
    autorev.convert(model, batch=(X,), **how)
    return model


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A fresh compiler."""
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def _compile_blocks(model: Any, backend: Any, **options: Any) -> Any:
    for block in model.blocks:
        block.compile(backend=backend, **options)
    return model


def _wrap_blocks(model: Any, backend: Any) -> Any:
    for number in range(DEPTH):
        model.blocks[number] = torch.compile(model.blocks[number], backend=backend)
    return model


def _compile_forwards(model: Any, backend: Any) -> Any:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    return model


def _compile_in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def _regions(model: Any, backend: Any) -> Any:
    utils = pytest.importorskip("accelerate.utils", reason="compile_regions is accelerate's")
    return utils.compile_regions(model, backend=backend)


BY_ITSELF: dict[str, Callable[[Any, Any], Any]] = {
    "block.compile()": _compile_blocks,
    "torch.compile(block)": _wrap_blocks,
    "block.forward": _compile_forwards,
    "compile_regions": _regions,
}
WHOLE: dict[str, Callable[[Any, Any], Any]] = {
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile()": _compile_in_place,
}


def check(model: nn.Module, backend: Backend, parts: int = 1) -> None:
    """One artefact for all blocks, in both runs; gradients of the eager reversible model, and no drift."""
    loss, found = one_step(model, X)
    compiled, backend.runs = backend.compiled, 0
    assert compiled == parts
    again, _ = one_step(model, X)
    assert backend.compiled == compiled, "the second step was compiled anew"
    assert backend.runs >= RUNS, "blocks ran eagerly"
    assert again == loss
    assert set(autorev.drift(model).values()) == {0.0}
    plain_loss, plain = one_step(converted(make()), X)
    oracle_loss, oracle = one_step(model, X, mode="oracle")
    torch.testing.assert_close(loss, plain_loss)
    assert loss == oracle_loss
    assert gap(found, oracle) < 1e-6
    names = [name.replace("_orig_mod.", "") for name in found]
    assert gap(dict(zip(names, found.values(), strict=True)), plain) < 1e-5


@pytest.mark.parametrize("way", BY_ITSELF)
@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "converted first"])
def test_the_branch_of_a_compiled_block_is_compiled(way: str, first: bool, backend: Backend) -> None:
    """In forward and in its second run, by one artefact for all blocks, whichever came first."""
    if first:
        model = converted(BY_ITSELF[way](make(), backend))
    else:
        model = BY_ITSELF[way](converted(make()), backend)
    # The regions are also what is beside the blocks, and that runs in the probe of the grid, too.
    check(model, backend, parts=1 if way != "compile_regions" else 4 if first else 3)


@pytest.mark.parametrize("way", WHOLE)
@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "converted first"])
def test_torch_compile_around_the_model_compiles_its_branches(
    way: str, first: bool, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop is no part of its graph, and that is said."""
    model = converted(WHOLE[way](make(), backend)) if first else WHOLE[way](converted(make()), backend)
    check(model, backend)
    said = [record.message for record in caplog.records if "their branches are compiled" in record.message]
    assert len(said) == 1


def test_a_model_that_ran_compiled_is_converted_and_reverted(backend: Backend) -> None:
    """No code that was compiled before is run on after either."""
    model = make()
    whole = torch.compile(model, backend=backend)
    plain, _ = one_step(whole, X)
    converted(model)
    assert one_step(whole, X)[0] != plain
    assert autorev.drift(model) == {"blocks": 0.0}
    autorev.revert(model)
    assert one_step(whole, X)[0] == plain
    assert not [block for block in model.blocks if {"compile", "forward"} & vars(block).keys()]


def test_a_block_is_compiled_again_when_it_is_reverted(backend: Backend) -> None:
    """`convert` leaves what `block.compile()` set as it was, also where that came after it."""
    for model in (_compile_blocks(make(), backend), make()):
        before = [block._compiled_call_impl for block in model.blocks]
        converted(model)
        if before[0] is None:
            _compile_blocks(model, backend)
        autorev.revert(model)
        backend.runs = 0
        model(X)
        assert backend.runs == DEPTH
        if before[0] is not None:
            assert [block._compiled_call_impl for block in model.blocks] == before


def test_the_conversion_notes_that_blocks_were_compiled(backend: Backend) -> None:
    """And that blocks in steps are not."""
    notes = autorev.convert(_compile_blocks(make(), backend), batch=(X,)).notes
    assert notes == ("the blocks of blocks were compiled, and their branches are",)
    notes = autorev.convert(_compile_blocks(make(), backend), batch=(X,), granularity="sublayer").notes
    assert "compile the modules that they call" in notes[0]


@pytest.mark.parametrize("how", [{"granularity": "sublayer"}, {"method": "hamiltonian"}], ids=str)
def test_blocks_in_steps_say_that_they_run_eagerly_and_their_modules_do_not(
    how: dict[str, Any], backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """What was asked for is not what is done: that is said, with what to do instead."""
    model: Any = _compile_blocks(converted(make(), **how), backend)
    one_step(model, X)
    assert backend.runs == 0
    assert sum("compile the modules that they call" in record.message for record in caplog.records) == 1
    model = converted(make(), **how)
    for block in model.blocks:
        block.mlp.compile(backend=backend)
    for _ in range(2):
        _, found = one_step(model, X)
    assert backend.compiled <= 2  # for a step's first run and for its second
    assert autorev.drift(model) == {"blocks": 0.0}
    assert gap(found, one_step(model, X, mode="oracle")[1]) < 1e-6


def test_other_lengths_between_forward_and_backward(backend: Backend) -> None:
    """An artefact for any length may have been made in the meantime; the second run is the first one's all the same."""
    model = _compile_blocks(converted(make()), backend)
    losses = [model(X[:, :length]).square().mean() for length in (8, 6, 5)]  # from the second on, any
    for loss in losses:
        loss.backward()
        assert autorev.drift(model) == {"blocks": 0.0}
    assert backend.compiled == 2


def test_what_changes_between_forward_and_backward_is_noticed(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guards hold for compiled branches."""
    model: Any = _compile_blocks(converted(make()), backend)
    loss = model(X).square().mean()
    monkeypatch.setitem(globals(), "factor", 2.0)
    with pytest.raises(ReconstructionError, match=r"blocks\.\d computed something else|was not rebuilt exactly"):
        loss.backward()
    monkeypatch.undo()
    loss = model(X).square().mean()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.data.mul_(2)
    with pytest.raises(ReconstructionError, match=r"blocks\.1\.mlp\.up\.weight was changed"):
        loss.backward()


def test_nothing_that_a_compiled_branch_saves_is_kept(backend: Backend) -> None:
    """Between forward and backward: as little as without compilation."""

    def kept(model: nn.Module) -> int:
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(X)
        return sum(held.values())

    eager = kept(converted(make(), keep_last=0))
    assert kept(_compile_blocks(converted(make(), keep_last=0), backend)) == eager
    assert kept(_compile_blocks(make(), backend)) > 2 * eager


def test_copies_are_not_compiled_and_train_the_same(backend: Backend) -> None:
    """As with torch's own `module.compile()`; a replica of `nn.DataParallel` is."""
    model: Any = _compile_blocks(converted(make()), backend)
    loss, found = one_step(model, X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        runs = backend.runs
        again, gradients = one_step(twin, X)
        assert backend.runs == runs
        torch.testing.assert_close(again, loss)
        assert gap(gradients, found) < 1e-5
        twin.blocks[0].compile(backend=backend)
        one_step(twin, X)
        assert backend.runs == runs + 2
    replica = model.blocks[0]._replicate_for_data_parallel()
    runs = backend.runs
    replica(X)
    assert backend.runs == runs + 1


def test_a_graph_without_breaks_around_the_model_is_refused(backend: Backend) -> None:
    """With what to do instead, which works."""
    whole = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), converted(make())), backend=backend, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"leave fullgraph=True out, or compile the blocks"):
        whole(X)
    check(_compile_blocks(converted(make()), backend, fullgraph=True), backend)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++ here")
def test_inductor(backend: Backend) -> None:
    """Dropout included: its random numbers are the first run's."""
    model: Any = converted(make())
    for block in model.blocks:
        block.compile(fullgraph=True, mode="reduce-overhead")
    loss, found = one_step(model, X)
    assert autorev.drift(model) == {"blocks": 0.0}
    oracle_loss, oracle = one_step(model, X, mode="oracle")
    assert loss == oracle_loss
    assert gap(found, oracle) < 1e-6
