"""The stream analysis on small hand-built graphs: what is an add of the stream, and where it is cut.

python -m pytest tests/unit/test_stream.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from autorev.capture.tracer import capture
from autorev.detect.stream import ResidualStep, Stream, follow

X = torch.randn(2, 4, 8)


class Written(nn.Module):
    """A block whose forward is a function of the stream `x` and a map `f`."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body = body
        self.f = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def steps(body: Callable[[Any, torch.Tensor], torch.Tensor]) -> list[ResidualStep] | None:
    """The residual steps between the argument and the output; None where the output is not the stream."""
    captured = capture("", Written(body), (X.clone(),), {})
    stream: Stream = follow(captured.placeholders["x"])
    output = captured.output
    assert isinstance(output, fx.Node)
    return stream.steps_to(output) if output in stream else None


ONE_STEP = {
    "x + f(x)": lambda m, x: x + m.f(x),
    "f(x) + x": lambda m, x: m.f(x) + x,
    "x += f(x)": lambda m, x: x.add_(m.f(x)),
    "f(x) += x": lambda m, x: m.f(x).add_(x),
    "x - f(x)": lambda m, x: x - m.f(x),
    "torch.add(x, f(x), alpha=2)": lambda m, x: torch.add(x, m.f(x), alpha=2),
    "addcmul": lambda m, x: torch.addcmul(x, m.scale, m.f(x)),
    "rezero": lambda m, x: x + m.scale * m.f(x),
    "sum of a list": lambda m, x: sum([x, m.f(x)]),
    "two terms": lambda m, x: x + m.f(x) + torch.tanh(m.f(x)),
    "flattened": lambda m, x: (x.view(-1, 8) + m.f(x).view(-1, 8)).view(2, 4, 8),
    "transposed": lambda m, x: (x.transpose(0, 1) + m.f(x).transpose(0, 1)).transpose(0, 1),
    "widened": lambda m, x: x.double() + m.f(x),
    "dropout of nothing": lambda m, x: F.dropout(x + m.f(x), 0.0),
    "broadcast branch": lambda m, x: x + m.f(x).mean(1, keepdim=True),
    "a bias behind": lambda m, x: x + m.f(x) + m.scale,
    "f(x) - x": lambda m, x: m.f(x) - x,
    "2 x + f(x)": lambda m, x: 2 * x + m.f(x),
    "alpha on the skip": lambda m, x: torch.add(m.f(x), x, alpha=2),
    "beta on the skip": lambda m, x: torch.baddbmm(x, m.f(x), torch.ones(2, 8, 8), beta=0.5),
    "lerp": lambda m, x: torch.lerp(x, m.f(x), 0.5),
    "the sum is divided": lambda m, x: (x + m.f(x)) / 3,
    "a multiple of itself": lambda m, x: x + 0.5 * x + m.f(x),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_residual_step(name: str) -> None:
    """However the add is written, it is one step that starts at the argument."""
    found = steps(ONE_STEP[name])
    assert found is not None
    assert len(found) == 1
    assert found[0].before.op == "placeholder"
    assert found[0].reads_stream()


NOT_THE_STREAM = {
    "lerp by a tensor": lambda m, x: torch.lerp(x, m.f(x), m.scale),
    "a learned factor": lambda m, x: m.scale * x + m.f(x),
    "nothing of it": lambda m, x: torch.add(m.f(x), x, alpha=0),
    "f(x)": lambda m, x: m.f(x),
    "x + x": lambda m, x: x + x + m.f(x),
    "detached": lambda m, x: x.detach() + m.f(x),
    "norm behind": lambda m, x: F.layer_norm(x + m.f(x), (8,)),
    "norm before the skip": lambda m, x: F.layer_norm(x, (8,)) + m.f(x),
    "broadcast stream": lambda m, x: x + m.f(x) + torch.ones(3, 1, 1, 1),
    "concatenated": lambda m, x: torch.cat([x, m.f(x)], -1),
    "part of it": lambda m, x: (x + m.f(x))[:, 1:],
    "relu in place": lambda m, x: F.relu(x, inplace=True) + m.f(x),
}


@pytest.mark.parametrize("name", NOT_THE_STREAM)
def test_not_a_residual_step(name: str) -> None:
    """The output of these does not contain the argument as it is."""
    assert steps(NOT_THE_STREAM[name]) is None


def test_two_steps_are_cut_between() -> None:
    """The second branch reads what the first add made."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = x + m.f(x)
        return h + m.f(h)

    first, second = steps(body) or []
    assert second.before is first.after


def test_a_branch_that_reads_the_first_stream_joins_two_adds_into_one_step() -> None:
    """No cut lies where a path from start to end goes around the add."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = x + m.f(x)
        return h + m.f(x)

    (step,) = steps(body) or []
    assert len(step.adds) == 2


def test_an_add_inside_a_branch_is_no_step() -> None:
    """GPT-2's tanh-GELU contains `u + 0.044715 u^3`."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u = m.f(x)
        return x + m.f(u + 0.044715 * u**3)

    (step,) = steps(body) or []
    assert len(step.adds) == 1
    assert sum(node.op == "call_module" for node in step.branch_nodes()) == 2


def test_the_source_of_a_step_is_the_line_of_its_add() -> None:
    """Not the line of the call."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        branch = m.f(x)
        return x + branch

    (step,) = steps(body) or []
    assert step.source == f"tests/unit/test_stream.py:{body.__code__.co_firstlineno + 2}"
