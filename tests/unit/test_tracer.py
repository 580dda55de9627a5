"""The value-carrying tracer: ordinary Python works in a forward, and what was decided on the way is written down.

python -m pytest tests/unit/test_tracer.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from autorev.capture.fake import new_fake_mode
from autorev.capture.record import record
from autorev.capture.tracer import CapturedBlock, capture

X = torch.randn(2, 4, 8)


class Holder(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.f = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.register_buffer("table", torch.ones(8))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def traced(body: Callable[..., Any], *args: Any, opened: frozenset[str] = frozenset(), **kwargs: Any) -> CapturedBlock:
    """The capture of a function."""
    return capture("", Holder(body), args, kwargs, opened)


def targets(captured: CapturedBlock, op: str) -> list[Any]:
    """Targets of the nodes of one kind, in order."""
    return [node.target for node in captured.graph.nodes if node.op == op]


def test_sub_modules_are_leaves() -> None:
    """One `call_module` node each, whatever is inside."""
    captured = traced(lambda m, x: m.inner(m.f(x)), X)
    assert targets(captured, "call_module") == ["f", "inner"]
    assert targets(captured, "call_function") == []


def test_an_opened_sub_module_is_traced_through() -> None:
    """Its own sub-modules become the leaves, and know where they stand."""
    captured = traced(lambda m, x: m.inner(x), X, opened=frozenset({"inner"}))
    assert targets(captured, "call_module") == ["inner.0", "inner.1"]
    assert all(n.meta["inside"] == ("Sequential",) for n in captured.graph.nodes if n.op == "call_module")


def test_python_runs_on_values() -> None:
    """`if`, `len`, `isinstance`, `**kwargs` and shapes need no proxy."""

    def body(m: Any, x: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        assert mask is None and isinstance(x, torch.Tensor) and len(x) == 2 and kwargs == {"flag": True}
        batch, *_ = x.shape
        return m.f(x).reshape(batch, -1) if x.dim() == 3 else x

    captured = traced(body, X, mask=None, flag=True)
    assert list(captured.placeholders) == ["args[0]"]
    assert targets(captured, "call_method") == ["reshape"]
    assert captured.decided == ()


def test_items_of_tuples_and_dicts_are_taken_out() -> None:
    """A tuple argument is one placeholder; what is read of it are `getitem` nodes."""
    captured = traced(lambda m, x, rotary, more: x * rotary[0] + more["mask"], X, (X, X), {"mask": X.clone()})
    assert list(captured.placeholders) == ["args[0]", "args[1]", "args[2]"]


@pytest.mark.parametrize(
    "question", [lambda x: bool(x.sum() > 0), lambda x: x.sum().item(), lambda x: x[0, 0].tolist()]
)
def test_a_decision_by_data_is_written_down(question: Callable[[torch.Tensor], Any]) -> None:
    """With the line at which the forward looked at the values."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        question(x)
        return m.f(x)

    (decision,) = traced(body, X).decided
    assert decision.endswith(f"(tests/unit/test_tracer.py:{question.__code__.co_firstlineno})")


def test_a_closure_stays_beside_the_graph() -> None:
    """A tensor that is neither argument nor parameter is a constant of the capture."""
    outside = torch.ones(8)
    captured = traced(lambda m, x: m.f(x) * outside, X)
    assert list(captured.constants.values()) == [outside]
    assert captured.lost == ()


def test_parameters_and_buffers_are_attributes() -> None:
    """By the name under which the module owns them."""
    assert targets(traced(lambda m, x: x * m.table + m.f.bias, X), "get_attr") == ["table", "f.bias"]


