"""A downstream check without a download: which of four endings is a held-out row's own?

A question is a row that training never saw (documents are held out whole): all but its last `ENDING` tokens. The
choices are its own ending and those of the next rows. The model chooses the ending that it gives the highest
probability; chance is one of `CHOICES`. After HellaSwag's form (arXiv 1905.07830), with endings that are not written
to deceive.
"""

from __future__ import annotations

from pathlib import Path

import torch

from autorev.engine.eval_mode import eval_mode
from autorev.engine.mode import ORIGINAL, running
from autorev.finetuning.packing import Rows
from autorev.finetuning.record import HELD_OUT, FineTuning
from autorev.finetuning.trained import trained_model

CHOICES, ENDING, LEAST = 4, 12, 24
"""LEAST: tokens of a row that makes a question."""
Question = tuple[list[int], list[list[int]]]
"""A beginning, and endings of which the first is right."""


def questions(rows: Rows) -> list[Question]:
    """One of every row whose first document is long enough."""
    documents = [list(row[0].ids) for row in rows.rows if len(row[0].ids) >= LEAST]
    endings = [ids[-ENDING:] for ids in documents]
    return [
        (ids[:-ENDING], [endings[(n + shift) % len(endings)] for shift in range(CHOICES)])
        for n, ids in enumerate(documents)
        if len(documents) >= CHOICES
    ]


@torch.no_grad()
def right(model: torch.nn.Module, asked: list[Question]) -> float:
    """Share of questions that the model answers right."""
    found = 0
    with eval_mode(model):
        for beginning, endings in asked:
            ids = torch.tensor([beginning + ending for ending in endings])
            scores = model(input_ids=ids, use_cache=False).logits[:, len(beginning) - 1 : -1].log_softmax(-1)
            likely = scores.gather(-1, ids[:, len(beginning) :, None]).sum((1, 2))
            found += int(likely.argmax()) == 0
    return found / len(asked)


def answers(folder: Path, record: FineTuning) -> dict[str, float]:
    """Of a run's model: as it was trained, and its weights in the plain architecture."""
    asked = questions(Rows.from_json((folder / HELD_OUT).read_text(encoding="utf-8")))
    if not asked:
        return {}
    model, _ = trained_model(folder, record)
    with running(ORIGINAL):
        plain = right(model, asked)
    return {"right": right(model, asked), "right, as the plain": plain}
