"""`compile=graph`: a training pass of a converted model as one compiled graph, which is as right as the eager one.

The backend is AOTAutograd without a code generator; one test is on inductor itself. What is right is known from the
oracle, which runs the original code under the coupling's equations by ordinary autograd.

python -m pytest tests/engine/test_whole_graph.py
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import autorev
from autorev.conversion.convert import forwards_of
from autorev.conversion.recouple import recouple
from autorev.errors import FixedPointRangeError, ReconstructionError
from tests.helpers.one_step import gap, loss_of, one_step
from tests.helpers.tiny_llm import tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute",  # of torch's own compiler, as the next ones
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
)
DEPTH, WIDTH = 3, 16
X = torch.linspace(-2, 2, 3 * 8 * WIDTH).reshape(3, 8, WIDTH).sin()


class Block(nn.Module):
    """Two residual steps; the second reads something that all blocks are given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixing = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = x + torch.sin(self.mixing(x.flip(1)))
        branch = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + (branch if scale is None else branch * scale)


class Model(nn.Module):
    """Something before the loop and behind it, and a parameter that goes to every block as an argument."""

    def __init__(self, blocks: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(DEPTH)])
        self.depth = 99
        self.returns = "head"

    def forward(self, x: torch.Tensor) -> Any:
        x, scale = self.stem(x), self.scale * 2
        seen = []
        for block in self.blocks[: self.depth]:
            x = block(x, scale=scale)
            seen.append(x)
        if self.returns == "middle":
            return seen[1].square()
        return self.head(x) + seen[1] if self.returns == "both" else self.head(x)


def make(**how: Any) -> Model:
    torch.manual_seed(0)
    return Model(**how).train()


def converted(model: Any, **how: Any) -> Any:
    found = autorev.convert(model, **{"batch": (X,), "compile": "graph", "keep_last": 0, **how})
    assert found.why_not_graph is None
    assert found.compiled == "graph"
    return model


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that has seen nothing, and does not write all that it does into pytest's log."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: nn.Module, **how: Any) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True, **how)


def check(model: Any, compiled: Any = None, tolerance: float = 1e-5, x: torch.Tensor = X) -> None:
    """One graph without a break; loss and gradients are the oracle's, and the chain came back to where it began."""
    counters.clear()
    loss, found = one_step(whole(model) if compiled is None else compiled, x)
    assert not counters["graph_break"]
    assert autorev.drift(model) == {"blocks": 0.0}
    right, oracle = one_step(model, x, mode="oracle")
    torch.testing.assert_close(loss, right)
    found = {name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}
    assert gap(found, oracle) < tolerance


@pytest.mark.parametrize(
    "how",
    [{}, {"method": "midpoint", "keep_last": 1}, {"gamma": {"blocks.0": -0.375, "blocks.1": 0.0}}],
    ids=str,
)
def test_a_training_pass_is_one_graph(how: dict[str, Any]) -> None:
    """With blocks stored at the end or in the middle, and an argument that has a gradient."""
    check(converted(make(), **how))


def test_what_is_kept_is_two_streams_and_side_bits() -> None:
    """Counted in the tensors that the compiled pass saves, besides weights and what stem and head save themselves."""

    def kept(model: Any) -> dict[str, int]:
        held: dict[int, tuple[str, int]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage()._cdata] = str(tensor.dtype), tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage()._cdata for p in model.parameters()} | {X.untyped_storage()._cdata}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            whole(model)(X)
        by_kind: dict[str, int] = {}
        for key, (kind, size) in held.items():
            if key not in own:
                by_kind[kind] = by_kind.get(kind, 0) + size
        return by_kind

    found = kept(converted(make()))
    assert found["torch.int32"] == 2 * 4 * X.numel()
    assert found["torch.uint8"] == DEPTH * X.numel() * 3 // 8
    assert found["torch.float32"] <= 4 * X.numel() + 128  # the head's input; scale times 2; numbers
    plain = kept(make())
    assert plain["torch.float32"] > 2 * sum(found.values())


