"""Rows: nothing lost, nothing doubled, nothing seen that belongs to another document; the gradients say so."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autorev
from autorev.errors import DataError
from autorev.finetuning.data import IGNORED, Example
from autorev.finetuning.packing import Collator, Rows, keeps_apart, make_rows
from tests.helpers.one_step import gap, one_step
from tests.helpers.tiny_llm import LENGTH, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PAD = 257
Row = tuple[Example, ...]


def example(length: int, first: int = 0, is_text: bool = False, prompt: int = 1) -> Example:
    """Token ids that count up from `first`; the first `prompt` of them are not learned."""
    ids = tuple(range(first, first + length))
    return Example(ids, (IGNORED,) * min(prompt, length) + ids[prompt:], is_text)


def examples(lengths: list[int], is_text: bool, prompt: int = 1) -> list[Example]:
    """One behind the other: every token of all is another number."""
    return [example(n, sum(lengths[:at]), is_text, prompt) for at, n in enumerate(lengths)]


def ids_in(rows: Any) -> list[int]:
    """All tokens in order."""
    return [token for row in rows for part in row for token in part.ids]


def rows_or_none(given: list[Example], length: int, packed: bool) -> Rows | None:
    """Rows, or None where there is nothing to learn."""
    if not any(part.learned for part in given):
        return None
    return make_rows(given, length, packed)


lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths_of, st.integers(2, 30), st.booleans())
def test_of_text_no_token_is_lost_or_doubled(lengths: list[int], length: int, packed: bool) -> None:
    """In their order; only a text's last token may be alone, as a part, or in a row that is left out for it."""
    documents = examples(lengths, is_text=True)
    rows = rows_or_none(documents, length, packed)
    if rows is None:
        return
    found = ids_in(rows.rows)
    assert found == sorted(set(found))
    missing = set(range(sum(lengths))) - set(found)
    ends = {document.ids[-1] for document in documents}
    assert missing <= ends
    assert {part.ids[0] for row in rows.rows for part in row if len(part.ids) == 1} <= ends
    assert rows.truncated == 0


@given(lengths_of, st.integers(2, 30), st.booleans(), st.booleans())
def test_no_row_is_too_long_and_each_teaches_something(
    lengths: list[int], length: int, packed: bool, is_text: bool
) -> None:
    """A part's labels are its own tokens, and never its first."""
    rows = rows_or_none(examples(lengths, is_text), length, packed)
    if rows is None:
        return
    for row in rows.rows:
        assert 2 <= sum(len(part.ids) for part in row) <= length
        assert any(part.learned for part in row)
        assert packed or len(row) == 1
        assert all(part.labels == (IGNORED, *part.ids[1:]) for part in row)
    assert rows.learned == sum(len(part.ids) - 1 for row in rows.rows for part in row)


@given(lengths_of, st.integers(2, 30))
def test_packed_text_fills_its_rows(lengths: list[int], length: int) -> None:
    """All but the last have room for less than two tokens: there are as few rows as there can be, or nearly."""
    rows = rows_or_none(examples(lengths, is_text=True), length, packed=True)
    if rows is None:
        return
    filled = [sum(len(part.ids) for part in row) for row in rows.rows]
    assert all(length - count < 2 for count in filled[:-1])


@given(lengths_of, st.integers(2, 30), st.booleans())
def test_examples_stay_whole_or_lose_their_end(lengths: list[int], length: int, packed: bool) -> None:
    """Each is there once, from its first token on; how many were cut is counted."""
    documents = examples(lengths, is_text=False)
    rows = rows_or_none(documents, length, packed)
    if rows is None:
        return
    found = {part.ids[0]: part.ids for row in rows.rows for part in row}
    assert sum(len(row) for row in rows.rows) == len(found)
    for document in documents:
        if document.learned:
            assert found[document.ids[0]] == document.ids[:length]
    assert rows.truncated == sum(n > length for n in lengths)


@given(lengths_of, st.integers(2, 30))
def test_examples_go_into_the_first_row_with_room(lengths: list[int], length: int) -> None:
    """The longest first: none would have fitted into an earlier row when it was placed."""
    rows = rows_or_none(examples(lengths, is_text=False, prompt=0), length, packed=True)
    if rows is None:
        return
    for earlier, row in ((a, b) for n, b in enumerate(rows.rows) for a in rows.rows[:n]):
        for part in row:
            longer = sum(len(other.ids) for other in earlier if len(other.ids) >= len(part.ids))
            assert longer + len(part.ids) > length
    for row in rows.rows:
        assert all(len(a.ids) >= len(b.ids) for a, b in pairwise(row))


def test_first_fit_by_hand() -> None:
    """6, 5, 4, 3, 2 into rows of 10: 6 + 4, 5 + 3 + 2."""
    rows = make_rows(examples([4, 3, 6, 2, 5], is_text=False), 10, packed=True)
    assert [[len(part.ids) for part in row] for row in rows.rows] == [[6, 4], [5, 3, 2]]


