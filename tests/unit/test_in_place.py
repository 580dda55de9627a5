"""A method in place: the model trains as it says, and is the same before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from autorev.conversion.convert import forwards_of
from autorev.engine.mode import running
from autorev.in_place import Blocks, NotApplicable, in_place
from autorev.integrations.example_call import example_call_for
from autorev.methods import ALL, Method
from autorev.prediction.training import own_loss
from autorev.profiler.passes.prepare import find_blocks
from autorev.workload import Call
from tests.helpers import handwritten as hand
from tests.helpers.blocks import TOKENS, Results, assert_same, gradients_of, small
from tests.helpers.zoo import build

compiling = pytest.mark.filterwarnings("ignore")  # the compiler warns of what it meets in itself


pytestmark = pytest.mark.usefixtures("one_thread")


def stack() -> tuple[nn.Module, Call, Blocks]:
    """A hand-written model of four blocks, quick to compile."""
    torch.manual_seed(0)
    return with_blocks(small(), ((TOKENS,), {}))


def language_model() -> tuple[nn.Module, Call, Blocks]:
    """A Llama of three blocks, which has a loss of its own."""
    model = build("llama")
    return with_blocks(model, example_call_for(model, 2, 16))


def with_blocks(model: nn.Module, call: Call) -> tuple[nn.Module, Call, Blocks]:
    """A model, a call of it, and its blocks."""
    return model, call, find_blocks(model, call)


def looks(model: nn.Module) -> dict[str, Any]:
    """Everything that a method could leave behind."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": {path: {**module.__dict__} for path, module in model.named_modules()},
        "hooks": {
            path: [list(held) for name, held in vars(module).items() if name.endswith("_hooks")]
            for path, module in model.named_modules()
        },
        "gradients": [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks],
        "classes": [type(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """`model` looks as it did, to the attribute."""
    after = looks(model)
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(value, before["state"][name]) for name, value in after["state"].items())
    for key in ("hooks", "gradients", "classes", "training"):
        assert after[key] == before[key], key
    for path, attributes in before["attributes"].items():
        assert attributes.keys() == after["attributes"][path].keys(), path
        assert all(value is after["attributes"][path][name] for name, value in attributes.items()), path


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """What happens inside leaves the model and PyTorch as they were."""
    import torch._functorch.config as functorch

    before, budget = looks(model), functorch.activation_memory_budget
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    yield
    assert_untouched(model, before)
    assert functorch.activation_memory_budget == budget
    assert not any(hooks)
    assert not list(forwards_of(model))


def gradients(model: nn.Module, call: Call, mode: str = "reversible") -> Results:
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(), running(mode):
        torch.manual_seed(1)
        loss = own_loss(model, call)
        loss.backward()
    found = {"loss": loss.detach(), **gradients_of(model)}
    model.zero_grad(set_to_none=True)
    return found


def run(*specs: str) -> pytest.MarkDecorator:
    """One test for each of `specs`."""
    return pytest.mark.parametrize(
        "spec", [pytest.param(spec, marks=compiling if spec.startswith("compile") else ()) for spec in specs]
    )


@run(*ALL, "momentum:arithmetic=float", "leapfrog:granularity=sublayer", "momentum:k=3,keep_last=0,tile=3")
def test_a_method_trains_the_model_and_leaves_it_as_it_was(spec: str) -> None:
    """Gradients are those of plain training, or of the coupling under ordinary autograd; then nothing is left."""
    method = Method.parse(spec)
    model, call, blocks = language_model() if method.loss == "chunked" else stack()
    plain = gradients(model, call)
    with no_trace(model), in_place(model, method, blocks, call):
        found = gradients(model, call)
        expected = gradients(model, call, "oracle") if method.reversible else plain
        assert_same(found, expected, 1e-4 if method.loss == "chunked" else 1e-5)
        if method.reversible:
            assert list(forwards_of(model))
        else:
            replaced = [m for m in model.modules() if {"forward", "_compiled_call_impl"} & vars(m).keys()]
            wrapped = 0 if method.name == "plain" else len(blocks.paths)
            assert len(replaced) == wrapped + (method.loss == "chunked")
    assert_same(gradients(model, call), plain, 0.0)


@run("checkpoint", "sac", "offload", "compile", "leapfrog", "momentum:k=3,loss=chunked")
def test_an_error_inside_leaves_nothing_behind(spec: str) -> None:
    """The body's own exception comes out, and the model is whole."""
    model, call, blocks = language_model() if "chunked" in spec else stack()
    with (
        no_trace(model),
        pytest.raises(ZeroDivisionError),
        in_place(model, Method.parse(spec), blocks, call),
    ):
        raise ZeroDivisionError


def test_a_forward_of_the_users_own_comes_back() -> None:
    """What stood on an instance before is called inside the method, and stands there again."""
    model, call, blocks = stack()
    block: Any = model.get_submodule(blocks.paths[1])
    block.forward = lambda x: type(block).forward(block, 2 * x)
    own = block.forward
    changed = gradients(model, call)
    with no_trace(model), in_place(model, Method.parse("checkpoint"), blocks, call):
        assert_same(gradients(model, call), changed, 0.0)
    assert block.forward is own


@compiling
def test_dropout_is_replayed_under_checkpointing() -> None:
    """Blocks that draw random numbers get the same gradients, as their random state is kept."""
    torch.manual_seed(0)
    model, call, blocks = with_blocks(hand.stack_of(hand.Dropping), ((TOKENS,), {}))
    assert blocks.draws_random
    plain = gradients(model, call)
    for spec in ("checkpoint", "sac", "offload", "compile:budget=1"):
        with no_trace(model), in_place(model, Method.parse(spec), blocks, call):
            if not spec.startswith("compile"):  # which draws its own numbers
                assert_same(gradients(model, call), plain, 1e-5)


def test_compile_below_a_full_budget_is_refused_with_dropout() -> None:
    """torch.compile would recompute with other random numbers than in forward."""
    model, call, blocks = with_blocks(hand.stack_of(hand.Dropping), ((TOKENS,), {}))
    with (
        no_trace(model),
        pytest.raises(NotApplicable, match=r"draw random numbers \(dropout\), which torch.compile replays wrongly"),
        in_place(model, Method.parse("compile"), blocks, call),
    ):
        pass


@run("checkpoint", "sac", "offload", "compile")
def test_turns_of_a_loop_have_no_module_to_wrap(spec: str) -> None:
    """An inline loop refuses what goes around modules, and can be made reversible all the same."""
    model, call, blocks = with_blocks(hand.Loop(), ((torch.randn(2, 8, hand.WIDTH),), {}))
    assert blocks.inline
    with (
        no_trace(model),
        pytest.raises(NotApplicable, match="its blocks are turns of a loop: there is no module to"),
        in_place(model, Method.parse(spec), blocks, call),
    ):
        pass
    with no_trace(model), in_place(model, Method.parse("momentum"), blocks, call):
        assert list(forwards_of(model))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("plain:loss=chunked", "no loss to compute in chunks"),
        ("momentum:loss=chunked", "no loss to compute in chunks"),
        ("momentum:gamma=0.3", "gamma = 0.3 .* which exact arithmetic needs"),
    ],
)
def test_what_cannot_be_had_says_why(spec: str, words: str) -> None:
    """A conversion that is refused is a method that does not apply, with the conversion's own words."""
    model, call, blocks = stack()
    with no_trace(model), pytest.raises(NotApplicable, match=words), in_place(model, Method.parse(spec), blocks, call):
        pass


