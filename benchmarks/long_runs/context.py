"""A longer context than most methods fit: python -m benchmarks.long_runs.context [--json] [ROW ...]

A Llama-shaped model has learned to look keys up in short contexts (`retrieval.py`; the row `BASE`, from random
weights). Its context is extended to `PLAN.length` tokens within a fixed memory: weights, gradients, AdamW's states
and activations, by the allocator's own events (`limited.py`). Each row is one way to train, from the same weights.
What does not fit at the full length is said with its peak there, trains at the longest length that fits, by the same
number of steps and rows, and is asked at the full length like the others.

    python -m benchmarks.long_runs.context                 # runs what is left, and prints the table
    python -m benchmarks.long_runs.context --table         # prints the table of what is recorded

A run that was ended, by whatever, goes on from its last save when the command is given again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autorev.conversion.convert import chains_of
from autorev.couplings.arithmetic import FixedPoint
from autorev.engine.eval_mode import eval_mode
from autorev.finetuning.agreeing import grids
from autorev.in_place import InPlace, in_place
from autorev.methods import Method
from autorev.profiler.passes.prepare import find_blocks
from benchmarks.long_runs.limited import DoesNotFit, Steps, longest
from benchmarks.long_runs.nested import nest
from benchmarks.long_runs.retrieval import VOCABULARY, accuracy, sample
from benchmarks.long_runs.saved import Line, Lines, State, claimed
from benchmarks.long_runs.tables import MIB, of_context

RECORD, FOLDER = Path("profiles/recorded/long_runs/context.jsonl"), Path("runs/long_context")
HELD_OUT = 10_000
"""Seed of the rows that are asked; training draws from the plan's own."""
FINALLY = 3


Stage = tuple[int, int, int]
"""Length, rows in a step, steps."""
BASE, WEIGHTS = "short context", "short_context_weights.pt"


@dataclass(frozen=True)
class Plan:
    """What every row is given alike."""

    width: int = 64
    blocks: int = 24
    length: int = 4096
    limit: int = 32 * MIB
    """Bytes."""
    short: tuple[Stage, ...] = ((32, 32, 340), (128, 8, 60), (512, 2, 60))
    """Of `BASE`: longer and longer."""
    stages: tuple[Stage, ...] = ((2048, 1, 10), (4096, 1, 20))
    """Of every row."""
    rates: tuple[float, float] = (2e-3, 5e-4)
    """Learning rates of both."""
    warmup: int = 20
    """Steps in which the base's rate rises."""
    cooldown: int = 10
    """Last steps of a row, in which its rate falls to nothing."""
    least: int = 32
    """The shortest length, of which all that are tried are multiples."""
    asked: int = 8
    """Rows of each length that are asked after each stage; after the last one, `FINALLY` times as many."""
    every: int = 10
    """Steps between saves."""
    seed: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """That are asked."""
        return tuple(dict.fromkeys(length for length, _, _ in (*self.short, *self.stages)))

    def stages_of(self, name: str) -> tuple[Stage, ...]:
        """Of the base, or of a row."""
        return self.short if name == BASE else self.stages

    def rate_at(self, name: str, step: int) -> float:
        """The learning rate of a step of the base, or of a row, the first of which is 0."""
        if name == BASE:
            return self.rates[0] * min(1.0, (step + 1) / self.warmup)
        steps = sum(count for _, _, count in self.stages)
        return self.rates[1] * min(1.0, (steps - step) / self.cooldown)


PLAN = Plan()
TILES = "tile=auto,loss=chunked"
NESTED = "nested checkpoint"
ROWS = {
    BASE: f"checkpoint:{TILES}",
    "autorev, momentum, tiles": f"momentum:k=3,keep_last=0,{TILES}",
    "checkpoint, tiles": f"checkpoint:{TILES}",
    "autorev, leapfrog, tiles": f"leapfrog:keep_last=0,{TILES}",
    "plain": "plain:loss=chunked",
    "plain, tiles": f"plain:{TILES}",
    "checkpoint": "checkpoint:loss=chunked",
    "nested checkpoint, tiles": f"{NESTED}:{TILES}",
    "autorev, momentum": "momentum:k=3,keep_last=0,loss=chunked",
    "offload, tiles": f"offload:{TILES}",
}
"""In the order in which they are run; `nested checkpoint` is `nested.py`, every other a method of autorev."""


