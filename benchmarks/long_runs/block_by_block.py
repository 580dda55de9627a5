"""A schedule driven by the measured loss: one block after the other is given the target's gamma in training.

Before the first step every block is tried alone, and the order is that of the loss they cost. A block moves when the
mean loss of the last steps is back within `SLACK` of what it was before the last move, or when its share of the steps
is over, so that all have moved after `MOVING` of them. Every move is written down with its step: a run that goes on
takes up those that its checkpoint had seen.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from autorev.conversion.convert import chains_of
from autorev.conversion.recouple import recouple
from autorev.conversion.schedule import TARGETS
from autorev.engine.eval_mode import eval_mode
from autorev.errors import FixedPointRangeError
from autorev.finetuning.checkpoints import step_of
from autorev.records import write_whole

MOVING = 2 / 3
"""Of all steps."""
WINDOW = 10
"""Steps whose mean loss is compared; a move is followed by as many at least."""
SLACK = 0.02
"""Nats."""
TRIED_ON = 4
"""Rows of the training text on which each block is tried."""
FILE = "moves.json"


class BlockByBlock(TrainerCallback):
    """`target`: leapfrog, midpoint or midpoint_a; `folder`: of the run; `steps`: all of them."""

    def __init__(self, target: str, folder: Path, steps: int) -> None:
        self.target, self.path, self.steps = target, folder / FILE, steps
        self.order: list[str] = []
        self.moves: list[tuple[int, str, float]] = []
        """(step before which it was made, block, gamma)."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """A run that ended after its last step trains no more, and is evaluated as it was."""
        found = [path for path in self.path.parent.glob("checkpoint-*") if path.is_dir()]
        self._take_up(model, max(map(step_of, found), default=0))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Go on with the moves that were made, or find out in which order to make them."""
        self._take_up(model, state.global_step)
        if not self.order:
            self.order = self._by_cost(model, kwargs["train_dataloader"])
            self._write()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move a block, if it is time."""
        if len(self.moves) == len(self.order):
            return
        losses = [row["loss"] for row in state.log_history if "loss" in row]
        share = MOVING * self.steps / len(self.order)
        if self._recovered(state.global_step, losses) or state.global_step >= share * (len(self.moves) + 1):
            block = self.order[len(self.moves)]
            self.moves.append((state.global_step, block, self._gamma(block)))
            self._write()
            recouple(model, gamma={block: self._gamma(block)})

    def _recovered(self, step: int, losses: list[float]) -> bool:
        last = self.moves[-1][0] if self.moves else 0
        if step - last < WINDOW or last < WINDOW:
            return step - last >= WINDOW
        return _mean(losses[-WINDOW:]) <= _mean(losses[last - WINDOW : last]) + SLACK

    def _gamma(self, block: str) -> float:
        if self.target in TARGETS:
            return float(TARGETS[self.target])
        return -random.Random(block).randint(1, 7) / 8

    def _take_up(self, model: Any, step: int) -> None:
        if self.path.is_file():
            held = json.loads(self.path.read_text(encoding="utf-8"))
            self.order = held["order"]
            self.moves = [(at, block, gamma) for at, block, gamma in held["moves"] if at < step]
        if self.moves:
            recouple(model, gamma={block: gamma for _, block, gamma in self.moves})

    def _write(self) -> None:
        write_whole(self.path, json.dumps({"target": self.target, "order": self.order, "moves": self.moves}))

    def _by_cost(self, model: Any, rows: Any) -> list[str]:
        """Blocks by the loss that each costs alone."""
        batches = [batch for batch, _ in zip(rows, range(TRIED_ON), strict=False)]
        blocks = list(dict.fromkeys(path for chain in chains_of(model) for path in chain.paths))
        couplings = [list(chain.couplings) for chain in chains_of(model)]
        costs = {}
        with torch.no_grad(), eval_mode(model):
            for block in blocks:
                recouple(model, gamma={block: self._gamma(block)})
                try:
                    costs[block] = sum(float(model(**batch, use_cache=False).loss) for batch in batches)
                except FixedPointRangeError:
                    costs[block] = float("inf")
                for chain, before in zip(chains_of(model), couplings, strict=True):
                    chain.couplings[:] = before
        return sorted(blocks, key=lambda block: costs[block])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