def test_a_refused_coupling_takes_the_chunked_loss_with_it() -> None:
    """Half of a method is not left in place when the other half is refused."""
    model, call, blocks = language_model()
    with (
        no_trace(model),
        pytest.raises(NotApplicable, match="exact arithmetic needs"),
        in_place(model, Method.parse("momentum:gamma=0.3,loss=chunked"), blocks, call),
    ):
        pass


def test_offloading_frees_the_host_with_the_graph() -> None:
    """Every byte that was moved is taken back after backward, also when backward never comes."""
    model, call, blocks = stack()
    with in_place(model, Method.parse("offload"), blocks, call) as placed:
        assert placed.host is not None
        loss = own_loss(model, call)
        stream = TOKENS.numel() * hand.WIDTH * 4
        assert placed.host.bytes == len(blocks.paths) * stream
        loss.backward()
        assert placed.host.bytes == 0
        loss = own_loss(model, call)
        del loss
        assert placed.host.bytes == 0
        assert placed.host.peak == len(blocks.paths) * stream


def test_side_bits_are_the_exponent_of_gamma() -> None:
    """gamma = n / 2^k costs k bits an element and step, and none in float arithmetic."""
    model, call, blocks = stack()
    bits = {**{f"momentum:k={k}": k for k in range(1, 8)}, "momentum:gamma=0.375": 3, "momentum:gamma=-0.5": 1}
    bits |= {"momentum:gamma=1": 0, "leapfrog": 0, "hamiltonian": 0, "bdia": 1, "momentum:k=1,arithmetic=float": 0}
    for spec, most in bits.items():
        with in_place(model, Method.parse(spec), blocks, call) as placed:
            assert placed.side_bits == most, spec