def model_of(plan: Plan) -> Any:
    """Random weights; the branches begin small, as GPT-2's do, so that depth does not slow learning."""
    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=plan.width,
        intermediate_size=2 * plan.width,
        num_hidden_layers=plan.blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=plan.length,
        tie_word_embeddings=True,
        initializer_range=0.05,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    with torch.no_grad():
        for layer in model.model.layers:
            for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                out.weight /= (2 * plan.blocks) ** 0.5
    return model


@contextmanager
def trained_by(model: Any, spec: str) -> Iterator[InPlace]:
    """While it lasts, `model` trains that way."""
    call = ((), {**sample(1, 64, torch.Generator().manual_seed(0)), "use_cache": False})
    method = Method.parse(spec.replace(NESTED, "plain"))
    with in_place(model, method, find_blocks(model, call), call) as placed:
        if spec.startswith(NESTED):
            nest(model.model)
        yield placed


def peaks(plan: Plan, spec: str, length: int, passes: int = 1) -> tuple[int, int]:
    """Of a warm step, one row of so many tokens a pass: the most bytes alive at once, and those on the host."""
    model = model_of(plan)
    draws = torch.Generator().manual_seed(plan.seed)
    with trained_by(model, spec) as placed:
        steps = Steps(model, lambda step: 0.0, None)
        for number in range(2):
            steps.take(number, [sample(1, length, draws) for _ in range(passes)])
        found = steps.peak, placed.host.peak if placed.host else 0
    gc.collect()
    return found


def measured(name: str, plan: Plan, lines: Lines) -> Line:
    """The row's line, which says at least what a step of the full length holds."""
    line: Line = lines.by_name.get(name) or {"name": name, "spec": ROWS[name], "plan": asdict(plan), "status": "begun"}
    if "peak" not in line:
        length = plan.length if name != BASE else plan.short[-1][0]
        line["peak"], line["host"] = peaks(plan, line["spec"], length)
        line |= {"length": length, "fits": line["peak"] <= plan.limit}
        tell(f"{name}: {line['peak'] / MIB:.2f} MiB at {length} tokens, {plan.limit / MIB:.2f} are allowed")
        lines.put(line)
    return line


def run(line: Line, plan: Plan, lines: Lines, folder: Path) -> None:
    """One row, from where it is to its end."""
    name, spec = line["name"], line["spec"]
    state = State(folder, name.replace(", ", "_").replace(" ", "_"))
    if "trained_at" not in line:
        fit = plan.length if line["fits"] else _longest(plan, spec, 1)
        tell(f"{name}: the longest that fits is {fit} tokens")
        line |= {"trained_at": fit, "status": "running" if fit else "does not fit"}
        lines.put(line)
    fit = line["trained_at"]
    if "together" not in line and any(rows * min(length, fit) > fit for length, rows, _ in plan.stages_of(name)):
        line["together"] = _longest(plan, spec, 2)  # gradients wait beside all passes but the first
        line["status"] = "running" if line["together"] else "does not fit"
        tell(f"{name}: {line['together']} tokens in each of several passes")
        lines.put(line)
    if line["status"] == "running":
        train(line, spec, plan, lines, state)
        state.drop()


def _longest(plan: Plan, spec: str, passes: int) -> int:
    """0: not even the shortest fits."""
    found = longest(lambda tokens: peaks(plan, spec, tokens, passes)[0], plan.limit, plan.least, plan.length)
    return found or 0


