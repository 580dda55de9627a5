"""The largest batch that a card trains, predicted, by depth: the form of the founding paper's table (arXiv 2512.02056).

    python -m benchmarks.largest_batch > benchmarks/largest_batch_predicted_DATE.md

A GPT-2 of width 512 (`gpt2-width512.json`) with 16, 32, 64 and 96 blocks, its weights frozen but for adapters of rank
8, 512 tokens a sample, bf16, a chunked loss: activations are what binds, where gradients and states of all weights
would hide every method. Each batch is that of a simulated step which fits, while one sample more does not; tokens a
second follow from the card's published figures, and are an upper bound. No GPU is needed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

from autorev.methods import Method
from autorev.models.resolve import resolve
from autorev.pipeline import prepare
from autorev.prediction.forecast import Forecaster
from autorev.prediction.frontier import explore

CONFIG = Path(__file__).with_name("gpt2-width512.json")
CARD, TOKENS, RANK = "rtx-4090", 512, 8
DEPTHS = (16, 32, 64, 96)
METHODS = (
    "plain",
    "plain:tile=auto",
    "checkpoint",
    "checkpoint:tile=auto",
    "offload:tile=auto",
    "momentum:k=3,keep_last=0",
    "momentum:k=3,keep_last=0,tile=auto",
    "momentum:k=3,keep_last=0,tile=auto,host=side_bits",
    "leapfrog:keep_last=0,tile=auto",
)
HEAD = """\
# The largest batch that a card trains, predicted

`python -m benchmarks.largest_batch`, {date}, {versions}.

GPT-2 of width 512, weights frozen, adapters of rank 8, samples of 512 tokens, bf16, chunked loss; {card} with 1 GiB
left to the framework. In brackets thousands of tokens a second by the card's published figures, an upper bound.
Offloading needs the host, as side bits on the host do; leapfrog changes a model's function: it is for training from
scratch.
"""


def forecaster_of(blocks: int) -> Forecaster:
    """The model with so many blocks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(CONFIG.read_text()) | {"n_layer": blocks}))
        how = {"batch": 8, "sequence": TOKENS, "lora_rank": RANK, "dtype": "bf16", "loss": "chunked"}
        return prepare(resolve(str(path)), device=CARD, **how)[1]


def cell(forecaster: Forecaster, spec: str) -> str:
    """The largest batch, and tokens a second there."""
    method = Method.parse(spec)
    here = forecaster.trace(method, 8, TOKENS)
    found = explore(forecaster, method, here, axes=("batch",))
    if "batch" not in found.limits:
        raise SystemExit(f"{spec}: {'; '.join(found.problems)}")
    batch = found.limits["batch"]
    if not batch:
        return "does not fit"
    seconds = forecaster.prediction(method, found.curves["batch"].at(batch)).step_seconds
    return f"{batch:,} ({batch * TOKENS / seconds / 1000:,.0f})"


def main() -> None:
    """Print the page."""
    warnings.filterwarnings("ignore")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(HEAD.format(date=date.today(), versions=versions, card=CARD))
    cells: dict[str, list[str]] = {spec: [] for spec in METHODS}
    for blocks in DEPTHS:
        forecaster = forecaster_of(blocks)
        for spec in METHODS:
            began = time.perf_counter()
            cells[spec].append(cell(forecaster, spec))
            print(f"{blocks} blocks, {spec}: {cells[spec][-1]}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(f"| method | {' | '.join(f'{blocks} blocks' for blocks in DEPTHS)} |\n|---{'|---:' * len(DEPTHS)}|")
    for spec, row in cells.items():
        print(f"| `{spec}` | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
