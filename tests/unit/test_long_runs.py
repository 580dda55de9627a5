"""The parts of the long runs: their task, their record, the limit, and the questions at their end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autorev.finetuning.data import Example
from autorev.finetuning.packing import Rows
from benchmarks.long_runs import quiz
from benchmarks.long_runs.limited import DoesNotFit, Steps, longest
from benchmarks.long_runs.nested import nest
from benchmarks.long_runs.retrieval import (
    ASKED,
    FIRST_NOISE,
    FIRST_PAIR,
    FIRST_VALUE,
    IGNORED,
    KEYS,
    VALUES,
    VOCABULARY,
    accuracy,
    sample,
)
from benchmarks.long_runs.saved import Lines, State


def test_every_answer_stands_in_the_context() -> None:
    """What is asked for was told exactly once, and only answers are learned."""
    batch = sample(20, 64, torch.Generator().manual_seed(0))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        told = ids[:-ASKED]
        pairs = told[(told >= FIRST_PAIR) & (told < FIRST_NOISE)] - FIRST_PAIR
        known = {int(pair) // VALUES: FIRST_VALUE + int(pair) % VALUES for pair in pairs}
        assert len(pairs) == len(known) == KEYS
        learned = (labels != IGNORED).nonzero()[:, 0]
        assert len(learned) == KEYS
        assert [int(labels[at]) for at in learned] == [known[int(ids[at - 1])] for at in learned]
        assert sorted(int(ids[at - 1]) for at in learned) == list(range(KEYS))
        assert bool((ids[learned] == labels[learned]).all())


class LooksUp(nn.Module):
    """Answers by reading the context; of every `wrong`th key it says another value."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **kwargs: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for pair in input_ids[0]:
            if FIRST_PAIR <= pair < FIRST_NOISE:
                key, value = divmod(int(pair) - FIRST_PAIR, VALUES)
                value = (value + (key < self.wrong)) % VALUES
                logits[0, input_ids[0] == key, FIRST_VALUE + value] = 1
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize("wrong", [0, 1, KEYS])
def test_accuracy_is_the_share_of_right_answers(wrong: int) -> None:
    """Counted on a model whose mistakes are known."""
    assert accuracy(LooksUp(wrong), 40, 5, 1) == 1 - wrong / KEYS


def test_too_short_a_context_is_refused() -> None:
    """Rather than told less than is asked."""
    with pytest.raises(ValueError, match="12 tokens or more, not 8"):
        sample(1, 8, torch.Generator())


@pytest.mark.parametrize("limit", [99, 100, 137, 500, 4000, 10**9])
@pytest.mark.parametrize("curve", [0.0, 0.01])
def test_the_longest_that_fits_is_found(limit: int, curve: float) -> None:
    """The very next length does not fit, in few tries."""
    tried = []

    def peak_at(length: int) -> int:
        tried.append(length)
        return int(36 + 2 * length + curve * length**2)

    found = longest(peak_at, limit, 32, 4096)
    fitting = [length for length in range(32, 4097, 32) if int(36 + 2 * length + curve * length**2) <= limit]
    assert found == max(fitting, default=None)
    assert len(tried) <= 14


def test_a_step_above_the_limit_ends_the_run() -> None:
    """Counted in the second step of each shape; one byte less than it needs is too little."""

    class Model(nn.Linear):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]  # as a language model
            return SimpleNamespace(loss=super().forward(input_ids.float()).square().mean())

    parts = [{"input_ids": torch.ones(4, 64)}]
    free = Steps(Model(64, 64), lambda step: 1e-3, None)
    for number in range(2):
        free.take(number, parts)
    weights = 64 * 65 * 4
    assert free.peak >= 4 * weights  # with gradients and both of AdamW's states
    Steps(Model(64, 64), lambda step: 1e-3, free.peak)
    bound = Steps(Model(64, 64), lambda step: 1e-3, free.peak - 1)
    bound.take(0, parts)
    with pytest.raises(DoesNotFit) as raised:
        bound.take(1, parts)
    assert raised.value.peak == free.peak


def test_nested_checkpoints_change_no_gradient() -> None:
    """Only when what is computed changes."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.runs = nn.Linear(8, 8), 0

        def forward(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
            self.runs += 1
            return hidden + scale * self.linear(hidden).tanh()

    torch.manual_seed(0)
    blocks = [Block() for _ in range(5)]
    decoder = SimpleNamespace(layers=nn.ModuleList(blocks))

    def gradients() -> list[torch.Tensor]:
        hidden = torch.linspace(-1, 1, 8)
        for layer in decoder.layers:
            hidden = layer(hidden, scale=0.5)
        return list(torch.autograd.grad(hidden.sum(), [block.linear.weight for block in blocks]))

    plain = gradients()
    nest(decoder)
    for block in blocks:
        block.runs = 0
    assert len(decoder.layers) == 2
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))
    assert [block.runs for block in blocks] == [3, 3, 2, 3, 2]  # a segment's second run ends before its last block


def test_a_record_keeps_its_order_and_its_other_lines(tmp_path: Path) -> None:
    """A line is replaced in its place, and what is done is not run again."""
    lines = Lines(tmp_path / "record.jsonl")
    lines.put({"name": "a", "status": "running"})
    lines.put({"name": "b", "status": "does not fit"})
    lines.put({"name": "a", "status": "done", "step": 3})
    again = Lines(tmp_path / "record.jsonl")
    assert list(again.by_name.values()) == [
        {"name": "a", "status": "done", "step": 3},
        {"name": "b", "status": "does not fit"},
    ]
    assert again.left(["c", "b", "a"]) == ["c"]


def test_a_state_is_taken_up_whole(tmp_path: Path) -> None:
    """Weights, the optimiser's numbers, the draws and the line; a half-written one is nobody's."""
    model = nn.Linear(2, 2)
    optimizer, draws = torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(3)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = State(tmp_path, "run")
    assert state.load(model, optimizer, draws) is None
    state.save(model, optimizer, draws, {"step": 1})
    (tmp_path / ".run.pt.1.part").write_bytes(b"half")
    wanted = torch.rand(3, generator=draws)
    other = nn.Linear(2, 2)
    fresh, drawn = torch.optim.AdamW(other.parameters(), lr=0.1), torch.Generator()
    assert state.load(other, fresh, drawn) == {"step": 1}
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(torch.rand(3, generator=drawn), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_the_likeliest_ending_is_the_answer() -> None:
    """A model that expects numbers to go up knows every ending; one that expects them to go down knows none."""

    class Counts(nn.Module):
        def __init__(self, up: int) -> None:
            super().__init__()
            self.up = up

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return SimpleNamespace(logits=10.0 * nn.functional.one_hot((input_ids + self.up) % 300, 300))

    def row(start: int) -> tuple[Example, ...]:
        ids = tuple(range(start, start + 30))
        return (Example(ids, ids, True),)

    asked = quiz.questions(Rows((row(0), row(50), row(100), row(150), (Example((1, 2), (1, 2), True),)), 30, True))
    assert len(asked) == 4
    assert all(len(endings) == quiz.CHOICES for _, endings in asked)
    assert asked[1][0][-1] + 1 == asked[1][1][0][0]
    assert quiz.right(Counts(1), asked) == 1.0
    assert quiz.right(Counts(-1), asked) < 1.0
    assert quiz.questions(Rows((row(0),), 30, True)) == []