def train(line: Line, spec: str, plan: Plan, lines: Lines, state: State) -> None:
    """All stages, or what is left of them; `line` is as it was saved last."""
    model, draws = model_of(plan), torch.Generator().manual_seed(plan.seed + 1)
    base, stages = state.path.with_name(WEIGHTS), plan.stages_of(line["name"])
    if line["name"] != BASE:
        model.load_state_dict(torch.load(base, weights_only=True))
    with trained_by(model, spec):
        steps = Steps(model, lambda step: plan.rate_at(line["name"], step), plan.limit)
        new = {"step": 0, "curve": [], "asked": [], "highest": 0, "seconds": 0.0, "grids": grids(model)}
        new["steps"] = sum(count for _, _, count in stages)
        line |= state.load(model, steps.optimizer, draws) or new
        line["plan"] = asdict(plan)
        for chain in chains_of(model):
            chain.begin_on(FixedPoint(line["grids"][chain.name]))
        began = time.monotonic() - line["seconds"]
        ends = list(accumulate(count for _, _, count in stages))
        while line["step"] < ends[-1]:
            length, rows, _ = stages[bisect_right(ends, line["step"])]
            at = min(length, line["trained_at"])
            together = line["trained_at"]
            if rows * at > together:
                together = line["together"]
                at = min(length, together)
            try:
                loss = steps.take(line["step"], divided(sample(rows, at, draws), together // at))
            except DoesNotFit as error:
                tell(f"{line['name']}, step {line['step'] + 1}: {error}")
                line |= {"status": "does not fit", "highest": error.peak}
                break
            line["step"] += 1
            line["curve"].append([line["step"], at, round(loss, 4)])
            last = line["step"] == ends[-1]
            if line["step"] in ends:
                right = ask(model, plan, plan.asked * (FINALLY if last else 1))
                line["asked"].append({"step": line["step"], "right": right})
                tell(f"{line['name']}, after {line['step']} steps: right {right}")
            if line["step"] in ends or line["step"] % plan.every == 0:
                line |= {"highest": max(line["highest"], steps.peak), "grids": grids(model)}
                line |= {"seconds": round(time.monotonic() - began, 1), "status": "done" if last else "running"}
                state.save(model, steps.optimizer, draws, line)
                lines.put(line)
                tell(f"{line['name']}, step {line['step']} of {ends[-1]}, {at} tokens: loss {loss:.3f}")
        if line["name"] == BASE and line["status"] == "done":
            torch.save(model.state_dict(), base)
        lines.put(line)


def divided(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Parts of at most so many rows, which pass one after the other."""
    pieces = {name: tensor.split(rows) for name, tensor in batch.items()}
    return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]


def ask(model: Any, plan: Plan, rows: int) -> dict[str, float]:
    """Share of right answers by length."""
    with eval_mode(model):
        return {str(n): round(accuracy(model, n, rows, HELD_OUT), 4) for n in plan.lengths}


def tell(text: str) -> None:
    """What is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main(plan: Plan = PLAN) -> None:
    """Run what is left, and print what is recorded."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {'; '.join(ROWS)}. Default: all")
    parser.add_argument("--json", action="store_true", help="print the recorded lines in the place of the table")
    parser.add_argument("--table", action="store_true", help="print what is recorded, and run nothing")
    parser.add_argument("--peaks", action="store_true", help="measure a step of every row, and train none")
    parser.add_argument("--record", type=Path, default=RECORD, help="a file of JSON lines that is read and added to")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where states are saved")
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}; choose of {'; '.join(ROWS)}")
    lines = Lines(given.record)
    if not given.table:
        with claimed(given.folder):
            if not (given.folder / WEIGHTS).is_file():  # another machine's record: its weights are not here
                lines.by_name.pop(BASE, None)
            left = [measured(name, plan, lines) for name in lines.left([BASE, *(given.rows or ROWS)])]
            for line in [] if given.peaks else left:
                if line["name"] != BASE and not (given.folder / WEIGHTS).is_file():
                    parser.error(f"{BASE} does not fit {plan.limit} bytes, so there is nothing to extend")
                run(line, plan, lines, given.folder)
    found = [lines.by_name[name] for name in ROWS if name in lines.by_name]
    print(json.dumps(found) if given.json else "\n".join(of_context(found)))


if __name__ == "__main__":
    main()
