"""`autorev evaluate`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import click

from autorev.cli.group import COUNT, FILE, FOLDER, base, main, steps_told, trust_remote_code
from autorev.cli.output import say


@main.command(short_help="Loss of a model, and its distance from the original.")
@click.argument("model", default="smollm2")
@click.option("--original", metavar="MODEL", help="Compare with it: agreement on the next token, KL.")
@click.option("--text", type=FILE, metavar="FILE", help="Text, or JSONL.")
@click.option("--tasks", metavar="NAME,NAME,...", help="Tasks of lm_eval, where it is installed and has their data.")
@click.option("--task-folder", type=FOLDER, metavar="DIR", help="Task files of your own.")
@click.option("--limit", type=COUNT, metavar="INT", help="Examples in each task.  [default: all]")
@base
@trust_remote_code
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def evaluate(model: str, tasks: str | None, as_json: bool, **options: Any) -> None:
    """Evaluate MODEL on held-out text: a run's folder, a folder of a converted model, or what `autorev analyze` takes.

    \b
    Examples:
      autorev evaluate runs/smollm2-momentum-k-3 --original smollm2
      autorev evaluate my_model --tasks arc_easy,piqa --limit 200
    """
    with steps_told() as tell, redirect_stdout(sys.stderr):
        tell("loading", 0.0)
        from autorev.finetuning.examine import examine

        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        found = examine(model, tasks=names, progress=tell, **options)
    say(found.to_json() if as_json else str(found))