def test_texts_and_examples_share_no_row() -> None:
    """An example is whole in its row, so it is not put where a text was cut."""
    rows = make_rows([example(12, 0, is_text=True), example(4, 100), example(3, 200)], 10, packed=True)
    assert [[(part.ids[0], len(part.ids)) for part in row] for row in rows.rows] == [
        [(0, 10)],
        [(10, 2)],
        [(100, 4), (200, 3)],
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_a_completion_behind_the_end_of_a_row_is_nothing_to_learn(packed: bool) -> None:
    """Its row is left out, and where none is left that is an error with what to do."""
    far, near = example(20, prompt=15), example(20, 100, prompt=5)
    rows = make_rows([far, near], 10, packed)
    assert ids_in(rows.rows) == list(range(100, 110))
    assert rows.truncated == 2
    with pytest.raises(DataError, match=r"within 10 tokens there is nothing left to learn.*longer `sequence`"):
        make_rows([far], 10, packed)


def test_the_first_rows_are_spread_over_all() -> None:
    """As many as asked for, or all."""
    rows = make_rows(examples([10] * 12, is_text=False), 10, packed=False)
    assert [row[0].ids[0] // 10 for row in rows.first(4).rows] == [0, 3, 6, 9]
    assert rows.first(50).rows == rows.rows
    assert (rows.first(4).length, rows.first(4).packed) == (10, False)


def test_rows_come_back_from_json() -> None:
    """Their tokens, labels, length and packing."""
    rows = make_rows(examples([4, 3, 6], is_text=False, prompt=2), 10, packed=True)
    again = Rows.from_json(rows.to_json())
    assert again.rows == rows.rows
    assert (again.length, again.packed) == (10, True)


# -- batches


def test_packed_batches_by_hand() -> None:
    """One shape; positions begin anew with each document and with the padding, which is not learned; no mask."""
    rows: list[Row] = [(example(3, 10), example(2, 20)), (example(6, 30, prompt=4),)]
    batch = Collator(packed=True, length=7, pad=PAD)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11, 12, 20, 21, PAD, PAD], [30, 31, 32, 33, 34, 35, PAD]],
        "labels": [[-100, 11, 12, -100, 21, -100, -100], [-100, -100, -100, -100, 34, 35, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padded_batches_by_hand() -> None:
    """As long as their longest row; the padding is masked, and not learned even where it is a token like any other."""
    batch = Collator(packed=False, length=7, pad=11)([(example(3, 10),), (example(5, 30),)])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11, 12, 11, 11], [30, 31, 32, 33, 34]],
        "labels": [[-100, 11, 12, -100, -100], [-100, 31, 32, 33, 34]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    }


# -- what a model makes of them


class Blind(hf.LlamaForCausalLM):  # type: ignore[misc]  # transformers is untyped here
    """A model that takes position_ids and ignores them."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class WithoutPositions(hf.LlamaForCausalLM):  # type: ignore[misc]  # transformers is untyped here
    """A model whose forward has no such argument."""

    def forward(self, input_ids: Any = None, use_cache: bool = False) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


class OnlyPositions(hf.GPT2LMHeadModel):  # type: ignore[misc]  # transformers is untyped here
    """A model that heeds the positions, but makes no mask of them."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_transformers_keep_documents_apart(family: str) -> None:
    """By looking, which changes neither mode nor weights, nor draws from the random numbers."""
    model = tiny_model(family, dropout=0.1).train()
    state = torch.get_rng_state()
    assert keeps_apart(model, 256) is True
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kind", "family"), [(Blind, "llama"), (WithoutPositions, "llama"), (OnlyPositions, "gpt2")], ids=lambda x: str(x)
)
def test_models_that_mix_documents_are_found_out(kind: Any, family: str) -> None:
    """Whether they ignore the positions, do not take them, or let later documents look at earlier ones."""
    model = kind(tiny_model(family).config).train()
    assert keeps_apart(model, 256) is False
    assert model.training


def documents_for(packed: bool) -> tuple[list[Row], list[Row]]:
    """Two documents of different length: together as the run packs them, and each by itself."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, prompt in ((37, 1), (24, 9)):
        ids = tuple(torch.randint(256, (length,), generator=generator).tolist())
        made.append(Example(ids, (IGNORED,) * prompt + ids[prompt:], False))
    together: list[Row] = [tuple(made)] if packed else [(document,) for document in made]
    return together, [(document,) for document in made]


def summed(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Any:
    """Loss and gradients over all learned tokens of all batches, each token with the same weight."""
    count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)

    def all_of_them() -> torch.Tensor:
        call: Any = model
        return sum(call(**batch, use_cache=False, num_items_in_batch=count).loss for batch in batches)  # type: ignore[return-value]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            return all_of_them()

    return one_step(Whole(), loss=lambda loss: loss)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("coupling", [None, "momentum", "leapfrog"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_the_documents_apart(family: str, coupling: str | None, packed: bool) -> None:
    """Token by token, in a converted model too; packed into a row with padding, or padded to one length."""
    model = tiny_model(family).train()
    if coupling is not None:
        autorev.convert(model, method=coupling, fraction_bits=20)
    together, apart = documents_for(packed)
    loss, found = summed(model, [Collator(packed, LENGTH, PAD)(together)])
    expected_loss, expected = summed(model, [Collator(False, LENGTH, PAD)([row]) for row in apart])
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert gap(found, expected) < 1e-3
    assert set(autorev.drift(model).values()) == (set() if coupling is None else {0.0})


def test_the_gradients_can_tell() -> None:
    """Of the comparison above: documents that see each other have other gradients, by far."""
    model = tiny_model().train()
    together, apart = documents_for(packed=True)
    batch = Collator(True, LENGTH, PAD)(together)
    del batch["position_ids"]
    _, mixed = summed(model, [batch])
    _, expected = summed(model, [Collator(False, LENGTH, PAD)([row]) for row in apart])
    assert gap(mixed, expected) > 0.03


def test_two_packed_rows_are_a_batch() -> None:
    """Rows with their documents in other places do not see each other either."""
    model = tiny_model().train()
    autorev.convert(model, fraction_bits=20)
    (together,), apart = documents_for(packed=True)
    collator = Collator(True, LENGTH, PAD)
    _, found = summed(model, [collator([together, together[::-1]])])
    _, expected = summed(model, [Collator(False, LENGTH, PAD)([row]) for row in (*apart, *apart)])
    assert gap(found, expected) < 1e-3