def test_frozen_and_shared_weights() -> None:
    """As with adapters: most weights are frozen, whole blocks are, and one block runs twice."""
    shared = Block()
    model = make(blocks=[Block(), shared, Block(), shared])
    model.blocks[2].up.weight = model.blocks[0].up.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mixing" in name or "up.weight" in name)
    check(converted(model))
    model = make()
    for part in (model.stem, model.blocks[0], model.blocks[1], model.head):
        part.requires_grad_(False)
    model.scale.requires_grad_(False)
    check(converted(model))


@pytest.mark.parametrize("returns", ["both", "middle"])
def test_hidden_states_in_the_loss(returns: str) -> None:
    """Gradients that enter in the middle, alone or beside others."""
    model = converted(make())
    model.returns = returns
    check(model)


def test_autocast() -> None:
    """Both runs of a branch are under it."""
    model = converted(make())
    with torch.autocast("cpu", torch.bfloat16):
        check(model, tolerance=0.05)


def test_lengths_and_batches_that_change() -> None:
    """One graph for any of them, from the second on."""
    model = converted(make())
    compiled = whole(model)
    for length in (8, 6, 5):
        check(model, compiled, x=X[:, :length])


def test_other_numbers_are_compiled_anew() -> None:
    """`recouple` between two steps."""
    model = converted(make())
    compiled = whole(model)
    check(model, compiled)
    before = one_step(compiled, X)[0]
    recouple(model, gamma=0.5)
    check(model, compiled)
    assert one_step(compiled, X)[0] != before


def test_a_stream_that_outgrows_its_grid_is_an_error_once() -> None:
    """The step is void, and the next one is begun on a coarser grid."""
    model = converted(make())
    compiled = whole(model)
    check(model, compiled)
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(1e3)
    for _ in range(8):
        try:
            one_step(compiled, X)
            break
        except FixedPointRangeError as error:
            assert "run the step again" in str(error)
    else:
        pytest.fail("the grid never became coarse enough")
    check(model, compiled, tolerance=1e-4)


def test_weights_changed_between_forward_and_backward() -> None:
    """The state does not come back to where it began: an error, and no gradient."""
    model = converted(make())
    loss = loss_of(whole(model)(X))
    with torch.no_grad():
        model.blocks[1].up.weight.data.mul_(1.01)
    with pytest.raises(ReconstructionError, match="did not come back to the state it began with"):
        loss.backward()


def test_other_modes_run_the_model_that_they_name() -> None:
    """Compiled code does not run where the original is asked for."""
    model, plain = converted(make()), make()
    compiled = torch.compile(model, backend="aot_eager")
    reversible, _ = one_step(compiled, X)
    original, _ = one_step(compiled, X, mode="original")
    torch.testing.assert_close(original, one_step(plain, X)[0])
    assert original != reversible
    torch.testing.assert_close(one_step(compiled, X)[0], reversible)


def test_without_gradients() -> None:
    """The same function."""
    model = converted(make()).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(model)(X), model(X))


def test_convert_compiles_the_model_and_revert_undoes_it() -> None:
    """Calls with gradients are compiled, others are not; copies are not compiled."""
    counters.clear()
    model = converted(make())
    counters.clear()
    check(model, model)
    assert counters["stats"]["calls_captured"]
    counters.clear()
    with torch.no_grad():
        model(X)
    assert not counters["stats"]["calls_captured"]
    loss, found = one_step(model, X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        counters.clear()
        again, gradients = one_step(twin, X)
        assert not counters["stats"]["calls_captured"]
        torch.testing.assert_close(again, loss)
        assert gap(gradients, found) < 1e-5
        check(twin)
    autorev.revert(model)
    assert model._compiled_call_impl is None
    assert not [block for block in model.blocks if {"compile", "forward"} & vars(block).keys()]
    assert gap(one_step(model, X)[1], one_step(make(), X)[1]) == 0


class Dropping(Block):
    """With dropout."""

    p = 0.1

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        return x + nn.functional.dropout(super().forward(x, scale=scale) - x, self.p, self.training)


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.count.add_(1)
        return super().forward(x, scale=scale)


class Breaking(Block):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, scale=scale)