def test_a_tensor_from_unseen_code_is_told() -> None:
    """An operator that runs behind the back of torch functions leaves a hole in the graph."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            hidden = torch.tanh(x)
        return m.f(hidden)

    assert len(traced(body, X).lost) == 1


def test_writes_are_seen() -> None:
    """A node names the nodes whose value it changed in place."""
    captured = traced(lambda m, x: m.f(x).mul_(2), X)
    (mul,) = (node for node in captured.graph.nodes if node.target == "mul_")
    assert [node.target for node in mul.meta["mutates"]] == ["f"]


@dataclass
class Output:
    """A result as a dataclass."""

    hidden: torch.Tensor
    nothing: None = None


def test_structured_results_keep_their_places() -> None:
    """Tuples, dicts and dataclasses are structures of nodes."""
    captured = traced(lambda m, x: (Output(m.f(x)), {"x": x}), X)
    first, second = captured.output
    assert isinstance(first["hidden"], fx.Node) and first["nothing"] is None
    assert second["x"] is captured.placeholders["args[0]"]


def test_the_graph_computes_what_the_forward_computes() -> None:
    """A capture is a program, not only a picture."""

    def body(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = m.inner(x).transpose(1, 2).softmax(1).transpose(1, 2)
        h = (1 - h) ** 3 / (2 + 3**h) - x @ x.mT.sum(-1, keepdim=True) + h[..., :1] // 1
        return torch.where(mask, -h, x)

    module, mask = Holder(body), X > 0
    captured = capture("", module, (X, mask), {})
    assert torch.equal(captured.graph_module()(X, mask), module(X, mask))


def test_a_custom_function_can_be_run_from_the_graph() -> None:
    """fx's generated code finds it, and its own backward runs."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient / 2  # not the derivative

    captured = traced(lambda m, x: x + Halved.apply(x), X)
    x = X.clone().requires_grad_()
    out = captured.graph_module()(x)
    assert torch.equal(out, X * 3)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, torch.full_like(X, 1.5))


def test_nothing_is_written_to_the_module() -> None:
    """Attributes, hooks and sub-modules are as before."""
    module = Holder(lambda m, x: m.inner(m.f(x)))
    before = [(dict(vars(m)), list(m._modules)) for m in module.modules()]
    capture("", module, (X,), {})
    assert [(dict(vars(m)), list(m._modules)) for m in module.modules()] == before


def test_two_adds_on_one_line_have_two_places() -> None:
    """The instruction tells apart what the line number does not."""
    captured = traced(lambda m, x: (x + 1) + (x + 2), X)
    places = [node.meta["place"] for node in captured.graph.nodes if node.op == "call_method"]
    assert len({line for line, _ in places}) == 1
    assert len(set(places)) == 3


def test_fake_tensors_are_enough() -> None:
    """A capture needs shapes and no weights."""
    mode = new_fake_mode()
    with mode:
        module = Holder(lambda m, x: m.f(x) + x)
        captured = capture("", module, (torch.empty(2, 4, 8),), {})
    assert captured.output.meta["val"].shape == (2, 4, 8)


def test_the_recorded_call_sees_modules_inside_of_their_hooks() -> None:
    """What a hook makes of arguments and results is not what the module's own forward got and returned."""
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model[1].register_forward_hook(lambda module, inputs, output: output * 3)
    x = torch.zeros(2)
    second = record(model, (x,), {}).root.children[1]
    assert torch.equal(second.args[0], torch.ones(2))
    assert torch.equal(second.output, torch.ones(2))


def test_random_draws_are_seen_where_they_happen() -> None:
    """Dropout draws in training and not in evaluation; an embedding never does."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
    assert [call.draws_random for call in record(model.train(), (X,), {}).root.children] == [False, True]
    assert [call.draws_random for call in record(model.eval(), (X,), {}).root.children] == [False, False]


def test_caches_stay_off_while_a_call_is_recorded() -> None:
    """A config's `use_cache` is switched off for the recorded call, and on again afterwards."""

    class Config:
        use_cache = True

    model = Holder(lambda m, x: m.f(x) if m.config.use_cache else x)
    model.config = Config()
    assert record(model, (X,), {}).root.children == []
    assert model.config.use_cache is True


def test_one_tensor_for_two_arguments_is_two_placeholders() -> None:
    """A first decoder block may be given its own stream as memory; the two are not confused."""
    captured = traced(lambda m, x, memory: m.f(x) - memory, X, X)
    (sub,) = (node for node in captured.graph.nodes if node.target == "sub")
    assert sub.args[1] is captured.placeholders["args[1]"]
    assert all(node.meta["val"] is X for node in captured.placeholders.values())
