"""`autorev fit`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from autorev.cli.ending import COMMAND
from autorev.cli.group import COUNT, OUTPUT, main, steps_told, training_step, trust_remote_code, what_trains
from autorev.cli.report import show


class CountOrAuto(click.IntRange):
    """A whole number, or as many as fit."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`auto` stays."""
        return value if value == "auto" else super().convert(value, param, ctx)


SIZE = CountOrAuto(COUNT.min, COUNT.max)


@main.command(short_help="The fastest way to train MODEL in the memory there is.")
@click.argument("model", required=False)
@click.option(
    "--memory", metavar="SIZE", help="What a step may take: 24GiB, or +2GiB beside weights and optimizer state."
)
@click.option("--batch", type=SIZE, metavar="INT|auto", help="Samples per step, or as many as fit.  [default: 1]")
@click.option(
    "--sequence",
    "--seq",
    type=SIZE,
    metavar="INT|auto",
    help="Tokens per sample, or as many as fit.  [default: 2048, or the model's limit]",
)
@training_step
@click.option(
    "--device",
    default="h100-80gb",
    show_default=True,
    metavar="NAME",
    help="Device profile: its speed, and without --memory its memory.",
)
@click.option("--no-host", is_flag=True, help="Plan without the host's memory.")
@click.option("--from-scratch", is_flag=True, help="The model has no function yet that has to be kept.")
@click.option("--measure", is_flag=True, help="Run the plan here, and take a tighter one where it does not hold.")
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--html", type=OUTPUT, metavar="PATH", help="Also write a page, with time against memory.")
@click.pass_context
def fit(
    ctx: click.Context,
    /,
    model: str | None,
    no_host: bool,
    from_scratch: bool,
    as_json: bool,
    html: Path | None,
    **how: Any,
) -> None:
    """Find the fastest way to train MODEL in the memory there is.

    Plain training, checkpointing, offloading and reversible blocks are simulated, with and without tiles, a loss in
    chunks and the host's memory, and as many blocks are stored as fit. "Nothing is needed" is an answer, too.

    \b
    Examples:
      autorev fit llama-3.1-8b --lora-rank 16 --sequence 32768 --device rtx-4090
      autorev fit llama-3.1-8b --lora-rank 16 --sequence auto --device h100-80gb
      autorev fit --memory 2GiB --batch auto --html plan.html
    """
    how["trains"], how["lora_rank"] = what_trains(how["trains"], how["lora_rank"])
    from autorev.profiles import load_device

    load_device(how["device"])
    with steps_told() as tell, redirect_stdout(sys.stderr):
        tell("reading the model", 0.0)
        from autorev.planning.fit import fit as find

        plan = find(model, host=not no_host, pretrained=not from_scratch, progress=tell, **how)
    show([plan], ctx.meta[COMMAND], as_json, html)
    if plan.method is None:
        ctx.exit(1)