REFUSED: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "dropout": (Dropping, {}, r"blocks\.0 draws random numbers"),
    "a buffer": (Counting, {}, r"blocks\.0 writes to a tensor of shape|side effect"),
    "a graph break": (Breaking, {}, "graph_break"),
    "steps": (Block, {"granularity": "sublayer"}, "in steps or tiles"),
    "two streams": (Block, {"method": "hamiltonian"}, "in steps or tiles"),
    "float": (Block, {"method": "leapfrog", "arithmetic": "float"}, "float arithmetic"),
    "drawn": (Block, {"method": "bdia"}, "drawn anew"),
    "host": (Block, {"host": "side_bits"}, "keep= and host="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_single_graph_is_compiled_block_by_block(case: str) -> None:
    """The reason is data, and the model trains right."""
    kind, how, why = REFUSED[case]
    model = make(blocks=[kind() for _ in range(DEPTH)])
    found = autorev.convert(model, batch=(X,), compile="graph", keep_last=0, **how)
    assert found.compiled == json.loads(found.to_json())["compiled"] == "blocks"
    assert found.why_not_graph is not None
    assert re.search(why, found.why_not_graph)
    assert f"Not one graph: {found.why_not_graph}" in str(found)
    assert model._compiled_call_impl is None
    assert len(list(forwards_of(model))) == DEPTH


WITHOUT = """
import torch._higher_order_ops
del torch._higher_order_ops.dynamo_bypassing_wrapper
import autorev
from tests.helpers.blocks import TOKENS, small
model = small()
print(autorev.convert(model, TOKENS, compile="graph").why_not_graph)
autorev.revert(model)
autorev.convert(model, TOKENS)
print(autorev.verify(model, TOKENS).passed)
"""


def test_without_an_internal_of_torch_only_the_whole_graph_is_missing() -> None:
    """A later torch may have renamed it."""
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    why, *_, passed = ran.stdout.splitlines()
    assert re.search(r"^torch .* has no torch\._higher_order_ops\.dynamo_bypassing_wrapper, which torch 2\.9", why)
    assert passed == "True"


def test_dropout_that_is_switched_on_later_is_an_error() -> None:
    """Not another mask in backward."""
    model = make(blocks=[Dropping() for _ in range(DEPTH)])
    for block in model.blocks:
        block.p = 0.0
    compiled = whole(converted(model))
    check(model, compiled)
    model.blocks[1].p = 0.1
    with pytest.raises(Exception, match=r"blocks\.1 draws random numbers"):
        one_step(compiled, X)


def test_a_loop_that_is_left_early_is_an_error() -> None:
    """Nothing would look whether the grid has held the stream."""
    model = converted(make())
    model.depth = 2
    with pytest.raises(Exception, match="the loop left blocks before its last block"):
        whole(model)(X)


def test_a_language_model() -> None:
    """With its loss and attention; the cache that it makes by itself in training is left out; it still generates."""
    model = tiny_model(blocks=2)
    ids = torch.arange(2 * 12).reshape(2, 12)
    plain = copy.deepcopy(model)
    found = autorev.convert(model, compile="graph", gamma=0.125, keep_last=0)
    assert found.why_not_graph is None
    model.train()
    loss, gradients = one_step(whole(model), input_ids=ids, labels=ids)
    assert autorev.drift(model) == {"model.layers": 0.0}
    right, oracle = one_step(model, input_ids=ids, labels=ids, use_cache=False, mode="oracle")
    torch.testing.assert_close(loss, right)
    assert gap(dict(zip(oracle, gradients.values(), strict=True)), oracle) < 1e-5
    model.eval()
    made = model.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        assert made[:, 12].equal(model(ids).logits[:, -1].argmax(-1))
    autorev.revert(model)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++ here")
def test_inductor_in_bfloat16() -> None:
    """Fused otherwise forward and backward, and yet rounded alike: by what `convert` compiles."""
    model = converted(make(blocks=[Block() for _ in range(2)]).bfloat16(), batch=(X.bfloat16(),))
    loss, found = one_step(model, X.bfloat16())
    assert autorev.drift(model) == {"blocks": 0.0}
    right, oracle = one_step(model, X.bfloat16(), mode="oracle")
    torch.testing.assert_close(loss, right, rtol=0.02, atol=0.02)
    assert gap(found, oracle) < 0.05
