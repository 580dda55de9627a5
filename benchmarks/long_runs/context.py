"""A context that training needs and hardly a method fits: python -m benchmarks.long_runs.context [--json] [ROW ...]

A Llama-shaped model learns to look keys up in `PLAN.length` tokens (`retrieval.py`), from random weights, within a
fixed memory: weights, gradients, AdamW's states and activations, by the allocator's own events (`limited.py`). Each
row is one way to train. What does not fit at the full length is said with its peak there, trains at the longest
length that fits, by the same number of steps and rows, and is asked at the full length like the others.

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

RECORD, FOLDER = Path("profiles/recorded/long_runs/context.jsonl"), Path("runs/long_context")
HELD_OUT = 10_000
"""Seed of the rows that are asked; training draws from the plan's own."""
FINALLY = 8
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What every row is given alike."""

    width: int = 64
    blocks: int = 24
    length: int = 4096
    limit: int = 32 * MIB
    """Bytes."""
    stages: tuple[tuple[int, int, int], ...] = ((32, 32, 340), (128, 8, 60), (512, 2, 60), (2048, 1, 40), (4096, 1, 40))
    """(length, rows in a step, steps): longer and longer."""
    rate: float = 2e-3
    warmup: int = 20
    least: int = 32
    """The shortest length, of which all that are tried are multiples."""
    asked: int = 8
    """Rows of each length that are asked after each stage; after the last one, `FINALLY` times as many."""
    every: int = 20
    """Steps between saves."""
    seed: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """That are asked."""
        return tuple(dict.fromkeys(length for length, _, _ in self.stages))


PLAN = Plan()
TILES = "tile=auto,loss=chunked"
NESTED = "nested checkpoint"
ROWS = {
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
        steps = Steps(model, plan.rate, plan.warmup, None)
        for number in range(2):
            steps.take(number, [sample(1, length, draws) for _ in range(passes)])
        found = steps.peak, placed.host.peak if placed.host else 0
    gc.collect()
    return found


def markdown(lines: list[Line]) -> Iterator[str]:
    """A table: what each way needs at the full length, how long it trains within the limit, and what it reaches."""
    if not lines:
        return
    plan = Plan(**lines[0]["plan"])
    total = sum(count for _, _, count in plan.stages)
    yield (
        f"| trained by | peak at {plan.length:,} tokens | on the host | longest within {plan.limit / MIB:g} MiB "
        f"| steps | highest peak in training | loss, last 10 steps | right at {plan.length:,} tokens |"
    )
    yield "|---|" + "---:|" * 7
    for line in lines:
        done, curve = line.get("step", 0), line.get("curve", [])
        cells = [f"{line['peak'] / MIB:.2f} MiB", f"{line['host'] / MIB:.1f} MiB" if line["host"] else "-"]
        cells += [f"{line['trained_at']:,}" if line.get("trained_at") else "-", f"{done} of {total}"]
        cells += [f"{line['highest'] / MIB:.2f} MiB" if line.get("highest") else "-"]
        cells += [f"{sum(row[2] for row in curve[-10:]) / len(curve[-10:]):.3f}" if curve else "-"]
        cells += [f"{line['asked'][-1]['right'][str(plan.length)]:.1%}" if line.get("asked") else "-"]
        yield f"| {line['name']} | {' | '.join(cells)} |"


def run(name: str, spec: str, plan: Plan, lines: Lines, folder: Path) -> None:
    """One row, from where it is to its end."""
    line: Line = lines.by_name.get(name) or {"name": name, "spec": spec, "plan": asdict(plan), "status": "begun"}
    state = State(folder, name.replace(", ", "_").replace(" ", "_"))
    if "peak" not in line:
        line["peak"], line["host"] = peaks(plan, spec, plan.length)
        line["fits"] = line["peak"] <= plan.limit
        tell(f"{name}: {line['peak'] / MIB:.2f} MiB at {plan.length} tokens, {plan.limit / MIB:.2f} are allowed")
        lines.put(line)
    if "trained_at" not in line:
        fit = plan.length if line["fits"] else _longest(plan, spec, 1)
        tell(f"{name}: the longest that fits is {fit} tokens")
        line |= {"trained_at": fit, "status": "running" if fit else "does not fit"}
        lines.put(line)
    fit = line["trained_at"]
    if "together" not in line and any(rows * min(length, fit) > fit for length, rows, _ in plan.stages):
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
    with trained_by(model, spec):
        steps = Steps(model, plan.rate, plan.warmup, plan.limit)
        new = {"step": 0, "curve": [], "asked": [], "highest": 0, "seconds": 0.0, "grids": grids(model)}
        line |= state.load(model, steps.optimizer, draws) or new
        for chain in chains_of(model):
            chain.begin_on(FixedPoint(line["grids"][chain.name]))
        began = time.monotonic() - line["seconds"]
        ends = list(accumulate(count for _, _, count in plan.stages))
        while line["step"] < ends[-1]:
            length, rows, _ = plan.stages[bisect_right(ends, line["step"])]
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
    parser.add_argument("--record", type=Path, default=RECORD, help="a file of JSON lines that is read and added to")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where states are saved")
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}; choose of {'; '.join(ROWS)}")
    lines = Lines(given.record)
    if not given.table:
        with claimed(given.folder):
            for name in lines.left(given.rows or list(ROWS)):
                run(name, ROWS[name], plan, lines, given.folder)
    found = list(lines.by_name.values())
    print(json.dumps(found) if given.json else "\n".join(markdown(found)))


if __name__ == "__main__":
    main()
