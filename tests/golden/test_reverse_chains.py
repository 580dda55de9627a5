"""ReverseChains on graphs that people made themselves: the code before and after, and the numbers.

python -m pytest tests/golden/test_reverse_chains.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from autorev.engine.mode import running
from autorev.errors import CaptureError, ConversionError
from autorev.fx.reverse import ReverseChains, ReversibleStep
from tests.golden.test_fx_pass import GPT, IDS, Block, Halved, PostNorm, Scaled, exported, traced

WAYS: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
    "traced": traced,
    "blocks closed": lambda model: traced(model, Block),
    "exported": lambda model: exported(model, IDS),
}
each_way = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # copying what torch.export returned


def graph_of(way: str, block: type[nn.Module] = Block) -> fx.GraphModule:
    """A small GPT as a graph, with the same weights each time."""
    torch.manual_seed(0)
    return WAYS[way](GPT(block))


def code(gm: fx.GraphModule) -> str:
    """The generated forward, without its annotations."""
    return gm.code.strip()


def gradients(gm: fx.GraphModule, how: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, run reversibly, by the oracle or as it was."""
    gm.zero_grad(set_to_none=True)
    with running(how):
        loss = gm(IDS).square().mean()
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}


def test_the_code_before_and_after() -> None:
    """Four residual steps become four calls; what is around them stays as it was."""
    gm = graph_of("blocks closed")
    before = """
        def forward(self, ids : torch.Tensor) -> torch.Tensor:
            wte = self.wte(ids)
            size = ids.size(1);  ids = None
            arange = torch.arange(size);  size = None
            wpe = self.wpe(arange);  arange = None
            add = wte + wpe;  wte = wpe = None
            h_0 = getattr(self.h, "0")(add);  add = None
            h_1 = getattr(self.h, "1")(h_0);  h_0 = None
            ln_f = self.ln_f(h_1);  h_1 = None
            lm_head = self.lm_head(ln_f);  ln_f = None
            return lm_head
    """
    assert code(gm) == dedent(before).strip()

    result = ReverseChains((IDS,))(gm)

    after = """
        def forward(self, ids : torch.Tensor) -> torch.Tensor:
            wte = self.wte(ids)
            size = ids.size(1);  ids = None
            arange = torch.arange(size);  size = None
            wpe = self.wpe(arange);  arange = None
            add = wte + wpe;  wte = wpe = None
            reversible_0_0 = self.reversible_0_0(add);  add = None
            reversible_0_1 = self.reversible_0_1(reversible_0_0);  reversible_0_0 = None
            ln_f = self.ln_f(reversible_0_1);  reversible_0_1 = None
            lm_head = self.lm_head(ln_f);  ln_f = None
            return lm_head
    """
    assert code(gm) == dedent(after).strip()
    assert result is not None
    assert result.graph_module is gm
    assert result.modified


def test_the_code_of_an_opened_graph_after() -> None:
    """Where the tracer went into the blocks, each residual add ends a step."""
    gm = graph_of("traced")
    ReverseChains((IDS,))(gm)
    calls = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    assert calls == ["wte", "wpe", *(f"reversible_0_{step}" for step in range(4)), "ln_f", "lm_head"]


@each_way
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "leapfrog"}, {"method": "hamiltonian"}, {"gamma": 1 / 4, "keep_last": 0}],
    ids=["momentum", "leapfrog", "hamiltonian", "momentum 1/4"],
)
def test_gradients_are_the_oracle_s(way: str, options: dict[str, Any]) -> None:
    """One step of the rewritten graph, against the same coupling under ordinary autograd."""
    gm = graph_of(way)
    plain = gm(IDS)
    ReverseChains((IDS,), **options)(gm)

    loss, found = gradients(gm, "reversible")
    expected_loss, expected = gradients(gm, "oracle")
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys() == dict(gm.named_parameters()).keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    with running("original"):
        assert torch.equal(gm(IDS), plain)
    drifts = {d for module in gm.modules() if hasattr(module, "chain") for d in module.chain.drifts.values()}
    assert drifts == {0.0}


@each_way
def test_nothing_of_the_user_s_is_renamed(way: str) -> None:
    """The state_dict's keys and the parameters stay the same objects."""
    gm = graph_of(way)
    keys, parameters = list(gm.state_dict()), {id(p) for p in gm.parameters()}
    ReverseChains((IDS,))(gm)
    assert list(gm.state_dict()) == keys
    assert {id(p) for p in gm.parameters()} == parameters


@each_way
def test_a_second_application_changes_nothing(way: str) -> None:
    """The pass says so, and fits into a PassManager."""
    gm = graph_of(way)
    assert PassManager([ReverseChains((IDS,))])(gm).modified
    before = code(gm)
    result = ReverseChains((IDS,))(gm)
    assert result is not None
    assert not result.modified
    assert code(gm) == before


@each_way
def test_a_stream_that_is_multiplied_by_a_constant(way: str) -> None:
    """Each step knows its factor; loss and gradients are the oracle's."""
    gm = graph_of(way, Halved)
    ReverseChains((IDS,), keep_last=0)(gm)
    (loss, actual), (right, expected) = gradients(gm, "reversible"), gradients(gm, "oracle")
    assert torch.equal(loss, right)
    assert all(torch.allclose(actual[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
    factors = {step.factor.number for step in gm.modules() if isinstance(step, ReversibleStep)}
    assert factors == {0.5}


@pytest.mark.parametrize("block", [PostNorm, Scaled])
def test_a_graph_without_an_eligible_chain_stays_as_it_is(block: type[nn.Module]) -> None:
    """`modified` is False, and the code is the same."""
    gm = graph_of("traced", block)
    before = code(gm)
    result = ReverseChains((IDS,))(gm)
    assert result is not None
    assert not result.modified
    assert code(gm) == before


def test_a_copy_runs_its_own_weights() -> None:
    """deepcopy of a rewritten graph does not refer to the original's parameters."""
    gm = graph_of("traced")
    ReverseChains((IDS,))(gm)
    other = copy.deepcopy(gm)
    before = gm(IDS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(gm(IDS), before)
    assert not torch.equal(other(IDS), before)


def test_a_failing_probe_leaves_the_graph_as_it_was() -> None:
    """Weights that are not finite are noticed when the grid is chosen, and the rewrite is taken back."""
    gm = graph_of("traced")
    before, modules = code(gm), [name for name, _ in gm.named_modules()]
    with torch.no_grad():
        gm.get_submodule("h.0.mlp.up").weight[0, 0] = torch.nan
    with pytest.raises(ConversionError, match="not finite"):
        ReverseChains((IDS,))(gm)
    assert code(gm) == before
    assert [name for name, _ in gm.named_modules()] == modules


def test_bad_requests_are_refused_before_anything_is_rewritten() -> None:
    """Unknown shapes, a gamma that is no n / 2^k, and a coupling that does not exist."""
    gm = graph_of("traced")
    before = code(gm)
    with pytest.raises(CaptureError, match="shape of input ids"):
        ReverseChains()(gm)
    with pytest.raises(ConversionError, match="n / 2"):
        ReverseChains((IDS,), gamma=0.1)(gm)
    with pytest.raises(ConversionError, match="choose of"):
        ReverseChains((IDS,), method="sideways")
    assert code(gm) == before
