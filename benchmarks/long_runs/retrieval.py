"""Key retrieval: each key has a value, told somewhere in noise, and at the end every key is asked for.

    noise (KEY_3 is b) noise noise (KEY_0 is f) noise ... | KEY_0 f KEY_3 b ...

What is in brackets is one token. Only the values behind the bar are learned, so that chance is one value of `VALUES`,
and a model is right if and only if it looks the key up in its context, however far back. After multi-query
associative recall (Arora et al., arXiv 2312.04927), whose two tokens a pair a network of this size learns too slowly.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORED = -100

KEYS, VALUES, NOISE = 4, 8, 32
FIRST_VALUE = KEYS
FIRST_PAIR = FIRST_VALUE + VALUES
FIRST_NOISE = FIRST_PAIR + KEYS * VALUES
VOCABULARY = FIRST_NOISE + NOISE
ASKED = 2 * KEYS
"""Tokens behind the bar."""
Batch = dict[str, torch.Tensor]


def sample(rows: int, length: int, draws: torch.Generator) -> Batch:
    """`input_ids` and `labels`, both int64 [rows, length]; labels are `IGNORED` but at the answers.

    Raises:
        ValueError: what is told and asked for does not fit so few tokens.
    """
    context = length - ASKED
    if context < KEYS:
        raise ValueError(f"{KEYS} keys need a length of {KEYS + ASKED} tokens or more, not {length}")
    ids = torch.randint(FIRST_NOISE, VOCABULARY, (rows, length), generator=draws)
    labels = torch.full_like(ids, IGNORED)
    for row in range(rows):
        values = torch.randint(VALUES, (KEYS,), generator=draws)
        places, asked = torch.randperm(context, generator=draws)[:KEYS], torch.randperm(KEYS, generator=draws)
        ids[row, places] = FIRST_PAIR + torch.arange(KEYS) * VALUES + values
        ids[row, context::2], ids[row, context + 1 :: 2] = asked, FIRST_VALUE + values[asked]
        labels[row, context + 1 :: 2] = FIRST_VALUE + values[asked]
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def accuracy(model: Any, length: int, rows: int, seed: int) -> float:
    """Share of right answers of a model in eval mode, on rows that training never draws."""
    draws = torch.Generator().manual_seed(seed)
    right = asked = 0
    for _ in range(rows):
        batch = sample(1, length, draws)
        logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=ASKED).logits
        wanted, found = batch["labels"][:, -ASKED + 1 :], logits[:, :-1].argmax(-1)
        learned = wanted != IGNORED
        right += int((found == wanted)[learned].sum())
        asked += int(learned.sum())
    return right / asked
