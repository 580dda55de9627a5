"""Examples -> rows of one length: several documents in a row, each seeing itself alone, or one each and padding.

Packed rows carry `position_ids` that begin anew with every document, from which `transformers` makes the attention
mask; `keeps_apart` looks whether the model at hand heeds them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autorev.engine.eval_mode import eval_mode
from autorev.errors import DataError, UnreadableError
from autorev.files import parse_json
from autorev.finetuning.data import IGNORED, Example

_APART = 1e-3
"""Relative difference of logits: of a document behind another one, and of the same document alone."""
_LOOKED_AT = 8
"""Tokens of each of the two documents of that comparison."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences ready to be trained on: `rows[i]` holds one or more examples, in order."""

    rows: tuple[tuple[Example, ...], ...]
    length: int
    packed: bool
    truncated: int = 0
    """Examples that lost their end."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Example, ...]:
        return self.rows[index]

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(example.learned for row in self.rows for example in row)

    @property
    def digest(self) -> str:
        """Of the token ids and labels, row by row."""
        found = hashlib.sha256()
        for row in self.rows:
            for example in row:
                found.update(array("q", [len(example.ids), *example.ids, *example.labels]).tobytes())
            found.update(b"row")
        return found.hexdigest()[:16]

    def first(self, count: int) -> Rows:
        """At most `count` rows, spread over all."""
        count = min(count, len(self.rows))
        rows = tuple(self.rows[n * len(self.rows) // count] for n in range(count))
        return Rows(rows, self.length, self.packed, self.truncated)

    def to_json(self) -> str:
        """The rows' token ids and labels."""
        rows = [[{"ids": example.ids, "labels": example.labels} for example in row] for row in self.rows]
        return json.dumps({"length": self.length, "packed": self.packed, "rows": rows})

    @classmethod
    def from_json(cls, text: str) -> Rows:
        """What `to_json` wrote.

        Raises:
            DataError: it is something else.
        """
        try:
            data = parse_json(text)
            rows = tuple(tuple(_example(each) for each in row) for row in data["rows"])
            length, packed = int(data["length"]), bool(data["packed"])
        except (UnreadableError, ValueError, KeyError, TypeError):
            raise DataError("is no text of token ids and labels") from None
        longest = max((sum(len(example.ids) for example in row) for row in rows), default=0)
        if not any(example.learned for row in rows for example in row) or longest > length:
            raise DataError("holds nothing to learn, or more in a row than its length")
        return cls(rows, length, packed)


def _example(data: Any) -> Example:
    ids, labels = tuple(data["ids"]), tuple(data["labels"])
    whole = all(type(token) is int and token >= 0 for token in ids) and all(type(label) is int for label in labels)
    if not whole or any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise ValueError("no token ids with the labels of theirs")
    return Example(ids, labels, False)


def make_rows(examples: Sequence[Example], length: int, packed: bool) -> Rows:
    """Rows of at most `length` tokens. Text is cut into rows; of other examples, what does not fit is cut off.

    Raises:
        DataError: nothing to learn is left.
    """
    pieces: list[Example] = []
    truncated = 0
    for example in examples:
        if example.is_text and not packed:
            pieces += [
                example.part(at, min(at + length, len(example.ids))) for at in range(0, len(example.ids), length)
            ]
        elif example.is_text or len(example.ids) <= length:
            pieces.append(example)
        else:
            pieces.append(example.part(0, length))
            truncated += 1
    rows = [(piece,) for piece in pieces] if not packed else [*_filled(pieces, length), *_fitted(pieces, length)]
    useful = tuple(row for row in rows if any(example.learned for example in row))
    if not useful:
        raise DataError(
            f"within {length} tokens there is nothing left to learn: every completion begins later; give a longer "
            "`sequence`"
        )
    return Rows(useful, length, packed, truncated)


def _filled(pieces: Sequence[Example], length: int) -> list[tuple[Example, ...]]:
    """Texts one behind the other, cut where a row is full."""
    rows: list[list[Example]] = [[]]
    room = length
    for piece in pieces:
        at = 0
        while piece.is_text and at < len(piece.ids):
            if room < 2:  # a single token teaches nothing
                rows.append([])
                room = length
            part = piece.part(at, min(at + room, len(piece.ids)))
            rows[-1].append(part)
            at += len(part.ids)
            room -= len(part.ids)
    return [tuple(row) for row in rows if row]


def _fitted(pieces: Sequence[Example], length: int) -> list[tuple[Example, ...]]:
    """Whole examples, the longest first, each into the first row with room."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for piece in sorted((p for p in pieces if not p.is_text), key=lambda p: -len(p.ids)):
        at = next((n for n, free in enumerate(room) if free >= len(piece.ids)), None)
        if at is None:
            rows.append([])
            room.append(length)
            at = len(rows) - 1
        rows[at].append(piece)
        room[at] -= len(piece.ids)
    return [tuple(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Collator:
    """Rows -> int64 [rows, tokens]: `input_ids`, `labels`, and `position_ids` (packed) or `attention_mask`."""

    packed: bool
    length: int
    pad: int

    def __call__(self, rows: Sequence[tuple[Example, ...]]) -> dict[str, torch.Tensor]:
        """The batch; packed ones have one shape, others are as long as their longest row."""
        length = self.length if self.packed else max(len(example.ids) for row in rows for example in row)
        made = [self._row(row, length) for row in rows]
        return {name: torch.tensor([row[name] for row in made]) for name in made[0]}

    def _row(self, row: tuple[Example, ...], length: int) -> dict[str, list[int]]:
        ids = [token for example in row for token in example.ids]
        labels = [label for example in row for label in example.labels]
        missing = length - len(ids)
        common = {"input_ids": ids + [self.pad] * missing, "labels": labels + [IGNORED] * missing}
        if not self.packed:
            return {**common, "attention_mask": [1] * len(ids) + [0] * missing}
        positions = [n for example in row for n in range(len(example.ids))]
        return {**common, "position_ids": positions + list(range(missing))}  # the padding sees itself alone


def keeps_apart(model: nn.Module, vocabulary: int) -> bool:
    """Does `model` compute for a document behind another one what it computes for it alone?"""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (1, 2 * _LOOKED_AT), generator=generator).to(device)
    half = torch.arange(_LOOKED_AT, device=device)
    call: Any = model
    try:
        with torch.no_grad(), eval_mode(model):
            both = call(input_ids=ids, position_ids=torch.cat([half, half])[None], use_cache=False).logits
            alone = call(input_ids=ids[:, _LOOKED_AT:], use_cache=False).logits
    except (TypeError, ValueError):  # its forward takes no position_ids
        return False
    return bool((both[:, _LOOKED_AT:] - alone).abs().max() <= _APART * alone.abs().max())
