"""`autorev evaluate`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from autorev.cli.group import main, steps_told


@main.command(short_help="Loss of a model, and its distance from the original.")
@click.argument("model", default="smollm2")
@click.option("--original", metavar="MODEL", help="Compare with it: agreement on the next token, KL.")
@click.option("--text", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Text, or JSONL.")
@click.option("--tasks", metavar="NAME,NAME,...", help="Tasks of lm_eval, where it is installed and has their data.")
@click.option(
    "--task-folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Task files of your own."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="INT", help="Examples in each task.  [default: all]")
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
    click.echo(found.to_json() if as_json else str(found))
